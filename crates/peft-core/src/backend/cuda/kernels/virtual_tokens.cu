// Virtual tokens: rows that every span of a batch has at its front. A block takes a row (blockIdx.x) and a share of its
// columns (blockIdx.y).

#define FOR_VIRTUAL_COLUMNS(c, columns) \
    for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < (columns); c += gridDim.y * blockDim.x)

// Queries `query_start ..`, keys `key_start ..`, as attention reads them.
struct Front {
    u32 query_start;
    u32 queries;
    u32 key_start;
    u32 keys;
};

// The row of the keys that stands for a row of the batch. Spans lie in the order of their rows, without gaps.
__device__ __forceinline__ u64 key_of(const Front* spans, u32 count, u32 row) {
    u32 low = 0, high = count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (spans[middle].query_start <= row) low = middle; else high = middle;
    }
    Front span = spans[low];
    return (u64)span.key_start + span.keys - span.queries + row - span.query_start;
}

// to[start + i, :] = from[i, :] for every span, whose keys or queries begin at `start`.
extern "C" __global__ void put_virtual(const Front* spans, u32 count, u32 keys, Any from, Any to) {
    for (u32 s = 0; s < count; s++) {
        u64 row = (keys ? spans[s].key_start : spans[s].query_start) + blockIdx.x;
        FOR_VIRTUAL_COLUMNS(c, from.columns) set(to, row, c, get(from, blockIdx.x, c));
    }
}

// to[i, :] += from[span.key_start + i, :], span by span.
extern "C" __global__ void sum_virtual(const Front* spans, u32 count, Any from, Any to) {
    FOR_VIRTUAL_COLUMNS(c, to.columns) {
        float sum = get(to, blockIdx.x, c);
        for (u32 s = 0; s < count; s++) sum += get(from, (u64)spans[s].key_start + blockIdx.x, c);
        set(to, blockIdx.x, c, sum);
    }
}

extern "C" __global__ void rows_to_keys(const Front* spans, u32 count, Any from, Any to) {
    u64 row = key_of(spans, count, blockIdx.x);
    FOR_VIRTUAL_COLUMNS(c, from.columns) set(to, row, c, get(from, blockIdx.x, c));
}

extern "C" __global__ void keys_to_rows(const Front* spans, u32 count, Any from, Any to) {
    u64 row = key_of(spans, count, blockIdx.x);
    FOR_VIRTUAL_COLUMNS(c, to.columns) set(to, blockIdx.x, c, get(from, row, c));
}
