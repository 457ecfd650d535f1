// What all kernels share. Compiled by NVRTC alone: no header of any toolkit is read.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// A matrix inside device memory: row r, column c lies at data[r * stride + c].
struct Matrix {
    float* data;
    u64 stride;
    u32 rows;
    u32 columns;
};

__device__ __forceinline__ float* row_of(const Matrix& m, u64 row) { return m.data + row * m.stride; }

// A number kept in two bytes.
struct bf16 {
    u16 bits;
};

// A matrix of numbers of any kind.
template <class T>
struct MatrixOf {
    T* data;
    u64 stride;
    u32 rows;
    u32 columns;
};

template <class T>
__device__ __forceinline__ T* row_of(const MatrixOf<T>& m, u64 row) {
    return m.data + row * m.stride;
}

// Round to nearest, ties to even; a NaN stays one.
__device__ __forceinline__ u16 to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }

// Two numbers rounded as to_bf16 rounds, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

__device__ __forceinline__ float get(const float* p) { return *p; }
__device__ __forceinline__ float get(const bf16* p) { return from_bf16(p->bits); }
__device__ __forceinline__ void set(float* p, float x) { *p = x; }
__device__ __forceinline__ void set(bf16* p, float x) { p->bits = (u16)pack_bf16(x, 0.0f); }

// A matrix whose kind of number is known when a kernel runs: for what is not hot.
struct Any {
    void* data;
    u64 stride;
    u32 rows;
    u32 columns;
    u32 half;
};

__device__ __forceinline__ float get(const Any& m, u64 row, u64 column) {
    u64 at = row * m.stride + column;
    return m.half ? get((const bf16*)m.data + at) : ((const float*)m.data)[at];
}

__device__ __forceinline__ void set(const Any& m, u64 row, u64 column, float x) {
    u64 at = row * m.stride + column;
    if (m.half) set((bf16*)m.data + at, x);
    else ((float*)m.data)[at] = x;
}

// Eight numbers side by side, at an address that is a multiple of 16 bytes.
__device__ __forceinline__ void get8(const float* p, float (&x)[8]) {
    float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void get8(const bf16* p, float (&x)[8]) {
    uint4 w = *(const uint4*)p;
    u32 words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}

__device__ __forceinline__ void set8(float* p, const float (&x)[8]) {
    ((float4*)p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ void set8(bf16* p, const float (&x)[8]) {
    *(uint4*)p = make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
}

// Whether rows can be taken eight numbers at a time.
template <class T>
__device__ __forceinline__ bool by_eights(const MatrixOf<T>& m) {
    return (((u64)m.data | (m.stride * sizeof(T))) & 15) == 0 && (m.columns & 7) == 0;
}

template <class T>
__device__ __forceinline__ bool by_eights(const T* data, u32 columns) {
    return ((u64)data & 15) == 0 && (columns & 7) == 0;
}

// Sum over a warp in a fixed order. Every lane gets it.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

// Sum over a block in a fixed order: lanes, then warps. Every thread gets it.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float warps[32];
    __shared__ float total;
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = value;
    __syncthreads();
    if (threadIdx.x < 32) {
        value = threadIdx.x < (blockDim.x + 31) / 32 ? warps[threadIdx.x] : 0.0f;
        for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
        if (threadIdx.x == 0) total = value;
    }
    __syncthreads();
    return total;
}

// Largest over a block. Every thread gets it.
__device__ __forceinline__ float block_max(float value) {
    __shared__ float warps[32];
    __shared__ float total;
    for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_down_sync(0xffffffffu, value, offset));
    __syncthreads();
    if ((threadIdx.x & 31) == 0) warps[threadIdx.x >> 5] = value;
    __syncthreads();
    if (threadIdx.x < 32) {
        value = threadIdx.x < (blockDim.x + 31) / 32 ? warps[threadIdx.x] : __int_as_float(0xff800000);
        for (int offset = 16; offset > 0; offset /= 2) value = fmaxf(value, __shfl_down_sync(0xffffffffu, value, offset));
        if (threadIdx.x == 0) total = value;
    }
    __syncthreads();
    return total;
}
