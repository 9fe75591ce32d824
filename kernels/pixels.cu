// Total variation: mean squared difference of neighbouring pixels; and the gradient of the whole loss.

#include "common.cuh"

// pixels (3, height, width). Writes gradient = vjp / *scale + weight * dTV/dx unless it is null, adds to the terms of
// layer_losses: terms[2] = TV, terms[0] += weight * TV, which becomes NaN if the gradient is not finite.
// sums (gridDim.x, 2) are scratch.
__global__ void pixel_gradient(const float* pixels, const float* vjp, float* gradient, const float* scale,
                               long long height, long long width, float weight, double* sums, unsigned* arrived,
                               float* terms) {
    const float across = 1.f / (3 * height * (width - 1)), down = 1.f / (3 * (height - 1) * width);
    const long long count = 3 * height * width;
    const float unscale = 1 / *scale;
    double value = 0, broken = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count; i += (long long)gridDim.x * THREADS) {
        const long long column = i % width, row = i / width % height;
        const float x = pixels[i];
        float slope = 0;
        if (column + 1 < width) {
            const float d = pixels[i + 1] - x;
            value += across * d * d;
            slope -= across * d;
        }
        if (column > 0) slope += across * (x - pixels[i - 1]);
        if (row + 1 < height) {
            const float d = pixels[i + width] - x;
            value += down * d * d;
            slope -= down * d;
        }
        if (row > 0) slope += down * (x - pixels[i - width]);
        if (gradient) {
            gradient[i] = unscale * vjp[i] + 2 * weight * slope;
            broken += !isfinite(gradient[i]);
        }
    }
    value = block_sum(value);
    broken = block_sum(broken);
    if (threadIdx.x == 0) {
        sums[2 * blockIdx.x] = value;
        sums[2 * blockIdx.x + 1] = broken;
    }
    if (!last_block(arrived)) return;
    const volatile double* written = sums;
    value = broken = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += THREADS) {
        value += written[2 * b];
        broken += written[2 * b + 1];
    }
    value = block_sum(value);
    broken = block_sum(broken);
    if (threadIdx.x > 0) return;
    terms[2] = value;
    terms[0] = broken > 0 ? nanf("") : terms[0] + weight * static_cast<float>(value);
}
