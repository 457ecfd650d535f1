// f32 or bf16 to NF4, and block scales to 8 bits, on the way from a file to the card.
//
// Bit-equal to the CPU: every operation is rounded by itself, in the CPU's order; no sum is taken here.

__constant__ float MIDPOINTS[15] = {-0.8480964f,  -0.6106329f,  -0.45999527f, -0.33967943f, -0.2346074f,
                                    -0.13791173f, -0.045525018f, 0.03979015f,  0.12025525f,  0.20352125f,
                                    0.29201377f,  0.38931254f,  0.50166342f,  0.6427869f,   0.86147842f};

#define ZERO_CODE 7u
// Numbers of a block: whole blocks of every size.
#define QUANTISED 4096u

__device__ __forceinline__ u32 code_of(float scaled) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < 15; i++) code += scaled > MIDPOINTS[i];
    return code;
}

// `count` numbers, the first of which begins a block of 2^block_shift; 512 threads, eight numbers each.
template <class T>
__device__ __forceinline__ void quantise(const T* from, u32 count, u32 block_shift, u8* codes, float* scales) {
    // The largest magnitude by bits: order of non-negative floats is that of their bits, and NaN is above all.
    __shared__ u32 largest[QUANTISED / 32];
    for (u32 i = threadIdx.x; i < QUANTISED / 32; i += blockDim.x) largest[i] = 0;
    __syncthreads();
    u32 first = blockIdx.x * QUANTISED + 8 * threadIdx.x, block = (8 * threadIdx.x) >> block_shift;
    float x[8] = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
    if (first + 8 <= count) {
        get8(from + first, x);
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            if (first + i < count) x[i] = get(from + first + i);
        }
    }
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) most = max(most, __float_as_uint(x[i]) & 0x7fffffffu);
    if (first < count) atomicMax(&largest[block], most);
    __syncthreads();
    if (first >= count) return;
    u32 bits = largest[block];
    float scale = __uint_as_float(bits);
    if (((8 * threadIdx.x) & ((1u << block_shift) - 1u)) == 0) scales[first >> block_shift] = scale;
    bool flat = bits == 0 || bits >= 0x7f800000u;
    float inverse = __frcp_rn(scale);
    u32 word = 0;
#pragma unroll
    for (u32 i = 0; i < 8; i++) {
        u32 code = flat || first + i >= count ? ZERO_CODE : code_of(__fmul_rn(x[i], inverse));
        word |= code << (8 * (i >> 1) + (i & 1 ? 0 : 4));
    }
    if (first + 8 <= count) {
        *(u32*)(codes + first / 2) = word;
    } else {
        u32 bytes = (count - first + 1) / 2;
        for (u32 i = 0; i < bytes; i++) codes[first / 2 + i] = (u8)(word >> (8 * i));
    }
}

extern "C" __global__ void quantise_f32(const float* from, u32 count, u32 block_shift, u8* codes, float* scales) {
    quantise(from, count, block_shift, codes, scales);
}
extern "C" __global__ void quantise_bf16(const bf16* from, u32 count, u32 block_shift, u8* codes, float* scales) {
    quantise(from, count, block_shift, codes, scales);
}

// Block scales less their mean to bytes of `map`, the lower entry where two are equally near; 256 scales a block of as
// many threads, which have one scale of their own in `nested`.
extern "C" __global__ void quantise_scales(const float* scales, u32 count, float offset, const float* map, u8* codes,
                                           float* nested) {
    __shared__ float table[256];
    __shared__ u32 largest;
    u32 t = threadIdx.x, i = blockIdx.x * 256 + t;
    table[t] = map[t];
    if (t == 0) largest = 0;
    __syncthreads();
    float rest = i < count ? __fsub_rn(scales[i], offset) : 0.0f;
    atomicMax(&largest, __float_as_uint(rest) & 0x7fffffffu);
    __syncthreads();
    float most = __uint_as_float(largest);
    if (t == 0) nested[blockIdx.x] = most;
    if (i >= count) return;
    float value = __fmul_rn(rest, most == 0.0f ? 0.0f : __frcp_rn(most));
    // The first entry that is not below the value.
    u32 low = 0, high = 256;
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (table[middle] < value) low = middle + 1;
        else high = middle;
    }
    u32 index = low;
    if (low == 256) index = 255;
    else if (low > 0 && __fsub_rn(value, table[low - 1]) <= __fsub_rn(table[low], value)) index = low - 1;
    codes[i] = (u8)index;
}
