// Gradients of the style and content losses of all layers with respect to their features.

#include "tiles.cuh"

// gridDim.y layers from `begin` on, each with three `factors`: CONTENT (F - P) as the `cotangent` of content layers that
// have one. cuBLAS adds STYLE `lifted` F.
template <typename T>
__global__ void content_cotangents(const Layer* layers, long long begin, const float* factors) {
    take_turn();
    const Layer layer = layers[begin + blockIdx.y];
    if (!layer.content || !layer.cotangent) return;
    constexpr int WIDE = 16 / sizeof(T);
    using Wide = Vector<T, WIDE>;
    const long long first = (long long)blockIdx.x * THREADS + threadIdx.x, step = (long long)gridDim.x * THREADS;
    const float factor = factors[3 * blockIdx.y + CONTENT];
    const T *features = static_cast<const T*>(layer.features), *content = static_cast<const T*>(layer.content);
    T* out = static_cast<T*>(layer.cotangent);
    const long long count = layer.channels * layer.positions;
#pragma unroll 4
    for (long long i = WIDE * first; i + WIDE <= count; i += WIDE * step) {
        const Wide f = *reinterpret_cast<const Wide*>(features + i), p = *reinterpret_cast<const Wide*>(content + i);
        Wide found;
        for (int e = 0; e < WIDE; ++e)
            store(found.element + e, factor * (to_float(f.element[e]) - to_float(p.element[e])));
        *reinterpret_cast<Wide*>(out + i) = found;
    }
    for (long long i = count / WIDE * WIDE + first; i < count; i += step)
        store(out + i, factor * (to_float(features[i]) - to_float(content[i])));
}

// layers (count,): writes `cotangent` = STYLE (LIFT (G - A)) F + CONTENT (F - P), with the factors of layers.cuh.
template <typename T, bool NHWC>
__global__ void __launch_bounds__(THREADS, 2) layer_gradients(const Layer* layers, long long count,
                                                              const float* factors) {
    take_turn();
    const int found = locate(layers, count, &Layer::gradient_block, blockIdx.x);
    const Layer& layer = layers[found];
    const float* own = factors_of(factors, found);
    const long long C = layer.channels, M = layer.positions, local = blockIdx.x - layer.gradient_block;
    const T* features = static_cast<const T*>(layer.features);
    const auto content_part = [&](long long i) {
        return own[CONTENT] * (to_float(features[i]) - to_float(static_cast<const T*>(layer.content)[i]));
    };
    T* out = static_cast<T*>(layer.cotangent);
    if (!layer.target) {
        const long long begin = local * layer.content_span, end = smaller(begin + layer.content_span, C * M);
        for (long long i = begin + threadIdx.x; i < end; i += THREADS) store(out + i, content_part(i));
        return;
    }
    const long long across = divide_up(C, tile<T>);  // blocks that read the same positions run side by side
    const long long row0 = local % across * tile<T>, column0 = local / across * tile<T>;
    if constexpr (sizeof(T) == 4) {
        ProductFp32 product;
        product.add({layer.difference, C, C, 1}, row0, {features, M, NHWC ? C : 1, NHWC ? 1 : M}, column0, 0, C);
        const float factor = own[STYLE] * own[LIFT];
        product.each([&](int i, int j, float value) {
            const long long channel = row0 + i, position = column0 + j;
            if (channel >= C || position >= M) return;
            const long long index = NHWC ? position * C + channel : channel * M + position;
            out[index] = factor * value + (layer.content ? content_part(index) : 0.f);
        });
    } else {
        __shared__ __align__(16) T shared[4 * OPERAND];
        const Matrix<float> difference{layer.difference, C, C, C};
        const Matrix<T> matrix{features, NHWC ? M : C, NHWC ? C : M, NHWC ? C : M};
        Product product;
        product.template add<true, NHWC>(difference, row0, own[LIFT], matrix, column0, 0, C, shared);
        // Through shared memory, so that whole lines are written: (position, channel) if NHWC, else the reverse.
        constexpr int STRIDE = TILE + PAD;
        static_assert(TILE * STRIDE <= 4 * OPERAND);
        __syncthreads();
        const float factor = own[STYLE];
        product.each([&](int i, int j, float value) {
            store(shared + (NHWC ? j * STRIDE + i : i * STRIDE + j), factor * value);
        });
        __syncthreads();
        const long long top = NHWC ? column0 : row0, left = NHWC ? row0 : column0;
        for (int v = threadIdx.x; v < TILE * TILE / 8; v += THREADS) {
            const int i = v / (TILE / 8), j = v % (TILE / 8) * 8;
            const long long row = top + i, column = left + j, index = row * matrix.stride + column;
            if (row >= matrix.rows || column >= matrix.columns) continue;
            T* staged = shared + i * STRIDE + j;
            if (layer.content)
                for (int e = 0; e < 8 && column + e < matrix.columns; ++e)
                    store(staged + e, to_float(staged[e]) + content_part(index + e));
            if (matrix.stride % 8 == 0)
                *reinterpret_cast<uint4*>(out + index) = *reinterpret_cast<const uint4*>(staged);
            else
                for (int e = 0; e < 8 && column + e < matrix.columns; ++e) out[index + e] = staged[e];
        }
    }
}
