// Causal attention over packed spans, without a matrix of scores in memory (Dao et al., arXiv 2205.14135).
//
// Compiled for one HEAD_DIM (a multiple of 8). Numbers in memory are f32. Products run on tensor cores with f32 sums,
// their operands in TF32 (mma.sync.m16n8k8, sm_80 and up) or, with HALVES, in bf16 (m16n8k16; HEAD_DIM a multiple of
// 16); with EXACT they run in f32 by the same threads in the same layout. A warp owns 16 rows.
// No atomics: sums run in a fixed order, the same inputs give the same bits.

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef WARPS
#define WARPS 4
#endif
// Columns of a tile of scores.
#ifndef TILE
#define TILE 32
#endif
#define ROWS (16 * WARPS)
#define THREADS (32 * WARPS)
// Rows in shared memory are padded, so that the lanes of a warp hit different banks.
#ifdef HALVES
typedef u16 Number;
#define PAD 8
#define EXP __expf
#else
typedef float Number;
#define PAD 4
#define EXP expf
#endif
// Numbers in memory.
#ifdef STORED_BF16
typedef bf16 Stored;
#else
typedef float Stored;
#endif
typedef MatrixOf<Stored> Tensor;
#define LD (HEAD_DIM + PAD)
#define LS (TILE + PAD)

// Queries `query_start ..`, keys `key_start ..`; query i sees keys 0 ..= i + keys - queries.
struct Span {
    u32 query_start;
    u32 queries;
    u32 key_start;
    u32 keys;
};

// With a `cap` above 0 the scaled scores become cap tanh(score / cap); with a `window` above 0 a query sees no more
// than the last `window` of its keys.
struct Shape {
    u32 heads;
    u32 group;
    float scale;
    float cap;
    u32 window;

    // Whether the query at `place` of the span's keys sees `key`, which the caller knows to be one of them.
    __device__ __forceinline__ bool sees(int place, int key) const {
        return key <= place && (!window || key > place - (int)window);
    }
    // The score of a product.
    __device__ __forceinline__ float score(float x) const {
        return cap > 0.0f ? cap * tanhf(x * scale / cap) : x * scale;
    }
    // Its slope, given the score.
    __device__ __forceinline__ float slope(float score) const {
        return cap > 0.0f ? scale * (1.0f - score / cap * (score / cap)) : scale;
    }
};

__device__ __forceinline__ u32 tf32(float x) {
    u32 y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

#ifdef HALVES
__device__ __forceinline__ u32 shared_address(const void* pointer) {
    u64 address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
    return (u32)address;
}

__device__ __forceinline__ void load_matrices(u32 (&to)[4], const Number* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 (&to)[4], const Number* from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(shared_address(from)) : "memory");
}

