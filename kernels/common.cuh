// Shared by all kernels: element types, and sums whose order never changes, so that every run gives the same bits.
// Every kernel runs with THREADS threads a block and accumulates in fp32 or fp64.

#include "ptx.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline void store(float* p, float x) { *p = x; }
__device__ inline void store(__half* p, float x) { *p = __float2half_rn(x); }
__device__ inline void store(__nv_bfloat16* p, float x) { *p = __float2bfloat16_rn(x); }

// Neighbouring elements that are read or written at once.
template <typename T, int COUNT>
struct alignas(sizeof(T) * COUNT) Vector {
    T element[COUNT];
};

// What other kernels have written, past the first cache, which may not know of that yet in a kernel ahead of its turn.
template <typename Wide>
__device__ inline Wide load_past_first(const Wide* from) {
    static_assert(sizeof(Wide) == 8 || sizeof(Wide) == 16);
    if constexpr (sizeof(Wide) == 16) {
        const uint4 found = __ldcg(reinterpret_cast<const uint4*>(from));
        return reinterpret_cast<const Wide&>(found);
    } else {
        const uint2 found = __ldcg(reinterpret_cast<const uint2*>(from));
        return reinterpret_cast<const Wide&>(found);
    }
}

// Sums of the values over the warp, in every lane: all at once, as each has to wait for the other lanes.
template <int COUNT>
__device__ inline void warp_sums(double (&values)[COUNT]) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
#pragma unroll
        for (int i = 0; i < COUNT; ++i) values[i] += __shfl_xor_sync(0xffffffffu, values[i], offset);
}

// Sums of the values over the block; valid in thread 0.
template <int COUNT>
__device__ inline void block_sums(double (&values)[COUNT]) {
    __shared__ double warps[WARPS][COUNT];
    warp_sums(values);
    __syncthreads();  // earlier sums may still be being read
    for (int i = 0; i < COUNT && threadIdx.x % 32 == 0; ++i) warps[threadIdx.x / 32][i] = values[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
        values[i] = 0;
        for (int warp = 0; warp < WARPS; ++warp) values[i] += warps[warp][i];
    }
}

__device__ inline double block_sum(double value) {
    double values[1] = {value};
    block_sums(values);
    return values[0];
}

// The best image after a step among the rows of a trail, bests (kept, stride).
__device__ inline float* best_of(float* bests, unsigned step, long long stride, long long kept) {
    return bests + step % static_cast<unsigned>(kept) * stride;
}

// Whether this is the last of all blocks to come here, which then sees what the others wrote before (if it reads that
// with __ldcg). *arrived is zero between launches.
__device__ inline bool last_block(unsigned* arrived) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(arrived, 1u) + 1 == gridDim.x * gridDim.y;
        if (last) *arrived = 0;
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Sums the value over all blocks, in an order that never changes; true in the one thread that has the sum. sums
// (gridDim.x,) are scratch.
__device__ inline bool grid_sum(double& value, double* sums, unsigned* arrived) {
    value = block_sum(value);
    if (threadIdx.x == 0) sums[blockIdx.x] = value;
    if (!last_block(arrived)) return false;
    value = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += THREADS) value += __ldcg(sums + b);
    value = block_sum(value);
    return threadIdx.x == 0;
}
