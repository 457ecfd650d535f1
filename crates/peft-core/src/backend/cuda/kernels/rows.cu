// Operations that need a sum over a row. Norms: a warp takes a row. Cross-entropy: a block does.

// f(index) for the lane's share of a row: eight numbers at a time, or one.
#define FOR_EIGHTS(c, columns) for (u32 c = threadIdx.x * 8; c < (columns); c += 256)
#define FOR_LANES(c, columns) for (u32 c = threadIdx.x; c < (columns); c += 32)

// blockDim is [32, rows of a block].
template <class T>
__device__ __forceinline__ void rms_norm_of(MatrixOf<T> x, const float* weight, float epsilon, MatrixOf<T> out,
                                            MatrixOf<float> reciprocal) {
    u32 row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= x.rows) return;
    const T* in = row_of(x, row);
    T* to = row_of(out, row);
    float sum = 0.0f;
    if (by_eights(x) && by_eights(out) && by_eights(weight, x.columns)) {
#pragma unroll 4
        FOR_EIGHTS(c, x.columns) {
            float a[8];
            get8(in + c, a);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += a[i] * a[i];
        }
        float factor = 1.0f / sqrtf(warp_sum(sum) / (float)x.columns + epsilon);
        if (threadIdx.x == 0) row_of(reciprocal, row)[0] = factor;
#pragma unroll 4
        FOR_EIGHTS(c, x.columns) {
            float a[8], w[8];
            get8(in + c, a);
            get8(weight + c, w);
#pragma unroll
            for (int i = 0; i < 8; i++) a[i] = a[i] * factor * w[i];
            set8(to + c, a);
        }
    } else {
        FOR_LANES(c, x.columns) sum += get(in + c) * get(in + c);
        float factor = 1.0f / sqrtf(warp_sum(sum) / (float)x.columns + epsilon);
        if (threadIdx.x == 0) row_of(reciprocal, row)[0] = factor;
        FOR_LANES(c, x.columns) set(to + c, get(in + c) * factor * weight[c]);
    }
}
BOTH(rms_norm, (MatrixOf<T> x, const float* weight, float epsilon, MatrixOf<T> out, MatrixOf<float> reciprocal),
     (x, weight, epsilon, out, reciprocal))

template <class T>
__device__ __forceinline__ void rms_norm_backward_of(MatrixOf<T> dout, MatrixOf<T> x, const float* weight,
                                                     MatrixOf<float> reciprocal, MatrixOf<T> dx) {
    u32 row = blockIdx.x * blockDim.y + threadIdx.y;
    if (row >= x.rows) return;
    const T* dy = row_of(dout, row);
    const T* in = row_of(x, row);
    T* to = row_of(dx, row);
    float factor = row_of(reciprocal, row)[0];
    float sum = 0.0f;
    if (by_eights(x) && by_eights(dout) && by_eights(dx) && by_eights(weight, x.columns)) {
#pragma unroll 2
        FOR_EIGHTS(c, x.columns) {
            float a[8], d[8], w[8];
            get8(in + c, a);
            get8(dy + c, d);
            get8(weight + c, w);
#pragma unroll
            for (int i = 0; i < 8; i++) sum += a[i] * d[i] * w[i];
        }
        float slope = warp_sum(sum) / (float)x.columns * factor * factor * factor;
#pragma unroll 2
        FOR_EIGHTS(c, x.columns) {
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
        FOR_LANES(c, x.columns) sum += get(in + c) * get(dy + c) * weight[c];
        float slope = warp_sum(sum) / (float)x.columns * factor * factor * factor;
        FOR_LANES(c, x.columns) {
            set(to + c, get(to + c) + get(dy + c) * weight[c] * factor - get(in + c) * slope);
        }
    }
}
BOTH(rms_norm_backward,
     (MatrixOf<T> dout, MatrixOf<T> x, const float* weight, MatrixOf<float> reciprocal, MatrixOf<T> dx),
     (dout, x, weight, reciprocal, dx))

// The same for rows of 1024 numbers, or two to eight times as many: a block of 128 threads takes a row and holds it, so that
// memory is read once and all its loads are under way at once.
#define HELD_THREADS 128

__device__ __forceinline__ float held_sum(float value) {
    __shared__ float warps[HELD_THREADS / 32];
    value = warp_sum(value);
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = value;
    __syncthreads();
    return (warps[0] + warps[1]) + (warps[2] + warps[3]);
}

// Eight numbers as they lie in memory.
template <class T>
struct Held {
    uint4 words[sizeof(T) / 2];
};

template <class T>
__device__ __forceinline__ void hold(const T* from, Held<T>& to) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(T) / 2; i++) to.words[i] = ((const uint4*)from)[i];
}

