// F F^T of all style layers. The positions are shared out over the blocks, since C x C alone is too few tiles to fill a
// chip; losses.cu adds the shares in a fixed order. Only tiles on and above the diagonal are computed.

#include "tiles.cuh"

// layers: writes `partial` of `count` ones from `begin` on, whose blocks are those from `start` on of a launch for all.
template <typename T, bool NHWC>
__global__ void __launch_bounds__(THREADS, 2) gram(const Layer* layers, long long begin, long long count,
                                                   long long start) {
    const long long block = start + blockIdx.x;
    const Layer layer = layers[begin + locate(layers + begin, count, &Layer::gram_block, block)];
    take_turn();  // the table is always the same
    const long long C = layer.channels, M = layer.positions;
    const long long across = divide_up(C, tile<T>), pairs = across * (across + 1) / 2;
    const long long local = block - layer.gram_block;
    const long long share = local / pairs;  // blocks that read the same positions run side by side
    long long row = 0, column = local % pairs;
    for (; column >= across - row; ++row) column -= across - row;
    column += row;
    const long long row0 = row * tile<T>, column0 = column * tile<T>;
    const long long from = share * layer.share, end = smaller(from + layer.share, M);
    float* out = layer.partial + share * C * C;
    const auto write = [=](int i, int j, float value) {
        if (row0 + i < C && column0 + j < C) out[(row0 + i) * C + column0 + j] = value;
    };
    const T* features = static_cast<const T*>(layer.features);
    if constexpr (sizeof(T) == 4) {
        const View view{features, C, NHWC ? 1 : M, NHWC ? C : 1};
        ProductFp32 product;
        product.add(view, row0, view, column0, from, end);
        product.each(write);
    } else {
        __shared__ __align__(16) T shared[4 * OPERAND];
        const Matrix<T> matrix{features, NHWC ? end : C, NHWC ? C : end, NHWC ? C : M};
        Product product;
        product.template add<!NHWC, !NHWC>(matrix, row0, 1.f, matrix, column0, from, end, shared);
        product.each(write);
    }
}

constexpr int STRETCH = 32;  // positions that the warps of a group multiply at once

// The same for one NHWC layer of C channels, row `found` of the layers: a block has a share of its positions, and reads each
// of their features once. Its warps are groups, which take turns at the positions. In a group each warp has two of the
// strips of 16 rows of the upper triangle, together as long as those of the others; a fragment of the transposed features
// is an operand of either side.
template <typename H, int C>
__global__ void __launch_bounds__(THREADS, 2) gram_narrow(const Layer* layers, long long found) {
    constexpr int STRIPS = C / 16, MEMBERS = STRIPS / 2, GROUPS = WARPS / MEMBERS, PIECES = C / 8;
    constexpr int POSITIONS = GROUPS * STRETCH, STAGES = 3;  // POSITIONS C elements as in layers.py
    struct Sums {
        float of[STRIPS + 1][2][4];  // 16 x 16 elements each: those of the first strip, then those of the second
    };
    union Memory {
        H features[STAGES][POSITIONS][C];
        float sums[MEMBERS][sizeof(Sums) / 4][32];
    };
    __shared__ __align__(16) unsigned char memory[sizeof(Memory)];
    Memory& shared = *reinterpret_cast<Memory*>(memory);
    static_assert(sizeof(Memory) <= 48 << 10);
    const Layer layer = layers[found];
    take_turn();  // the table is always the same
    const int lane = threadIdx.x % 32, group = threadIdx.x / 32 / MEMBERS, member = threadIdx.x / 32 % MEMBERS;
    const long long begin = blockIdx.x * layer.share, end = smaller(begin + layer.share, layer.positions);
    const H* features = static_cast<const H*>(layer.features);
    const auto ask = [&](long long from, int stage) {
#pragma unroll
        for (int v = threadIdx.x; v < POSITIONS * PIECES; v += THREADS) {
            const int position = v / PIECES, piece = v % PIECES;
            const bool there = from + position < end;
            const H* source = features + (there ? (from + position) * C + piece * 8 : 0);
            // Eight positions lie in different banks.
            copy_later(shared.features[stage][position] + (piece ^ position % 8) * 8, source, there);
        }
        end_group();
    };
    for (int stage = 0; stage < STAGES - 1; ++stage) ask(begin + stage * POSITIONS, stage);
    const int lower = STRIPS - 1 - member;
    Sums sums = {};
    int stage = 0;
    for (long long at = begin; at < end; at += POSITIONS) {
        wait_for_groups<STAGES - 2>();
        __syncthreads();  // and nobody reads the stage before this one any more
        ask(at + (STAGES - 1) * POSITIONS, stage == 0 ? STAGES - 1 : stage - 1);
#pragma unroll
        for (int k = 0; k < STRETCH; k += 16) {
            const auto fragment = [&](unsigned (&q)[4], int strip) {
                const int position = group * STRETCH + k + lane % 8 + lane / 16 * 8, piece = 2 * strip + lane / 8 % 2;
                load_matrices<true>(q, shared.features[stage][position] + (piece ^ position % 8) * 8);
            };
            unsigned first[4], second[4];
            fragment(first, member);
            fragment(second, lower);
#pragma unroll
            for (int s = 0; s <= STRIPS; ++s) {
                const bool in_first = s < STRIPS - member;
                unsigned left[4], right[4];
                for (int i = 0; i < 4; ++i) left[i] = in_first ? first[i] : second[i];
                fragment(right, in_first ? member + s : s - 1);
                for (int half = 0; half < 2; ++half) mma<H>(sums.of[s][half], left, right[half], right[half + 2]);
            }
        }
        stage = stage + 1 < STAGES ? stage + 1 : 0;
    }
    wait_for_groups<0>();
    // The groups add up, one after the other.
    float* own = reinterpret_cast<float*>(sums.of);
    for (int turn = GROUPS - 1; turn > 0; --turn) {
        __syncthreads();
        if (group == turn)
#pragma unroll
            for (int i = 0; i < static_cast<int>(sizeof(Sums)) / 4; ++i) {
                if (turn < GROUPS - 1) own[i] += shared.sums[member][i][lane];
                shared.sums[member][i][lane] = own[i];
            }
    }
    __syncthreads();
    if (group > 0) return;
    float* out = layer.partial + blockIdx.x * (long long)(C * C);
#pragma unroll
    for (int s = 0; s <= STRIPS; ++s) {
        const bool in_first = s < STRIPS - member;
        const int row = 16 * (in_first ? member : lower) + lane / 4, column = 16 * (in_first ? member + s : s - 1);
        for (int half = 0; half < 2; ++half)
            for (int e = 0; e < 4; e += 2) {
                const int place = (s * 2 + half) * 4 + e;
                Vector<float, 2> pair;
                for (int i = 0; i < 2; ++i) pair.element[i] = own[place + i] + shared.sums[member][place + i][lane];
                float* to = out + (row + e / 2 * 8) * C + column + 8 * half + lane % 4 * 2;
                *reinterpret_cast<Vector<float, 2>*>(to) = pair;
            }
    }
}
