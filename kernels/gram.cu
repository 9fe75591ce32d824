// Gram matrix G = F F^T / M. The positions are shared out over blockIdx.z, since C x C alone is too few tiles to fill a
// chip; the shares are added in a fixed order afterwards. Only tiles on and above the diagonal are computed.

constexpr int TILE = 64;   // rows and columns of G in a block: 16 x 16 threads with 4 x 4 elements each
constexpr int CHUNK = 16;  // positions held in shared memory at a time

// partial (shares, C, C): F[:, share] F[:, share]^T of features (C, M).
template <typename T>
__global__ void gram_partial(const T* features, float* partial, long long channels, long long positions,
                             long long share) {
    __shared__ float rows[CHUNK][TILE + 1];
    __shared__ float columns[CHUNK][TILE + 1];
    const long long row0 = (long long)blockIdx.y * TILE, column0 = (long long)blockIdx.x * TILE;
    if (column0 < row0) return;
    const long long begin = blockIdx.z * share;
    const long long end = begin + share < positions ? begin + share : positions;
    const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
    float sum[4][4] = {};
    for (long long k0 = begin; k0 < end; k0 += CHUNK) {
        for (int i = threadIdx.x; i < TILE * CHUNK; i += THREADS) {
            const int k = i % CHUNK, c = i / CHUNK;  // neighbouring threads read neighbouring positions
            const bool inside = k0 + k < end;
            const long long row = row0 + c, column = column0 + c;
            rows[k][c] = inside && row < channels ? to_float(features[row * positions + k0 + k]) : 0.f;
            columns[k][c] = inside && column < channels ? to_float(features[column * positions + k0 + k]) : 0.f;
        }
        __syncthreads();
        for (int k = 0; k < CHUNK; ++k)
            for (int i = 0; i < 4; ++i)
                for (int j = 0; j < 4; ++j) sum[i][j] += rows[k][ty * 4 + i] * columns[k][tx * 4 + j];
        __syncthreads();
    }
    float* own = partial + (long long)blockIdx.z * channels * channels;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const long long row = row0 + ty * 4 + i, column = column0 + tx * 4 + j;
            if (row < channels && column < channels) own[row * channels + column] = sum[i][j];
        }
}

// out (C, C) = scale * sum of the shares; the lower triangle mirrors the upper.
__global__ void gram_reduce(const float* partial, float* out, long long channels, long long shares, float scale) {
    const long long index = (long long)blockIdx.x * THREADS + threadIdx.x;
    if (index >= channels * channels) return;
    const long long i = index / channels, j = index % channels;
    const long long upper = i < j ? i * channels + j : j * channels + i;
    float sum = 0;
    for (long long s = 0; s < shares; ++s) sum += partial[s * channels * channels + upper];
    out[index] = scale * sum;
}
