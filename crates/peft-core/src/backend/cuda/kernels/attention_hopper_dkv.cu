// Gradients of keys and values for Hopper, and what both backward kernels need of every row.
//
// dv = sum over queries of P^T dO and dk = sum of dS^T Q, over all query heads that share the key head, where
// P = exp(S - log_sum) and dS = P (dO V^T - delta). A warp group owns 64 keys: it computes the scores with keys along
// rows, so that P^T and dS^T are operands of the second products as they stand in registers.

// Queries of a tile, and tiles in flight.
#ifndef DKV_BLOCK
#define DKV_BLOCK 64
#endif
#ifndef DKV_STAGES
#define DKV_STAGES 4
#endif

#define DKV_KEYS_AT 0
#define DKV_VALUES_AT TILE_BYTES(ROWS)
#define DKV_QUERIES_AT (2 * TILE_BYTES(ROWS))
#define DKV_SLOPES_AT (DKV_QUERIES_AT + DKV_STAGES * TILE_BYTES(DKV_BLOCK))
#define DKV_STATISTICS_AT (DKV_SLOPES_AT + DKV_STAGES * TILE_BYTES(DKV_BLOCK))
#define DKV_BARRIERS_AT (DKV_STATISTICS_AT + DKV_STAGES * DKV_BLOCK * 8)

// statistics[head][row] = {log_sum log2(e), sum over the head of dout * out}: what P and dS are computed from. A block
// takes some rows of a head (blockIdx.y); several lanes a row.
extern "C" __global__ void attention_hopper_statistics(const u16* dout, u64 dout_stride, const u16* out, u64 out_stride,
                                                       const float* log_sum, u64 log_stride, u32 rows,
                                                       float2* statistics) {
    const u32 LANES = HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32;
    u32 lane = threadIdx.x % LANES, head = blockIdx.y, step = blockDim.x / LANES;
    u32 row = blockIdx.x * step + threadIdx.x / LANES;
    float sum = 0.0f;
    if (row < rows && lane < HEAD_DIM / 8) {
        uint4 a = *(const uint4*)(dout + row * dout_stride + head * HEAD_DIM + 8 * lane);
        uint4 b = *(const uint4*)(out + row * out_stride + head * HEAD_DIM + 8 * lane);
        const u32 x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            sum += __uint_as_float(x[i] << 16) * __uint_as_float(y[i] << 16);
            sum += __uint_as_float(x[i] & 0xffff0000u) * __uint_as_float(y[i] & 0xffff0000u);
        }
    }
#pragma unroll
    for (u32 offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (row < rows && lane == 0) {
        statistics[(u64)head * rows + row] = make_float2(log_sum[row * log_stride + head] * LOG2_E, sum);
    }
}

// One of four numbers behind an address; the compiler does not keep them longer than needed.
__device__ __forceinline__ float4 read_pairs(u32 address) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address) : "memory");
    return x;
}

// Takes from scores with keys along rows what queries do not see: the thread's row g is key `key`, columns are queries
// `first ..` of which `end` bounds the span; query i sees keys up to i + past, and `window` of them where that is set.
__device__ __forceinline__ void hide_turned(float (&s)[DKV_BLOCK / 2], int key, int first, int end, int past, int window) {
    int t = 2 * (threadIdx.x & 3);
    // Columns that see the key: from `low` on, below `high`.
    int low = key - past - first - t, until = end - first - t;
    int high = window ? min(until, low + window) : until, next = window ? min(until, low + 8 + window) : until;
#pragma unroll
    for (int n = 0; n < DKV_BLOCK / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int query = 8 * n + i;
            if (query < low || query >= high) s[4 * n + i] = MASKED;
            if (query < low + 8 || query >= next) s[4 * n + 2 + i] = MASKED;
        }
    }
}

// What a block works on: a tile of keys of a key head, and the queries that see it.
struct Keys {
    int key;       // first key of the tile, within the span or the prefix
    int valid;     // keys
    u32 head;      // key head
    int row;       // first key, row of its matrix
    int query_row; // row of the span's first query
    int begin;     // first tile of queries
    int blocks;    // tiles of queries
    int end;       // queries of the span end here
    int past;      // query i sees keys up to i + past
    int window;
};

__device__ __forceinline__ Keys keys_of(const Span* spans, const Tile* tiles, const Shape& shape, u32 item) {
    u32 heads = shape.heads / shape.group;
    Tile tile = tiles[item / heads];
    Span span = spans[tile.span];
    Keys keys;
    keys.head = item % heads;
    keys.key = (int)tile.first;
    keys.valid = min((int)ROWS, (int)(span.keys - tile.first));
    keys.row = (int)(span.key_start + tile.first);
    keys.query_row = (int)span.query_start;
    keys.past = (int)(span.keys - span.queries);
    keys.window = (int)shape.window;
    keys.end = (int)span.queries;
    keys.begin = max(0, keys.key - keys.past) / DKV_BLOCK;
    int last = keys.window ? min(keys.end, keys.key + keys.valid - 1 + keys.window - keys.past) : keys.end;
    keys.blocks = max(0, (last + DKV_BLOCK - 1) / DKV_BLOCK - keys.begin);
    return keys;
}

