// Operations that need a sum over a row: a block takes a row.

// f(index) for the thread's share of a row: eight numbers at a time, or one.
#define FOR_EIGHTS(c, columns) for (u32 c = threadIdx.x * 8; c < (columns); c += 8 * NORM_THREADS)
#define FOR_EACH(c, columns) for (u32 c = threadIdx.x; c < (columns); c += NORM_THREADS)
// Threads of a block of norms, and how often each takes eight numbers where a row is kept in registers.
#define NORM_THREADS 128
#define NORM_EIGHTS 4

// Sum over a block of norms in a fixed order. Every thread gets it. Once a kernel.
__device__ __forceinline__ float norm_sum(float value) {
    __shared__ float warps[NORM_THREADS / 32];
    value = warp_sum(value);
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < NORM_THREADS / 32; i++) sum += warps[i];
    return sum;
}

template <class T>
__device__ __forceinline__ void rms_norm_of(MatrixOf<T> x, const float* weight, float epsilon, MatrixOf<T> out,
                                            MatrixOf<float> reciprocal) {
    u32 row = blockIdx.x, columns = x.columns;
    const T* in = row_of(x, row);
    T* to = row_of(out, row);
    float sum = 0.0f;
    auto factor_of = [&]() {
        float factor = 1.0f / sqrtf(norm_sum(sum) / (float)columns + epsilon);
        if (threadIdx.x == 0) row_of(reciprocal, row)[0] = factor;
        return factor;
    };
    bool eights = by_eights(x) && by_eights(out) && by_eights(weight, columns);
    if (eights && columns <= 8 * NORM_EIGHTS * NORM_THREADS) {
        float a[NORM_EIGHTS][8];
#pragma unroll
        for (int i = 0; i < NORM_EIGHTS; i++) {
            u32 c = (i * NORM_THREADS + threadIdx.x) * 8;
            if (c < columns) get8(in + c, a[i]);
        }
#pragma unroll
        for (int i = 0; i < NORM_EIGHTS; i++) {
            if ((i * NORM_THREADS + threadIdx.x) * 8 >= columns) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) sum += a[i][j] * a[i][j];
        }
        float factor = factor_of();
#pragma unroll
        for (int i = 0; i < NORM_EIGHTS; i++) {
            u32 c = (i * NORM_THREADS + threadIdx.x) * 8;
            if (c >= columns) continue;
            float w[8];
            get8(weight + c, w);
#pragma unroll
            for (int j = 0; j < 8; j++) a[i][j] = a[i][j] * factor * w[j];
            set8(to + c, a[i]);
        }
    } else if (eights) {
        FOR_EIGHTS(c, columns) {
            float a[8];
            get8(in + c, a);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += a[i] * a[i];
        }
        float factor = factor_of();
        FOR_EIGHTS(c, columns) {
            float a[8], w[8];
            get8(in + c, a);
            get8(weight + c, w);
#pragma unroll
            for (int i = 0; i < 8; i++) a[i] = a[i] * factor * w[i];
            set8(to + c, a);
        }
    } else {
        FOR_EACH(c, columns) sum += get(in + c) * get(in + c);
        float factor = factor_of();
        FOR_EACH(c, columns) set(to + c, get(in + c) * factor * weight[c]);
    }
}
BOTH(rms_norm, (MatrixOf<T> x, const float* weight, float epsilon, MatrixOf<T> out, MatrixOf<float> reciprocal),
     (x, weight, epsilon, out, reciprocal))