__device__ __forceinline__ void multiply_tile(float (&acc)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 pair(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
#endif

// acc[16 x 8 N] += A[16 x K] B[K x 8 N] for one warp, A(i, k) = a[i * ai + k * ak], B(k, n) = b[k * bk + n * bn].
// acc[n] holds (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1) of columns 8 n .., with g = lane / 4, t = lane % 4.
template <int N, int K>
__device__ __forceinline__ void multiply(float (&acc)[N][4], const Number* a, int ai, int ak, const Number* b, int bk,
                                         int bn) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#ifdef HALVES
    // A lies with k along rows (ak = 1); B with k along rows (bk = 1), or along columns, turned while it is loaded.
    const Number* from = a + (lane & 15) * ai + (lane >> 4) * 8;
    int part = lane >> 3, r = lane & 7, n_part = (part >> 1) * 8, k_part = (part & 1) * 8;
#pragma unroll
    for (int k = 0; k < K; k += 16) {
        u32 a_part[4];
        load_matrices(a_part, from + k);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 b_part[4];
            if (bk == 1) load_matrices(b_part, b + (8 * n + n_part + r) * bn + k + k_part);
            else load_transposed(b_part, b + (k + k_part + r) * bk + 8 * n + n_part);
            multiply_tile(acc[n], a_part, b_part[0], b_part[1]);
            multiply_tile(acc[n + 1], a_part, b_part[2], b_part[3]);
        }
    }
#elif defined(EXACT)
    for (int k = 0; k < K; k++) {
        float a0 = a[g * ai + k * ak], a1 = a[(g + 8) * ai + k * ak];
#pragma unroll
        for (int n = 0; n < N; n++) {
            float b0 = b[k * bk + (8 * n + 2 * t) * bn], b1 = b[k * bk + (8 * n + 2 * t + 1) * bn];
            acc[n][0] += a0 * b0;
            acc[n][1] += a0 * b1;
            acc[n][2] += a1 * b0;
            acc[n][3] += a1 * b1;
        }
    }
#else
#pragma unroll 4
    for (int k = 0; k < K; k += 8) {
        u32 a0 = tf32(a[g * ai + (k + t) * ak]), a1 = tf32(a[(g + 8) * ai + (k + t) * ak]);
        u32 a2 = tf32(a[g * ai + (k + t + 4) * ak]), a3 = tf32(a[(g + 8) * ai + (k + t + 4) * ak]);
#pragma unroll
        for (int n = 0; n < N; n++) {
            u32 b0 = tf32(b[(k + t) * bk + (8 * n + g) * bn]), b1 = tf32(b[(k + t + 4) * bk + (8 * n + g) * bn]);
            asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3])
                : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
        }
    }
#endif
}

template <int N>
__device__ __forceinline__ void clear(float (&acc)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = acc[n][2] = acc[n][3] = 0.0f;
}

__device__ __forceinline__ float4 get4(const float* p) { return *(const float4*)p; }
__device__ __forceinline__ float4 get4(const bf16* p) {
    uint2 w = *(const uint2*)p;
    return make_float4(__uint_as_float(w.x << 16), __uint_as_float(w.x & 0xffff0000u), __uint_as_float(w.y << 16),
                       __uint_as_float(w.y & 0xffff0000u));
}

// `count` rows of a head into shared memory; rows from `valid` on become 0.
__device__ __forceinline__ void load(Number* to, const Tensor& from, u64 row, u32 column, int count, int valid) {
    // Sixteen bytes at once where all rows begin at a multiple of that.
    bool aligned = (from.stride & 3) == 0 && ((u64)from.data & (4 * sizeof(Stored) - 1)) == 0;
    for (int i = threadIdx.x; i < count * (HEAD_DIM / 4); i += THREADS) {
        int r = i / (HEAD_DIM / 4), c = i % (HEAD_DIM / 4) * 4;
        Number* out = to + r * LD + c;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (r < valid) {
            const Stored* in = row_of(from, row + r) + column + c;
            if (aligned) x = get4(in);
            else x = make_float4(get(in), get(in + 1), get(in + 2), get(in + 3));
        }
#ifdef HALVES
        *(uint2*)out = make_uint2(pair(x.x, x.y), pair(x.z, x.w));
#else
        *(float4*)out = x;
#endif
    }
}

// Rows of accumulators to memory: lane's rows g and g + 8 of the warp's 16.
template <int N>
__device__ __forceinline__ void store(const float (&acc)[N][4], const Tensor& to, u64 row, u32 column, int valid,
                                      float low, float high) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < N; n++) {
        if (g < valid) {
            Stored* out = row_of(to, row + g) + column + 8 * n + 2 * t;
            set(out, acc[n][0] * low), set(out + 1, acc[n][1] * low);
        }
        if (g + 8 < valid) {
            Stored* out = row_of(to, row + g + 8) + column + 8 * n + 2 * t;
            set(out, acc[n][2] * high), set(out + 1, acc[n][3] * high);
        }
    }
}

