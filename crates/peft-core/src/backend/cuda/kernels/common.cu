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

// Round to nearest, ties to even; a NaN stays one.
__device__ __forceinline__ u16 to_bf16(float x) {
    u32 bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);
    return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ float from_bf16(u16 x) { return __uint_as_float((u32)x << 16); }

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
