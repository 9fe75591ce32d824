// Runs CUDA kernels on the CPU, block after block: enough of the language for the kernels of this project.
//
// Each CUDA thread of a block is a fiber, run until it comes to a barrier or to a warp-wide instruction, where the next
// fiber has its turn. So the order is always the same, and a missing __syncthreads() shows as a wrong number in at least
// one of the two orders, ascending and descending, that `main` can be asked for. Barriers that not all threads reach
// end the program. This file stands in for ptx.cuh: the tensor-core instructions below work on the registers of all
// lanes, laid out as the PTX ISA says, and independently of how the kernels fill them.
//
// For a launch `main` reads a request file (arguments and the bytes of all buffers), allocates every buffer with its exact
// size, so that the address sanitizer sees any access outside, runs the kernel and writes the buffers to an answer file.
#pragma once
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __shared__ static
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::isfinite;

struct Dim {
    unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
using __half = _Float16;
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half_rn(float x) { return static_cast<__half>(x); }
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t word = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {  // to nearest, ties to even; NaN stays NaN
    uint32_t word;
    std::memcpy(&word, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16)};
}

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
}

// --- Fibers -----------------------------------------------------------------------------------------------------------

inline Dim threadIdx, blockIdx, gridDim;

struct Barrier {
    int expected = 0, arrived = 0;
    long generation = 0;
    void release_if_complete() {
        if (arrived < expected || expected == 0) return;
        arrived = 0;
        ++generation;
    }
};

struct Fiber {
    void** top;  // of its stack, while another one runs
    void* fake_stack = nullptr;  // of the address sanitizer
    bool done = false;
};

constexpr int BLOCK = 256;
constexpr size_t STACK = 128 << 10;
inline Fiber fibers[BLOCK], scheduler;
inline char (*stacks)[STACK] = static_cast<char (*)[STACK]>(std::aligned_alloc(16, BLOCK * STACK));
inline const void* main_stack;
inline size_t main_stack_size;
inline Barrier block_barrier, warp_barriers[BLOCK / 32];
inline int current, direction = 1, idle;
inline void (*body)(void*);
inline void* body_data;

// Keep on this stack what a call must not change, and go on where the other one was left. swapcontext() also asks the
// system for its signal mask, and under the address sanitizer clears the shadow of a whole stack, each time.
extern "C" void swap_stacks(void*** from, void** to);
asm(R"(
swap_stacks:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");

inline void switch_to(Fiber& from, Fiber& to, const void* stack, size_t size) {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, stack, size);
#endif
    swap_stacks(&from.top, to.top);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

// The next fiber has its turn; back to the scheduler if there is none.
inline void yield() {
    const int own = current;
    int next = own;
    do next = (next + direction + BLOCK) % BLOCK;
    while (fibers[next].done && next != own);
    if (fibers[next].done) {
        switch_to(fibers[own], scheduler, main_stack, main_stack_size);
    } else if (next != own) {
        current = next;
        threadIdx.x = next;
        switch_to(fibers[own], fibers[next], stacks[next], STACK);
    }
    current = own;
    threadIdx.x = own;
}

inline void wait_at(Barrier& barrier) {
    const long generation = barrier.generation;
    ++barrier.arrived;
    barrier.release_if_complete();
    idle = 0;
    while (barrier.generation == generation) {
        if (++idle > 4 * BLOCK) fail("a barrier is not reached by all threads");
        yield();
    }
    idle = 0;
}

inline void run_fiber() {
#ifdef __SANITIZE_ADDRESS__
    const void* from;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &from, &size);
    if (main_stack == nullptr) main_stack = from, main_stack_size = size;
#endif
    body(body_data);
    fibers[current].done = true;
    idle = 0;
    for (Barrier* barrier : {&block_barrier, &warp_barriers[current / 32]}) {
        --barrier->expected;  // a thread that has returned holds nobody up
        barrier->release_if_complete();
    }
    yield();
}

// Copies arrive as late as they may in one direction, at once in the other.
struct Copy {
    char* to;
    const char* from;
    void make() const {
        if (from) std::memcpy(to, from, 16);
        else std::memset(to, 0, 16);
    }
};
inline std::vector<std::vector<Copy>> copies[BLOCK];  // the groups of each thread; the last one is still open

