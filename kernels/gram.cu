// F F^T of all style layers. The positions are shared out over the blocks, since C x C alone is too few tiles to fill a
// chip; losses.cu adds the shares in a fixed order. Only tiles on and above the diagonal are computed.

#include "tiles.cuh"

// layers: writes `partial` of `count` ones from `begin` on, whose blocks are those from `start` on of a launch for all.
template <typename T, bool NHWC>
__global__ void __launch_bounds__(THREADS, 2) gram(const Layer* layers, long long begin, long long count,
                                                   long long start) {
    take_turn();
    const long long block = start + blockIdx.x;
    const Layer layer = layers[begin + locate(layers + begin, count, &Layer::gram_block, block)];
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
