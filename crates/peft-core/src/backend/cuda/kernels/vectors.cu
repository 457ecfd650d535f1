// Operations that methods of adaptation need: scales, sums over tokens, rows by token id. Sums over tokens run from the
// first to the last, one thread a column.

#define FOR_ALL_COLUMNS(c, columns) \
    for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < (columns); c += gridDim.y * blockDim.x)

extern "C" __global__ void scale_columns(float alpha, Matrix x, const float* factors, float beta, Matrix out) {
    const float* in = row_of(x, blockIdx.x);
    float* to = row_of(out, blockIdx.x);
    FOR_ALL_COLUMNS(c, out.columns) to[c] = alpha * in[c] * factors[c] + (beta == 0.0f ? 0.0f : beta * to[c]);
}

extern "C" __global__ void column_sum(float alpha, Matrix x, float* out) {
    FOR_ALL_COLUMNS(c, x.columns) {
        float sum = 0.0f;
        for (u32 t = 0; t < x.rows; t++) sum += row_of(x, t)[c];
        out[c] += alpha * sum;
    }
}

extern "C" __global__ void column_dot(Matrix x, Matrix y, float* out) {
    FOR_ALL_COLUMNS(c, x.columns) {
        float sum = 0.0f;
        for (u32 t = 0; t < x.rows; t++) sum += row_of(x, t)[c] * row_of(y, t)[c];
        out[c] += sum;
    }
}

// Weights may be kept as bf16: a flag for each factor says so.
__device__ __forceinline__ float number_at(const Matrix& m, u64 row, u32 column, u32 half) {
    u64 at = row * m.stride + column;
    return half ? from_bf16(((const u16*)m.data)[at]) : m.data[at];
}

extern "C" __global__ void row_dot(float alpha, Matrix x, u32 x_half, Matrix y, u32 y_half, float beta, float* out) {
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < x.columns; c += blockDim.x) {
        sum += number_at(x, blockIdx.x, c, x_half) * number_at(y, blockIdx.x, c, y_half);
    }
    sum = alpha * block_sum(sum);
    if (threadIdx.x == 0) out[blockIdx.x] = beta == 0.0f ? sum : sum + beta * out[blockIdx.x];
}

extern "C" __global__ void reciprocal_root(Matrix from, Matrix to) {
    const float* in = row_of(from, blockIdx.x);
    float* out = row_of(to, blockIdx.x);
    FOR_ALL_COLUMNS(c, to.columns) out[c] = 1.0f / sqrtf(in[c]);
}

extern "C" __global__ void norm_weight_backward(Matrix dout, Matrix x, Matrix reciprocal, float* dweight) {
    FOR_ALL_COLUMNS(c, x.columns) {
        float sum = 0.0f;
        for (u32 t = 0; t < x.rows; t++) sum += row_of(dout, t)[c] * row_of(x, t)[c] * row_of(reciprocal, t)[0];
        dweight[c] += sum;
    }
}

extern "C" __global__ void gather_ids(const u32* ids, u32 columns, Matrix table, Matrix out) {
    u64 id = ids[blockIdx.x];
    float* to = row_of(out, blockIdx.x);
    FOR_ALL_COLUMNS(c, out.columns) to[c] = columns ? row_of(table, c)[id] : row_of(table, id)[c];
}

// Tokens that occur twice meet in an atomic addition: the order of the sum is not fixed.
extern "C" __global__ void scatter_ids(const u32* ids, u32 columns, Matrix from, Matrix table) {
    u64 id = ids[blockIdx.x];
    const float* in = row_of(from, blockIdx.x);
    FOR_ALL_COLUMNS(c, from.columns) atomicAdd(columns ? row_of(table, c) + id : row_of(table, id) + c, in[c]);
}

extern "C" __global__ void set_rows_of(const u32* ids, u32 id, const float* row, Matrix out) {
    if (ids[blockIdx.x] != id) return;
    float* to = row_of(out, blockIdx.x);
    FOR_ALL_COLUMNS(c, out.columns) to[c] = row[c];
}

extern "C" __global__ void sum_rows_of(const u32* ids, u32 id, Matrix from, float* row) {
    FOR_ALL_COLUMNS(c, from.columns) {
        float sum = 0.0f;
        for (u32 t = 0; t < from.rows; t++) {
            if (ids[t] == id) sum += row_of(from, t)[c];
        }
        row[c] += sum;
    }
}