template <typename Body>
void run_grid(Dim grid, Body kernel) {
    gridDim = grid;
    body = [](void* data) { (*static_cast<Body*>(data))(); };
    body_data = &kernel;
    const unsigned blocks = grid.x * grid.y * grid.z;
    for (unsigned i = 0; i < blocks; ++i) {
        const unsigned block = direction > 0 ? i : blocks - 1 - i;
        blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        block_barrier = {BLOCK};
        for (Barrier& barrier : warp_barriers) barrier = {32};
        for (int t = 0; t < BLOCK; ++t) {
            fibers[t].done = false;
            copies[t].clear();
            fibers[t].top = reinterpret_cast<void**>(stacks[t] + STACK) - 8;  // six registers, and where to begin
            fibers[t].top[6] = reinterpret_cast<void*>(run_fiber);
        }
        current = threadIdx.x = direction > 0 ? 0 : BLOCK - 1;
        idle = 0;
        switch_to(scheduler, fibers[current], stacks[current], STACK);
    }
}

inline void take_turn() {}
inline void await_turn() {}
inline void let_next_come() {}
inline void fetch_early(const void*) {}
inline void __syncthreads() { wait_at(block_barrier); }
inline void __syncwarp() { wait_at(warp_barriers[threadIdx.x / 32]); }
inline void __threadfence() {}
template <typename T>
T __ldcg(const T* address) {
    return *address;
}
inline unsigned atomicAdd(unsigned* address, unsigned value) { return std::exchange(*address, *address + value); }

// --- Warp-wide instructions -------------------------------------------------------------------------------------------

// What each lane of the warp brings. Two sets in turn: a lane can be one instruction ahead of another, not two.
template <typename T>
const T* exchange(const T& own) {
    static_assert(sizeof(T) <= 48);
    alignas(16) static char slots[2][BLOCK / 32][32][48];
    static unsigned char turn[BLOCK];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp_barriers[warp].expected != 32) fail("a lane has left before a warp-wide instruction");
    T* set = reinterpret_cast<T*>(slots[turn[threadIdx.x] ^= 1][warp]);
    set[lane] = own;
    wait_at(warp_barriers[warp]);
    return set;
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
    return exchange(value)[(threadIdx.x % 32) ^ offset];
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
    return exchange(value)[lane % 32];
}
inline float __uint_as_float(unsigned word) {
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

template <bool TRANSPOSED>
void load_matrices(unsigned (&q)[4], const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix needs addresses that are multiples of 16");
    const void* const* rows = exchange(row);
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
        const auto at = [&](int r, int c) -> unsigned { return static_cast<const uint16_t*>(rows[8 * i + r])[c]; };
        q[i] = TRANSPOSED ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
    }
}

inline void copy_later(void* to, const void* from, bool wanted) {
    const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
    if (!aligned(to) || !aligned(from)) fail("a copy of 16 bytes needs addresses that are multiples of 16");
    const Copy copy{static_cast<char*>(to), wanted ? static_cast<const char*>(from) : nullptr};
    if (direction < 0) return copy.make();
    auto& own = copies[threadIdx.x];
    if (own.empty()) own.emplace_back();
    own.back().push_back(copy);
}
inline void end_group() {
    auto& own = copies[threadIdx.x];
    if (own.empty()) own.emplace_back();
    own.emplace_back();
}
template <int LATER>
void wait_for_groups() {
    auto& own = copies[threadIdx.x];
    while (own.size() > LATER + 1) {
        for (const Copy& copy : own.front()) copy.make();
        own.erase(own.begin());
    }
}

template <typename T>
float half_of(unsigned word, int which) {
    const uint16_t bits = which ? word >> 16 : word;
    T value;
    std::memcpy(&value, &bits, 2);
    if constexpr (std::is_same_v<T, __half>) return __half2float(value);
    else return __bfloat162float(value);
}

struct Operands {  // of a lane for mma: a 16 x 16 and b 16 x 8 are spread over the warp
    float a[4][2], b[2][2];
};

// sum + a row of a times a column of b. What takes most of the harness's time, and no address here is a kernel's.
__attribute__((no_sanitize("address", "undefined"), optimize("O3"))) inline float add_products(
    float sum, const Operands* warp, int row, int column
) {
    for (int k = 0; k < 16; ++k)
        sum += warp[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2][k % 2]
            * warp[column * 4 + k % 8 / 2].b[k / 8][k % 2];
    return sum;
}

template <typename T>
void mma(float (&sum)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    Operands own;
    for (int which = 0; which < 2; ++which) {
        for (int i = 0; i < 4; ++i) own.a[i][which] = half_of<T>(a[i], which);
        own.b[0][which] = half_of<T>(b0, which);
        own.b[1][which] = half_of<T>(b1, which);
    }
    const Operands* warp = exchange(own);
    const int lane = threadIdx.x % 32;
    for (int e = 0; e < 4; ++e) sum[e] = add_products(sum[e], warp, lane / 4 + e / 2 * 8, lane % 4 * 2 + e % 2);
}

