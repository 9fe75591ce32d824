// Temporal loss of a frame of a video and its gradient, added to those of the other terms.

#include "common.cuh"

// pixels and carried (3, count), certain (count,). Adds weight / (3 count) * sum of certain * (pixels - carried)^2 to
// *total and its derivative to gradient, unless that is null. sums (gridDim.x,) are scratch.
__global__ void temporal(const float* pixels, const float* carried, const float* certain, float* gradient,
                         long long count, float weight, double* sums, unsigned* arrived, float* total) {
    take_turn();
    const float slope = 2 * weight / (3 * count);
    double value = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < 3 * count;
         i += (long long)gridDim.x * THREADS) {
        const float d = pixels[i] - carried[i], part = certain[i % count] * d;
        value += part * d;
        if (gradient) gradient[i] += slope * part;
    }
    if (grid_sum(value, sums, arrived)) *total += weight * value / (3 * count);
}
