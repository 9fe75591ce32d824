// Total variation: weighted powers of the differences of neighbouring pixels; and the gradient of the whole loss.

#include "common.cuh"

// |d|^power / d, and 0 at d = 0.
__device__ inline float sharpened(float d, float power) {
    return power == 2 || d == 0 ? d : copysignf(powf(fabsf(d), power - 1), d);
}

// pixels (3, height, width), whose last column and row have the first as neighbours if wrap. Writes gradient = vjp /
// *scale + weight * dTV/dx unless it is null, adds to the terms of layer_losses: terms[2] = TV, terms[0] += weight *
// TV, which becomes NaN if the gradient is not finite. across are the weights of the differences across, in inner rows,
// in the first and in the last one; down the same by columns; diagonal is that of diagonal ones.
// sums (gridDim.x, 2) are scratch.
__global__ void pixel_gradient(const float* pixels, const float* vjp, float* gradient, const float* scale,
                               long long height, long long width, float weight, float power, long long wrap,
                               float across, float across_first, float across_last, float down, float down_first,
                               float down_last, float diagonal, double* sums, unsigned* arrived, float* terms) {
    const unsigned count = 3 * height * width, broad = width, high = height;  // 64-bit divisions take their time
    const float unscale = 1 / *scale;
    double value = 0, broken = 0;
    for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < count; i += gridDim.x * THREADS) {
        const long long column = i % broad, row = i / broad % high;
        const long long left = column > 0 ? -1 : width - 1, right = column + 1 < width ? 1 : 1 - width;
        const long long above = row > 0 ? -width : (height - 1) * width;
        const long long below = row + 1 < height ? width : (1 - height) * width;
        const bool has_left = wrap || column > 0, has_right = wrap || column + 1 < width;
        const bool has_above = wrap || row > 0, has_below = wrap || row + 1 < height;
        const float wide = row == 0 ? across_first : row + 1 == height ? across_last : across;
        const float tall = column == 0 ? down_first : column + 1 == width ? down_last : down;
        const float x = pixels[i];
        float slope = 0;
        // A pair counts where its upper or left pixel is; its slope is felt at both.
        const auto pair = [&](bool is_there, bool counts, long long offset, float share) {
            if (!is_there) return;
            const float d = pixels[i + offset] - x, e = sharpened(d, power);
            if (counts) value += share * d * e;
            slope -= share * e;
        };
        pair(has_right, true, right, wide);
        pair(has_left, false, left, wide);
        pair(has_below, true, below, tall);
        pair(has_above, false, above, tall);
        if (diagonal != 0) {
            pair(has_below && has_right, true, below + right, diagonal);
            pair(has_below && has_left, true, below + left, diagonal);
            pair(has_above && has_right, false, above + right, diagonal);
            pair(has_above && has_left, false, above + left, diagonal);
        }
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
    value = broken = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += THREADS) {
        value += __ldcg(sums + 2 * b);
        broken += __ldcg(sums + 2 * b + 1);
    }
    value = block_sum(value);
    broken = block_sum(broken);
    if (threadIdx.x > 0) return;
    terms[2] = value;
    terms[0] = broken > 0 ? nanf("") : terms[0] + weight * static_cast<float>(value);
}
