// What the language has no words for, one function each. Tensor cores have the register layouts of the PTX ISA: with
// g = lane / 4 and t = lane % 4, a 16 x 16 fragment is four registers of two neighbouring elements of a row each,
//     (g, 2t..)  (g + 8, 2t..)  (g, 2t + 8..)  (g + 8, 2t + 8..)
// and lane's share of a 16 x 8 result is (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1).

#include <cuda_bf16.h>
#include <cuda_fp16.h>

// In every kernel, which may be brought to the device ahead of its turn. It waits until all that was queued before is
// done; from then on the next kernel may be brought there, to wait for this one: so, in this order, each waits for all
// before it. Ahead of its turn a kernel only reads, and only what the one just before it does not write: all earlier ones
// are done, if that one is ours. A library's may let the next come before it has waited itself; what follows one of
// those reads ahead only what never changes.
__device__ inline void take_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The same in two parts. A kernel that lets the next one come before its own turn knows that one: it reads nothing ahead
// that the kernel before this one writes. Without the second part the next one comes when this one is done.
__device__ inline void await_turn() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ inline void let_next_come() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 128 bytes of memory to the second cache.
__device__ inline void fetch_early(const void* line) {
    asm volatile("prefetch.global.L2 [%0];" :: "l"(line));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lanes 8i..8i+7 give the addresses of the rows of matrix i,
// and q[i] holds its elements (g, 2t) and (g, 2t + 1), or (2t, g) and (2t + 1, g) if TRANSPOSED.
template <bool TRANSPOSED>
__device__ inline void load_matrices(unsigned (&q)[4], const void* row) {
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(q[0]), "=r"(q[1]), "=r"(q[2]), "=r"(q[3]) : "r"(address) : "memory");
}

// 16 bytes to shared memory, or zeros unless they are `wanted`. They are on their way until the thread waits for them,
// and the others see them after a barrier.
__device__ inline void copy_later(void* to, const void* from, bool wanted) {
#if __CUDA_ARCH__ >= 800
    const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :: "r"(address), "l"(from), "r"(wanted ? 16 : 0) : "memory");
#else
    *reinterpret_cast<uint4*>(to) = wanted ? *reinterpret_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
}

// What the thread has copied since it last said so is a group.
__device__ inline void end_group() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until all groups but the last LATER ones have arrived.
template <int LATER>
__device__ inline void wait_for_groups() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" :: "n"(LATER) : "memory");
#endif
}

// sum (16 x 8) += a (16 x 16) b (16 x 8); register b0 holds the rows 2t, 2t + 1 of column g, b1 those eight further.
template <typename T>
__device__ void mma(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1);

template <>
__device__ inline void mma<__half>(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // two products of half the depth
    const unsigned b[2] = {b0, b1};
    for (int i = 0; i < 2; ++i)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[2 * i]), "r"(a[2 * i + 1]), "r"(b[i]));
#endif
}

template <>
__device__ inline void mma<__nv_bfloat16>(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // no bf16 tensor cores before sm_80: the lanes of a row of `a` and of a column of `b` pass their elements round
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1  // for the sake of who compiles it
    for (int from = 0; from < 4; ++from)
        for (int i = 0; i < 4; ++i) {  // of a: row g + 8 (i % 2), columns 2 from + 8 (i / 2) and the next
            const unsigned left = __shfl_sync(0xffffffffu, a[i], 4 * g + from);
            for (int column = 0; column < 2; ++column) {
                const unsigned right = __shfl_sync(0xffffffffu, i < 2 ? b0 : b1, 4 * (2 * t + column) + from);
                float& own = sum[2 * (i % 2) + column];  // bf16 is the upper half of fp32
                own += __uint_as_float(left << 16) * __uint_as_float(right << 16);
                own += __uint_as_float(left & 0xffff0000u) * __uint_as_float(right & 0xffff0000u);
            }
        }
#endif
}
