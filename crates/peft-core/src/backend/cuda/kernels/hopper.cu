// What Hopper's own instructions (sm_90a) look like from C: barriers of shared memory, the tensor copy engine, and
// products of a warp group (wgmma). Operands of products lie in shared memory in the swizzled layout that the copy
// engine writes, or in registers.

// A tensor map of the driver (cuTensorMapEncodeTiled): opaque here.
struct __align__(64) TensorMap {
    u64 words[16];
};

__device__ __forceinline__ u32 shared_address(const void* pointer) {
    u64 address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(pointer));
    return (u32)address;
}

// Shared memory that a launch asked for, from the next multiple of 1024 bytes on: swizzled tiles begin there.
extern __shared__ u8 dynamic_shared[];

__device__ __forceinline__ u32 shared_start() { return (shared_address(dynamic_shared) + 1023) & ~1023u; }

// ---- Barriers of shared memory. A phase ends when all arrivals and all bytes it expects are there.

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Waits until the phase of this parity has ended.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    u32 done;
    do {
        asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done) : "r"(barrier), "r"(parity) : "memory");
    } while (!done);
}

// Barriers of threads by number: `sync` waits for `threads` of them, `arrive` does not wait.
__device__ __forceinline__ void named_sync(u32 id, u32 threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(u32 id, u32 threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- The copy engine.

// A box of a tensor of three dimensions into shared memory; its bytes count towards the barrier.
__device__ __forceinline__ void load_box(u32 to, const TensorMap* map, u32 barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 ::"r"(to), "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z) : "memory");
}

__device__ __forceinline__ void prefetch_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Eight bytes into shared memory, behind the thread's back; `async_arrive` arrives when all before it are there.
__device__ __forceinline__ void load_pair(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void async_arrive(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// ---- Registers of a warp group.

template <int COUNT>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// ---- Products of a warp group: 64 rows, f32 sums, bf16 operands, 16 deep an instruction.

__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups are not done.
template <int PENDING>
__device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving uses of sums across the place where they become known.
template <int N>
__device__ __forceinline__ void pin(float (&sums)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sums[i])::"memory");
}

template <int N>
__device__ __forceinline__ void pin(u32 (&words)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(words[i])::"memory");
}

#define OUT4(how, d, i) how(d[i]), how(d[i + 1]), how(d[i + 2]), how(d[i + 3])
#define OUT16(how, d, i) OUT4(how, d, i), OUT4(how, d, i + 4), OUT4(how, d, i + 8), OUT4(how, d, i + 12)
#define LIST_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define LIST_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define LIST_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define LIST_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LIST_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define LIST_80 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define LIST_96 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define LIST_112 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"

// sums[64 x N] (+)= A B, with B (and A) in shared memory. TURN: columns of B lie along memory, not its depth.
template <int N, int TURN_A, int TURN_B> struct Product;

#define PRODUCT(N, LIST, OUTS, I0, I1, I2, I3, I4, I5)                                                              \
    template <int TURN_A, int TURN_B> struct Product<N, TURN_A, TURN_B> {                                              \
        /* sums = A B: what was there is of no account. */                                                             \
        static __device__ __forceinline__ void fresh(float (&d)[N / 2], u64 a, u64 b) {                                \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, " I0 ", " I1            \
                         ", 0, 1, 1, " I2 ", " I3 ";"                                                                  \
                         : OUTS("=f") : "l"(a), "l"(b), "n"(TURN_A), "n"(TURN_B));                                     \
        }                                                                                                              \
        static __device__ __forceinline__ void both(float (&d)[N / 2], u64 a, u64 b) {                                 \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, " I0 ", " I1            \
                         ", 1, 1, 1, " I2 ", " I3 ";"                                                                  \
                         : OUTS("+f") : "l"(a), "l"(b), "n"(TURN_A), "n"(TURN_B));                                     \
        }                                                                                                              \
        static __device__ __forceinline__ void one(float (&d)[N / 2], u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {         \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" LIST "}, {" I0 "," I1 "," I2     \
                         "," I3 "}, " I4 ", 1, 1, 1, " I5 ";"                                                          \
                         : OUTS("+f") : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(TURN_B));                      \
        }                                                                                                              \
    };

#define OUTS_32(how) OUT16(how, d, 0)
#define OUTS_64(how) OUTS_32(how), OUT16(how, d, 16)
#define OUTS_96(how) OUTS_64(how), OUT16(how, d, 32)
#define OUTS_128(how) OUTS_96(how), OUT16(how, d, 48)
#define OUTS_160(how) OUTS_128(how), OUT16(how, d, 64)
#define OUTS_192(how) OUTS_160(how), OUT16(how, d, 80)
#define OUTS_256(how) OUTS_192(how), OUT16(how, d, 96), OUT16(how, d, 112)
PRODUCT(32, LIST_0, OUTS_32, "%16", "%17", "%18", "%19", "%20", "%21")
PRODUCT(64, LIST_0 LIST_16, OUTS_64, "%32", "%33", "%34", "%35", "%36", "%37")
PRODUCT(96, LIST_0 LIST_16 LIST_32, OUTS_96, "%48", "%49", "%50", "%51", "%52", "%53")
PRODUCT(128, LIST_0 LIST_16 LIST_32 LIST_48, OUTS_128, "%64", "%65", "%66", "%67", "%68", "%69")
PRODUCT(256, LIST_0 LIST_16 LIST_32 LIST_48 LIST_64 LIST_80 LIST_96 LIST_112, OUTS_256, "%128", "%129", "%130", "%131",
        "%132", "%133")

// A matrix of ROWS x DIM numbers in shared memory: columns in stretches of STRETCH, each stretch ROWS lines of
// 2 STRETCH bytes, swizzled over that width. STRETCH is 64 (128 bytes) or 32 (64 bytes).
template <int ROWS, int STRETCH>
struct Swizzled {
    static constexpr u32 LINE = 2 * STRETCH;
    static constexpr u64 MODE = STRETCH == 64 ? 1ull << 62 : 2ull << 62;
    // Depth along the lines: eight lines are 8 LINE bytes apart.
    static __device__ __forceinline__ u64 straight(u32 address) {
        return MODE | (u64)(8 * LINE >> 4) << 32 | 1ull << 16 | (u64)((address & 0x3ffffu) >> 4);
    }
    // Depth across the lines: stretches lie ROWS lines apart.
    static __device__ __forceinline__ u64 turned(u32 address) {
        return MODE | (u64)(8 * LINE >> 4) << 32 | (u64)(ROWS * LINE >> 4) << 16 | (u64)((address & 0x3ffffu) >> 4);
    }
    // What 16 steps of depth number k add to a description.
    static __host__ __device__ constexpr u64 straight_step(int k) {
        return (u64)((k * 16 / STRETCH * ROWS * (int)LINE + k * 16 % STRETCH * 2) >> 4);
    }
    static __host__ __device__ constexpr u64 turned_step(int k) { return (u64)((k * 16 * (int)LINE) >> 4); }
};

// sums = A B^T: both with their depth along the lines of shared memory.
template <int N, int DEPTH, int A_ROWS, int B_ROWS, int STRETCH>
__device__ __forceinline__ void product_straight(float (&sums)[N / 2], u32 a, u32 b) {
    typedef Swizzled<A_ROWS, STRETCH> A;
    typedef Swizzled<B_ROWS, STRETCH> B;
    u64 from_a = A::straight(a), from_b = B::straight(b);
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) {
        if (k == 0) Product<N, 0, 0>::fresh(sums, from_a, from_b);
        else Product<N, 0, 0>::both(sums, from_a + A::straight_step(k), from_b + B::straight_step(k));
    }
}

// sums += A B: A in registers, as packed sums of DEPTH columns; B with its columns along the lines.
template <int N, int DEPTH, int B_ROWS, int STRETCH>
__device__ __forceinline__ void product_registers(float (&sums)[N / 2], const u32 (&a)[DEPTH / 4], u32 b) {
    typedef Swizzled<B_ROWS, STRETCH> B;
    u64 from = B::turned(b);
#pragma unroll
    for (int k = 0; k < DEPTH / 16; k++) {
        Product<N, 0, 1>::one(sums, a[4 * k], a[4 * k + 1], a[4 * k + 2], a[4 * k + 3], from + B::turned_step(k));
    }
}

// ---- Numbers.

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float tanh_fast(float x) {
    float y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Sums of a warp group, rounded, as the operand of a product.
template <int N>
__device__ __forceinline__ void pack_all(const float (&sums)[N], u32 (&to)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 2; i++) to[i] = pack(sums[2 * i], sums[2 * i + 1]);
}

// Four lanes of a row hold word j of lane t; after, they hold word t of lane j.
__device__ __forceinline__ void turn_quad(u32 (&w)[4]) {
    bool upper = threadIdx.x & 2, odd = threadIdx.x & 1;
    u32 a = __shfl_xor_sync(0xffffffffu, upper ? w[0] : w[2], 2);
    u32 b = __shfl_xor_sync(0xffffffffu, upper ? w[1] : w[3], 2);
    if (upper) w[0] = a, w[1] = b;
    else w[2] = a, w[3] = b;
    a = __shfl_xor_sync(0xffffffffu, odd ? w[0] : w[1], 1);
    b = __shfl_xor_sync(0xffffffffu, odd ? w[2] : w[3], 1);
    if (odd) w[0] = a, w[2] = b;
    else w[1] = a, w[3] = b;
}

// 64 rows of sums to memory as bf16, sixteen bytes a thread: row r of the warp group where r < valid.
template <int N>
__device__ __forceinline__ void store_rows(const float (&sums)[N], u16* to, u64 stride, int valid, float low,
                                           float high) {
    int thread = threadIdx.x & 127, row = (thread >> 5) * 16 + ((thread >> 2) & 7), t = thread & 3;
    u16* first = to + row * stride + 8 * t;
    u16* second = first + 8 * stride;
#pragma unroll
    for (int n = 0; n < N / 4; n += 4) {
        u32 w[4];
#pragma unroll
        for (int j = 0; j < 4; j++) w[j] = pack(sums[4 * (n + j)] * low, sums[4 * (n + j) + 1] * low);
        turn_quad(w);
        if (row < valid) *(uint4*)(first + 8 * n) = make_uint4(w[0], w[1], w[2], w[3]);
#pragma unroll
        for (int j = 0; j < 4; j++) w[j] = pack(sums[4 * (n + j) + 2] * high, sums[4 * (n + j) + 3] * high);
        turn_quad(w);
        if (row + 8 < valid) *(uint4*)(second + 8 * n) = make_uint4(w[0], w[1], w[2], w[3]);
    }
}
