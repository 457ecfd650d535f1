// Clipping and AdamW on flat f32 buffers, as src/optim: sums of squares in f64 in a fixed order, every product and sum of
// the update rounded by itself, so that the bits are the CPU's.

#define SQUARES 4096

// partial[b] = sum of squares of numbers [b * SQUARES, (b + 1) * SQUARES).
extern "C" __global__ void square_sums(const float* numbers, u64 count, double* partial) {
    __shared__ double lanes[256];
    u64 start = (u64)blockIdx.x * SQUARES, end = min(start + SQUARES, count);
    double sum = 0.0;
    for (u64 i = start + threadIdx.x; i < end; i += 256) sum += (double)numbers[i] * (double)numbers[i];
    lanes[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 128; half > 0; half /= 2) {
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = lanes[0];
}

// report[0] = norm of the mean gradient, report[1] = what gradients are multiplied by: 1 / tokens, and clipped.
// Not finite where the norm is not; then nothing is updated. One block of 1024.
extern "C" __global__ void clip(const double* partial, u32 count, double mean, double max_norm, double* report) {
    __shared__ double lanes[1024];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += 1024) sum += partial[i];
    lanes[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 512; half > 0; half /= 2) {
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        double norm = sqrt(lanes[0]) * mean;
        bool finite = norm - norm == 0.0;
        double factor = max_norm > 0.0 ? fmin(max_norm / (norm + 1e-6), 1.0) : 1.0;
        report[0] = norm;
        report[1] = finite ? mean * factor : norm - norm;
    }
}

// The scalars of one update; `step` is minus the step size where every tensor learns at one rate.
struct Factors {
    float keep;
    float first;
    float beta2;
    float second;
    float root;
    float epsilon;
    float step;
};

// A range of numbers that share factors: `end` is the first number behind it.
struct Group {
    u64 end;
    Factors factors;
    u32 skip;
};

// `rounded` gets the new parameters as bf16 where it is not null. The gradient becomes 0.
extern "C" __global__ void adamw(float* parameters, float* gradients, float* first, float* second, u64 count,
                                 const Group* groups, u32 group_count, const double* report, bf16* rounded) {
    double factor = report[1];
    if (!(factor - factor == 0.0)) return;
    float scale = (float)factor;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
        u32 low = 0, high = group_count - 1;
        while (low < high) {
            u32 middle = (low + high) / 2;
            if (i < groups[middle].end) high = middle;
            else low = middle + 1;
        }
        Factors f = groups[low].factors;
        if (groups[low].skip) {
            gradients[i] = 0.0f;
            continue;
        }
        float gradient = __fmul_rn(gradients[i], scale);
        float m = __fadd_rn(first[i], __fmul_rn(f.first, __fsub_rn(gradient, first[i])));
        float v = __fadd_rn(__fmul_rn(second[i], f.beta2), __fmul_rn(__fmul_rn(f.second, gradient), gradient));
        float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), f.root), f.epsilon);
        float p = __fadd_rn(__fmul_rn(parameters[i], f.keep), __fdiv_rn(__fmul_rn(f.step, m), denominator));
        parameters[i] = p;
        first[i] = m;
        second[i] = v;
        gradients[i] = 0.0f;
        if (rounded) set(rounded + i, p);
    }
}

// sum += losses[0 .. count], in f64, in a fixed order. One block of 1024.
extern "C" __global__ void sum_losses(const float* losses, u32 count, double* total) {
    __shared__ double lanes[1024];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += 1024) sum += (double)losses[i];
    lanes[threadIdx.x] = sum;
    __syncthreads();
    for (int half = 512; half > 0; half /= 2) {
        if (threadIdx.x < half) lanes[threadIdx.x] += lanes[threadIdx.x + half];
        __syncthreads();
    }
    if (threadIdx.x == 0) *total += lanes[0];
}

// Ends after so many nanoseconds. One warp.
extern "C" __global__ void hold(u64 nanoseconds) {
    u64 begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
}
