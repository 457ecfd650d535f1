// Operations that move or combine numbers row by row. A block takes one row (blockIdx.x) and a share of its columns
// (blockIdx.y); threads run along the columns, so that accesses are coalesced.

#define FOR_COLUMNS(c, columns) \
    for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < (columns); c += gridDim.y * blockDim.x)

extern "C" __global__ void fill(Matrix to, float value) {
    float* out = row_of(to, blockIdx.x);
    FOR_COLUMNS(c, to.columns) out[c] = value;
}

extern "C" __global__ void copy(Matrix from, Matrix to) {
    const float* in = row_of(from, blockIdx.x);
    float* out = row_of(to, blockIdx.x);
    FOR_COLUMNS(c, to.columns) out[c] = in[c];
}

extern "C" __global__ void add(Matrix from, Matrix to) {
    const float* in = row_of(from, blockIdx.x);
    float* out = row_of(to, blockIdx.x);
    FOR_COLUMNS(c, to.columns) out[c] += in[c];
}

extern "C" __global__ void add_bias(Matrix bias, Matrix to) {
    float* out = row_of(to, blockIdx.x);
    FOR_COLUMNS(c, to.columns) out[c] += bias.data[c];
}

// out[r, :] = table[ids[r], :], for a table of f32 or of bf16.
extern "C" __global__ void gather_f32(const u32* ids, const float* table, Matrix out) {
    const float* in = table + (u64)ids[blockIdx.x] * out.columns;
    float* to = row_of(out, blockIdx.x);
    FOR_COLUMNS(c, out.columns) to[c] = in[c];
}

extern "C" __global__ void gather_bf16(const u32* ids, const u16* table, Matrix out) {
    const u16* in = table + (u64)ids[blockIdx.x] * out.columns;
    float* to = row_of(out, blockIdx.x);
    FOR_COLUMNS(c, out.columns) to[c] = from_bf16(in[c]);
}

extern "C" __global__ void gather_rows(const u32* rows, Matrix x, Matrix out) {
    const float* in = row_of(x, rows[blockIdx.x]);
    float* to = row_of(out, blockIdx.x);
    FOR_COLUMNS(c, out.columns) to[c] = in[c];
}

extern "C" __global__ void scatter_rows(const u32* rows, Matrix x, Matrix out) {
    const float* in = row_of(x, blockIdx.x);
    float* to = row_of(out, rows[blockIdx.x]);
    FOR_COLUMNS(c, x.columns) to[c] = in[c];
}

// bf16 without gaps to f32 without gaps.
extern "C" __global__ void widen(const u16* from, float* to, u64 count) {
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
        to[i] = from_bf16(from[i]);
    }
}

// A matrix of f32 to bf16 without gaps, `columns` a multiple of 4 and rows aligned to 16 bytes where `wide` is set.
extern "C" __global__ void narrow(Matrix from, u16* to, u32 wide) {
    const float* in = row_of(from, blockIdx.x);
    u16* out = to + (u64)blockIdx.x * from.columns;
    if (wide) {
        FOR_COLUMNS(c, from.columns / 4) {
            float4 x = ((const float4*)in)[c];
            ushort4 y = {to_bf16(x.x), to_bf16(x.y), to_bf16(x.z), to_bf16(x.w)};
            ((ushort4*)out)[c] = y;
        }
    } else {
        FOR_COLUMNS(c, from.columns) out[c] = to_bf16(in[c]);
    }
}

extern "C" __global__ void swiglu(Matrix gate, Matrix up, Matrix out) {
    const float* g = row_of(gate, blockIdx.x);
    const float* u = row_of(up, blockIdx.x);
    float* to = row_of(out, blockIdx.x);
    FOR_COLUMNS(c, out.columns) to[c] = g[c] / (1.0f + expf(-g[c])) * u[c];
}

extern "C" __global__ void swiglu_backward(Matrix dout, Matrix gate, Matrix up) {
    const float* d = row_of(dout, blockIdx.x);
    float* gs = row_of(gate, blockIdx.x);
    float* us = row_of(up, blockIdx.x);
    FOR_COLUMNS(c, gate.columns) {
        float g = gs[c], u = us[c], dy = d[c];
        float sigmoid = 1.0f / (1.0f + expf(-g));
        gs[c] = dy * u * sigmoid * (1.0f + g * (1.0f - sigmoid));
        us[c] = dy * g * sigmoid;
    }
}

