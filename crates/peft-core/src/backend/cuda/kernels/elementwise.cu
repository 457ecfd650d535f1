// Operations that move or combine numbers row by row. A block takes one row (blockIdx.x) and a share of its columns
// (blockIdx.y); threads run along the columns, so that accesses are coalesced, eight numbers at a time where they can.

#define FOR_COLUMNS(c, columns) \
    for (u32 c = blockIdx.y * blockDim.x + threadIdx.x; c < (columns); c += gridDim.y * blockDim.x)

// Defines NAME_f32 and NAME_bf16 from a template's name, parameters and arguments; T is the kind of number.
#define BOTH(name, parameters, arguments)                                                       \
    namespace f32_##name { typedef float T; extern "C" __global__ void name##_f32 parameters { name##_of arguments; } }  \
    namespace bf16_##name { typedef bf16 T; extern "C" __global__ void name##_bf16 parameters { name##_of arguments; } }
// Defines NAME_f32_f32 and so on: From the kind that is read, To the kind that is written.
#define MIXED_ONE(name, from, to, parameters, arguments)                                        \
    namespace from##_##to##_##name { typedef number_##from From; typedef number_##to To;        \
    extern "C" __global__ void name##_##from##_##to parameters { name##_of arguments; } }
#define MIXED(name, parameters, arguments)                                                      \
    MIXED_ONE(name, f32, f32, parameters, arguments) MIXED_ONE(name, f32, bf16, parameters, arguments) \
    MIXED_ONE(name, bf16, f32, parameters, arguments) MIXED_ONE(name, bf16, bf16, parameters, arguments)
typedef float number_f32;
typedef bf16 number_bf16;

template <class T>
__device__ __forceinline__ void fill_of(MatrixOf<T> to, float value) {
    T* out = row_of(to, blockIdx.x);
    FOR_COLUMNS(c, to.columns) set(out + c, value);
}
BOTH(fill, (MatrixOf<T> to, float value), (to, value))

// to = from, or to += from.
template <bool ADD, class F, class T>
__device__ __forceinline__ void move_row(const F* in, T* out, u32 columns, bool eights) {
    if (eights) {
        FOR_COLUMNS(c, columns / 8) {
            float x[8], y[8];
            get8(in + 8 * c, x);
            if (ADD) {
                get8(out + 8 * c, y);
#pragma unroll
                for (int i = 0; i < 8; i++) x[i] += y[i];
            }
            set8(out + 8 * c, x);
        }
    } else {
        FOR_COLUMNS(c, columns) set(out + c, ADD ? get(out + c) + get(in + c) : get(in + c));
    }
}

template <class F, class T>
__device__ __forceinline__ void copy_of(MatrixOf<F> from, MatrixOf<T> to) {
    move_row<false>(row_of(from, blockIdx.x), row_of(to, blockIdx.x), to.columns, by_eights(from) && by_eights(to));
}
MIXED(copy, (MatrixOf<From> from, MatrixOf<To> to), (from, to))

template <class F, class T>
__device__ __forceinline__ void add_of(MatrixOf<F> from, MatrixOf<T> to) {
    move_row<true>(row_of(from, blockIdx.x), row_of(to, blockIdx.x), to.columns, by_eights(from) && by_eights(to));
}
MIXED(add, (MatrixOf<From> from, MatrixOf<To> to), (from, to))

template <class F, class T>
__device__ __forceinline__ void add_bias_of(MatrixOf<F> bias, MatrixOf<T> to) {
    move_row<true>(bias.data, row_of(to, blockIdx.x), to.columns, by_eights(bias) && by_eights(to));
}
MIXED(add_bias, (MatrixOf<From> bias, MatrixOf<To> to), (bias, to))

// out[r, :] = table[ids[r], :].
template <class F, class T>
__device__ __forceinline__ void gather_table_of(const u32* ids, const F* table, MatrixOf<T> out) {
    const F* in = table + (u64)ids[blockIdx.x] * out.columns;
    move_row<false>(in, row_of(out, blockIdx.x), out.columns, by_eights(table, out.columns) && by_eights(out));
}
MIXED(gather_table, (const u32* ids, const From* table, MatrixOf<To> out), (ids, table, out))

