// Gradient of queries for Hopper: dq = scale times the sum over keys of dS K, with dS = P (dO V^T - delta). The walk is
// the forward kernel's; P comes from the statistics that `attention_hopper_statistics` wrote.

// Keys of a tile, and tiles in flight.
#ifndef DQ_BLOCK
#define DQ_BLOCK (HEAD_DIM > 128 ? 32 : 64)
#endif
#ifndef DQ_STAGES
#define DQ_STAGES (HEAD_DIM > 128 ? 2 : 4)
#endif

#define DQ_QUERIES_AT 0
#define DQ_SLOPES_AT TILE_BYTES(ROWS)
#define DQ_KEYS_AT (2 * TILE_BYTES(ROWS))
#define DQ_VALUES_AT (DQ_KEYS_AT + DQ_STAGES * TILE_BYTES(DQ_BLOCK))
#define DQ_TOLD_AT (DQ_VALUES_AT + DQ_STAGES * TILE_BYTES(DQ_BLOCK))
#define DQ_BARRIERS_AT (DQ_TOLD_AT + TOLD_BYTES)

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_hopper_dq(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                    const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                    const Span* spans, const Tile* tiles, u32 items, u32* counter, Shape shape, const float2* statistics, u32 rows,
                    Target dq) {
    u32 shared = shared_start();
    u32 queries_full = shared + DQ_BARRIERS_AT, queries_empty = queries_full + 8, keys_full = queries_full + 16;
    u32 values_full = keys_full + 8 * DQ_STAGES, keys_empty = values_full + 8 * DQ_STAGES;
    u32 values_empty = keys_empty + 8 * DQ_STAGES;
    if (threadIdx.x == 0) {
        barrier_init(queries_full, 1);
        barrier_init(queries_empty, ARRIVALS);
        for (int i = 0; i < DQ_STAGES; i++) {
            barrier_init(keys_full + 8 * i, 1);
            barrier_init(values_full + 8 * i, 1);
            barrier_init(keys_empty + 8 * i, ARRIVALS);
            barrier_init(values_empty + 8 * i, ARRIVALS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int group = (int)(threadIdx.x >> 7) - 1;
    if (group < 0) {
        give_registers<LOADER_REGISTERS>();
        if (threadIdx.x == 0) {
            u32 stage = 0, parity = 0, round = 0;
            for (u32 item = blockIdx.x;; round++) {
                barrier_wait(queries_empty, (round & 1) ^ 1);
                if (item >= items) {
                    told<Range<DQ_BLOCK>>(shared, DQ_TOLD_AT)->tiles = 0;
                    barrier_arrive(queries_full);
                    break;
                }
                Range<DQ_BLOCK> range(spans, tiles, shape, item);
                *told<Range<DQ_BLOCK>>(shared, DQ_TOLD_AT) = range;
                int z = (int)range.head * STRETCHES;
                barrier_expect(queries_full, 2 * TILE_BYTES(ROWS));
                load_box(shared + DQ_QUERIES_AT, &q_map, queries_full, 0, (int)range.row, z);
                load_box(shared + DQ_SLOPES_AT, &dout_map, queries_full, 0, (int)range.row, z);
                z = (int)(range.head / shape.group) * STRETCHES;
                for (int i = 0; i < range.tiles; i++) {
                    int row = (int)range.key_row + range.first_key(i);
                    if (i + 1 == range.tiles) item = take_item(counter, items);
                    barrier_wait(keys_empty + 8 * stage, parity ^ 1);
                    barrier_expect(keys_full + 8 * stage, TILE_BYTES(DQ_BLOCK));
                    load_box(shared + DQ_KEYS_AT + stage * TILE_BYTES(DQ_BLOCK), &k_map, keys_full + 8 * stage, 0, row, z);
                    barrier_wait(values_empty + 8 * stage, parity ^ 1);
                    barrier_expect(values_full + 8 * stage, TILE_BYTES(DQ_BLOCK));
                    load_box(shared + DQ_VALUES_AT + stage * TILE_BYTES(DQ_BLOCK), &v_map, values_full + 8 * stage, 0, row, z);
                    if (++stage == DQ_STAGES) stage = 0, parity ^= 1;
                }
            }
        }
    } else {
        take_registers<WORKER_REGISTERS>();
        bool leader = (threadIdx.x & 31) == 0;
        u32 stage = 0, parity = 0, round = 0;
        u32 group_at = group * 64 * Swizzled<ROWS, STRETCH>::LINE;
        int own_row = group * 64 + (int)((threadIdx.x & 127) >> 5) * 16 + (int)((threadIdx.x & 31) >> 2);
        float scale = exponent_scale(shape);
        for (;; round++) {
            barrier_wait(queries_full, round & 1);
            Range<DQ_BLOCK> range = *told<Range<DQ_BLOCK>>(shared, DQ_TOLD_AT);
            if (range.tiles == 0) break;
            const float2* of_rows = statistics + (u64)range.head * rows;
            float2 low = of_rows[min(range.row + own_row, rows - 1)], high = of_rows[min(range.row + own_row + 8, rows - 1)];
            float acc[HEAD_DIM / 2];
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) acc[i] = 0.0f;
            float s[DQ_BLOCK / 2], d[DQ_BLOCK / 2];
            u32 ds[DQ_BLOCK / 4];
#ifdef SOFT_CAP
            float slope[DQ_BLOCK / 2];
#endif
            auto begin_scores = [&]() {
                barrier_wait(keys_full + 8 * stage, parity);
                products_begin();
                product_straight<DQ_BLOCK, HEAD_DIM, ROWS, DQ_BLOCK, STRETCH>(
                    s, shared + DQ_QUERIES_AT + group_at, shared + DQ_KEYS_AT + stage * TILE_BYTES(DQ_BLOCK));
                products_commit();
                barrier_wait(values_full + 8 * stage, parity);
                product_straight<DQ_BLOCK, HEAD_DIM, ROWS, DQ_BLOCK, STRETCH>(
                    d, shared + DQ_SLOPES_AT + group_at, shared + DQ_VALUES_AT + stage * TILE_BYTES(DQ_BLOCK));
                products_commit();
            };
            auto add_product = [&](u32 at) {
                product_registers<HEAD_DIM, DQ_BLOCK, DQ_BLOCK, STRETCH>(acc, ds,
                                                                       shared + DQ_KEYS_AT + at * TILE_BYTES(DQ_BLOCK));
                products_commit();
            };
            auto look = [&](int i) {
                pin(s);
                cap_scores(s, shape);
#ifdef SOFT_CAP
#pragma unroll
                for (int j = 0; j < DQ_BLOCK / 2; j++) slope[j] = 1.0f - s[j] * s[j];
#endif
                hide_tile<DQ_BLOCK>(s, range, shape, i, group * 64, own_row);
#pragma unroll
                for (int n = 0; n < DQ_BLOCK / 8; n++) {
                    s[4 * n] = exp2_fast(s[4 * n] * scale - low.x);
                    s[4 * n + 1] = exp2_fast(s[4 * n + 1] * scale - low.x);
                    s[4 * n + 2] = exp2_fast(s[4 * n + 2] * scale - high.x);
                    s[4 * n + 3] = exp2_fast(s[4 * n + 3] * scale - high.x);
                }
            };
            auto slope_down = [&]() {
                pin(d);
                if (leader) barrier_arrive(values_empty + 8 * stage);
#pragma unroll
                for (int n = 0; n < DQ_BLOCK / 8; n++) {
                    d[4 * n] = s[4 * n] * (d[4 * n] - low.y);
                    d[4 * n + 1] = s[4 * n + 1] * (d[4 * n + 1] - low.y);
                    d[4 * n + 2] = s[4 * n + 2] * (d[4 * n + 2] - high.y);
                    d[4 * n + 3] = s[4 * n + 3] * (d[4 * n + 3] - high.y);
                }
#ifdef SOFT_CAP
#pragma unroll
                for (int j = 0; j < DQ_BLOCK / 2; j++) d[j] *= slope[j];
#endif
            };
            begin_scores();
            products_wait<1>();
            look(0);
            products_wait<0>();
            slope_down();
            pack_all(d, ds);
            for (int i = 1; i < range.tiles; i++) {
                u32 before = stage;
                if (++stage == DQ_STAGES) stage = 0, parity ^= 1;
                pin(ds);
                pin(acc);
                begin_scores();
                add_product(before);
                products_wait<2>();
                look(i);
                products_wait<1>();
                slope_down();
                products_wait<0>();
                pin(acc);
                pin(ds);
                if (leader) barrier_arrive(keys_empty + 8 * before);
                pack_all(d, ds);
            }
            pin(ds);
            pin(acc);
            products_begin();
            add_product(stage);
            products_wait<0>();
            pin(acc);
            u32 before = stage;
            if (++stage == DQ_STAGES) stage = 0, parity ^= 1;
            if (leader) {
                barrier_arrive(keys_empty + 8 * before);
                barrier_arrive(queries_empty);
            }
            store_rows(acc, dq.data + ((u64)range.row + group * 64) * dq.stride + range.head * HEAD_DIM, dq.stride,
                       (int)range.valid - group * 64, shape.scale, shape.scale);
        }
    }
}
