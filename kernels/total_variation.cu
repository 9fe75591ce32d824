// Total variation: mean squared difference of neighbouring pixels, and its gradient gathered by each pixel.

// gradient += factor * dL/dx; partials (gridDim.x,): the blocks' shares of L. pixels and gradient (3, height, width).
__global__ void tv_gradient(const float* pixels, float* gradient, long long height, long long width, float factor,
                            float* partials) {
    const float across = 1.f / (3 * height * (width - 1)), down = 1.f / (3 * (height - 1) * width);
    const long long count = 3 * height * width;
    float sum = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count; i += (long long)gridDim.x * THREADS) {
        const long long column = i % width, row = i / width % height;
        const float x = pixels[i];
        float slope = 0;
        if (column + 1 < width) {
            const float d = pixels[i + 1] - x;
            sum += across * d * d;
            slope -= across * d;
        }
        if (column > 0) slope += across * (x - pixels[i - 1]);
        if (row + 1 < height) {
            const float d = pixels[i + width] - x;
            sum += down * d * d;
            slope -= down * d;
        }
        if (row > 0) slope += down * (x - pixels[i - width]);
        gradient[i] += 2 * factor * slope;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}