template <class T>
__device__ __forceinline__ void gather_rows_of(const u32* rows, MatrixOf<T> x, MatrixOf<T> out) {
    move_row<false>(row_of(x, rows[blockIdx.x]), row_of(out, blockIdx.x), out.columns, by_eights(x) && by_eights(out));
}
BOTH(gather_rows, (const u32* rows, MatrixOf<T> x, MatrixOf<T> out), (rows, x, out))

template <class T>
__device__ __forceinline__ void scatter_rows_of(const u32* rows, MatrixOf<T> x, MatrixOf<T> out) {
    move_row<false>(row_of(x, blockIdx.x), row_of(out, rows[blockIdx.x]), x.columns, by_eights(x) && by_eights(out));
}
BOTH(scatter_rows, (const u32* rows, MatrixOf<T> x, MatrixOf<T> out), (rows, x, out))

// Gated activations, f(gate) * up. What is computed again in the backward pass has the same bits.
struct Silu {
    // f(g) and its slope.
    static __device__ __forceinline__ void at(float g, float& value, float& slope) {
        float sigmoid = 1.0f / (1.0f + expf(-g));
        value = g * sigmoid;
        slope = sigmoid * (1.0f + g * (1.0f - sigmoid));
    }
};

// By the approximation x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
struct Gelu {
    static __device__ __forceinline__ void at(float x, float& value, float& slope) {
        float bend = tanhf(0.7978845608f * (x + 0.044715f * x * x * x));
        float inner = 0.7978845608f * (1.0f + 3.0f * 0.044715f * x * x);
        value = 0.5f * x * (1.0f + bend);
        slope = 0.5f * (1.0f + bend) + 0.5f * x * (1.0f - bend * bend) * inner;
    }
};

template <class F, class T>
__device__ __forceinline__ void gated(MatrixOf<T> gate, MatrixOf<T> up, MatrixOf<T> out) {
    const T* g = row_of(gate, blockIdx.x);
    const T* u = row_of(up, blockIdx.x);
    T* to = row_of(out, blockIdx.x);
    float value, slope;
    if (by_eights(gate) && by_eights(up) && by_eights(out)) {
        FOR_COLUMNS(c, out.columns / 8) {
            float x[8], y[8];
            get8(g + 8 * c, x);
            get8(u + 8 * c, y);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                F::at(x[i], value, slope);
                x[i] = value * y[i];
            }
            set8(to + 8 * c, x);
        }
    } else {
        FOR_COLUMNS(c, out.columns) {
            F::at(get(g + c), value, slope);
            set(to + c, value * get(u + c));
        }
    }
}

// The product in the place of its gradient, and the gradients of gate and up in theirs.
template <class F>
__device__ __forceinline__ void gated_gradient(float& out, float& gate, float& up) {
    float dy = out, u = up, value, slope;
    F::at(gate, value, slope);
    out = value * u;
    gate = dy * u * slope;
    up = dy * value;
}

template <class F, class T>
__device__ __forceinline__ void gated_backward(MatrixOf<T> dout, MatrixOf<T> gate, MatrixOf<T> up) {
    T* d = row_of(dout, blockIdx.x);
    T* gs = row_of(gate, blockIdx.x);
    T* us = row_of(up, blockIdx.x);
    if (by_eights(gate) && by_eights(up) && by_eights(dout)) {
        FOR_COLUMNS(c, gate.columns / 8) {
            float dy[8], g[8], u[8];
            get8(d + 8 * c, dy);
            get8(gs + 8 * c, g);
            get8(us + 8 * c, u);
#pragma unroll
            for (int i = 0; i < 8; i++) gated_gradient<F>(dy[i], g[i], u[i]);
            set8(d + 8 * c, dy);
            set8(gs + 8 * c, g);
            set8(us + 8 * c, u);
        }
    } else {
        FOR_COLUMNS(c, gate.columns) {
            float dy = get(d + c), g = get(gs + c), u = get(us + c);
            gated_gradient<F>(dy, g, u);
            set(d + c, dy);
            set(gs + c, g);
            set(us + c, u);
        }
    }
}