// gelu(x) by its approximation x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
__device__ __forceinline__ float gelu_bend(float x) {
    return tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
}

extern "C" __global__ void geglu(Matrix gate, Matrix up, Matrix out) {
    const float* g = row_of(gate, blockIdx.x);
    const float* u = row_of(up, blockIdx.x);
    float* to = row_of(out, blockIdx.x);
    FOR_COLUMNS(c, out.columns) to[c] = 0.5f * g[c] * (1.0f + gelu_bend(g[c])) * u[c];
}

extern "C" __global__ void geglu_backward(Matrix dout, Matrix gate, Matrix up) {
    const float* d = row_of(dout, blockIdx.x);
    float* gs = row_of(gate, blockIdx.x);
    float* us = row_of(up, blockIdx.x);
    FOR_COLUMNS(c, gate.columns) {
        float x = gs[c], u = us[c], dy = d[c];
        float bend = gelu_bend(x);
        float inner = 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
        gs[c] = dy * u * (0.5f * (1.0f + bend) + 0.5f * x * (1.0f - bend * bend) * inner);
        us[c] = dy * 0.5f * x * (1.0f + bend);
    }
}

extern "C" __global__ void scale(Matrix to, float factor) {
    float* out = row_of(to, blockIdx.x);
    FOR_COLUMNS(c, to.columns) out[c] *= factor;
}

extern "C" __global__ void soft_cap(Matrix x, float cap) {
    float* row = row_of(x, blockIdx.x);
    FOR_COLUMNS(c, x.columns) row[c] = cap * tanhf(row[c] / cap);
}

// Turns the pairs (i, i + half) of every head. `table` holds the cosines, then the sines of a position in one row.
extern "C" __global__ void rope(const u32* positions, u32 half, Matrix table, float sign, Matrix x) {
    const float* angles = row_of(table, positions[blockIdx.x]);
    float* row = row_of(x, blockIdx.x);
    FOR_COLUMNS(i, x.columns / 2) {
        u32 head = i / half, pair = i % half;
        float* a = row + (u64)head * 2 * half + pair;
        float cosine = angles[pair], sine = sign * angles[half + pair];
        float first = a[0], second = a[half];
        a[0] = first * cosine - second * sine;
        a[half] = second * cosine + first * sine;
    }
}

// Philox4x32-10, as src/random.rs.
__device__ __forceinline__ uint4 philox(uint4 counter, u32 key0, u32 key1) {
#pragma unroll
    for (int round = 0; round < 10; round++) {
        u32 hi0 = __umulhi(0xD2511F53u, counter.x), lo0 = 0xD2511F53u * counter.x;
        u32 hi1 = __umulhi(0xCD9E8D57u, counter.z), lo1 = 0xCD9E8D57u * counter.z;
        counter = make_uint4(hi1 ^ counter.y ^ key0, lo1, hi0 ^ counter.w ^ key1, lo0);
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

// One thread draws one block of Philox: eight features, the layout of src/random.rs. `accumulate` adds to `out`.
extern "C" __global__ void dropout(const u64* samples, const u32* positions, u32 key0, u32 key1, u32 threshold,
                                   float scale, u32 accumulate, Matrix x, Matrix out) {
    const float* in = row_of(x, blockIdx.x);
    float* to = row_of(out, blockIdx.x);
    u64 sample = samples[blockIdx.x];
    u32 token = positions[blockIdx.x];
    FOR_COLUMNS(block, (x.columns + 63) / 64 * 8) {
        u32 group = block / 8, lane = block % 8;
        uint4 words = philox(make_uint4(block, token, (u32)sample, (u32)(sample >> 32)), key0, key1);
        u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int part = 0; part < 8; part++) {
            u32 feature = group * 64 + part * 8 + lane;
            u32 half = (word[part / 2] >> (16 * (part % 2))) & 0xffffu;
            if (feature < x.columns) {
                float kept = half < threshold ? 0.0f : in[feature] * scale;
                to[feature] = accumulate ? to[feature] + kept : kept;
            }
        }
    }
}
