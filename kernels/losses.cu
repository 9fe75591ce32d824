// Style and content losses of all layers, G - A, and the factors of their gradients.

#include "layers.cuh"

constexpr int ROUNDS = 2;        // as in layers.py
constexpr int MAX_LAYERS = 256;  // as in layers.py
constexpr double QUIET = 1e-30;  // the least that a cotangent is taken for

// Elements of the upper triangle of a matrix, with its diagonal.
__device__ inline long long triangle(long long rows) { return rows * (rows + 1) / 2; }

// An element of the upper triangle, where each row from above is followed by one from below, so that together they have
// C + 1 elements.
struct Element {
    unsigned row, column;
    __device__ Element(unsigned place, unsigned C) {
        const unsigned pair = place / (C + 1), k = place % (C + 1);
        row = k < C - pair ? pair : C - 1 - pair;
        column = k < C - pair ? pair + k : k - 1;
    }
};

// The share of this thread in |a - b|^2; a and b are multiples of 16 bytes.
template <typename T>
__device__ inline double distance(const T* a, const T* b, long long count) {
    constexpr int WIDE = 16 / sizeof(T);
    using Wide = Vector<T, WIDE>;
    float sum = 0;
#pragma unroll 4
    for (long long i = WIDE * threadIdx.x; i + WIDE <= count; i += WIDE * THREADS) {
        const Wide left = *reinterpret_cast<const Wide*>(a + i), right = *reinterpret_cast<const Wide*>(b + i);
        for (int e = 0; e < WIDE; ++e) {
            const float d = to_float(left.element[e]) - to_float(right.element[e]);
            sum += d * d;
        }
    }
    for (long long i = count / WIDE * WIDE + threadIdx.x; i < count; i += THREADS) {
        const float d = to_float(a[i]) - to_float(b[i]);
        sum += d * d;
    }
    return sum;
}

// Writes sums (blocks, 2): the shares of each block in |G - A|^2 and in trace(G) of its style layer, or in |F - P|^2; of
// `count` layers from `begin` on, whose blocks are those from `start` on of a launch for all. A block has `span` elements
// of G, in ROUNDS.
template <typename T>
__global__ void __launch_bounds__(THREADS, 4) layer_losses(const Layer* layers, long long begin, long long count,
                                                           long long start, double* sums) {
    __shared__ float shares[ROUNDS][THREADS];
    const long long block = start + blockIdx.x;
    const Layer layer = layers[begin + locate(layers + begin, count, &Layer::loss_block, block)];
    const long long C = layer.channels, M = layer.positions, local = block - layer.loss_block;
    const long long style_blocks = layer.target ? divide_up(triangle(C), layer.span) : 0;
    // Elements of G at once, the threads that add up one of them, and which of those this one is.
    const int elements = layer.span / ROUNDS, lanes = THREADS / elements, lane = threadIdx.x / elements;
    unsigned place[ROUNDS];
    float wanted[ROUNDS], sum[ROUNDS] = {};
    for (int r = 0; r < ROUNDS && local < style_blocks; ++r) {
        place[r] = local * layer.span + r * elements + threadIdx.x % elements;
        const Element own(place[r], C);
        wanted[r] = place[r] < triangle(C) ? layer.target[own.row * C + own.column] : 0.f;
    }
    take_turn();  // the table and the targets are always the same
    double found[2] = {};  // squares, trace
    if (local < style_blocks) {
        for (int r = 0; r < ROUNDS; ++r) {
            const Element own(place[r], C);
            const float* share = layer.partial + own.row * C + own.column;
            if (place[r] < triangle(C))
#pragma unroll 8
                for (long long s = lane; s < layer.shares; s += lanes) sum[r] += share[s * C * C];
            shares[r][threadIdx.x] = sum[r];
        }
        __syncthreads();
        for (int r = 0; r < ROUNDS && lane == 0; ++r) {
            if (place[r] >= triangle(C)) continue;
            const Element own(place[r], C);
            for (int other = 1; other < lanes; ++other) sum[r] += shares[r][other * elements + threadIdx.x];
            const float gram = sum[r] / M, d = gram - wanted[r];
            layer.difference[own.row * C + own.column] = layer.difference[own.column * C + own.row] = d;
            found[0] += (own.row == own.column ? 1. : 2.) * d * d;
            if (own.row == own.column) found[1] += gram;
        }
    } else {
        const T *features = static_cast<const T*>(layer.features), *content = static_cast<const T*>(layer.content);
        const long long from = (local - style_blocks) * layer.content_span;
        const long long end = smaller(from + layer.content_span, C * M);
        found[0] = distance(features + from, content + from, end - from);
    }
    block_sums(found);
    if (threadIdx.x > 0) return;
    sums[2 * block] = found[0];
    sums[2 * block + 1] = found[1];
}