// Accumulators of a warp to its own part of shared memory.
template <int N>
__device__ __forceinline__ void stage(const float (&acc)[N][4], Number* to) {
    int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    __syncwarp();
#pragma unroll
    for (int n = 0; n < N; n++) {
        Number* low = to + g * LS + 8 * n + 2 * t;
        Number* high = low + 8 * LS;
#ifdef HALVES
        *(u32*)low = pair(acc[n][0], acc[n][1]);
        *(u32*)high = pair(acc[n][2], acc[n][3]);
#else
        low[0] = acc[n][0], low[1] = acc[n][1];
        high[0] = acc[n][2], high[1] = acc[n][3];
#endif
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(THREADS)
attention_forward(const Span* spans, Shape shape, Tensor q, Tensor k, Tensor v, Tensor out, Matrix log_sum) {
    extern __shared__ uint4 shared[];
    Span span = spans[blockIdx.z];
    u32 head = blockIdx.y, first = (gridDim.x - 1 - blockIdx.x) * ROWS;
    if (first >= span.queries) return;
    Number* qs = (Number*)shared;
    Number* ks = qs + ROWS * LD;
    Number* vs = ks + TILE * LD;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    Number* ps = vs + TILE * LD + warp * 16 * LS;
    int queries = min((int)ROWS, (int)(span.queries - first));
    u32 column = head / shape.group * HEAD_DIM;
    load(qs, q, span.query_start + first, head * HEAD_DIM, ROWS, queries);

    // The last key that the rows of this lane see, and of the whole block.
    int past = (int)(span.keys - span.queries);
    int low_row = (int)first + warp * 16 + g, high_row = low_row + 8;
    int end = min((int)span.keys, (int)first + queries + past);
    float largest[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
    float acc[HEAD_DIM / 8][4];
    clear(acc);
    int begin = shape.window ? max(0, (int)first + past + 1 - (int)shape.window) / TILE * TILE : 0;
    for (int start = begin; start < end; start += TILE) {
        __syncthreads();
        int valid = min(TILE, (int)span.keys - start);
        load(ks, k, span.key_start + start, column, TILE, valid);
        load(vs, v, span.key_start + start, column, TILE, valid);
        __syncthreads();
        float s[TILE / 8][4];
        clear(s);
        multiply<TILE / 8, HEAD_DIM>(s, qs + warp * 16 * LD, LD, 1, ks, 1, LD);
        float highest[2] = {largest[0], largest[1]};
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = start + 8 * n + 2 * t + (i & 1), row = i < 2 ? low_row : high_row;
                s[n][i] = shape.sees(row + past, key) && key < (int)span.keys ? shape.score(s[n][i]) : -1e30f;
                highest[i / 2] = fmaxf(highest[i / 2], s[n][i]);
            }
        }
        float factor[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffffu, highest[i], 1));
            highest[i] = fmaxf(highest[i], __shfl_xor_sync(0xffffffffu, highest[i], 2));
            factor[i] = EXP(largest[i] - highest[i]);
            largest[i] = highest[i];
            sum[i] *= factor[i];
        }
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                s[n][i] = s[n][i] <= -1e30f ? 0.0f : EXP(s[n][i] - largest[i / 2]);
                sum[i / 2] += s[n][i];
            }
        }
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 8; n++) {
            acc[n][0] *= factor[0], acc[n][1] *= factor[0], acc[n][2] *= factor[1], acc[n][3] *= factor[1];
        }
        stage(s, ps);
        multiply<HEAD_DIM / 8, TILE>(acc, ps, LS, 1, vs, LD, 1);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
    }
    int valid = queries - warp * 16;
    u64 row = (u64)span.query_start + first + warp * 16;
    store(acc, out, row, head * HEAD_DIM, valid, 1.0f / sum[0], 1.0f / sum[1]);
    if (t == 0) {
        if (g < valid) row_of(log_sum, row + g)[head] = largest[0] + logf(sum[0]);
        if (g + 8 < valid) row_of(log_sum, row + g + 8)[head] = largest[1] + logf(sum[1]);
    }
}

