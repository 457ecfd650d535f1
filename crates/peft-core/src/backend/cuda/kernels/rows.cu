// Operations that need a sum over a row: a block takes a row.

extern "C" __global__ void rms_norm(Matrix x, const float* weight, float epsilon, Matrix out, Matrix reciprocal) {
    const float* in = row_of(x, blockIdx.x);
    float* to = row_of(out, blockIdx.x);
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < x.columns; c += blockDim.x) sum += in[c] * in[c];
    sum = block_sum(sum);
    float factor = 1.0f / sqrtf(sum / (float)x.columns + epsilon);
    if (threadIdx.x == 0) row_of(reciprocal, blockIdx.x)[0] = factor;
    for (u32 c = threadIdx.x; c < x.columns; c += blockDim.x) to[c] = in[c] * factor * weight[c];
}

extern "C" __global__ void rms_norm_backward(Matrix dout, Matrix x, const float* weight, Matrix reciprocal, Matrix dx) {
    const float* dy = row_of(dout, blockIdx.x);
    const float* in = row_of(x, blockIdx.x);
    float* to = row_of(dx, blockIdx.x);
    float factor = row_of(reciprocal, blockIdx.x)[0];
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < x.columns; c += blockDim.x) sum += in[c] * dy[c] * weight[c];
    float slope = block_sum(sum) / (float)x.columns * factor * factor * factor;
    for (u32 c = threadIdx.x; c < x.columns; c += blockDim.x) to[c] += dy[c] * weight[c] * factor - in[c] * slope;
}

// losses[r] = ln(sum of e^logit) - logit[target]; with `gradient` the logits become softmax - one_hot(target). A `cap` that
// is not 0 bounds the logits first; its slope multiplies the gradient.
extern "C" __global__ void cross_entropy(const u32* targets, u32 gradient, float cap, Matrix logits, Matrix losses) {
    float* row = row_of(logits, blockIdx.x);
    u32 target = targets[blockIdx.x];
    float largest = __int_as_float(0xff800000);
    for (u32 c = threadIdx.x; c < logits.columns; c += blockDim.x) {
        if (cap != 0.0f) row[c] = cap * tanhf(row[c] / cap);
        largest = fmaxf(largest, row[c]);
    }
    largest = block_max(largest);
    float wanted = row[target];
    float sum = 0.0f;
    for (u32 c = threadIdx.x; c < logits.columns; c += blockDim.x) sum += expf(row[c] - largest);
    sum = block_sum(sum);
    // `wanted` was read before any thread passes the barriers of the sum, so writing may begin.
    if (threadIdx.x == 0) row_of(losses, blockIdx.x)[0] = logf(sum) + (largest - wanted);
    if (!gradient) return;
    float inverse = 1.0f / sum;
    for (u32 c = threadIdx.x; c < logits.columns; c += blockDim.x) {
        float bend = cap != 0.0f ? row[c] / cap : 0.0f;
        float slope = 1.0f - bend * bend;
        row[c] = (expf(row[c] - largest) * inverse - (c == target ? 1.0f : 0.0f)) * slope;
    }
}
