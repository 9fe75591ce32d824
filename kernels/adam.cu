// Adam (Kingma, Ba 2015) with clamped pixels, in one launch.

#include "common.cuh"

// image, gradient, first and second moment: (count,). state: lowest loss, rate1^t, rate2^t of the steps so far. No image
// changes if *loss is not finite; the best one becomes the image before the step if *loss is the lowest so far.
// bests (kept, stride) and losses, which may be null, are those of a trail with *made steps.
__global__ void adam_step(float* image, const float* gradient, float* first, float* second, float* bests,
                          long long stride, long long kept, unsigned* made, float* losses, const float* loss,
                          double* state, unsigned* arrived, long long count, float rate, float rate1, float rate2,
                          float epsilon) {
    take_turn();
    const bool good = isfinite(*loss), improved = good && *loss < state[0];
    const unsigned step_number = *made;
    float* best = best_of(bests, step_number, stride, kept);
    const float* before = best_of(bests, step_number + kept - 1, stride, kept);
    const double power1 = state[1] * rate1, power2 = state[2] * rate2;
    const float step = rate / (1 - power1), root = sqrt(1 - power2);
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count;
         i += (long long)gridDim.x * THREADS) {
        const float g = gradient[i], x = image[i];
        best[i] = improved ? x : before[i];
        if (!good) continue;
        first[i] += (1 - rate1) * (g - first[i]);
        second[i] = rate2 * second[i] + (1 - rate2) * g * g;
        image[i] = fminf(1.f, fmaxf(0.f, x - step * first[i] / (sqrtf(second[i]) / root + epsilon)));
    }
    if (!last_block(arrived) || threadIdx.x > 0) return;
    if (losses) losses[step_number] = *loss;
    *made = step_number + 1;
    if (!good) return;
    if (improved) state[0] = *loss;
    state[1] = power1;
    state[2] = power2;
}
