// The backward pass of a branch y += scale (x A^T) B^T reads dy for two products, dp = scale dy B and
// db += scale dy^T p with p = x A^T. Here it is read once, which is what the time goes into: both products of a tile are
// computed while it stands in shared memory.
//
// A block takes 512 columns of dy and a stretch of its rows. It sums db over its rows and dp over its columns; a second
// kernel adds the blocks' sums in order, so that the same inputs give the same bits.

#define STRIP 64
#define LOW_RANK_COLUMNS 512
#define LOW_RANK_ROWS 32
#ifndef LOW_RANK_STAGES
#define LOW_RANK_STAGES 4
#endif
#define LOW_RANK_THREADS 256
// Numbers from one row of a tile to the next: padded, so that eight rows hit different banks.
#define LOW_RANK_LINE (LOW_RANK_COLUMNS + 8)

extern __shared__ uint4 low_rank_shared[];

__device__ __forceinline__ u32 low_rank_at(const void* pointer) {
    u64 address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
    return (u32)address;
}

// Sixteen bytes into shared memory in the background; zeros where `there` is not set.
__device__ __forceinline__ void fetch(u32 to, const void* from, bool there) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

__device__ __forceinline__ void four_matrices(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void four_matrices_turned(u32 (&to)[4], u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from) : "memory");
}

__device__ __forceinline__ void two_matrices_turned(u32& first, u32& second, u32 from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                 : "=r"(first), "=r"(second) : "r"(from) : "memory");
}

// dp_parts[column block][row][r] and db_parts[row block][column][r]. `stretch`, rows of a block, is a multiple of
// LOW_RANK_ROWS. dy and p have rows at multiples of 16 bytes; b has no gaps.
template <int RANK>
__device__ __forceinline__ void low_rank_slopes(MatrixOf<bf16> dy, const bf16* b, MatrixOf<bf16> p, u32 stretch,
                                                float* dp_parts, float* db_parts) {
    const int TILES = RANK / 8, P_LINE = RANK + 8;
    bf16* tiles = (bf16*)low_rank_shared;
    bf16* ps = tiles + LOW_RANK_STAGES * LOW_RANK_ROWS * LOW_RANK_LINE;
    float* sums = (float*)(ps + LOW_RANK_STAGES * LOW_RANK_ROWS * P_LINE);
    u32 warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    u32 first = blockIdx.x * LOW_RANK_COLUMNS, strip = warp * STRIP;
    u32 start = blockIdx.y * stretch, end = min(dy.rows, start + stretch);
    u32 steps = end > start ? (end - start + LOW_RANK_ROWS - 1) / LOW_RANK_ROWS : 0;

    // The warp's part of B, as operand: depth along its 64 columns of dy.
    u32 operand[STRIP / 16][TILES][2];
#pragma unroll
    for (int k = 0; k < STRIP / 16; k++) {
#pragma unroll
        for (int n = 0; n < TILES; n++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                u32 row = first + strip + 16 * k + 8 * half + 2 * t, column = 8 * n + g;
                u32 low = row < dy.columns ? b[(u64)row * RANK + column].bits : 0;
                u32 high = row + 1 < dy.columns ? b[(u64)(row + 1) * RANK + column].bits : 0;
                operand[k][n][half] = low | high << 16;
            }
        }
    }
    auto load = [&](u32 step) {
        if (step < steps) {
            u32 stage = step % LOW_RANK_STAGES, from = start + step * LOW_RANK_ROWS;
            bf16* tile = tiles + stage * LOW_RANK_ROWS * LOW_RANK_LINE;
#pragma unroll
            for (u32 i = 0; i < LOW_RANK_ROWS * LOW_RANK_COLUMNS / 8 / LOW_RANK_THREADS; i++) {
                u32 piece = i * LOW_RANK_THREADS + threadIdx.x;
                u32 r = piece / (LOW_RANK_COLUMNS / 8), c = piece % (LOW_RANK_COLUMNS / 8) * 8;
                bool there = from + r < end && first + c < dy.columns;
                fetch(low_rank_at(tile + r * LOW_RANK_LINE + c), there ? row_of(dy, from + r) + first + c : dy.data, there);
            }
            if (threadIdx.x < LOW_RANK_ROWS * RANK / 8) {
                u32 r = threadIdx.x / (RANK / 8), c = threadIdx.x % (RANK / 8) * 8;
                bool there = from + r < end;
                fetch(low_rank_at(ps + (stage * LOW_RANK_ROWS + r) * P_LINE + c), there ? row_of(p, from + r) + c : p.data,
                      there);
            }
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    float db[STRIP / 16][TILES][4];
#pragma unroll
    for (int m = 0; m < STRIP / 16; m++) {
#pragma unroll
        for (int n = 0; n < TILES; n++) db[m][n][0] = db[m][n][1] = db[m][n][2] = db[m][n][3] = 0.0f;
    }
    for (u32 step = 0; step < LOW_RANK_STAGES - 1; step++) load(step);
    for (u32 step = 0; step < steps; step++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(LOW_RANK_STAGES - 2) : "memory");
        __syncthreads();
        load(step + LOW_RANK_STAGES - 1);
        u32 stage = step % LOW_RANK_STAGES;
        u32 tile = low_rank_at(tiles + stage * LOW_RANK_ROWS * LOW_RANK_LINE + strip);
        u32 p_tile = low_rank_at(ps + stage * LOW_RANK_ROWS * P_LINE);
        // db: columns of dy along rows of the product, its rows along the depth.
#pragma unroll
        for (int k = 0; k < LOW_RANK_ROWS / 16; k++) {
            u32 of_p[TILES][2];
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                two_matrices_turned(of_p[n][0], of_p[n][1], p_tile + 2 * ((16 * k + (lane & 15)) * P_LINE + 8 * n));
            }
            u32 row = 16 * k + (lane & 7) + (lane >> 4) * 8, column = (lane >> 3 & 1) * 8;
#pragma unroll
            for (int m = 0; m < STRIP / 16; m++) {
                u32 a[4];
                four_matrices_turned(a, tile + 2 * (row * LOW_RANK_LINE + 16 * m + column));
#pragma unroll
                for (int n = 0; n < TILES; n++) multiply_16x8(db[m][n], a, of_p[n][0], of_p[n][1]);
            }
        }
        // dp, over the warp's columns.
#pragma unroll
        for (int m = 0; m < LOW_RANK_ROWS / 16; m++) {
            float dp[TILES][4];
#pragma unroll
            for (int n = 0; n < TILES; n++) dp[n][0] = dp[n][1] = dp[n][2] = dp[n][3] = 0.0f;
#pragma unroll
            for (int k = 0; k < STRIP / 16; k++) {
                u32 a[4];
                four_matrices(a, tile + 2 * ((16 * m + (lane & 15)) * LOW_RANK_LINE + 16 * k + (lane >> 4) * 8));
#pragma unroll
                for (int n = 0; n < TILES; n++) multiply_16x8(dp[n], a, operand[k][n][0], operand[k][n][1]);
            }
            float* to = sums + (warp * LOW_RANK_ROWS + 16 * m + g) * RANK + 2 * t;
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                *(float2*)(to + 8 * n) = make_float2(dp[n][0], dp[n][1]);
                *(float2*)(to + 8 * RANK + 8 * n) = make_float2(dp[n][2], dp[n][3]);
            }
        }
        __syncthreads();
        u32 from = start + step * LOW_RANK_ROWS;
        for (u32 i = threadIdx.x; i < LOW_RANK_ROWS * RANK; i += LOW_RANK_THREADS) {
            float sum = 0.0f;
#pragma unroll
            for (u32 w = 0; w < LOW_RANK_THREADS / 32; w++) sum += sums[w * LOW_RANK_ROWS * RANK + i];
            if (from + i / RANK < end) dp_parts[((u64)blockIdx.x * dy.rows + from) * RANK + i] = sum;
        }
    }
