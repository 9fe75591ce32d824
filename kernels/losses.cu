// Style and content losses of all layers, G - A, and the factors of their gradients.

#include "layers.cuh"

constexpr int ROUNDS = 2;        // as in layers.py
constexpr int MAX_LAYERS = 256;  // as in layers.py

// Elements of the upper triangle of a matrix, with its diagonal.
__device__ inline long long triangle(long long rows) { return rows * (rows + 1) / 2; }

__device__ inline double power_of_two_below(double x) { return ldexp(1., ilogb(x)); }

// Style: G of the elements from `begin` to `end` of its upper triangle, where each row from above is followed by one from
// below, so that together they have C + 1; G - A, its weighted squares and the trace of G.
__device__ inline void style_part(const Layer& layer, long long begin, long long end, double& squares, double& trace) {
    __shared__ float sums[THREADS];
    const long long C = layer.channels;
    const unsigned both = C + 1;
    const int elements = layer.span / ROUNDS, lanes = THREADS / elements;  // at once, and threads for each
    const int own = threadIdx.x % elements, lane = threadIdx.x / elements;
    for (long long first = begin; first < end; first += elements) {
        const unsigned place = first + own, pair = place / both, k = place % both;
        const unsigned row = k < C - pair ? pair : C - 1 - pair, column = k < C - pair ? pair + k : k - 1;
        const bool there = place < end;
        const long long index = row * C + column;
        float sum = 0;
        if (there)
#pragma unroll 8
            for (long long s = lane; s < layer.shares; s += lanes) sum += layer.partial[s * C * C + index];
        sums[threadIdx.x] = sum;
        __syncthreads();
        if (lane == 0 && there) {
            for (int other = 1; other < lanes; ++other) sum += sums[other * elements + own];
            const float gram = sum / layer.positions, d = gram - layer.target[index];
            layer.difference[index] = layer.difference[column * C + row] = d;
            squares += (row == column ? 1. : 2.) * d * d;
            if (row == column) trace += gram;
        }
        __syncthreads();
    }
}

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
// `count` layers from `begin` on, whose blocks are those from `start` on of a launch for all.
template <typename T>
__global__ void __launch_bounds__(THREADS, 4) layer_losses(const Layer* layers, long long begin, long long count,
                                                           long long start, double* sums) {
    take_turn();
    const long long block = start + blockIdx.x;
    const Layer layer = layers[begin + locate(layers + begin, count, &Layer::loss_block, block)];
    const long long C = layer.channels, M = layer.positions;
    const long long local = block - layer.loss_block;
    const long long style_blocks = layer.target ? divide_up(triangle(C), layer.span) : 0;
    double squares = 0, trace = 0;
    if (local < style_blocks) {
        style_part(layer, local * layer.span, smaller((local + 1) * layer.span, triangle(C)), squares, trace);
    } else {
        const T *features = static_cast<const T*>(layer.features), *content = static_cast<const T*>(layer.content);
        const long long from = (local - style_blocks) * layer.content_span;
        const long long end = smaller(from + layer.content_span, C * M);
        squares = distance(features + from, content + from, end - from);
    }
    squares = block_sum(squares);
    trace = block_sum(trace);
    if (threadIdx.x > 0) return;
    sums[2 * block] = squares;
    sums[2 * block + 1] = trace;
}