// --- Requests ---------------------------------------------------------------------------------------------------------

struct Argument {
    char kind;     // 'i', 'f', 'n' for null, or the type of what the pointer points to
    int64_t value;  // number, bits of the float, or buffer
    int64_t offset;  // bytes into the buffer
};

struct Request {
    Dim grid;
    std::vector<char*> buffers;
    std::vector<Argument> arguments;

    template <typename P>
    P get(size_t i) const {
        const Argument& given = arguments.at(i);
        if constexpr (std::is_pointer_v<P>) {
            using E = std::remove_cv_t<std::remove_pointer_t<P>>;
            const char wanted = std::is_same_v<E, float>           ? 'F'
                                : std::is_same_v<E, double>        ? 'D'
                                : std::is_same_v<E, unsigned>      ? 'U'
                                : std::is_same_v<E, __half>        ? 'H'
                                : std::is_same_v<E, __nv_bfloat16> ? 'B'
                                                                   : 'S';  // a structure
            if (given.kind == 'n') return nullptr;
            if (given.kind != wanted && !(wanted == 'S' && given.kind == 'D')) fail("an argument of another type");
            return reinterpret_cast<P>(buffers.at(given.value) + given.offset);
        } else if constexpr (std::is_same_v<P, float>) {
            if (given.kind != 'f') fail("not a float");
            float value;
            std::memcpy(&value, &given.value, 4);
            return value;
        } else {
            static_assert(std::is_same_v<P, long long>);
            if (given.kind != 'i') fail("not an integer");
            return given.value;
        }
    }
};

template <typename... P>
void call(void (*kernel)(P...), const Request& request) {
    if (request.arguments.size() != sizeof...(P)) fail("not as many arguments as parameters");
    [&]<size_t... I>(std::index_sequence<I...>) {
        const std::tuple<P...> values{request.get<P>(I)...};
        run_grid(request.grid, [&] { std::apply(kernel, values); });
    }(std::index_sequence_for<P...>{});
}

inline int64_t number(FILE* file) {
    int64_t value;
    if (std::fread(&value, 8, 1, file) != 1) fail("the request is too short");
    return value;
}

// Makes the launch that a file asks for, and leaves the memory after it in another.
inline void answer(const char* asked, const std::string& answered, void (*const* entries)(const Request&)) {
    FILE* file = std::fopen(asked, "rb");
    const int64_t entry = number(file);
    Request request;
    for (unsigned* side : {&request.grid.x, &request.grid.y, &request.grid.z}) *side = number(file);
    std::vector<size_t> sizes(number(file));
    for (size_t& size : sizes) {
        void* memory = nullptr;
        size = number(file);
        if (posix_memalign(&memory, 256, size)) fail("no memory");
        if (std::fread(memory, 1, size, file) != size) fail("the request is too short");
        request.buffers.push_back(static_cast<char*>(memory));
    }
    for (int64_t count = number(file); count > 0; --count) {  // addresses inside buffers: where, and of what
        char* where = request.buffers.at(number(file));
        where += number(file);
        char* address = request.buffers.at(number(file));
        address += number(file);
        std::memcpy(where, &address, 8);
    }
    request.arguments.resize(number(file));
    for (Argument& argument : request.arguments) {
        argument.kind = number(file);
        argument.value = number(file);
        argument.offset = number(file);
    }
    std::fclose(file);
    entries[entry](request);
    file = std::fopen(answered.c_str(), "wb");
    for (size_t i = 0; i < sizes.size(); ++i) std::fwrite(request.buffers[i], 1, sizes[i], file);
    std::fclose(file);
}

// For each line of the input, "REQUEST ANSWER", two children of this process make the launch, with threads and blocks in
// ascending and in descending order, and leave ANSWER1 and ANSWER-1; the line of the output is 0 if both went well.
inline int serve(void (*const* entries)(const Request&)) {
    for (std::string asked, answered; std::cin >> asked >> answered;) {
        for (int way : {1, -1}) {
            const pid_t child = fork();
            if (child < 0) fail("no child");
            if (child > 0) continue;
            direction = way;
            answer(asked.c_str(), answered + std::to_string(way), entries);
            _exit(0);
        }
        int failed = 0, status;
        for (int i = 0; i < 2; ++i) failed |= wait(&status) < 0 || status != 0;
        std::cout << failed << std::endl;
    }
    return 0;
}
