// Content loss: difference to the target, its square sum, and the gradient.

// difference = features - target, all (count,); partials (gridDim.x,): square sums of the blocks.
template <typename T>
__global__ void content_difference(const T* features, const T* target, T* difference, long long count,
                                   float* partials) {
    float sum = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count; i += (long long)gridDim.x * THREADS) {
        const float d = to_float(features[i]) - to_float(target[i]);
        store(difference + i, d);
        sum += d * d;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// difference (count,) *= *factor, in place.
template <typename T>
__global__ void content_gradient(T* difference, long long count, const float* factor) {
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count; i += (long long)gridDim.x * THREADS)
        store(difference + i, *factor * to_float(difference[i]));
}