template <class T>
__device__ __forceinline__ void swiglu_of(MatrixOf<T> gate, MatrixOf<T> up, MatrixOf<T> out) { gated<Silu>(gate, up, out); }
BOTH(swiglu, (MatrixOf<T> gate, MatrixOf<T> up, MatrixOf<T> out), (gate, up, out))

template <class T>
__device__ __forceinline__ void geglu_of(MatrixOf<T> gate, MatrixOf<T> up, MatrixOf<T> out) { gated<Gelu>(gate, up, out); }
BOTH(geglu, (MatrixOf<T> gate, MatrixOf<T> up, MatrixOf<T> out), (gate, up, out))

template <class T>
__device__ __forceinline__ void swiglu_backward_of(MatrixOf<T> dout, MatrixOf<T> gate, MatrixOf<T> up) {
    gated_backward<Silu>(dout, gate, up);
}
BOTH(swiglu_backward, (MatrixOf<T> dout, MatrixOf<T> gate, MatrixOf<T> up), (dout, gate, up))

template <class T>
__device__ __forceinline__ void geglu_backward_of(MatrixOf<T> dout, MatrixOf<T> gate, MatrixOf<T> up) {
    gated_backward<Gelu>(dout, gate, up);
}
BOTH(geglu_backward, (MatrixOf<T> dout, MatrixOf<T> gate, MatrixOf<T> up), (dout, gate, up))

extern "C" __global__ void scale(Any to, float factor) {
    FOR_COLUMNS(c, to.columns) set(to, blockIdx.x, c, get(to, blockIdx.x, c) * factor);
}

extern "C" __global__ void soft_cap(Any x, float cap) {
    FOR_COLUMNS(c, x.columns) set(x, blockIdx.x, c, cap * tanhf(get(x, blockIdx.x, c) / cap));
}

__device__ __forceinline__ void turn(float& first, float& second, float cosine, float sine) {
    float a = first, b = second;
    first = a * cosine - b * sine;
    second = b * cosine + a * sine;
}

// Turns the pairs (i, i + half) of every head. `table` holds the cosines, then the sines of a position in one row.
template <class T>
__device__ __forceinline__ void rope_of(const u32* positions, u32 half, MatrixOf<float> table, float sign,
                                        MatrixOf<T> x) {
    const float* angles = row_of(table, positions[blockIdx.x]);
    T* row = row_of(x, blockIdx.x);
    if (by_eights(x) && by_eights(table) && half % 8 == 0) {
        FOR_COLUMNS(i, x.columns / 16) {
            u32 head = i / (half / 8), pair = i % (half / 8) * 8;
            T* a = row + (u64)head * 2 * half + pair;
            float first[8], second[8], cosine[8], sine[8];
            get8(a, first);
            get8(a + half, second);
            get8(angles + pair, cosine);
            get8(angles + half + pair, sine);
#pragma unroll
            for (int j = 0; j < 8; j++) turn(first[j], second[j], cosine[j], sign * sine[j]);
            set8(a, first);
            set8(a + half, second);
        }
    } else {
        FOR_COLUMNS(i, x.columns / 2) {
            u32 head = i / half, pair = i % half;
            T* a = row + (u64)head * 2 * half + pair;
            float first = get(a), second = get(a + half);
            turn(first, second, angles[pair], sign * angles[half + pair]);
            set(a, first);
            set(a + half, second);
        }
    }
}
BOTH(rope, (const u32* positions, u32 half, MatrixOf<float> table, float sign, MatrixOf<T> x),
     (positions, half, table, sign, x))

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
template <class T>
__device__ __forceinline__ void dropout_of(const u64* samples, const u32* positions, u32 key0, u32 key1, u32 threshold,
                                           float scale, u32 accumulate, MatrixOf<T> x, MatrixOf<T> out) {
    const T* in = row_of(x, blockIdx.x);
    T* to = row_of(out, blockIdx.x);
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
                float kept = half < threshold ? 0.0f : get(in + feature) * scale;
                set(to + feature, accumulate ? get(to + feature) + kept : kept);
            }
        }
    }
}
BOTH(dropout,
     (const u64* samples, const u32* positions, u32 key0, u32 key1, u32 threshold, float scale, u32 accumulate,
      MatrixOf<T> x, MatrixOf<T> out),
     (samples, positions, key0, key1, threshold, scale, accumulate, x, out))
