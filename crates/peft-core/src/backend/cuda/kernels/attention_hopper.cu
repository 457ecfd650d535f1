// What the attention kernels for Hopper share: what they are handed, which tiles meet which, and what is hidden.
//
// Compiled for one HEAD_DIM (64, 96, 128 or 256), and with SOFT_CAP for models that cap their scores.

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
// Warp groups that compute, 64 rows each; one more loads.
#ifndef GROUPS
#define GROUPS 2
#endif
#define THREADS (128 * (GROUPS + 1))
#define ROWS (64 * GROUPS)
#define STRETCH (HEAD_DIM % 64 == 0 ? 64 : 32)
#define STRETCHES (HEAD_DIM / STRETCH)
#define LOADER_REGISTERS (GROUPS == 3 ? 32 : 24)
#define WORKER_REGISTERS (GROUPS == 3 ? 160 : 240)
#define LOG2_E 1.4426950408889634f
#define MASKED __int_as_float(0xff800000)
// Bytes of rows in shared memory.
#define TILE_BYTES(rows) ((rows) * HEAD_DIM * 2)

// Queries `query_start ..`, keys `key_start ..`; query i sees keys 0 ..= i + keys - queries.
struct Span {
    u32 query_start;
    u32 queries;
    u32 key_start;
    u32 keys;
};

// Rows `first ..` of a span, as many as a tile has or the span still has.
struct Tile {
    u32 span;
    u32 first;
};

// `group` query heads share a key head. Scores are multiplied by `scale` and, with SOFT_CAP, become
// cap tanh(score / cap). With a `window` above 0 a query sees no more than the last `window` of its keys.
struct Shape {
    u32 heads;
    u32 group;
    float scale;
    float cap;
    u32 window;
};

// A matrix of bf16 whose numbers are written: row r, column c lies at data[r * stride + c].
struct Target {
    u16* data;
    u64 stride;
};

// Blocks take items in order, each a new one as soon as it can: which block takes which changes nothing in the results.
// A block takes the next when it loads the last tile of one, not earlier: who is behind takes no more. The first of a
// block is its own number; `counter` holds how many more were taken, and is 0 again after the last.
__device__ __forceinline__ u32 take_item(u32* counter, u32 items) {
    u32 taken = atomicAdd(counter, 1);
    if (taken == items - 1) *counter = 0;
    return gridDim.x + taken;
}

// What the loading warp tells the others, behind a barrier.
template <class T>
__device__ __forceinline__ T* told(u32 shared, u32 at) {
    return (T*)(dynamic_shared + (shared - shared_address(dynamic_shared)) + at);
}
// Bytes for it.
#define TOLD_BYTES 64

// Arrivals at a barrier when every warp of the groups that compute arrives once.
#define ARRIVALS (4 * GROUPS)

// Which tiles of COLUMNS keys a tile of queries meets, last first.
template <int COLUMNS>
struct Range {
    u32 head;
    u32 row;      // first query, row of the matrix
    u32 valid;    // queries
    int reach;    // the last key that the first query sees
    u32 key_row;  // first key of the span, row of the matrix
    int keys;
    int last;     // the last of the tiles
    int tiles;    // how many; 0 where there is no item left

    Range() = default;

    __device__ __forceinline__ Range(const Span* spans, const Tile* list, const Shape& shape, u32 item) {
        Tile tile = list[item / shape.heads];
        Span span = spans[tile.span];
        head = item % shape.heads;
        row = span.query_start + tile.first;
        valid = min((u32)ROWS, span.queries - tile.first);
        reach = (int)(tile.first + span.keys - span.queries);
        key_row = span.key_start;
        keys = (int)span.keys;
        int end = min(keys, reach + (int)valid);
        int begin = shape.window ? max(0, reach + 1 - (int)shape.window) : 0;
        last = (end - 1) / COLUMNS;
        tiles = last + 1 - begin / COLUMNS;
    }

    // First key of the i-th tile, within the span.
    __device__ __forceinline__ int first_key(int i) const { return (last - i) * COLUMNS; }
};

// Takes from a warp group's scores (queries along rows) what its queries do not see; a thread holds rows g and g + 8 of
// its warp, columns 8 n + 2 t and the next. `low_reach` is the last key that row g sees.
template <int COLUMNS>
__device__ __forceinline__ void hide(float (&s)[COLUMNS / 2], int first_key, int end, int low_reach, int window) {
    int t = 2 * (threadIdx.x & 3);
    int low = min(end - 1, low_reach) - first_key - t, high = min(end - 1, low_reach + 8) - first_key - t;
    int low_begin = window ? low_reach - window - first_key - t : -1000000000;
    int high_begin = window ? low_begin + 8 : low_begin;
#pragma unroll
    for (int n = 0; n < COLUMNS / 8; n++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int key = 8 * n + i;
            if (key > low || key <= low_begin) s[4 * n + i] = MASKED;
            if (key > high || key <= high_begin) s[4 * n + 2 + i] = MASKED;
        }
    }
}

// Hides what a group of queries does not see of the i-th tile of keys, where there is anything.
template <int COLUMNS>
__device__ __forceinline__ void hide_tile(float (&s)[COLUMNS / 2], const Range<COLUMNS>& range, const Shape& shape, int i,
                                          int group_row, int own_row) {
    int first = range.first_key(i), window = (int)shape.window;
    // All of the group see a tile that ends before what its first row misses and begins where its last row looks.
    bool open_end = first + COLUMNS <= min(range.keys, range.reach + group_row + 1);
    bool open_begin = !window || first >= range.reach + group_row + 64 - window;
    if (!open_end || !open_begin) hide<COLUMNS>(s, first, range.keys, range.reach + own_row, window);
}

// What scores are multiplied by before an exponential of base 2; with SOFT_CAP scores are hyperbolic tangents by then.
__device__ __forceinline__ float exponent_scale(const Shape& shape) {
#ifdef SOFT_CAP
    return shape.cap * LOG2_E;
#else
    return shape.scale * LOG2_E;
#endif
}

template <int N>
__device__ __forceinline__ void cap_scores(float (&s)[N], const Shape& shape) {
#ifdef SOFT_CAP
    float inner = shape.scale / shape.cap;
#pragma unroll
    for (int i = 0; i < N; i++) s[i] = tanh_fast(s[i] * inner);
#endif
}
