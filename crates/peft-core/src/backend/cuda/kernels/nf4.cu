// NF4 to f32 or bf16, block scales restored from 8 bits in the same launch.
//
// Bit-equal to the CPU: every product and sum is rounded by itself (__fmul_rn, __fadd_rn), never contracted.

__constant__ float CODE_BOOK[16] = {
    -1.0f, -0.6961928f, -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
    0.0795803f, 0.1609302f, 0.2461123f, 0.33791524f, 0.44070983f, 0.562617f, 0.72295684f, 1.0f};

// A quantised matrix. `map` is null where scales are plain f32, in `nested` then.
struct Nf4 {
    const u8* codes;
    const u8* scales;
    const float* nested;
    const float* map;
    float offset;
    u32 block_shift;
    u64 numbers;
};

__device__ __forceinline__ float scale_of(const Nf4& m, u64 block) {
    if (m.map == nullptr) return m.nested[block];
    return __fadd_rn(__fmul_rn(m.map[m.scales[block]], m.nested[block >> 8]), m.offset);
}

__device__ __forceinline__ void dequantise(const Nf4& m, float* wide, u16* narrow) {
    __shared__ float2 pairs[256];
    for (u32 i = threadIdx.x; i < 256; i += blockDim.x) pairs[i] = make_float2(CODE_BOOK[i >> 4], CODE_BOOK[i & 15]);
    __syncthreads();
    // Eight numbers a thread: they never straddle a block, whose size is a multiple of 32.
    u64 groups = m.numbers / 8;
    u64 start = (u64)blockIdx.x * blockDim.x + threadIdx.x, step = (u64)gridDim.x * blockDim.x;
    for (u64 group = start; group < groups; group += step) {
        u32 codes = ((const u32*)m.codes)[group];
        float scale = scale_of(m, group * 8 >> m.block_shift);
        float out[8];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float2 pair = pairs[(codes >> (8 * i)) & 255u];
            out[2 * i] = __fmul_rn(pair.x, scale);
            out[2 * i + 1] = __fmul_rn(pair.y, scale);
        }
        if (wide) {
            ((float4*)wide)[2 * group] = make_float4(out[0], out[1], out[2], out[3]);
            ((float4*)wide)[2 * group + 1] = make_float4(out[4], out[5], out[6], out[7]);
        } else {
            u32 words[4];
#pragma unroll
            for (int i = 0; i < 4; i++) words[i] = pack_bf16(out[2 * i], out[2 * i + 1]);
            ((uint4*)narrow)[group] = make_uint4(words[0], words[1], words[2], words[3]);
        }
    }
    for (u64 i = groups * 8 + start; i < m.numbers; i += step) {
        float2 pair = pairs[m.codes[i / 2]];
        float value = __fmul_rn(i % 2 ? pair.y : pair.x, scale_of(m, i >> m.block_shift));
        if (wide) wide[i] = value;
        else narrow[i] = to_bf16(value);
    }
}

extern "C" __global__ void nf4_f32(Nf4 m, float* out) { dequantise(m, out, nullptr); }
extern "C" __global__ void nf4_bf16(Nf4 m, u16* out) { dequantise(m, nullptr, out); }
