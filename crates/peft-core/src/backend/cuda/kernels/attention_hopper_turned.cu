// Gradients of keys and values for Hopper: what its two kernels share, and what the backward kernels need of every row.
//
// dv = sum over queries of P^T dO and dk = sum of dS^T Q, over all query heads that share the key head, where
// P = exp(S - log_sum) and dS = P (dO V^T - delta). Scores are computed with keys along rows, so that P^T and dS^T are
// operands of the second products as they stand in registers.

// Keys of a block, queries of a tile, and tiles in flight.
#define KEY_ROWS (HEAD_DIM > 128 ? 64 : ROWS)
#ifndef DKV_BLOCK
#ifdef SOFT_CAP
// The slopes of the cap take registers, too.
#define DKV_BLOCK 32
#else
#define DKV_BLOCK 64
#endif
#endif
#ifndef DKV_STAGES
#define DKV_STAGES (HEAD_DIM > 128 ? 2 : 4)
#endif

#define DKV_KEYS_AT 0
#define DKV_VALUES_AT TILE_BYTES(KEY_ROWS)
#define DKV_QUERIES_AT (2 * TILE_BYTES(KEY_ROWS))
#define DKV_SLOPES_AT (DKV_QUERIES_AT + DKV_STAGES * TILE_BYTES(DKV_BLOCK))
#define DKV_STATISTICS_AT (DKV_SLOPES_AT + DKV_STAGES * TILE_BYTES(DKV_BLOCK))
#define DKV_TOLD_AT (DKV_STATISTICS_AT + DKV_STAGES * DKV_BLOCK * 8)
#define DKV_BARRIERS_AT (DKV_TOLD_AT + TOLD_BYTES)

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

// Two statistics, read anew each time: to keep them would cost registers.
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
    int key;       // first key of the tile, within the span
    int left;      // 0 where there is no item left
    int valid;     // keys; none, or fewer, where a part of a tile lies past the end
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
    // Tiles are listed by ROWS keys; a block may take a part of one.
    u32 heads = shape.heads / shape.group, parts = ROWS / KEY_ROWS;
    Tile tile = tiles[item / heads / parts];
    tile.first += item / heads % parts * KEY_ROWS;
    Span span = spans[tile.span];
    Keys keys;
    keys.left = 1;
    keys.head = item % heads;
    keys.key = (int)tile.first;
    keys.valid = min(KEY_ROWS, (int)span.keys - (int)tile.first);
    keys.row = (int)(span.key_start + tile.first);
    keys.query_row = (int)span.query_start;
    keys.past = (int)(span.keys - span.queries);
    keys.window = (int)shape.window;
    keys.end = (int)span.queries;
    keys.begin = max(0, keys.key - keys.past) / DKV_BLOCK;
    int last = keys.window ? min(keys.end, keys.key + keys.valid - 1 + keys.window - keys.past) : keys.end;
    keys.blocks = keys.valid > 0 ? max(0, (last + DKV_BLOCK - 1) / DKV_BLOCK - keys.begin) : 0;
    return keys;
}

struct DkvBarriers {
    u32 keys_full, keys_empty, queries_full, slopes_full, empty;

    __device__ __forceinline__ DkvBarriers(u32 shared) {
        keys_full = shared + DKV_BARRIERS_AT, keys_empty = keys_full + 8, queries_full = keys_full + 16;
        slopes_full = queries_full + 8 * DKV_STAGES, empty = slopes_full + 8 * DKV_STAGES;
    }

