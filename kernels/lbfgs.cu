// Vector-free L-BFGS (Chen, Wang, Zhou, NIPS 2014) in three launches: dot products, a plan made of scalars, the move.
// The arithmetic of the plan, and what its fields mean, is explained in lbfgs.py.

#include "common.cuh"

constexpr int SLOTS = 21;               // most pairs of the history, and one being made
constexpr int CHANGE = 2 * SLOTS;       // row of y among the dot products
constexpr int GRADIENT = CHANGE + 1;    // and of g
constexpr int ROWS = GRADIENT + 1;
constexpr int GROUP = 11;               // rows that one block multiplies
enum { HALT, STEP, HALVE, RESTART };

struct State {
    double unit, first_step, lowest, pairs, halvings, moved;
    double improved, action, accepted, from, to, of_gradient;
    double of_history[2 * SLOTS];
    double products[SLOTS][SLOTS];  // s_i y_j
    double squares[SLOTS][SLOTS];   // y_i y_j
};

// Rows of the history of `slots` pairs that hold something.
__device__ inline int rows_in_use(const State& state, long long slots) {
    const double used = state.pairs + 1 < slots ? state.pairs + 1 : slots;
    return state.moved ? 2 * used : 0;
}

// The history is kept in 16 bits, times these powers of two. Moves are bounded; changes of the gradient, whose root mean
// square was one at first, are cut off at 1023.
constexpr float MOVES = 1 << 19, CHANGES = 1 << 6, LARGEST = 65504;
constexpr int EIGHT = 8;  // elements that a thread takes at once
using Eight = Vector<__half, EIGHT>;

__device__ inline __half narrowed(float x, float scale) {
    return __float2half_rn(fminf(LARGEST, fmaxf(-LARGEST, scale * x)));
}

// Eight neighbouring elements of a row.
__device__ inline Eight fetch(const __half* from) { return *reinterpret_cast<const Eight*>(from); }

// Eight neighbouring elements, of which `there` exist; the others are zeros.
__device__ inline void fetch(float (&x)[EIGHT], const float* from, int there) {
    using Four = Vector<float, 4>;
    if (there == EIGHT) {
        const Four low = reinterpret_cast<const Four*>(from)[0], high = reinterpret_cast<const Four*>(from)[1];
        for (int e = 0; e < 4; ++e) x[e] = low.element[e], x[4 + e] = high.element[e];
    } else {
        for (int e = 0; e < EIGHT; ++e) x[e] = e < there ? from[e] : 0.f;
    }
}

__device__ inline void keep(float* to, const float (&x)[EIGHT], int there) {
    using Four = Vector<float, 4>;
    if (there == EIGHT) {
        reinterpret_cast<Four*>(to)[0] = {x[0], x[1], x[2], x[3]};
        reinterpret_cast<Four*>(to)[1] = {x[4], x[5], x[6], x[7]};
    } else {
        for (int e = 0; e < there; ++e) to[e] = x[e];
    }
}

__device__ inline void keep(__half* to, const float (&x)[EIGHT], float scale) {
    Eight found;
    for (int e = 0; e < EIGHT; ++e) found.element[e] = narrowed(x[e], scale);
    *reinterpret_cast<Eight*>(to) = found;
}

__device__ inline int remaining(long long count, long long i) { return count - i < EIGHT ? count - i : EIGHT; }

// Whether x lies on a bound of [0, 1], and its gradient points out.
__device__ inline bool held(float x, float gradient) { return (x <= 0 && gradient > 0) || (x >= 1 && gradient < 0); }

