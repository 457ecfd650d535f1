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

// out = bf16(W + scale B A) for W of NF4, A [rank, columns] and B [rows, rank] of bf16, sums in f32: a branch of low rank
// costs no pass over activations then. `columns` is a multiple of 64 and `rank` of 2. A block takes 256 rows and 128
// columns, a warp 32 rows. Columns of a tile of products are numbered so that a lane holds sixteen side by side.
#define MERGED_ROWS 256
#define MERGED_COLUMNS 128

__device__ __forceinline__ void multiply_16x8(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

extern "C" __global__ void __launch_bounds__(256)
nf4_merged(Nf4 m, u32 rows, u32 columns, const bf16* a, const bf16* b, u32 rank, float scale, u16* out) {
    extern __shared__ u16 tile[];
    __shared__ float2 pairs[256];
    u32 depth = (rank + 15) / 16 * 16, ld = depth + 2, first = blockIdx.x * MERGED_COLUMNS;
    pairs[threadIdx.x] = make_float2(CODE_BOOK[threadIdx.x >> 4], CODE_BOOK[threadIdx.x & 15]);
    for (u32 i = threadIdx.x; i < depth * MERGED_COLUMNS; i += 256) {
        u32 k = i / MERGED_COLUMNS, c = i % MERGED_COLUMNS;
        tile[c * ld + k] = k < rank && first + c < columns ? a[(u64)k * columns + first + c].bits : (u16)0;
    }
    __syncthreads();
    u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    u32 row = blockIdx.y * MERGED_ROWS + warp * 32 + g;
    for (u32 part = 0; part < MERGED_COLUMNS && first + part < columns; part += 64) {
        // What is read of W, asked for before the products that it is added to.
        uint2 codes[4];
        float blocks[4];
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
            u32 r = min(row + 8 * quarter, rows - 1);
            u64 at = (u64)r * columns + first + part + 16 * t;
            codes[quarter] = *(const uint2*)(m.codes + at / 2);
            blocks[quarter] = scale_of(m, at >> m.block_shift);
        }
        float acc[2][8][4];
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int n = 0; n < 8; n++) acc[half][n][0] = acc[half][n][1] = acc[half][n][2] = acc[half][n][3] = 0.0f;
        }
        for (u32 k = 2 * t; k < depth; k += 16) {
            u32 b_part[2][4];
#pragma unroll
            for (int half = 0; half < 2; half++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    u32 r = row + 16 * half + 8 * (i & 1), at = k + 8 * (i >> 1);
                    b_part[half][i] = r < rows && at < rank ? *(const u32*)(b + (u64)r * rank + at) : 0u;
                }
            }
#pragma unroll
            for (int n = 0; n < 8; n++) {
                const u16* from = tile + (part + 16 * (g >> 1) + 2 * n + (g & 1)) * ld + k;
                u32 a0 = *(const u32*)from, a1 = *(const u32*)(from + 8);
                multiply_16x8(acc[0][n], b_part[0], a0, a1);
                multiply_16x8(acc[1][n], b_part[1], a0, a1);
            }
        }
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
            u32 r = row + 8 * quarter;
            if (r >= rows) continue;
            u64 at = (u64)r * columns + first + part + 16 * t;
            float block = blocks[quarter];
            u32 words[8];
#pragma unroll
            for (int n = 0; n < 8; n++) {
                float2 pair = pairs[((n < 4 ? codes[quarter].x : codes[quarter].y) >> (8 * (n & 3))) & 255u];
                const float* sum = &acc[quarter >> 1][n][2 * (quarter & 1)];
                words[n] = pack_bf16(fmaf(scale, sum[0], __fmul_rn(pair.x, block)),
                                     fmaf(scale, sum[1], __fmul_rn(pair.y, block)));
            }
            ((uint4*)(out + at))[0] = make_uint4(words[0], words[1], words[2], words[3]);
            ((uint4*)(out + at))[1] = make_uint4(words[4], words[5], words[6], words[7]);
        }
    }
}
