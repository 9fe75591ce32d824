// Style loss: difference of two Gram matrices, its square sum, and the gradient (G - A) F.

// difference = gram - target, all (count,); partials (gridDim.x,): square sums of the blocks.
__global__ void style_difference(const float* gram, const float* target, float* difference, long long count,
                                 float* partials) {
    float sum = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < count; i += (long long)gridDim.x * THREADS) {
        const float d = gram[i] - target[i];
        difference[i] = d;
        sum += d * d;
    }
    sum = block_sum(sum);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

constexpr int TILE = 64;   // channels and positions of a block: 16 x 16 threads with 4 x 4 elements each
constexpr int CHUNK = 16;  // channels held in shared memory at a time

// out (C, M) = factor * difference (C, C) features (C, M), added to what is there if `accumulate`.
template <typename T>
__global__ void style_gradient(const float* difference, const T* features, const float* factor, T* out,
                               long long channels, long long positions, long long accumulate) {
    __shared__ float left[CHUNK][TILE + 1];
    __shared__ float right[CHUNK][TILE + 1];
    const long long row0 = (long long)blockIdx.y * TILE, column0 = (long long)blockIdx.x * TILE;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[4][4] = {};
    for (long long k0 = 0; k0 < channels; k0 += CHUNK) {
        for (int i = threadIdx.x; i < TILE * CHUNK; i += THREADS) {
            const int c = i % TILE, k = i / TILE;  // the difference is symmetric: read its rows as columns
            const bool inside = k0 + k < channels;
            const long long row = row0 + c, column = column0 + c;
            left[k][c] = inside && row < channels ? difference[(k0 + k) * channels + row] : 0.f;
            right[k][c] = inside && column < positions ? to_float(features[(k0 + k) * positions + column]) : 0.f;
        }
        __syncthreads();
        for (int k = 0; k < CHUNK; ++k)
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) sum[i][j] += left[k][ty * 4 + i] * right[k][tx * 4 + j];
        __syncthreads();
    }
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const long long row = row0 + ty * 4 + i, column = column0 + tx * 4 + j;
            if (row >= channels || column >= positions) continue;
            const long long index = row * positions + column;
            store(out + index, *factor * sum[i][j] + (accumulate ? to_float(out[index]) : 0.f));
        }
}