// As `keys_of`, for tiles of the prefix: an item is a tile of the prefix, a key head and a stretch of `chunk` queries.
__device__ __forceinline__ Keys prefix_keys_of(const Span* spans, const Tile* chunks, u32 chunk_count, u32 chunk,
                                               const Shape& shape, u32 item, u32& part) {
    u32 heads = shape.heads / shape.group;
    part = item / heads % chunk_count;
    Tile tile = chunks[part];
    Span span = spans[tile.span];
    Keys keys;
    keys.head = item % heads;
    keys.key = (int)(item / heads / chunk_count * ROWS);
    keys.valid = min((int)ROWS, (int)shape.prefix - keys.key);
    keys.row = keys.key;
    keys.query_row = (int)(span.query_start + tile.first);
    keys.end = (int)min(chunk, span.queries - tile.first);
    keys.past = 0x20000000;
    keys.window = 0;
    keys.begin = 0;
    keys.blocks = (keys.end + DKV_BLOCK - 1) / DKV_BLOCK;
    return keys;
}

struct DkvMaps {
    const TensorMap *q, *k, *v, *dout;
};

template <class Items, class Store>
__device__ __forceinline__ void keys_and_values(const DkvMaps& maps, const Shape& shape, const float2* statistics,
                                                u32 rows, u32 items, Items keys_at, Store store) {
    u32 shared = shared_start();
    u32 keys_full = shared + DKV_BARRIERS_AT, keys_empty = keys_full + 8, queries_full = keys_full + 16;
    u32 slopes_full = queries_full + 8 * DKV_STAGES, empty = slopes_full + 8 * DKV_STAGES;
    if (threadIdx.x == 0) {
        barrier_init(keys_full, 1);
        barrier_init(keys_empty, GROUPS);
        for (int i = 0; i < DKV_STAGES; i++) {
            barrier_init(queries_full + 8 * i, 33);
            barrier_init(slopes_full + 8 * i, 1);
            barrier_init(empty + 8 * i, GROUPS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    int group = (int)(threadIdx.x >> 7) - 1;
    if (group < 0) {
        give_registers<LOADER_REGISTERS>();
        if (threadIdx.x < 32) {
            u32 lane = threadIdx.x, stage = 0, parity = 0, round = 0;
            for (u32 item = blockIdx.x; item < items; item += gridDim.x, round++) {
                Keys keys = keys_at(item);
                if (lane == 0) {
                    int z = (int)keys.head * STRETCHES;
                    barrier_wait(keys_empty, (round & 1) ^ 1);
                    barrier_expect(keys_full, 2 * TILE_BYTES(ROWS));
                    load_box(shared + DKV_KEYS_AT, maps.k, keys_full, 0, keys.row, z);
                    load_box(shared + DKV_VALUES_AT, maps.v, keys_full, 0, keys.row, z);
                }
                for (u32 head = keys.head * shape.group; head < (keys.head + 1) * shape.group; head++) {
                    for (int block = 0; block < keys.blocks; block++) {
                        int row = keys.query_row + (keys.begin + block) * DKV_BLOCK;
                        barrier_wait(empty + 8 * stage, parity ^ 1);
                        u32 to = shared + DKV_STATISTICS_AT + stage * DKV_BLOCK * 8;
#pragma unroll
                        for (u32 i = 0; i < DKV_BLOCK / 32; i++) {
                            u32 from = min((u32)row + lane + 32 * i, rows - 1);
                            load_pair(to + 8 * (lane + 32 * i), statistics + (u64)head * rows + from);
                        }
                        async_arrive(queries_full + 8 * stage);
                        if (lane == 0) {
                            barrier_expect(queries_full + 8 * stage, TILE_BYTES(DKV_BLOCK));
                            load_box(shared + DKV_QUERIES_AT + stage * TILE_BYTES(DKV_BLOCK), maps.q,
                                     queries_full + 8 * stage, 0, row, (int)head * STRETCHES);
                            barrier_expect(slopes_full + 8 * stage, TILE_BYTES(DKV_BLOCK));
                            load_box(shared + DKV_SLOPES_AT + stage * TILE_BYTES(DKV_BLOCK), maps.dout,
                                     slopes_full + 8 * stage, 0, row, (int)head * STRETCHES);
                        }
                        if (++stage == DKV_STAGES) stage = 0, parity ^= 1;
                    }
                }
            }
            asm volatile("cp.async.wait_all;" ::: "memory");
        }
    } else {
        take_registers<WORKER_REGISTERS>();
        bool leader = (threadIdx.x & 127) == 0;
        u32 stage = 0, parity = 0, round = 0;
        u32 group_at = group * 64 * Swizzled<ROWS, STRETCH>::LINE;
        int own_row = group * 64 + (int)((threadIdx.x & 127) >> 5) * 16 + (int)((threadIdx.x & 31) >> 2);
        float scale = exponent_scale(shape);
        for (u32 item = blockIdx.x; item < items; item += gridDim.x, round++) {
            Keys keys = keys_at(item);
            float dk[HEAD_DIM / 2], dv[HEAD_DIM / 2];
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) dk[i] = dv[i] = 0.0f;
            float s[DKV_BLOCK / 2], d[DKV_BLOCK / 2];
            u32 p[DKV_BLOCK / 4], ds[DKV_BLOCK / 4];
            int count = keys.blocks * (int)shape.group, block = keys.begin;
#ifdef SOFT_CAP
            float slope[DKV_BLOCK / 2];
#endif
            auto begin_scores = [&]() {
                barrier_wait(queries_full + 8 * stage, parity);
                products_begin();
                product_straight<DKV_BLOCK, HEAD_DIM, ROWS, DKV_BLOCK, STRETCH>(
                    s, shared + DKV_KEYS_AT + group_at, shared + DKV_QUERIES_AT + stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto begin_slopes = [&]() {
                barrier_wait(slopes_full + 8 * stage, parity);
                product_straight<DKV_BLOCK, HEAD_DIM, ROWS, DKV_BLOCK, STRETCH>(
                    d, shared + DKV_VALUES_AT + group_at, shared + DKV_SLOPES_AT + stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto add_keys = [&](u32 at) {
                product_registers<HEAD_DIM, DKV_BLOCK, DKV_BLOCK, STRETCH>(
                    dk, ds, shared + DKV_QUERIES_AT + at * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto add_values = [&]() {
                pack_all(s, p);
                pin(p);
                pin(dv);
                products_begin();
                product_registers<HEAD_DIM, DKV_BLOCK, DKV_BLOCK, STRETCH>(
                    dv, p, shared + DKV_SLOPES_AT + stage * TILE_BYTES(DKV_BLOCK));
                products_commit();
            };
            auto look = [&]() {
                pin(s);
                cap_scores(s, shape);
#ifdef SOFT_CAP
#pragma unroll
                for (int j = 0; j < DKV_BLOCK / 2; j++) slope[j] = 1.0f - (s[j] / shape.cap) * (s[j] / shape.cap);
#endif
                int query = block * DKV_BLOCK, first_key = keys.key + group * 64;
                bool open = query + DKV_BLOCK <= keys.end && first_key + 63 <= query + keys.past &&
                            (!keys.window || query + DKV_BLOCK - 1 + keys.past - keys.window < first_key);
                if (!open) hide_turned(s, keys.key + own_row, query, keys.end, keys.past, keys.window);
                if (++block == keys.begin + keys.blocks) block = keys.begin;
                u32 pairs = shared + DKV_STATISTICS_AT + stage * DKV_BLOCK * 8 + 16 * (threadIdx.x & 3);
#pragma unroll
                for (int n = 0; n < DKV_BLOCK / 8; n++) {
                    float4 x = read_pairs(pairs + 64 * n);
                    s[4 * n] = exp2_fast(s[4 * n] * scale - x.x);
                    s[4 * n + 1] = exp2_fast(s[4 * n + 1] * scale - x.z);
                    s[4 * n + 2] = exp2_fast(s[4 * n + 2] * scale - x.x);
                    s[4 * n + 3] = exp2_fast(s[4 * n + 3] * scale - x.z);
                }
            };
            auto slope_down = [&]() {
                pin(d);
                u32 pairs = shared + DKV_STATISTICS_AT + stage * DKV_BLOCK * 8 + 16 * (threadIdx.x & 3);
#pragma unroll
                for (int n = 0; n < DKV_BLOCK / 8; n++) {
                    float4 x = read_pairs(pairs + 64 * n);
                    d[4 * n] = s[4 * n] * (d[4 * n] - x.y);
                    d[4 * n + 1] = s[4 * n + 1] * (d[4 * n + 1] - x.w);
                    d[4 * n + 2] = s[4 * n + 2] * (d[4 * n + 2] - x.y);
                    d[4 * n + 3] = s[4 * n + 3] * (d[4 * n + 3] - x.w);
                }
#ifdef SOFT_CAP
#pragma unroll
                for (int j = 0; j < DKV_BLOCK / 2; j++) d[j] *= slope[j];
#endif
            };
            barrier_wait(keys_full, round & 1);
            if (count > 0) {
                begin_scores();
                begin_slopes();
                products_wait<1>();
                look();
                add_values();
                products_wait<1>();
                slope_down();
                products_wait<0>();
                pin(dv);
                pin(p);
                pack_all(d, ds);
                for (int i = 1; i < count; i++) {
                    u32 before = stage;
                    if (++stage == DKV_STAGES) stage = 0, parity ^= 1;
                    pin(ds);
                    pin(dk);
                    begin_scores();
                    add_keys(before);
                    begin_slopes();
                    products_wait<2>();
                    look();
                    products_wait<1>();
                    pin(dk);
                    pin(ds);
                    if (leader) barrier_arrive(empty + 8 * before);
                    add_values();
                    products_wait<1>();
                    slope_down();
                    products_wait<0>();
                    pin(dv);
                    pin(p);
                    pack_all(d, ds);
                }
                pin(ds);
                pin(dk);
                products_begin();
                add_keys(stage);
                products_wait<0>();
                pin(dk);
                if (leader) barrier_arrive(empty + 8 * stage);
                if (++stage == DKV_STAGES) stage = 0, parity ^= 1;
            }
            if (leader) barrier_arrive(keys_empty);
            store(keys, group, own_row, dk, dv, item);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_hopper_dkv(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                     const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap dout_map,
                     const Span* spans, const Tile* tiles, u32 items, Shape shape, const float2* statistics, u32 rows,
                     Target dk, Target dv) {
    DkvMaps maps = {&q_map, &k_map, &v_map, &dout_map};
    keys_and_values(
        maps, shape, statistics, rows, items, [&](u32 item) { return keys_of(spans, tiles, shape, item); },
        [&](const Keys& keys, int group, int, float (&dk_sums)[HEAD_DIM / 2], float (&dv_sums)[HEAD_DIM / 2], u32) {
            u64 row = (u64)keys.row + group * 64;
            int valid = keys.valid - group * 64;
            store_rows(dk_sums, dk.data + row * dk.stride + keys.head * HEAD_DIM, dk.stride, valid, shape.scale,
                       shape.scale);
            store_rows(dv_sums, dv.data + row * dv.stride + keys.head * HEAD_DIM, dv.stride, valid, 1.0f, 1.0f);
        });
}

// The prefix's keys are seen by all queries: every stretch of queries makes a sum of its own,
// parts[stretch][dk, dv][row][column], and the second kernel adds them in order.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_hopper_prefix(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap prefix_k_map,
                        const __grid_constant__ TensorMap prefix_v_map, const __grid_constant__ TensorMap dout_map,
                        const Span* spans, const Tile* chunks, u32 chunk_count, u32 chunk, u32 items, Shape shape,
                        const float2* statistics, u32 rows, float* parts) {
    DkvMaps maps = {&q_map, &prefix_k_map, &prefix_v_map, &dout_map};
    u32 columns = shape.heads / shape.group * HEAD_DIM;
    keys_and_values(
        maps, shape, statistics, rows, items,
        [&](u32 item) {
            u32 part;
            return prefix_keys_of(spans, chunks, chunk_count, chunk, shape, item, part);
        },
        [&](const Keys& keys, int, int own_row, float (&dk_sums)[HEAD_DIM / 2], float (&dv_sums)[HEAD_DIM / 2], u32 item) {
            u32 part;
            prefix_keys_of(spans, chunks, chunk_count, chunk, shape, item, part);
            u64 size = (u64)shape.prefix * columns;
            float* to = parts + 2 * part * size + (u64)(keys.key + own_row) * columns + keys.head * HEAD_DIM +
                        2 * (threadIdx.x & 3);
#pragma unroll
            for (int n = 0; n < HEAD_DIM / 8; n++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    if (own_row + 8 * r >= keys.valid) continue;
                    float* at = to + 8 * r * (u64)columns + 8 * n;
                    *(float2*)at = make_float2(dk_sums[4 * n + 2 * r] * shape.scale, dk_sums[4 * n + 2 * r + 1] * shape.scale);
                    *(float2*)(at + size) = make_float2(dv_sums[4 * n + 2 * r], dv_sums[4 * n + 2 * r + 1]);
                }
            }
        });
}

// dk and dv of the prefix: adds the parts, in order, to what is there.
extern "C" __global__ void attention_hopper_prefix_sum(const float* parts, u32 part_count, u32 rows, u32 columns,
                                                       float* dk, u64 dk_stride, float* dv, u64 dv_stride) {
    u32 size = rows * columns;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < 2 * size; i += gridDim.x * blockDim.x) {
        float sum = 0.0f;
        for (u32 part = 0; part < part_count; part++) sum += parts[(u64)part * 2 * size + i];
        u32 at = i % size, row = at / columns, column = at % columns;
        if (i < size) dk[row * dk_stride + column] += sum;
        else dv[row * dv_stride + column] += sum;
    }
}
