// Total variation: mean power of the difference of neighbouring pixels; and the gradient of the whole loss.

#include "common.cuh"

// |d|^power / d, and 0 at d = 0.
__device__ inline float sharpened(float d, float power) {
    return power == 2 || d == 0 ? d : copysignf(powf(fabsf(d), power - 1), d);
}

// pixels (3, height, width), whose last column and row have the first as neighbours if wrap. Writes gradient = vjp / *scale + weight * dTV/dx unless it is null, adds to the terms of
// layer_losses: terms[2] = TV, terms[0] += weight * TV, which becomes NaN if the gradient is not finite.
// sums (gridDim.x, 2) are scratch.
__global__ void pixel_gradient(const float* pixels, const float* vjp, float* gradient, const float* scale,
                               long long height, long long width, float weight, float power, long long wrap,
                               double* sums, unsigned* arrived, float* terms) {
    const long long open = wrap ? 0 : 1, count = 3 * height * width;
    const float across = 1.f / (3 * height * (width - open)), down = 1.f / (3 * (height - open) * width);
    const float unscale = 1 / *scale;
    double value = 0, broken = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count; i += (long long)gridDim.x * THREADS) {
        const long long column = i % width, row = i / width % height;
        const float x = pixels[i];
        float slope = 0;
        if (wrap || column + 1 < width) {
            const float d = pixels[column + 1 < width ? i + 1 : i - column] - x, e = sharpened(d, power);
            value += across * d * e;
            slope -= across * e;
        }
        if (wrap || column > 0)
            slope += across * sharpened(x - pixels[column > 0 ? i - 1 : i + width - 1], power);
        if (wrap || row + 1 < height) {
            const float d = pixels[row + 1 < height ? i + width : i - row * width] - x, e = sharpened(d, power);
            value += down * d * e;
            slope -= down * e;
        }
        if (wrap || row > 0)
            slope += down * sharpened(x - pixels[row > 0 ? i - width : i + (height - 1) * width], power);
        if (gradient) {
            gradient[i] = unscale * vjp[i] + power * weight * slope;
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
