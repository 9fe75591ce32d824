// Vector-free L-BFGS (Chen, Wang, Zhou, NIPS 2014) in three launches: dot products, a plan made of scalars, the move.
// The arithmetic of the plan, and what its fields mean, is explained in lbfgs.py.

#include "common.cuh"

constexpr int SLOTS = 21;               // most pairs of the history, and one being made
constexpr int CHANGE = 2 * SLOTS;       // row of y among the dot products
constexpr int GRADIENT = CHANGE + 1;    // and of g
constexpr int ROWS = GRADIENT + 1;
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

// Eight neighbouring elements of a row, which is a whole evaluation old.
__device__ inline Eight fetch(const __half* from) { return *reinterpret_cast<const Eight*>(from); }

// COUNT neighbouring elements from a multiple of COUNT on, of which `there` exist; the others are zeros.
template <int COUNT>
__device__ inline void fetch(float (&x)[COUNT], const float* from, int there) {
    constexpr int WIDE = COUNT < 4 ? COUNT : 4;
    if (there == COUNT) {
        for (int k = 0; k < COUNT / WIDE; ++k) {
            const Vector<float, WIDE> found = load_past_first(reinterpret_cast<const Vector<float, WIDE>*>(from) + k);
            for (int e = 0; e < WIDE; ++e) x[WIDE * k + e] = found.element[e];
        }
    } else {
        for (int e = 0; e < COUNT; ++e) x[e] = e < there ? __ldcg(from + e) : 0.f;
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

// How many of `wanted` elements from i on there are.
__device__ inline int remaining(long long count, long long i, int wanted) {
    return count - i < wanted ? (count > i ? count - i : 0) : wanted;
}

// Whether x lies on a bound of [0, 1], and its gradient points out.
__device__ inline bool held(float x, float gradient) { return (x <= 0 && gradient > 0) || (x >= 1 && gradient < 0); }

constexpr int GROUP = 16;         // rows that one block multiplies, as in lbfgs.py
constexpr int LINE = 64;          // elements of a row that a warp takes at once
constexpr int OWN = LINE / 32;    // of them, whose y and g a lane prepares
constexpr int STAGES = 2;         // tiles of a warp that are on their way
constexpr float FINER = 1 << 11;  // what g loses in 16 bits is kept as 16 bits more, times this

// sums (ROWS, 2, gridDim.x): shares of the dot products of each row with y = g - before and g = unit * gradient. The
// blocks of a column share out the elements, those of a row the rows. history (2 slots, stride), of which `count`
// elements a row are in use; stride is a multiple of EIGHT, and so are all addresses of 16 bytes. Where the image is
// boxed and held, g is 0. y is rounded as it will be kept.
//
// The products with the history are one of matrices, (CHANGE, elements) (elements, 3): of y, of g in 16 bits and of what
// that leaves. Each warp goes its own way: what one waits for, the others' work hides. All but the gradient is as the
// step before left it, and so asked for before the turn.
__global__ void __launch_bounds__(THREADS, 3) lbfgs_dots(const __half* history, const float* before, const float* image,
                                                         const float* gradient, const State* state, long long count,
                                                         long long stride, long long slots, long long boxed,
                                                         double* sums) {
    constexpr int PIECES = LINE / EIGHT;
    using Own = Vector<__half, OWN>;
    __shared__ __align__(16) __half tiles[WARPS][STAGES][GROUP][LINE], vectors[WARPS][3][LINE + 8];  // in different banks
    __shared__ double found[WARPS][2 * GROUP];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = blockIdx.y * GROUP;
    const int rows = rows_in_use(*state, slots), present = rows - first < GROUP ? rows - first : GROUP;
    const float unit = state->unit;
    const long long step = (long long)LINE * WARPS * gridDim.x;
    long long at = (long long)LINE * (WARPS * blockIdx.x + warp);
    const auto ask = [&](long long from, int stage) {
        const int place = lane % PIECES;
        const bool there = from + place * EIGHT < stride;
        const __half* source = history + (there ? first * stride + from + place * EIGHT : 0);
#pragma unroll
        for (int row = lane / PIECES; row < GROUP; row += 32 / PIECES)  // eight rows lie in different banks
            if (row < present && from < count)
                copy_later(tiles[warp][stage][row] + (place ^ row % 8) * EIGHT, source + (there ? row * stride : 0), there);
        end_group();
    };
    float g[OWN], last[OWN], pixels[OWN];
    const auto look_back = [&](long long from) {
        const int there = remaining(count, from + OWN * lane, OWN);
        fetch(last, before + from + OWN * lane, rows ? there : 0);
        fetch(pixels, image + from + OWN * lane, boxed ? there : 0);
    };
    const auto look = [&](long long from) {
        fetch(g, gradient + from + OWN * lane, remaining(count, from + OWN * lane, OWN));
    };
    for (int stage = 0; stage < STAGES; ++stage) ask(at + stage * step, stage);
    look_back(at);
    take_turn();
    look(at);
    float total[4] = {};
    double squares[3] = {};  // y y, y g, g g
    const bool has_squares = first == CHANGE / GROUP * GROUP;
    for (int stage = 0; at < count; at += step, stage = (stage + 1) % STAGES) {
        Own change, coarse, fine;
#pragma unroll
        for (int e = 0; e < OWN; ++e) {
            const float own = boxed && held(pixels[e], g[e]) ? 0.f : unit * g[e];
            change.element[e] = narrowed(rows ? own - last[e] : 0.f, CHANGES);
            coarse.element[e] = narrowed(own, 1);
            fine.element[e] = narrowed(own - to_float(coarse.element[e]), FINER);
            if (!has_squares) continue;
            const float y = to_float(change.element[e]) / CHANGES;
            squares[0] += y * y;
            squares[1] += y * own;
            squares[2] += static_cast<double>(own) * own;
        }
        look(at + step);
        look_back(at + step);
        reinterpret_cast<Own*>(vectors[warp][0])[lane] = change;
        reinterpret_cast<Own*>(vectors[warp][1])[lane] = coarse;
        reinterpret_cast<Own*>(vectors[warp][2])[lane] = fine;
        wait_for_groups<STAGES - 1>();
        __syncwarp();
        float sum[4] = {};  // tensor cores cut sums off: long ones are made without them
        const int column = lane / 4, row = lane % 16;
#pragma unroll
        for (int k = 0; k < LINE / 16; ++k) {
            const auto pair = [&](int place) {
                return column < 3 ? *reinterpret_cast<const unsigned*>(vectors[warp][column] + place) : 0u;
            };
            const int place = 2 * k + lane / 16;
            unsigned left[4];
            load_matrices<false>(left, tiles[warp][stage][row] + (place ^ row % 8) * EIGHT);
            mma<__half>(sum, left, pair(16 * k + lane % 4 * 2), pair(16 * k + 8 + lane % 4 * 2));
        }
        for (int e = 0; e < 4; ++e) total[e] += sum[e];
        __syncwarp();
        ask(at + STAGES * step, stage);
    }
    for (int half = 0; half < 2; ++half) {
        const float fine = __shfl_sync(0xffffffffu, total[2 * half], lane + 1 & 31);  // column 2 is the next lane's
        const int row = 8 * half + lane / 4;
        if (lane % 4 > 0) continue;
        const float size = row % 2 ? CHANGES : MOVES;
        found[warp][2 * row] = row < present ? total[2 * half] / size / CHANGES : 0;
        found[warp][2 * row + 1] = row < present ? (total[2 * half + 1] + fine / FINER) / size : 0;
    }
    warp_sums(squares);
    static_assert(CHANGE / GROUP == GRADIENT / GROUP);
    __syncwarp();
    if (lane == 0 && has_squares) {
        double* own = found[warp] + 2 * (CHANGE - first);
        own[0] = squares[0];
        own[1] = own[2] = squares[1];
        own[3] = squares[2];
    }
    __syncthreads();
    if (threadIdx.x >= 2 * GROUP || first + threadIdx.x / 2 >= ROWS) return;
    double value = 0;
    for (int w = 0; w < WARPS; ++w) value += found[w][threadIdx.x];
    sums[(2ll * first + threadIdx.x) * gridDim.x + blockIdx.x] = value;
}

// -H g as coefficients of the history, by the two loops on dot products: lane i holds the i-th oldest pair. products and
// squares are those of the state.
__device__ inline void two_loops(State& state, const double (*products)[SLOTS], const double (*squares)[SLOTS],
                                 const double (*dots)[2], unsigned pairs, unsigned slots, int newest,
                                 bool accepted, float scaling) {
    const int lane = threadIdx.x, held = pairs < slots - 1 ? pairs : slots - 1;
    const int oldest = (pairs - held) % slots, youngest = (pairs + slots - 1) % slots;
    const int slot = lane < held ? (pairs - held + lane) % slots : newest;
    const double per_curvature = 1 / products[slot][slot];
    // s_i q and y_i q over s_i y_i: so each step waits for a shuffle and one sum only.
    double along = -dots[2 * slot][1] * per_curvature;
    double across = -dots[slot == newest && accepted ? CHANGE : 2 * slot + 1][1] * per_curvature;
    double share = 0, alpha = 0;
    for (int j = held - 1, other = youngest; j >= 0; --j, other = (other ? other : slots) - 1) {
        const double of_along = products[slot][other] * per_curvature, of_across = squares[slot][other] * per_curvature;
        const double a = __shfl_sync(0xffffffffu, along, j);
        if (lane == j) alpha = a;
        along -= a * of_along;
        across -= a * of_across;
    }
    const double gamma = held ? scaling * products[youngest][youngest] / squares[youngest][youngest] : 1;
    double rest = alpha - gamma * across;
    for (int j = 0, other = oldest; j < held; ++j, other = other + 1 < static_cast<int>(slots) ? other + 1 : 0) {
        const double of_rest = products[other][slot] * per_curvature;
        const double b = __shfl_sync(0xffffffffu, rest, j);
        if (lane == j) share = b;
        rest -= b * of_rest;
    }
    if (lane < held) {
        state.of_history[2 * slot] = share;
        state.of_history[2 * slot + 1] = -gamma * alpha;
    }
    if (lane == 0) state.of_gradient = -gamma;
}

constexpr int CHUNKS = 128;  // at most, as in lbfgs.py

// One block. sums (ROWS, 2, chunks) from lbfgs_dots over `count` elements. made_steps and losses, which may be null, are
// those of a trail.
__global__ void __launch_bounds__(THREADS, 2) lbfgs_plan(State* shared_state, const float* loss, unsigned* made_steps,
                                                         float* losses, const double* sums, long long chunks,
                                                         long long count, long long slots, float diverged,
                                                         long long halvings, float scaling) {
    __shared__ double dots[ROWS][2], products[SLOTS][SLOTS], squares[SLOTS][SLOTS];
    State& state = *shared_state;
    const int lane = threadIdx.x % 32;
    // The next kernel may read what neither this one nor the one before writes; and this one, before its turn, the state
    // as the step before left it, and the loss, which is older than the dot products.
    let_next_come();
    const int made = state.to;
    const float total = __ldcg(loss);
    const double lowest = state.lowest, known_pairs = state.pairs, half_steps = state.halvings;
    const bool moved = state.moved;
    const unsigned steps = *made_steps;
    for (int i = threadIdx.x; i < SLOTS * SLOTS; i += THREADS) {
        products[i / SLOTS][i % SLOTS] = state.products[i / SLOTS][i % SLOTS];
        squares[i / SLOTS][i % SLOTS] = state.squares[i / SLOTS][i % SLOTS];
    }
    await_turn();
    // Each warp adds up some of the dot products; branches would keep them from being on their way at once.
    static_assert(2 * ROWS % WARPS == 0);
    constexpr int EACH = 2 * ROWS / WARPS;
    double share[CHUNKS / 32][EACH], own[EACH] = {};
#pragma unroll
    for (int part = 0; part < CHUNKS / 32; ++part)
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int chunk = 32 * part + lane, from = chunk < chunks ? chunk : 0;
            share[part][i] = sums[(threadIdx.x / 32 + i * WARPS) * static_cast<int>(chunks) + from];
        }
#pragma unroll
    for (int part = 0; part < CHUNKS / 32; ++part)
#pragma unroll
        for (int i = 0; i < EACH; ++i) own[i] += 32 * part + lane < chunks ? share[part][i] : 0;
    warp_sums(own);
    for (int i = 0; i < EACH && lane == 0; ++i) {
        const int v = threadIdx.x / 32 + i * WARPS;
        dots[v / 2][v % 2] = own[i];
    }
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const bool finite = isfinite(total), improved = finite && total < lowest;
    const bool far = finite && !improved && total > diverged * lowest;
    const bool halve = far && half_steps < halvings, restart = far && !halve, step = finite && !far;
    const bool accepted = step && moved && dots[2 * made][0] > 1e-10;
    const unsigned pairs = accepted ? known_pairs + 1 : known_pairs;
    for (int row = lane; row < 2 * SLOTS; row += 32) state.of_history[row] = 0;
    if (accepted && lane < SLOTS) {
        const double along = dots[2 * lane][0], across = dots[lane == made ? CHANGE : 2 * lane + 1][0];
        state.products[lane][made] = products[lane][made] = along;
        state.squares[lane][made] = state.squares[made][lane] = squares[lane][made] = squares[made][lane] = across;
    }
    if (lane == 0) {
        if (losses) losses[steps] = total;
        *made_steps = steps + 1;
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
            state.to = pairs % static_cast<unsigned>(slots);
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
    if (step && moved) two_loops(state, products, squares, dots, pairs, slots, made, accepted, scaling);
}

constexpr int STAGED = 11, ON_THEIR_WAY = 14;  // rows that lbfgs_move keeps in shared memory; and has in registers at once

// Does what the plan says, with no element moved by more than `largest`; image, gradient, before (count,), history
// (2 slots, stride). A boxed image stays in [0, 1]. bests (kept, best_stride) and *made_steps, this one counted, are those
// of a trail. A block moves EIGHT THREADS elements; all that the plan does not change it asks for before its turn.
__global__ void __launch_bounds__(THREADS, 2) lbfgs_move(float* image, const float* gradient, __half* history,
                                                         float* before, const State* state, long long count,
                                                         long long stride, long long slots, long long boxed,
                                                         float largest, float* bests, long long best_stride,
                                                         long long kept, const unsigned* made_steps) {
    __shared__ __align__(16) __half staged[STAGED][THREADS * EIGHT];
    const long long i = EIGHT * ((long long)blockIdx.x * THREADS + threadIdx.x);
    const int there = remaining(count, i, EIGHT);
    // Rows that the plan does not use have the coefficient zero: what they hold is finite.
    const auto row_of = [=](int row) { return history + (row < 2 * slots ? row * stride : 0) + (there ? i : 0); };
    for (int r = 0; r < STAGED; ++r) copy_later(staged[r] + EIGHT * threadIdx.x, row_of(r), true);
    end_group();
    float x[EIGHT], g[EIGHT], last[EIGHT];
    fetch(x, image + i, there);
    fetch(g, gradient + i, there);
    fetch(last, before + i, there);
    Eight rows[ON_THEIR_WAY];
#pragma unroll
    for (int r = 0; r < ON_THEIR_WAY; ++r) rows[r] = fetch(row_of(STAGED + r));
    for (int r = STAGED + ON_THEIR_WAY + threadIdx.x % 8; r < 2 * slots && there; r += 8)
        fetch_early(row_of(r));  // eight neighbours share a line: each asks for other rows
    await_turn();  // the next kernel, which may be that of another step, comes when this one is done
    const int action = state->action, from = state->from, to = state->to;
    const bool improved = state->improved, accepted = state->accepted;
    const float unit = state->unit, of_gradient = state->of_gradient;
    __shared__ float of_history[2 * SLOTS], of_change;
    if (threadIdx.x < 2 * SLOTS) {
        // The newest y is not among the rows yet.
        const bool fresh = accepted && threadIdx.x == 2 * from + 1;
        const float own = state->of_history[threadIdx.x] / (threadIdx.x % 2 ? CHANGES : MOVES);
        of_history[threadIdx.x] = fresh ? 0.f : own;
        if (fresh) of_change = own;
    }
    const unsigned steps = *made_steps;
    __syncthreads();
    if (!there || action != STEP) wait_for_groups<0>();  // with what nobody uses, too
    if (!there) return;
    if (!improved) {
        float earlier[EIGHT];
        fetch(earlier, best_of(bests, steps + kept - 2, best_stride, kept) + i, there);
        keep(best_of(bests, steps - 1, best_stride, kept) + i, earlier, there);
        if (action == RESTART) keep(image + i, earlier, there);
    } else {
        keep(best_of(bests, steps - 1, best_stride, kept) + i, x, there);
    }
    __half *made = history + 2ll * from * stride + i, *next = history + 2ll * to * stride + i;
    if (action == STEP) {
        float move[EIGHT];
        bool stays[EIGHT];
        Eight change;
#pragma unroll
        for (int e = 0; e < EIGHT; ++e) {
            stays[e] = boxed && held(x[e], g[e]);
            g[e] = stays[e] ? 0.f : unit * g[e];
            move[e] = of_gradient * g[e];
            change.element[e] = narrowed(g[e] - last[e], CHANGES);
        }
        keep(before + i, g, there);
        const auto add = [&](float share, const Eight& vector) {
#pragma unroll
            for (int e = 0; e < EIGHT; ++e) move[e] += share * to_float(vector.element[e]);
        };
#pragma unroll
        for (int r = 0; r < 2 * SLOTS - STAGED; ++r) {
            add(of_history[STAGED + r], rows[r % ON_THEIR_WAY]);
            const int later = STAGED + r + ON_THEIR_WAY;
            if (later < 2 * SLOTS) rows[r % ON_THEIR_WAY] = fetch(row_of(later));
        }
        wait_for_groups<0>();
        for (int r = 0; r < STAGED; ++r) add(of_history[r], fetch(staged[r] + EIGHT * threadIdx.x));
        if (accepted) {
            add(of_change, change);
            *reinterpret_cast<Eight*>(made + stride) = change;
        }
#pragma unroll
        for (int e = 0; e < EIGHT; ++e) {
            move[e] = move[e] > largest ? largest : move[e] < -largest ? -largest : move[e];  // NaN stays NaN
            if (boxed) move[e] = stays[e] ? 0.f : fminf(1.f, fmaxf(0.f, x[e] + move[e])) - x[e];
            x[e] += move[e];
        }
        keep(next, move, MOVES);
        keep(image + i, x, there);
    } else if (action == HALVE) {
        const Eight made_move = fetch(made);
        float move[EIGHT];
        for (int e = 0; e < EIGHT; ++e) {
            move[e] = to_float(made_move.element[e]) / (2 * MOVES);
            x[e] = boxed ? fminf(1.f, fmaxf(0.f, x[e] - move[e])) : x[e] - move[e];
        }
        keep(made, move, MOVES);
        keep(image + i, x, there);
    }
}
