// Operations that methods of adaptation need: scales, sums over tokens, rows by token id. Sums over tokens run from the
// first to the last, one thread a column. Matrices are of either kind of number.

#define FOR_ALL_COLUMNS(c, columns) \
    for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < (columns); c += gridDim.y * blockDim.x)

extern "C" __global__ void scale_columns(float alpha, Any x, Any factors, float beta, Any out) {
    FOR_ALL_COLUMNS(c, out.columns) {
        float scaled = alpha * get(x, blockIdx.x, c) * get(factors, 0, c);
        set(out, blockIdx.x, c, scaled + (beta == 0.0f ? 0.0f : beta * get(out, blockIdx.x, c)));
    }
}

extern "C" __global__ void column_sum(float alpha, Any x, Any out) {
    FOR_ALL_COLUMNS(c, x.columns) {
        float sum = 0.0f;
        for (u32 t = 0; t < x.rows; t++) sum += get(x, t, c);
        set(out, 0, c, get(out, 0, c) + alpha * sum);
    }
}

extern "C" __global__ void column_dot(Any x, Any y, Any out) {
    FOR_ALL_COLUMNS(c, x.columns) {
        float sum = 0.0f;
        for (u32 t = 0; t < x.rows; t++) sum += get(x, t, c) * get(y, t, c);
        set(out, 0, c, get(out, 0, c) + sum);
    }
}

extern "C" __global__ void row_dot(float alpha, Any x, Any y, float beta, Any out) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < x.columns; c += blockDim.x) sum += get(x, blockIdx.x, c) * get(y, blockIdx.x, c);
    sum = alpha * block_sum(sum);
    if (threadIdx.x == 0) {
        set(out, 0, blockIdx.x, beta == 0.0f ? sum : sum + beta * get(out, 0, blockIdx.x));
    }
}

extern "C" __global__ void reciprocal_root(Any from, Any to) {
    FOR_ALL_COLUMNS(c, to.columns) set(to, blockIdx.x, c, 1.0f / sqrtf(get(from, blockIdx.x, c)));
}

extern "C" __global__ void norm_weight_backward(Any dout, Any x, Any reciprocal, Any dweight) {
    FOR_ALL_COLUMNS(c, x.columns) {
        float sum = 0.0f;
        for (u32 t = 0; t < x.rows; t++) sum += get(dout, t, c) * get(x, t, c) * get(reciprocal, t, 0);
        set(dweight, 0, c, get(dweight, 0, c) + sum);
    }
}

extern "C" __global__ void gather_ids(const u32* ids, u32 columns, Any table, Any out) {
    u64 id = ids[blockIdx.x];
    FOR_ALL_COLUMNS(c, out.columns) set(out, blockIdx.x, c, columns ? get(table, c, id) : get(table, id, c));
}

// Tokens that occur twice meet in an atomic addition: the order of the sum is not fixed. The table is f32.
extern "C" __global__ void scatter_ids(const u32* ids, u32 columns, Any from, Matrix table) {
    u64 id = ids[blockIdx.x];
    FOR_ALL_COLUMNS(c, from.columns) {
        atomicAdd(columns ? row_of(table, c) + id : row_of(table, id) + c, get(from, blockIdx.x, c));
    }
}

extern "C" __global__ void set_rows_of(const u32* ids, u32 id, Any row, Any out) {
    if (ids[blockIdx.x] != id) return;
    FOR_ALL_COLUMNS(c, out.columns) set(out, blockIdx.x, c, get(row, 0, c));
}

extern "C" __global__ void sum_rows_of(const u32* ids, u32 id, Any from, Any row) {
    FOR_ALL_COLUMNS(c, from.columns) {
        float sum = 0.0f;
        for (u32 t = 0; t < from.rows; t++) {
            if (ids[t] == id) sum += get(from, t, c);
        }
        set(row, 0, c, get(row, 0, c) + sum);
    }
}