template <class T>
__device__ __forceinline__ void rms_norm_backward_of(MatrixOf<T> dout, MatrixOf<T> x, const float* weight,
                                                     MatrixOf<float> reciprocal, MatrixOf<T> dx) {
    u32 row = blockIdx.x, columns = x.columns;
    const T* dy = row_of(dout, row);
    const T* in = row_of(x, row);
    T* to = row_of(dx, row);
    float factor = row_of(reciprocal, row)[0];
    float sum = 0.0f;
    auto slope_of = [&]() { return norm_sum(sum) / (float)columns * factor * factor * factor; };
    bool eights = by_eights(x) && by_eights(dout) && by_eights(dx) && by_eights(weight, columns);
    if (eights && columns <= 8 * NORM_EIGHTS * NORM_THREADS) {
        // The gradient is kept multiplied by the weight.
        float a[NORM_EIGHTS][8], d[NORM_EIGHTS][8], old[NORM_EIGHTS][8];
#pragma unroll
        for (int i = 0; i < NORM_EIGHTS; i++) {
            u32 c = (i * NORM_THREADS + threadIdx.x) * 8;
            if (c >= columns) continue;
            get8(in + c, a[i]);
            get8(dy + c, d[i]);
            get8(to + c, old[i]);
        }
#pragma unroll
        for (int i = 0; i < NORM_EIGHTS; i++) {
            u32 c = (i * NORM_THREADS + threadIdx.x) * 8;
            if (c >= columns) continue;
            float w[8];
            get8(weight + c, w);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                d[i][j] *= w[j];
                sum += a[i][j] * d[i][j];
            }
        }
        float slope = slope_of();
#pragma unroll
        for (int i = 0; i < NORM_EIGHTS; i++) {
            u32 c = (i * NORM_THREADS + threadIdx.x) * 8;
            if (c >= columns) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) old[i][j] += d[i][j] * factor - a[i][j] * slope;
            set8(to + c, old[i]);
        }
    } else if (eights) {
        FOR_EIGHTS(c, columns) {
            float a[8], d[8], w[8];
            get8(in + c, a);
            get8(dy + c, d);
            get8(weight + c, w);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += a[i] * d[i] * w[i];
        }
        float slope = slope_of();
        FOR_EIGHTS(c, columns) {
            float a[8], d[8], w[8], old[8];
            get8(in + c, a);
            get8(dy + c, d);
            get8(weight + c, w);
            get8(to + c, old);
#pragma unroll
            for (int i = 0; i < 8; i++) old[i] += d[i] * w[i] * factor - a[i] * slope;
            set8(to + c, old);
        }
    } else {
        FOR_EACH(c, columns) sum += get(in + c) * get(dy + c) * weight[c];
        float slope = slope_of();
        FOR_EACH(c, columns) {
            set(to + c, get(to + c) + get(dy + c) * weight[c] * factor - get(in + c) * slope);
        }
    }
}
BOTH(rms_norm_backward,
     (MatrixOf<T> dout, MatrixOf<T> x, const float* weight, MatrixOf<float> reciprocal, MatrixOf<T> dx),
     (dout, x, weight, reciprocal, dx))

// losses[r] = ln(sum of e^logit) - logit[target]; with `gradient` the logits become softmax - one_hot(target). A `cap` that
// is not 0 bounds the logits first; its slope multiplies the gradient. One pass finds the largest and the sum, another writes.
template <class T>
__device__ __forceinline__ float power(float x) { return sizeof(T) == 2 ? __expf(x) : expf(x); }

template <class T>
__device__ __forceinline__ void cross_entropy_of(const u32* targets, u32 gradient, float cap, MatrixOf<T> logits,
                                                 MatrixOf<float> losses) {
    T* row = row_of(logits, blockIdx.x);
    u32 target = targets[blockIdx.x];
    float wanted = get(row + target);
    if (cap != 0.0f) wanted = cap * tanhf(wanted / cap);
    float largest = -3.0e38f, sum = 0.0f;
    bool eights = by_eights(logits);
    if (eights) {
        for (u32 c = threadIdx.x * 8; c < logits.columns; c += blockDim.x * 8) {
            float x[8];
            get8(row + c, x);
            float most = largest;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (cap != 0.0f) x[i] = cap * tanhf(x[i] / cap);
                most = fmaxf(most, x[i]);
            }
            sum *= power<T>(largest - most);
            largest = most;
#pragma unroll
            for (int i = 0; i < 8; i++) sum += power<T>(x[i] - most);
        }
    } else {
        for (u32 c = threadIdx.x; c < logits.columns; c += blockDim.x) {
            float x = get(row + c);
            if (cap != 0.0f) x = cap * tanhf(x / cap);
            float most = fmaxf(largest, x);
            sum = sum * power<T>(largest - most) + power<T>(x - most);
            largest = most;
        }
    }
    float most = block_max(largest);
    sum = block_sum(sum * expf(largest - most));
    // `wanted` was read before any thread passes the barriers of the sum, so writing may begin.
    if (threadIdx.x == 0) row_of(losses, blockIdx.x)[0] = logf(sum) + (most - wanted);
    if (!gradient) return;
    float inverse = 1.0f / sum;
    if (eights) {
        for (u32 c = threadIdx.x * 8; c < logits.columns; c += blockDim.x * 8) {
            float x[8];
            get8(row + c, x);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float bend = 0.0f;
                if (cap != 0.0f) bend = tanhf(x[i] / cap), x[i] = cap * bend;
                x[i] = (power<T>(x[i] - most) * inverse - (c + i == target ? 1.0f : 0.0f)) * (1.0f - bend * bend);
            }
            set8(row + c, x);
        }
    } else {
        for (u32 c = threadIdx.x; c < logits.columns; c += blockDim.x) {
            float x = get(row + c), bend = 0.0f;
            if (cap != 0.0f) bend = tanhf(x / cap), x = cap * bend;
            set(row + c, (power<T>(x - most) * inverse - (c == target ? 1.0f : 0.0f)) * (1.0f - bend * bend));
        }
    }
}
BOTH(cross_entropy, (const u32* targets, u32 gradient, float cap, MatrixOf<T> logits, MatrixOf<float> losses),
     (targets, gradient, cap, logits, losses))