// sums (ROWS, 2, gridDim.x): shares of the dot products of each row with y = g - before and g = unit * gradient. The
// blocks of a column share out the elements, those of a row the rows. history (2 slots, stride), of which `count` elements
// a row are in use; stride is a multiple of EIGHT, and so are all addresses of 16 bytes. Where the image is boxed and held,
// g is 0. y is rounded as it will be kept.
__global__ void __launch_bounds__(THREADS, 2) lbfgs_dots(const __half* history, const float* before, const float* image,
                                                         const float* gradient, const State* state, long long count,
                                                         long long stride, long long slots, long long boxed,
                                                         double* sums) {
    take_turn();
    __shared__ __align__(16) __half ahead[GROUP][EIGHT * THREADS];  // what a thread reads next, while it adds up
    __shared__ double warps[WARPS][2 * GROUP];
    const int first = blockIdx.y * GROUP, rows = rows_in_use(*state, slots);
    const long long step = EIGHT * (long long)gridDim.x * THREADS;
    const float unit = state->unit;
    float sum[GROUP][2] = {};
    const auto ask = [&](long long i) {
        if (i < count && first < rows)
#pragma unroll
            for (int r = 0; r < GROUP; ++r) {
                const int row = first + r < rows ? first + r : rows - 1;
                copy_later(ahead[r] + EIGHT * threadIdx.x, history + row * stride + i, true);
            }
        end_group();
    };
    long long i = EIGHT * ((long long)blockIdx.x * THREADS + threadIdx.x);
    ask(i);
#pragma unroll 1  // for the sake of registers
    for (; i < count; i += step) {
        const int there = remaining(count, i);
        float y[EIGHT], g[EIGHT], pixels[EIGHT];
        fetch(y, before + i, rows ? there : 0);
        fetch(g, gradient + i, there);
        fetch(pixels, image + i, boxed ? there : 0);
#pragma unroll
        for (int e = 0; e < EIGHT; ++e) {
            g[e] = boxed && held(pixels[e], g[e]) ? 0.f : unit * g[e];
            y[e] = rows ? to_float(narrowed(g[e] - y[e], CHANGES)) / CHANGES : 0.f;
        }
        Eight x[GROUP] = {};
        wait_for_groups<0>();
        if (first < rows)
#pragma unroll
            for (int r = 0; r < GROUP; ++r) x[r] = fetch(ahead[r] + EIGHT * threadIdx.x);
        ask(i + step);
#pragma unroll
        for (int r = 0; r < GROUP; ++r)
#pragma unroll
            for (int e = 0; e < EIGHT; ++e) {
                static_assert(CHANGE % GROUP == GROUP - 2 && GRADIENT % GROUP == GROUP - 1);
                float own = to_float(x[r].element[e]);
                if (r == GROUP - 2 && first + r == CHANGE) own = y[e];
                if (r == GROUP - 1 && first + r == GRADIENT) own = g[e];
                sum[r][0] += own * y[e];
                sum[r][1] += own * g[e];
            }
    }
#pragma unroll
    for (int v = 0; v < 2 * GROUP; ++v) {
        const int row = first + v / 2;
        const float size = row >= CHANGE ? 1.f : row >= rows ? 0.f : row % 2 ? 1 / CHANGES : 1 / MOVES;
        const double value = size * warp_sum(sum[v / 2][v % 2]);
        if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32][v] = value;
    }
    __syncthreads();
    if (threadIdx.x < 2 * GROUP) {
        double value = 0;
        for (int warp = 0; warp < WARPS; ++warp) value += warps[warp][threadIdx.x];
        sums[(2ll * first + threadIdx.x) * gridDim.x + blockIdx.x] = value;
    }
}

// -H g as coefficients of the history, by the two loops on dot products: lane i holds the i-th oldest pair. products and
// squares are those of the state.
__device__ inline void two_loops(State& state, const double (*products)[SLOTS], const double (*squares)[SLOTS],
                                 const double (*dots)[2], long long pairs, long long slots, int newest) {
    const int lane = threadIdx.x, held = pairs < slots - 1 ? pairs : slots - 1;
    const unsigned place = static_cast<unsigned>(pairs - held + lane) % static_cast<unsigned>(slots);
    const int slot = lane < held ? place : newest;
    const auto slot_of = [=](int age) { return __shfl_sync(0xffffffffu, slot, age); };
    const double per_curvature = 1 / products[slot][slot];
    double along = -dots[2 * slot][1];  // s_i q
    double across = -dots[slot == newest && state.accepted ? CHANGE : 2 * slot + 1][1];  // y_i q
    double share = 0, alpha = 0;
    for (int j = held - 1; j >= 0; --j) {
        const double a = __shfl_sync(0xffffffffu, along * per_curvature, j);
        const int other = slot_of(j);
        if (lane == j) alpha = a;
        along -= a * products[slot][other];
        across -= a * squares[slot][other];
    }
    const int last = held ? slot_of(held - 1) : 0;
    const double gamma = held ? products[last][last] / squares[last][last] : 1;
    across *= gamma;
    for (int j = 0; j < held; ++j) {
        const double b = __shfl_sync(0xffffffffu, alpha - across * per_curvature, j);
        if (lane == j) share = b;
        across += b * products[slot_of(j)][slot];
    }
    if (lane < held) {
        state.of_history[2 * slot] = share;
        state.of_history[2 * slot + 1] = -gamma * alpha;
    }
    if (lane == 0) state.of_gradient = -gamma;
}