    __device__ __forceinline__ void init() const {
        barrier_init(keys_full, 1);
        barrier_init(keys_empty, ARRIVALS);
        for (int i = 0; i < DKV_STAGES; i++) {
            // A warp's copies of statistics, and the thread that starts the copy engine.
            barrier_init(queries_full + 8 * i, 33);
            barrier_init(slopes_full + 8 * i, 1);
            barrier_init(empty + 8 * i, ARRIVALS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
};

// A place in the ring of tiles.
struct Place {
    u32 stage;
    u32 parity;
    __device__ __forceinline__ void next() {
        if (++stage == DKV_STAGES) stage = 0, parity ^= 1;
    }
};

// What the loading warp does: keys and values of an item once, then its queries, tile by tile and head by head.
__device__ __forceinline__ void load_for_keys(u32 shared, const DkvBarriers& at, const TensorMap* q_map,
                                              const TensorMap* k_map, const TensorMap* v_map, const TensorMap* dout_map,
                                              const Span* spans, const Tile* tiles, u32 items, u32* counter,
                                              const Shape& shape, const float2* statistics, u32 rows) {
    u32 lane = threadIdx.x, round = 0;
    Place place = {0, 0};
    for (u32 item = blockIdx.x;; round++) {
        barrier_wait(at.keys_empty, (round & 1) ^ 1);
        if (item >= items) {
            if (lane == 0) {
                told<Keys>(shared, DKV_TOLD_AT)->left = 0;
                barrier_arrive(at.keys_full);
            }
            break;
        }
        Keys keys = keys_of(spans, tiles, shape, item);
        if (lane == 0) {
            int z = (int)keys.head * STRETCHES;
            *told<Keys>(shared, DKV_TOLD_AT) = keys;
            barrier_expect(at.keys_full, 2 * TILE_BYTES(KEY_ROWS));
            load_box(shared + DKV_KEYS_AT, k_map, at.keys_full, 0, keys.row, z);
            load_box(shared + DKV_VALUES_AT, v_map, at.keys_full, 0, keys.row, z);
        }
        for (u32 head = keys.head * shape.group; head < (keys.head + 1) * shape.group; head++) {
            for (int block = 0; block < keys.blocks; block++, place.next()) {
                int row = keys.query_row + (keys.begin + block) * DKV_BLOCK;
                u32 full = at.queries_full + 8 * place.stage;
                barrier_wait(at.empty + 8 * place.stage, place.parity ^ 1);
                u32 to = shared + DKV_STATISTICS_AT + place.stage * DKV_BLOCK * 8;
#pragma unroll
                for (u32 i = 0; i < DKV_BLOCK / 32; i++) {
                    u32 from = min((u32)row + lane + 32 * i, rows - 1);
                    load_pair(to + 8 * (lane + 32 * i), statistics + (u64)head * rows + from);
                }
                async_arrive(full);
                if (lane == 0) {
                    u32 offset = place.stage * TILE_BYTES(DKV_BLOCK);
                    barrier_expect(full, TILE_BYTES(DKV_BLOCK));
                    load_box(shared + DKV_QUERIES_AT + offset, q_map, full, 0, row, (int)head * STRETCHES);
                    full = at.slopes_full + 8 * place.stage;
                    barrier_expect(full, TILE_BYTES(DKV_BLOCK));
                    load_box(shared + DKV_SLOPES_AT + offset, dout_map, full, 0, row, (int)head * STRETCHES);
                }
            }
        }
        if (lane == 0) item = take_item(counter, items);
        item = __shfl_sync(0xffffffffu, item, 0);
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

// Scores of a tile become P^T. `pairs` is where the statistics of the tile stand for this thread; with SOFT_CAP,
// `slope` becomes the slope of the cap.
__device__ __forceinline__ void turned_probabilities(float (&s)[DKV_BLOCK / 2], float (&slope)[DKV_BLOCK / 2],
                                                     const Shape& shape, const Keys& keys, int block, int group_row,
                                                     int own_row, u32 pairs, float scale) {
    pin(s);
    cap_scores(s, shape);
#ifdef SOFT_CAP
#pragma unroll
    for (int j = 0; j < DKV_BLOCK / 2; j++) slope[j] = 1.0f - s[j] * s[j];
#endif
    int query = block * DKV_BLOCK, first_key = keys.key + group_row;
    bool open = query + DKV_BLOCK <= keys.end && first_key + 63 <= query + keys.past &&
                (!keys.window || query + DKV_BLOCK - 1 + keys.past - keys.window < first_key);
    if (!open) hide_turned(s, keys.key + own_row, query, keys.end, keys.past, keys.window);
#pragma unroll
    for (int n = 0; n < DKV_BLOCK / 8; n++) {
        float4 x = read_pairs(pairs + 64 * n);
        s[4 * n] = exp2_fast(s[4 * n] * scale - x.x);
        s[4 * n + 1] = exp2_fast(s[4 * n + 1] * scale - x.z);
        s[4 * n + 2] = exp2_fast(s[4 * n + 2] * scale - x.x);
        s[4 * n + 3] = exp2_fast(s[4 * n + 3] * scale - x.z);
    }
}

// (dO V^T)^T of a tile becomes dS^T, given P^T.
__device__ __forceinline__ void turned_slopes(const float (&s)[DKV_BLOCK / 2], const float (&slope)[DKV_BLOCK / 2],
                                              float (&d)[DKV_BLOCK / 2], u32 pairs) {
    pin(d);
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
}
