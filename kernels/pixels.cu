// Total variation: weighted powers of the differences of neighbouring pixels; and the gradient of the whole loss.

#include "common.cuh"

// |d|^power / d, and 0 at d = 0.
__device__ inline float sharpened(float d, float power) {
    return power == 2 || d == 0 ? d : copysignf(powf(fabsf(d), power - 1), d);
}

constexpr int RUN = 4;  // rows that a thread takes, as in pixels.py

// pixels (3, height, width), whose last column and row have the first as neighbours if wrap. Writes gradient = vjp /
// *scale + weight * dTV/dx unless it is null, adds to the terms of layer_losses: terms[2] = TV, terms[0] += weight *
// TV, which becomes NaN if the gradient is not finite. across are the weights of the differences across, in inner
// rows, in the first and in the last one; down the same by columns; diagonal is that of diagonal ones. Unless it is
// `measured`, TV counts as zero, and pixels are not read. sums (gridDim.x,) are scratch.
__global__ void pixel_gradient(const float* pixels, const float* vjp, float* gradient, const float* scale,
                               long long height, long long width, float weight, float power, long long wrap,
                               float across, float across_first, float across_last, float down, float down_first,
                               float down_last, float diagonal, long long measured, double* sums, unsigned* arrived,
                               float* terms) {
    take_turn();
    const unsigned broad = width, strips = (height + RUN - 1) / RUN;  // 64-bit divisions take their time
    const int high = height;
    const float unscale = 1 / *scale;
    double value = 0;
    const unsigned count = 3 * high * broad, step = gridDim.x * THREADS;
    for (unsigned i = blockIdx.x * THREADS + threadIdx.x; !measured && i < count; i += RUN * step) {
        float incoming[RUN];
        for (int r = 0; r < RUN; ++r) incoming[r] = i + r * step < count ? unscale * vjp[i + r * step] : 0.f;
        for (int r = 0; r < RUN; ++r) {
            if (i + r * step < count) gradient[i + r * step] = incoming[r];
            if (!isfinite(incoming[r])) value = nan("");
        }
    }
    if (!measured) {  // nobody waits for the others: all write the same
        if (value != 0) terms[0] = value;
        if (blockIdx.x == 0 && threadIdx.x == 0) terms[2] = 0;
        return;
    }
    for (unsigned i = blockIdx.x * THREADS + threadIdx.x; i < 3 * strips * broad; i += step) {
        const unsigned column = i % broad, strip = i / broad;
        const int top = strip % strips * RUN;
        const long long plane = strip / strips * height * width;
        const bool has_left = wrap || column > 0, has_right = wrap || column + 1 < broad;
        const unsigned left = column > 0 ? column - 1 : broad - 1, right = column + 1 < broad ? column + 1 : 0;
        const float tall = column == 0 ? down_first : column + 1 == broad ? down_last : down;
        float x[RUN + 2][3], incoming[RUN];  // three columns, with the rows above and below; all on their way at once
#pragma unroll
        for (int r = 0; r < RUN + 2; ++r) {
            const int row = top + r - 1;
            const float* line = pixels + plane + (row < 0 ? high - 1 : row < high ? row : 0) * width;
            x[r][0] = line[left], x[r][1] = line[column], x[r][2] = line[right];
        }
#pragma unroll
        for (int r = 0; r < RUN; ++r)
            incoming[r] = gradient && top + r < high ? vjp[plane + (top + r) * width + column] : 0.f;
#pragma unroll
        for (int r = 0; r < RUN; ++r) {
            const int row = top + r;
            if (row >= high) break;
            const bool has_above = wrap || row > 0, has_below = wrap || row + 1 < high;
            const float wide = row == 0 ? across_first : row + 1 == high ? across_last : across;
            float slope = 0;
            // A pair counts where its upper or left pixel is; its slope is felt at both.
            const auto pair = [&](bool is_there, bool counts, float other, float share) {
                if (!is_there) return;
                const float d = other - x[r + 1][1], e = sharpened(d, power);
                if (counts) value += share * d * e;
                slope -= share * e;
            };
            pair(has_right, true, x[r + 1][2], wide);
            pair(has_left, false, x[r + 1][0], wide);
            pair(has_below, true, x[r + 2][1], tall);
            pair(has_above, false, x[r][1], tall);
            if (diagonal != 0) {
                pair(has_below && has_right, true, x[r + 2][2], diagonal);
                pair(has_below && has_left, true, x[r + 2][0], diagonal);
                pair(has_above && has_right, false, x[r][2], diagonal);
                pair(has_above && has_left, false, x[r][0], diagonal);
            }
            if (gradient) {
                const float found = unscale * incoming[r] + power * weight * slope;
                gradient[plane + row * width + column] = found;
                if (!isfinite(found)) value = nan("");
            }
        }
    }
    if (!grid_sum(value, sums, arrived)) return;
    terms[2] = value;
    terms[0] += weight * static_cast<float>(value);
}