// delta[t, head] = sum over the head of dout * out. A warp takes a row of a head.
extern "C" __global__ void attention_delta(Tensor dout, Tensor out, Matrix delta) {
    u32 head = blockIdx.y * blockDim.y + threadIdx.y;
    if (head >= delta.columns) return;
    const Stored* a = row_of(dout, blockIdx.x) + head * HEAD_DIM;
    const Stored* b = row_of(out, blockIdx.x) + head * HEAD_DIM;
    float sum = 0.0f;
    for (int c = threadIdx.x; c < HEAD_DIM; c += 32) sum += get(a + c) * get(b + c);
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (threadIdx.x == 0) row_of(delta, blockIdx.x)[head] = sum;
}

// dq = sum over keys of dS K, with dS = P (dO V^T - delta) scale. A block takes a tile of queries of a head.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_dq(const Span* spans, Shape shape, Tensor q, Tensor k, Tensor v, Matrix log_sum, Matrix delta, Tensor dout,
             Tensor dq) {
    extern __shared__ uint4 shared[];
    Span span = spans[blockIdx.z];
    u32 head = blockIdx.y, first = (gridDim.x - 1 - blockIdx.x) * ROWS;
    if (first >= span.queries) return;
    Number* qs = (Number*)shared;
    Number* os = qs + ROWS * LD;
    Number* ks = os + ROWS * LD;
    Number* vs = ks + TILE * LD;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    Number* ps = vs + TILE * LD + warp * 16 * LS;
    int queries = min((int)ROWS, (int)(span.queries - first));
    u32 column = head / shape.group * HEAD_DIM;
    load(qs, q, span.query_start + first, head * HEAD_DIM, ROWS, queries);
    load(os, dout, span.query_start + first, head * HEAD_DIM, ROWS, queries);
    int past = (int)(span.keys - span.queries), valid_rows = queries - warp * 16;
    int low_row = (int)first + warp * 16 + g;
    u64 row = (u64)span.query_start + first + warp * 16;
    float logs[2], deltas[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
        bool there = g + 8 * i < valid_rows;
        logs[i] = there ? row_of(log_sum, row + g + 8 * i)[head] : 0.0f;
        deltas[i] = there ? row_of(delta, row + g + 8 * i)[head] : 0.0f;
    }
    int end = min((int)span.keys, (int)first + queries + past);
    float acc[HEAD_DIM / 8][4];
    clear(acc);
    int begin = shape.window ? max(0, (int)first + past + 1 - (int)shape.window) / TILE * TILE : 0;
    for (int start = begin; start < end; start += TILE) {
        __syncthreads();
        int valid = min(TILE, (int)span.keys - start);
        load(ks, k, span.key_start + start, column, TILE, valid);
        load(vs, v, span.key_start + start, column, TILE, valid);
        __syncthreads();
        float s[TILE / 8][4], d[TILE / 8][4];
        clear(s);
        clear(d);
        multiply<TILE / 8, HEAD_DIM>(s, qs + warp * 16 * LD, LD, 1, ks, 1, LD);
        multiply<TILE / 8, HEAD_DIM>(d, os + warp * 16 * LD, LD, 1, vs, 1, LD);
#pragma unroll
        for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                int key = start + 8 * n + 2 * t + (i & 1), query = low_row + (i < 2 ? 0 : 8);
                bool seen = shape.sees(query + past, key) && key < (int)span.keys && query < (int)span.queries;
                float score = shape.score(s[n][i]), p = seen ? EXP(score - logs[i / 2]) : 0.0f;
                s[n][i] = p * (d[n][i] - deltas[i / 2]) * shape.slope(score);
            }
        }
        stage(s, ps);
        multiply<HEAD_DIM / 8, TILE>(acc, ps, LS, 1, ks, LD, 1);
    }
    store(acc, dq, row, head * HEAD_DIM, valid_rows, 1.0f, 1.0f);
}

