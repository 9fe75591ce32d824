// Runs a CUDA kernel on the CPU, block after block, one host thread for each CUDA thread: enough of the language for
// the kernels of this project, and slow. Barriers are real, so a missing __syncthreads() is a data race that the thread
// sanitizer or a wrong number shows. Out-of-range accesses are shown by the address sanitizer.
#pragma once
#include <barrier>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};
inline thread_local Dim threadIdx, blockIdx;
inline Dim gridDim;
inline std::barrier<>* block_barrier = nullptr;
inline void __syncthreads() { block_barrier->arrive_and_wait(); }

using __half = _Float16;
inline float __half2float(__half x) { return (float)x; }
inline __half __float2half_rn(float x) { return (__half)x; }

template <typename Kernel>
void run_grid(Dim grid, unsigned threads, Kernel kernel) {
    gridDim = grid;
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                std::barrier<> barrier(threads);
                block_barrier = &barrier;
                std::vector<std::jthread> pool;
                for (unsigned t = 0; t < threads; ++t)
                    pool.emplace_back([=, &barrier] {
                        threadIdx = {t, 0, 0};
                        blockIdx = {x, y, z};
                        kernel();
                        barrier.arrive_and_drop();  // a thread that returns early must not hold the others up
                    });
            }
}