// One block. sums (ROWS, 2, chunks) from lbfgs_dots over `count` elements. made_steps and losses, which may be null, are
// those of a trail.
__global__ void lbfgs_plan(State* shared_state, const float* loss, unsigned* made_steps, float* losses,
                           const double* sums, long long chunks, long long count, long long slots, float diverged,
                           long long halvings) {
    take_turn();
    __shared__ double dots[ROWS][2], products[SLOTS][SLOTS], squares[SLOTS][SLOTS];
    State& state = *shared_state;
    const int lane = threadIdx.x % 32;
    // All that is read of memory is on its way before the first of it is used.
    const int made = state.to;
    const float total = *loss;
    const double lowest = state.lowest, known_pairs = state.pairs, half_steps = state.halvings;
    const bool moved = state.moved;
    constexpr int EACH = (SLOTS * SLOTS + THREADS - 1) / THREADS;
    double product[EACH] = {}, square[EACH] = {};
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const int i = threadIdx.x + e * THREADS;
        if (i >= SLOTS * SLOTS) break;
        product[e] = state.products[i / SLOTS][i % SLOTS];
        square[e] = state.squares[i / SLOTS][i % SLOTS];
    }
    static_assert(2 * ROWS % WARPS == 0);
    double own[2 * ROWS / WARPS] = {};  // each warp adds up some of the dot products, all of them at once
    for (long long chunk = lane; chunk < chunks; chunk += 32)
#pragma unroll
        for (int i = 0; i < 2 * ROWS / WARPS; ++i) own[i] += sums[(threadIdx.x / 32 + i * WARPS) * chunks + chunk];
#pragma unroll
    for (int i = 0; i < 2 * ROWS / WARPS; ++i) {
        const int v = threadIdx.x / 32 + i * WARPS;
        const double sum = warp_sum(own[i]);
        if (lane == 0) dots[v / 2][v % 2] = sum;
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) {
        const int i = threadIdx.x + e * THREADS;
        if (i >= SLOTS * SLOTS) break;
        products[i / SLOTS][i % SLOTS] = product[e];
        squares[i / SLOTS][i % SLOTS] = square[e];
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const bool finite = isfinite(total), improved = finite && total < lowest;
    const bool far = finite && !improved && total > diverged * lowest;
    const bool halve = far && half_steps < halvings, restart = far && !halve, step = finite && !far;
    const bool accepted = step && moved && dots[2 * made][0] > 1e-10;
    const long long pairs = accepted ? known_pairs + 1 : known_pairs;
    __syncwarp();  // all lanes have read the state
    for (int row = lane; row < 2 * SLOTS; row += 32) state.of_history[row] = 0;
    if (accepted && lane < SLOTS) {
        const double along = dots[2 * lane][0], across = dots[lane == made ? CHANGE : 2 * lane + 1][0];
        state.products[lane][made] = products[lane][made] = along;
        state.squares[lane][made] = state.squares[made][lane] = squares[lane][made] = squares[made][lane] = across;
    }
    if (lane == 0) {
        if (losses) losses[*made_steps] = total;
        *made_steps += 1;
        state.improved = improved;
        if (improved) state.lowest = total;
        state.action = step ? STEP : halve ? HALVE : restart ? RESTART : HALT;
        state.accepted = accepted;
        state.from = made;
        if (halve) state.halvings += 1;
        if (step) {
            state.halvings = 0;
            state.moved = 1;
            state.pairs = pairs;
            state.to = pairs % slots;
        }
        if (step && !moved) {
            const double size = sqrt(dots[GRADIENT][1] / count);
            state.unit = size > 0 ? 1 / size : 1;
            state.of_gradient = -state.first_step;
        }
        if (restart) {
            state.first_step /= 4;
            state.unit = 1;
            state.pairs = state.moved = state.halvings = state.to = 0;
        }
    }
    __syncwarp();
    if (step && moved) two_loops(state, products, squares, dots, pairs, slots, made);
}

