// Causal attention over packed spans for Hopper (sm_90a), forward: bf16 in and out, f32 scores, sums and statistics.
//
// The recurrence is that of FlashAttention (Dao et al., arXiv 2205.14135); that products of one tile run while the
// exponentials of another are taken, that one warp group does nothing but load, and that two groups take turns, is
// from FlashAttention-3 (Shah et al., arXiv 2407.08608). No atomics: the same inputs give the same bits.
//
// Blocks take items, a tile of rows of one head each, from a list, span by span, longest first. One thread of its
// first warp group starts copies; GROUPS warp groups compute, 64 rows each.

// Keys of a tile, and tiles in flight.
#ifndef BLOCK
#define BLOCK (HEAD_DIM > 128 ? 64 : 128)
#endif
#ifndef STAGES
#define STAGES 2
#endif

// What stands in shared memory, in bytes from its start.
#define QUERIES_AT 0
#define KEYS_AT TILE_BYTES(ROWS)
#define VALUES_AT (KEYS_AT + STAGES * TILE_BYTES(BLOCK))
#define TOLD_AT (VALUES_AT + STAGES * TILE_BYTES(BLOCK))
#define BARRIERS_AT (TOLD_AT + TOLD_BYTES)

// How far above the number they are taken against scores may lie, as a power of two, before earlier sums are made
// smaller: sums and probabilities keep their relative precision until then, and most tiles shrink nothing.
#define HEADROOM 8.0f

