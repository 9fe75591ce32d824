// The loss layers as a table in device memory: each launch covers all of them, and a block finds its own.

#include "common.cuh"

struct Layer {
    long long channels, positions;
    const void* features;       // F: (C, M) in memory, or (M, C) in the NHWC kernels
    const void* content;        // P, like F; null unless this is a content layer
    void* cotangent;            // dL/dF, like F
    const float* target;        // A (C, C); null unless this is a style layer
    float* difference;          // G - A (C, C)
    float* partial;             // (shares, C, C): F F^T of each share of the positions; upper triangle
    long long shares, share;    // number of shares, and positions in each
    long long span, content_span;  // elements of G's upper triangle and of F that one block of the loss covers
    long long gram_block, loss_block, gradient_block;  // the first block of this layer in each launch
    double content_weight, style_weight;               // its own, beside those of all layers
    void* lifted;               // LIFT (G - A) (C, C) in the type of the features, for cuBLAS and the VJP
};

// Index of the layer that a block belongs to; `first` is one of the three columns of first blocks. Of a single layer
// nothing is read.
__device__ inline int locate(const Layer* layers, long long count, long long Layer::*first, long long block) {
    int found = 0;
    for (int i = 1; i < count; ++i)
        if (layers[i].*first <= block) found = i;
    return found;
}

// factors: the scale of these cotangents, then three numbers for each layer.
enum { LIFT, STYLE, CONTENT };  // what G - A is multiplied with before, (G - A) F after the product; and F - P
template <typename F>
__device__ inline F* factors_of(F* factors, int layer) { return factors + 1 + 3 * layer; }

__device__ inline long long divide_up(long long a, long long b) { return (a + b - 1) / b; }
__device__ inline long long smaller(long long a, long long b) { return a < b ? a : b; }