// Does what the plan says, with no element moved by more than `largest`; image, gradient, before (count,), history
// (2 slots, stride). A boxed image stays in [0, 1]. bests (kept, best_stride) and *made_steps, this one counted, are those
// of a trail.
__global__ void __launch_bounds__(THREADS, 2) lbfgs_move(float* image, const float* gradient, __half* history,
                                                         float* before, const State* state, long long count,
                                                         long long stride, long long slots, long long boxed,
                                                         float largest, float* bests, long long best_stride,
                                                         long long kept, const unsigned* made_steps) {
    take_turn();
    __shared__ float of_history[2 * SLOTS];
    if (threadIdx.x < 2 * SLOTS)
        of_history[threadIdx.x] = state->of_history[threadIdx.x] / (threadIdx.x % 2 ? CHANGES : MOVES);
    __syncthreads();
    const int action = state->action;
    const bool improved = state->improved, accepted = state->accepted;
    const float unit = state->unit, of_gradient = state->of_gradient;
    const int rows = rows_in_use(*state, slots);
    float* best = best_of(bests, *made_steps - 1, best_stride, kept);
    const float* best_before = best_of(bests, *made_steps + kept - 2, best_stride, kept);
    __half *made = history + 2 * (long long)state->from * stride, *next = history + 2 * (long long)state->to * stride;
    for (long long i = EIGHT * ((long long)blockIdx.x * THREADS + threadIdx.x); i < count;
         i += EIGHT * (long long)gridDim.x * THREADS) {
        const int there = remaining(count, i);
        float x[EIGHT], g[EIGHT], move[EIGHT];
        fetch(x, image + i, there);
        if (improved) {
            keep(best + i, x, there);
        } else {
            fetch(g, best_before + i, there);
            keep(best + i, g, there);
        }
        if (action == STEP) {
            bool stays[EIGHT];
            fetch(g, gradient + i, there);
#pragma unroll
            for (int e = 0; e < EIGHT; ++e) {
                stays[e] = boxed && held(x[e], g[e]);
                g[e] = stays[e] ? 0.f : unit * g[e];
                move[e] = of_gradient * g[e];
            }
            if (accepted) {
                float y[EIGHT];
                fetch(y, before + i, there);
                for (int e = 0; e < EIGHT; ++e) y[e] = g[e] - y[e];
                keep(made + stride + i, y, CHANGES);
            }
            keep(before + i, g, there);
#pragma unroll 8  // loads of several rows on their way at once
            for (int row = 0; row < rows; ++row) {
                const Eight vector = fetch(history + row * stride + i);
                for (int e = 0; e < EIGHT; ++e) move[e] += of_history[row] * to_float(vector.element[e]);
            }
#pragma unroll
            for (int e = 0; e < EIGHT; ++e) {
                move[e] = move[e] > largest ? largest : move[e] < -largest ? -largest : move[e];  // NaN stays NaN
                if (boxed) move[e] = stays[e] ? 0.f : fminf(1.f, fmaxf(0.f, x[e] + move[e])) - x[e];
                x[e] += move[e];
            }
            keep(next + i, move, MOVES);
        } else if (action == HALVE) {
            const Eight made_move = fetch(made + i);
            for (int e = 0; e < EIGHT; ++e) {
                move[e] = to_float(made_move.element[e]) / (2 * MOVES);
                x[e] = boxed ? fminf(1.f, fmaxf(0.f, x[e] - move[e])) : x[e] - move[e];
            }
            keep(made + i, move, MOVES);
        } else if (action == RESTART) {
            fetch(x, best + i, there);
        }
        if (action != HALT) keep(image + i, x, there);
    }
}