// sums (blocks, 2) come from layer_losses. The weights are those of all layers, beside each layer's own. Writes
//   terms    total without total variation, content by the layers' own weights, 0, then the style loss of each layer
//            (0 if it is none), unweighted
//   factors  see layers.cuh; the scale is 1 for fp32, else it brings the root mean square of the loudest cotangent under a
//            power of two near one by the bound |(G - A) F|^2 <= |G - A|^2 |F|^2 and |F|^2 = M trace(G): then no element
//            can overflow, as it is at most sqrt(C M) < 65504
//   lifted   of style layers; the blocks, which all find the same factors, share them out
template <typename T>
__global__ void layer_factors(const Layer* layers, long long count, const double* sums, long long blocks,
                              float style_weight, float content_weight, float* terms, float* factors) {
    take_turn();
    __shared__ double style[MAX_LAYERS], styles[MAX_LAYERS], contents[MAX_LAYERS];  // a loss, and losses with own weights
    __shared__ double norm[MAX_LAYERS], loudest[MAX_LAYERS], of_style[MAX_LAYERS], of_content[MAX_LAYERS];
    __shared__ float lifts[MAX_LAYERS];
    const int lane = threadIdx.x % 32;
    for (int i = threadIdx.x / 32; i < count; i += WARPS) {
        const Layer layer = layers[i];
        const double channels = layer.channels, elements = channels * layer.positions;
        const long long end = i + 1 < count ? layers[i + 1].loss_block : blocks;
        const long long first = layer.target ? divide_up(triangle(layer.channels), layer.span) : 0;
        double difference = 0, loudness = 0, distance = 0;
#pragma unroll 8
        for (long long b = layer.loss_block + lane; b < end; b += 32) {
            (b - layer.loss_block < first ? difference : distance) += sums[2 * b];
            loudness += sums[2 * b + 1];
        }
        difference = warp_sum(difference);
        loudness = warp_sum(loudness);
        distance = warp_sum(distance);
        if (lane == 0) {
            const double content = distance / elements;
            norm[i] = sqrt(difference);
            style[i] = difference / (4 * channels * channels);
            styles[i] = layer.style_weight * style[i];
            contents[i] = layer.content_weight * content;
            of_style[i] = style_weight * layer.style_weight / (channels * elements);
            of_content[i] = 2 * content_weight * layer.content_weight / elements;
            loudest[i] = of_style[i] * sqrt(difference * loudness / channels) + of_content[i] * sqrt(content);
        }
    }
    __syncthreads();
    double loud = 1e-30;
    for (int i = 0; i < count; ++i) loud = loudest[i] > loud ? loudest[i] : loud;
    const double scale = sizeof(T) == 4 ? 1 : 1 / power_of_two_below(loud);
    for (int i = threadIdx.x; i < count; i += THREADS) {
        // G - A is at most its norm, so it fits fp16 at this size and loses no small elements.
        const double lift = norm[i] > 0 ? 16384 / power_of_two_below(norm[i]) : 1;
        lifts[i] = lift;
        if (blockIdx.x > 0) continue;
        float* own = factors_of(factors, i);
        own[LIFT] = lift;
        own[STYLE] = scale * of_style[i] / lift;
        own[CONTENT] = scale * of_content[i];
        terms[3 + i] = style[i];
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        double all_styles = 0, all_contents = 0;
        for (int i = 0; i < count; ++i) {
            all_styles += styles[i];
            all_contents += contents[i];
        }
        terms[0] = style_weight * all_styles + content_weight * all_contents;
        terms[1] = all_contents;
        terms[2] = 0;
        factors[0] = scale;
    }
    __syncthreads();
    constexpr int WIDE = 16 / sizeof(T);
    for (int i = 0; i < count; ++i) {
        const float *difference = layers[i].difference, lift = lifts[i];
        T* lifted = static_cast<T*>(layers[i].lifted);
        const long long elements = lifted ? layers[i].channels * layers[i].channels : 0;
        for (long long k = WIDE * ((long long)blockIdx.x * THREADS + threadIdx.x); k < elements;
             k += WIDE * THREADS * gridDim.x) {
            if (k + WIDE <= elements) {
                const auto d = *reinterpret_cast<const Vector<float, WIDE>*>(difference + k);
                Vector<T, WIDE> found;
                for (int e = 0; e < WIDE; ++e) store(found.element + e, lift * d.element[e]);
                *reinterpret_cast<Vector<T, WIDE>*>(lifted + k) = found;
            } else {
                for (long long rest = k; rest < elements; ++rest) store(lifted + rest, lift * difference[rest]);
            }
        }
    }
}
