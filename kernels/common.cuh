// Shared by all kernels: element types, and sums whose order never changes, so that every run gives the same bits.
// Every kernel runs with THREADS threads a block and accumulates in fp32.

#include <cuda_fp16.h>

constexpr int THREADS = 256;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(__half* p, float x) { *p = __float2half_rn(x); }

// Sum of `value` over the block; valid in thread 0.
__device__ inline float block_sum(float value) {
    __shared__ float lane[THREADS];
    lane[threadIdx.x] = value;
    __syncthreads();
    for (int half = THREADS / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) lane[threadIdx.x] += lane[threadIdx.x + half];
        __syncthreads();
    }
    return lane[0];
}

// *result = factor * sum of partials (count,). One block.
__global__ void sum_partials(const float* partials, long long count, float factor, float* result) {
    float sum = 0;
    for (long long i = threadIdx.x; i < count; i += THREADS) sum += partials[i];
    sum = block_sum(sum);
    if (threadIdx.x == 0) *result = factor * sum;
}