// Exponentials of a tile of scores in place, against a number near the largest so far. Returns whether that number
// changed in any row of the warp; earlier sums are to be multiplied by `shrink` then.
__device__ __forceinline__ bool soften(float (&s)[BLOCK / 2], float scale, float (&largest)[2], float (&sum)[2],
                                       float (&shrink)[2]) {
    float highest[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
        highest[r] = s[2 * r];
#pragma unroll
        for (int n = 0; n < BLOCK / 8; n++) highest[r] = fmaxf(highest[r], fmaxf(s[4 * n + 2 * r], s[4 * n + 2 * r + 1]));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 1));
        highest[r] = fmaxf(highest[r], __shfl_xor_sync(0xffffffffu, highest[r], 2));
    }
    bool low = (highest[0] - largest[0]) * scale > HEADROOM, high = (highest[1] - largest[1]) * scale > HEADROOM;
    bool changed = __any_sync(0xffffffffu, low || high);
    if (changed) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
            highest[r] = fmaxf(highest[r], largest[r]);
            shrink[r] = exp2_fast((largest[r] - highest[r]) * scale);
            largest[r] = highest[r];
            sum[r] *= shrink[r];
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float base = largest[r] * scale, total = 0.0f;
#pragma unroll
        for (int n = 0; n < BLOCK / 8; n++) {
            s[4 * n + 2 * r] = exp2_fast(s[4 * n + 2 * r] * scale - base);
            s[4 * n + 2 * r + 1] = exp2_fast(s[4 * n + 2 * r + 1] * scale - base);
            total += s[4 * n + 2 * r] + s[4 * n + 2 * r + 1];
        }
        sum[r] += total;
    }
    return changed;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_hopper_forward(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                         const __grid_constant__ TensorMap v_map, const Span* spans, const Tile* tiles, u32 items,
                         u32* counter, Shape shape, Target out, float* log_sum, u64 log_stride) {
    u32 shared = shared_start();
    u32 queries_full = shared + BARRIERS_AT, queries_empty = queries_full + 8, keys_full = queries_full + 16;
    u32 keys_empty = keys_full + 8 * STAGES, values_full = keys_empty + 8 * STAGES;
    u32 values_empty = values_full + 8 * STAGES;
    if (threadIdx.x == 0) {
        barrier_init(queries_full, 1);
        barrier_init(queries_empty, ARRIVALS);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(keys_full + 8 * i, 1);
            barrier_init(keys_empty + 8 * i, ARRIVALS);
            barrier_init(values_full + 8 * i, 1);
            barrier_init(values_empty + 8 * i, ARRIVALS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int group = (int)(threadIdx.x >> 7) - 1;
    if (group < 0) {
        give_registers<LOADER_REGISTERS>();
        if (threadIdx.x == 0) {
            prefetch_map(&q_map);
            prefetch_map(&k_map);
            prefetch_map(&v_map);
            u32 stage = 0, parity = 0, round = 0;
            for (u32 item = blockIdx.x;; round++) {
                barrier_wait(queries_empty, (round & 1) ^ 1);
                if (item >= items) {
                    told<Range<BLOCK>>(shared, TOLD_AT)->tiles = 0;
                    barrier_arrive(queries_full);
                    break;
                }
                Range<BLOCK> range(spans, tiles, shape, item);
                *told<Range<BLOCK>>(shared, TOLD_AT) = range;
                barrier_expect(queries_full, TILE_BYTES(ROWS));
                load_box(shared + QUERIES_AT, &q_map, queries_full, 0, (int)range.row, (int)range.head * STRETCHES);
                int z = (int)(range.head / shape.group) * STRETCHES;
                for (int i = 0; i < range.tiles; i++) {
                    int row = (int)range.key_row + range.first_key(i);
                    if (i + 1 == range.tiles) item = take_item(counter, items);
                    barrier_wait(keys_empty + 8 * stage, parity ^ 1);
                    barrier_expect(keys_full + 8 * stage, TILE_BYTES(BLOCK));
                    load_box(shared + KEYS_AT + stage * TILE_BYTES(BLOCK), &k_map, keys_full + 8 * stage, 0, row, z);
                    barrier_wait(values_empty + 8 * stage, parity ^ 1);
                    barrier_expect(values_full + 8 * stage, TILE_BYTES(BLOCK));
                    load_box(shared + VALUES_AT + stage * TILE_BYTES(BLOCK), &v_map, values_full + 8 * stage, 0, row, z);
                    if (++stage == STAGES) stage = 0, parity ^= 1;
                }
            }
        }
    } else {
        take_registers<WORKER_REGISTERS>();
        bool leader = (threadIdx.x & 31) == 0;
        u32 stage = 0, parity = 0, round = 0;
        u32 queries = shared + QUERIES_AT + group * 64 * Swizzled<ROWS, STRETCH>::LINE;
        int own_row = group * 64 + (int)((threadIdx.x & 127) >> 5) * 16 + (int)((threadIdx.x & 31) >> 2);
        float scale = exponent_scale(shape);
#ifdef PING_PONG
        // The groups take turns at starting products: number 0 begins.
        if (group == GROUPS - 1) named_arrive(1, 256);
        u32 own_turn = 1 + group, next_turn = 1 + (group + 1) % GROUPS;
#endif
        for (;; round++) {
            barrier_wait(queries_full, round & 1);
            Range<BLOCK> range = *told<Range<BLOCK>>(shared, TOLD_AT);
            if (range.tiles == 0) break;
            float largest[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f}, shrink[2];
            float acc[HEAD_DIM / 2];
            float s[BLOCK / 2];
            u32 p[BLOCK / 4];
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) acc[i] = 0.0f;
            auto look = [&](int i) {
                cap_scores(s, shape);
                hide_tile<BLOCK>(s, range, shape, i, group * 64, own_row);
                return soften(s, scale, largest, sum, shrink);
            };
            barrier_wait(keys_full + 8 * stage, parity);
            products_begin();
            product_straight<BLOCK, HEAD_DIM, ROWS, BLOCK, STRETCH>(s, queries, shared + KEYS_AT + stage * TILE_BYTES(BLOCK));
            products_commit();
            products_wait<0>();
            pin(s);
            if (leader) barrier_arrive(keys_empty + 8 * stage);
            look(0);
            pack_all(s, p);
            for (int i = 1; i < range.tiles; i++) {
                u32 before = stage, before_parity = parity;
                if (++stage == STAGES) stage = 0, parity ^= 1;
                barrier_wait(keys_full + 8 * stage, parity);
#ifdef PING_PONG
                named_sync(own_turn, 256);
#endif
                pin(p);
                pin(acc);
                products_begin();
                product_straight<BLOCK, HEAD_DIM, ROWS, BLOCK, STRETCH>(s, queries,
                                                                       shared + KEYS_AT + stage * TILE_BYTES(BLOCK));
                products_commit();
                barrier_wait(values_full + 8 * before, before_parity);
                product_registers<HEAD_DIM, BLOCK, BLOCK, STRETCH>(acc, p,
                                                                   shared + VALUES_AT + before * TILE_BYTES(BLOCK));
                products_commit();
#ifdef PING_PONG
                named_arrive(next_turn, 256);
#endif
                products_wait<1>();
                pin(s);
                if (leader) barrier_arrive(keys_empty + 8 * stage);
                bool changed = look(i);
                products_wait<0>();
                pin(acc);
                pin(p);
                if (leader) barrier_arrive(values_empty + 8 * before);
                if (changed) {
#pragma unroll
                    for (int n = 0; n < HEAD_DIM / 8; n++) {
                        acc[4 * n] *= shrink[0], acc[4 * n + 1] *= shrink[0];
                        acc[4 * n + 2] *= shrink[1], acc[4 * n + 3] *= shrink[1];
                    }
                }
                pack_all(s, p);
            }
            if (leader) barrier_arrive(queries_empty);
            barrier_wait(values_full + 8 * stage, parity);
            pin(p);
            pin(acc);
            products_begin();
            product_registers<HEAD_DIM, BLOCK, BLOCK, STRETCH>(acc, p, shared + VALUES_AT + stage * TILE_BYTES(BLOCK));
            products_commit();
#pragma unroll
            for (int r = 0; r < 2; r++) {
                sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 1);
                sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], 2);
            }
            products_wait<0>();
            pin(acc);
            if (leader) barrier_arrive(values_empty + 8 * stage);
            if (++stage == STAGES) stage = 0, parity ^= 1;
            int valid = (int)range.valid - group * 64;
            u64 row = (u64)range.row + group * 64;
            store_rows(acc, out.data + row * out.stride + range.head * HEAD_DIM, out.stride, valid, 1.0f / sum[0],
                       1.0f / sum[1]);
            if ((threadIdx.x & 3) == 0) {
                float natural = scale / LOG2_E;
                float* to = log_sum + (u64)range.row * log_stride + range.head;
                if (own_row < (int)range.valid) to[own_row * log_stride] = largest[0] * natural + logf(sum[0]);
                if (own_row + 8 < (int)range.valid) to[(own_row + 8) * log_stride] = largest[1] * natural + logf(sum[1]);
            }
        }
    }
}