// dv = sum over queries of P^T dO, dk = sum of dS^T Q, over all query heads of the key head. A block takes a tile of keys.
extern "C" __global__ void __launch_bounds__(THREADS)
attention_dkv(const Span* spans, Shape shape, Tensor q, Tensor k, Tensor v, Matrix log_sum, Matrix delta, Tensor dout,
              Tensor dk, Tensor dv) {
    extern __shared__ uint4 shared[];
    Span span = spans[blockIdx.z];
    u32 kv_head = blockIdx.y, first = blockIdx.x * ROWS;
    if (first >= span.keys) return;
    Number* ks = (Number*)shared;
    Number* vs = ks + ROWS * LD;
    Number* qs = vs + ROWS * LD;
    Number* os = qs + TILE * LD;
    float* logs = (float*)(os + TILE * LD);
    float* deltas = logs + TILE;
    int warp = threadIdx.x / 32, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    Number* ps = (Number*)(deltas + TILE) + warp * 16 * LS;
    int keys = min((int)ROWS, (int)(span.keys - first));
    load(ks, k, span.key_start + first, kv_head * HEAD_DIM, ROWS, keys);
    load(vs, v, span.key_start + first, kv_head * HEAD_DIM, ROWS, keys);
    int past = (int)(span.keys - span.queries);
    // The first query that sees a key of this tile, at the start of its tile.
    int begin = max(0, (int)first - past) / TILE * TILE;
    // One past the last query that does.
    int end = shape.window ? min((int)span.queries, (int)first + keys - 1 + (int)shape.window - past) : (int)span.queries;
    float dk_acc[HEAD_DIM / 8][4], dv_acc[HEAD_DIM / 8][4];
    clear(dk_acc);
    clear(dv_acc);
    for (u32 head = kv_head * shape.group; head < (kv_head + 1) * shape.group; head++) {
        for (int start = begin; start < end; start += TILE) {
            __syncthreads();
            int valid = min(TILE, (int)span.queries - start);
            u64 row = (u64)span.query_start + start;
            load(qs, q, row, head * HEAD_DIM, TILE, valid);
            load(os, dout, row, head * HEAD_DIM, TILE, valid);
            for (int i = threadIdx.x; i < TILE; i += THREADS) {
                logs[i] = i < valid ? row_of(log_sum, row + i)[head] : 0.0f;
                deltas[i] = i < valid ? row_of(delta, row + i)[head] : 0.0f;
            }
            __syncthreads();
            float s[TILE / 8][4], d[TILE / 8][4];
            clear(s);
            clear(d);
            multiply<TILE / 8, HEAD_DIM>(s, ks + warp * 16 * LD, LD, 1, qs, 1, LD);
            multiply<TILE / 8, HEAD_DIM>(d, vs + warp * 16 * LD, LD, 1, os, 1, LD);
#pragma unroll
            for (int n = 0; n < TILE / 8; n++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int column = 8 * n + 2 * t + (i & 1);
                    int key = (int)first + warp * 16 + g + (i < 2 ? 0 : 8);
                    bool seen = shape.sees(start + column + past, key) && key < (int)span.keys && column < valid;
                    float score = shape.score(s[n][i]), p = seen ? EXP(score - logs[column]) : 0.0f;
                    s[n][i] = p;
                    d[n][i] = p * (d[n][i] - deltas[column]) * shape.slope(score);
                }
            }
            stage(s, ps);
            multiply<HEAD_DIM / 8, TILE>(dv_acc, ps, LS, 1, os, LD, 1);
            stage(d, ps);
            multiply<HEAD_DIM / 8, TILE>(dk_acc, ps, LS, 1, qs, LD, 1);
        }
    }
    int valid = keys - warp * 16;
    u64 row = (u64)span.key_start + first + warp * 16;
    store(dk_acc, dk, row, kv_head * HEAD_DIM, valid, 1.0f, 1.0f);
    store(dv_acc, dv, row, kv_head * HEAD_DIM, valid, 1.0f, 1.0f);
}