template <int N, class T>
__device__ __forceinline__ void held_norm(const T* in, const float* weight, float epsilon, T* to, float* reciprocal) {
    Held<T> x[N];
    u32 start = threadIdx.x * 8;
#pragma unroll
    for (int i = 0; i < N; i++) hold(in + start + i * 1024, x[i]);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float a[8];
        get8((const T*)&x[i], a);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += a[j] * a[j];
    }
    float factor = 1.0f / sqrtf(held_sum(sum) / (float)(N * 1024) + epsilon);
    if (threadIdx.x == 0) *reciprocal = factor;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float a[8], w[8];
        get8((const T*)&x[i], a);
        get8(weight + start + i * 1024, w);
#pragma unroll
        for (int j = 0; j < 8; j++) a[j] = a[j] * factor * w[j];
        set8(to + start + i * 1024, a);
    }
}

template <int N, class T>
__device__ __forceinline__ void held_norm_backward(const T* dy, const T* in, const float* weight, float factor, T* to) {
    Held<T> x[N], d[N], old[N];
    u32 start = threadIdx.x * 8;
#pragma unroll
    for (int i = 0; i < N; i++) {
        hold(in + start + i * 1024, x[i]);
        hold(dy + start + i * 1024, d[i]);
        hold(to + start + i * 1024, old[i]);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float a[8], b[8], w[8];
        get8((const T*)&x[i], a);
        get8((const T*)&d[i], b);
        get8(weight + start + i * 1024, w);
#pragma unroll
        for (int j = 0; j < 8; j++) sum += a[j] * b[j] * w[j];
    }
    float slope = held_sum(sum) / (float)(N * 1024) * factor * factor * factor;
#pragma unroll
    for (int i = 0; i < N; i++) {
        float a[8], b[8], w[8], c[8];
        get8((const T*)&x[i], a);
        get8((const T*)&d[i], b);
        get8((const T*)&old[i], c);
        get8(weight + start + i * 1024, w);
#pragma unroll
        for (int j = 0; j < 8; j++) c[j] += b[j] * w[j] * factor - a[j] * slope;
        set8(to + start + i * 1024, c);
    }
}

#define HELD_SIZES(call) \
    switch (x.columns / 1024) { \
        case 1: call(1); break; case 2: call(2); break; case 3: call(3); break; case 4: call(4); break; \
        case 5: call(5); break; case 6: call(6); break; case 7: call(7); break; case 8: call(8); break; \
    }

template <class T>
__device__ __forceinline__ void rms_norm_held_of(MatrixOf<T> x, const float* weight, float epsilon, MatrixOf<T> out,
                                                 MatrixOf<float> reciprocal) {
    u32 row = blockIdx.x;
#define CALL(N) held_norm<N>(row_of(x, row), weight, epsilon, row_of(out, row), row_of(reciprocal, row))
    HELD_SIZES(CALL)
#undef CALL
}
BOTH(rms_norm_held, (MatrixOf<T> x, const float* weight, float epsilon, MatrixOf<T> out, MatrixOf<float> reciprocal),
     (x, weight, epsilon, out, reciprocal))

template <class T>
__device__ __forceinline__ void rms_norm_backward_held_of(MatrixOf<T> dout, MatrixOf<T> x, const float* weight,
                                                          MatrixOf<float> reciprocal, MatrixOf<T> dx) {
    u32 row = blockIdx.x;
#define CALL(N) \
    held_norm_backward<N>(row_of(dout, row), row_of(x, row), weight, row_of(reciprocal, row)[0], row_of(dx, row))
    HELD_SIZES(CALL)
#undef CALL
}
BOTH(rms_norm_backward_held,
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