#pragma unroll
    for (int m = 0; m < STRIP / 16; m++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            u32 column = first + strip + 16 * m + 8 * half + g;
            if (column >= dy.columns) continue;
            float* to = db_parts + ((u64)blockIdx.y * dy.columns + column) * RANK + 2 * t;
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                *(float2*)(to + 8 * n) = make_float2(db[m][n][2 * half], db[m][n][2 * half + 1]);
            }
        }
    }
}

#define LOW_RANK(rank)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(LOW_RANK_THREADS)                                                     \
    low_rank_slopes_##rank(MatrixOf<bf16> dy, const bf16* b, MatrixOf<bf16> p, u32 stretch, float* dp_parts,           \
                           float* db_parts) {                                                                          \
        low_rank_slopes<rank>(dy, b, p, stretch, dp_parts, db_parts);                                                  \
    }
LOW_RANK(8)
LOW_RANK(16)
LOW_RANK(32)

// Adds the blocks' sums: dp = scale times those of its `columns` column blocks, db += scale times those of its `rows` row
// blocks. dp.columns is the rank, and that of db. A thread takes two numbers.
extern "C" __global__ void low_rank_sum(const float* dp_parts, u32 columns, const float* db_parts, u32 rows, float scale,
                                        MatrixOf<bf16> dp, MatrixOf<float> db) {
    u32 rank = dp.columns, dp_pairs = dp.rows * rank / 2, db_pairs = db.rows * rank / 2;
    for (u32 i = blockIdx.x * blockDim.x + threadIdx.x; i < dp_pairs + db_pairs; i += gridDim.x * blockDim.x) {
        bool slope = i < dp_pairs;
        u32 pair = slope ? i : i - dp_pairs, count = slope ? columns : rows, step = slope ? dp_pairs : db_pairs;
        const float2* from = (const float2*)(slope ? dp_parts : db_parts) + pair;
        float low = 0.0f, high = 0.0f;
#pragma unroll 8
        for (u32 part = 0; part < count; part++) {
            float2 x = from[(u64)part * step];
            low += x.x;
            high += x.y;
        }
        u32 row = 2 * pair / rank, column = 2 * pair % rank;
        if (slope) {
            *(u32*)(row_of(dp, row) + column) = pack_bf16(scale * low, scale * high);
        } else {
            float* to = row_of(db, row) + column;
            to[0] += scale * low;
            to[1] += scale * high;
        }
    }
}