// Of `count` layers from `begin` on, whose sums (blocks, 2), up to `blocks`, come from layer_losses. The weights are those
// of all layers, beside each layer's own. Writes
//   terms    unless null: total without total variation, content by the layers' own weights, 0, then the style loss of
//            each layer (0 if it is none), unweighted
//   factors  of these layers, see layers.cuh; the scale is 1 for fp32, else it brings the root mean square of the loudest
//            cotangent under a power of two near one by the bound |(G - A) F|^2 <= |G - A|^2 |F|^2 and |F|^2 = M trace(G):
//            then no element overflows as long as C M < 2^30, see layers.py
//   lifted   of style layers; the blocks, which all find the same factors, share them out
//   ratio    unless null: the scale over that of the last layer alone, whose matrix is not lifted then
template <typename T>
__global__ void layer_factors(const Layer* layers, long long begin, long long count, const double* sums,
                              long long blocks, float style_weight, float content_weight, float* terms, float* factors,
                              float* ratio) {
    layers += begin;
    constexpr int WIDE = 16 / sizeof(T);
    __shared__ double style[MAX_LAYERS], styles[MAX_LAYERS], contents[MAX_LAYERS];  // a loss, and losses with own weights
    __shared__ double norm[MAX_LAYERS], loudest[MAX_LAYERS], of_style[MAX_LAYERS], of_content[MAX_LAYERS];
    __shared__ double per_channel[MAX_LAYERS], per_element[MAX_LAYERS];  // divisions take their time
    __shared__ float lifts[MAX_LAYERS];
    __shared__ const float* differences[MAX_LAYERS];
    __shared__ T* lifted[MAX_LAYERS];
    __shared__ unsigned elements[MAX_LAYERS];  // that are lifted
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = threadIdx.x; i < count; i += THREADS) {
        const Layer& layer = layers[i];
        per_channel[i] = 1. / layer.channels;
        per_element[i] = per_channel[i] / layer.positions;
        of_style[i] = style_weight * layer.style_weight * per_channel[i] * per_element[i];
        of_content[i] = 2 * content_weight * layer.content_weight * per_element[i];
        differences[i] = layer.difference;
        lifted[i] = static_cast<T*>(layer.lifted);
        elements[i] = layer.lifted && !(ratio && i == count - 1) ? layer.channels * layer.channels : 0;
    }
    const auto row = [=](int i) { return layers[i < count ? i : 0]; };
    Layer layer = row(warp);
    long long end = warp + 1 < count ? row(warp + 1).loss_block : blocks;
    __syncthreads();
    take_turn();  // the table is always the same
    for (int i = warp; i < count; i += WARPS) {
        const long long first = layer.target ? divide_up(triangle(layer.channels), layer.span) : 0;
        double found[3] = {};  // squares of G - A, the trace of G, squares of F - P
#pragma unroll 8
        for (long long b = layer.loss_block + lane; b < end; b += 32) {
            const double squares = sums[2 * b];
            (b - layer.loss_block < first ? found[0] : found[2]) += squares;
            found[1] += sums[2 * b + 1];
        }
        warp_sums(found);
        if (lane == 0) {
            const double content = per_element[i] * found[2];
            norm[i] = sqrt(found[0]);
            style[i] = per_channel[i] * per_channel[i] / 4 * found[0];
            styles[i] = layer.style_weight * style[i];
            contents[i] = layer.content_weight * content;
            loudest[i] = of_style[i] * sqrt(found[0] * found[1] * per_channel[i]) + of_content[i] * sqrt(content);
        }
        layer = row(i + WARPS);
        end = i + WARPS + 1 < count ? row(i + WARPS + 1).loss_block : blocks;
    }
    __syncthreads();
    double loud = QUIET;
    for (int i = 0; i < count; ++i) loud = loudest[i] > loud ? loudest[i] : loud;
    const auto scale_for = [](double loudness) { return sizeof(T) == 4 ? 1 : ldexp(1., -ilogb(loudness)); };
    const double scale = scale_for(loud);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        // G - A is at most its norm, so it fits fp16 at this size and loses no small elements.
        const int exponent = norm[i] > 0 ? 14 - ilogb(norm[i]) : 0;
        const double lift = ldexp(1., exponent);
        lifts[i] = lift;
        if (blockIdx.x > 0) continue;
        float* own = factors_of(factors, i);
        own[LIFT] = lift;
        own[STYLE] = ldexp(scale * of_style[i], -exponent);
        own[CONTENT] = fmin(scale * of_content[i], 3e38);  // infinity times F - P = 0 would be NaN
        if (terms) terms[3 + i] = style[i];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        factors[0] = scale;
        if (ratio) *ratio = scale / scale_for(loudest[count - 1] > QUIET ? loudest[count - 1] : QUIET);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0 && terms) {
        double all_styles = 0, all_contents = 0;
        for (int i = 0; i < count; ++i) {
            all_styles += styles[i];
            all_contents += contents[i];
        }
        terms[0] = style_weight * all_styles + content_weight * all_contents;
        terms[1] = all_contents;
        terms[2] = 0;
    }
    __syncthreads();
    int i = 0;
    unsigned before = 0;  // pieces of the layers before layer i
    for (unsigned piece = blockIdx.x * THREADS + threadIdx.x;; piece += gridDim.x * THREADS) {
        for (; i < count && piece - before >= (elements[i] + WIDE - 1) / WIDE; ++i)
            before += (elements[i] + WIDE - 1) / WIDE;
        if (i == count) return;
        const unsigned k = WIDE * (piece - before);
        const float* from = differences[i];
        if (k + WIDE <= elements[i]) {
            const auto d = *reinterpret_cast<const Vector<float, WIDE>*>(from + k);
            Vector<T, WIDE> found;
            for (int e = 0; e < WIDE; ++e) store(found.element + e, lifts[i] * d.element[e]);
            *reinterpret_cast<Vector<T, WIDE>*>(lifted[i] + k) = found;
        } else {
            for (unsigned rest = k; rest < elements[i]; ++rest) store(lifted[i] + rest, lifts[i] * from[rest]);
        }
    }
}
