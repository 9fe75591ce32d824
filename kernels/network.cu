// What stands between the convolutions of a network: the frame around the image, pooling, and on the way back the masks
// of the ReLUs; and the first convolution. Activations are (height, width, channels); but for the image, channels are
// multiples of EIGHT.

#include "layers.cuh"

constexpr int EIGHT = 8;   // channels that a thread takes at once
constexpr int COLOURS = 4;  // three and a zero: convolutions read rows of 8 bytes
enum { ZERO, REFLECT, REPLICATE, CIRCULAR };  // as in network.py
enum { SAME, AVERAGE, LARGEST };

template <typename T>
__device__ inline Vector<T, EIGHT> load(const T* from) {
    return *reinterpret_cast<const Vector<T, EIGHT>*>(from);
}

template <typename T>
__device__ inline void put(T* to, const float (&values)[EIGHT]) {
    Vector<T, EIGHT> found;
    for (int e = 0; e < EIGHT; ++e) store(found.element + e, values[e]);
    *reinterpret_cast<Vector<T, EIGHT>*>(to) = found;
}

template <typename T>
__device__ inline void add(float (&sum)[EIGHT], const T* from) {
    const Vector<T, EIGHT> found = load(from);
    for (int e = 0; e < EIGHT; ++e) sum[e] += to_float(found.element[e]);
}

// The row or column that stands at `place`, -1 for a zero.
__device__ inline int inside(int place, int length, int padding) {
    if (0 <= place && place < length) return place;
    if (padding == CIRCULAR) return place < 0 ? place + length : place - length;
    if (padding == REPLICATE) return place < 0 ? 0 : length - 1;
    if (padding == REFLECT) return place < 0 ? -place : 2 * length - 2 - place;
    return -1;
}

// The index of this thread's item: eight channels of a position, say. Below 2^32, as 64-bit divisions take their time.
__device__ inline unsigned item() { return blockIdx.x * THREADS + threadIdx.x; }

// image (3, height, width), means (3,) -> out (height + 2 frame, width + 2 frame, COLOURS): the image minus its means,
// then its frame.
template <typename T>
__global__ void network_image(const float* image, const float* means, T* out, long long height, long long width,
                              long long frame, long long padding) {
    take_turn();
    const unsigned i = item(), across = width + 2 * frame;
    if (i >= (height + 2 * frame) * across) return;
    const long long row = inside(i / across - frame, height, padding);
    const long long column = inside(i % across - frame, width, padding);
    Vector<T, COLOURS> found;
    for (int c = 0; c < COLOURS; ++c) {
        const bool there = c < 3 && row >= 0 && column >= 0;
        store(found.element + c, there ? image[(c * height + row) * width + column] - means[c] : 0.f);
    }
    reinterpret_cast<Vector<T, COLOURS>*>(out)[i] = found;
}

constexpr int CHANNELS = 64;  // of the first convolution
constexpr int RESIDENT = 2;   // blocks on a multiprocessor that make the share of the style loss, as in network.py
constexpr int TAPS = 27, FILLED = 32;  // products of a position with the first convolution: places and colours; with zeros

// image (3, height, width), means (3,), kernel (CHANNELS, FILLED) by place and colour, bias (CHANNELS,) -> out (height,
// width, CHANNELS): the first convolution of the image minus its means, and the ReLU of that if `rectified`.
//
// Every lane collects what one position sees, and the warp multiplies that with the kernel. Channels are dealt to the
// columns of the products in such a way that a lane gets eight neighbouring ones of a position, and then eight more.
template <typename H>
__global__ void __launch_bounds__(THREADS, 3) network_convolution(const float* image, const float* means,
                                                                  const H* kernel, const H* bias, H* out,
                                                                  long long height, long long width,
                                                                  long long padding, long long rectified) {
    take_turn();
    constexpr int LINE = FILLED + 8, PIECES = FILLED / EIGHT;  // eight rows lie in different banks
    __shared__ __align__(16) H seen[THREADS * LINE], kernels[CHANNELS * LINE];
    static_assert(THREADS == CHANNELS * PIECES);
    const unsigned lane = threadIdx.x % 32, positions = height * width, i = item(), first = i - lane;
    const unsigned c = threadIdx.x / PIECES, piece = threadIdx.x % PIECES * EIGHT;
    const unsigned line = c / 32 * 32 + c % 8 / 2 * 8 + c % 32 / 8 * 2 + c % 2;
    *reinterpret_cast<Vector<H, EIGHT>*>(kernels + line * LINE + piece) = load(kernel + c * FILLED + piece);
    Vector<H, EIGHT> found[PIECES] = {};
    const int y = i / static_cast<unsigned>(width), x = i - y * static_cast<unsigned>(width);
#pragma unroll
    for (int place = 0; place < TAPS / 3; ++place) {
        const int row = inside(y + place / 3 - 1, height, padding), column = inside(x + place % 3 - 1, width, padding);
        const bool there = i < positions && row >= 0 && column >= 0;
        const float* from = image + (there ? row * width + column : 0);
#pragma unroll
        for (int colour = 0; colour < 3; ++colour) {
            const int tap = 3 * place + colour;
            const float value = there ? from[colour * height * width] - means[colour] : 0.f;
            store(found[tap / EIGHT].element + tap % EIGHT, value);
        }
    }
    for (int k = 0; k < PIECES; ++k)
        *reinterpret_cast<Vector<H, EIGHT>*>(seen + threadIdx.x * LINE + k * EIGHT) = found[k];
    __syncthreads();
    for (int m = 0; m < 2; ++m) {
        unsigned p[2][4];
        for (int k = 0; k < 2; ++k)
            load_matrices<false>(p[k], seen + (threadIdx.x / 32 * 32 + 16 * m + lane % 16) * LINE + lane / 16 * 8 + 16 * k);
        for (int own = 0; own < 2; ++own) {  // eight of the channels of this lane
            const unsigned channel = own * 32 + lane % 4 * EIGHT;
            const Vector<H, EIGHT> offsets = load(bias + channel);
            float sum[2][EIGHT];  // of two positions
            for (int j = 0; j < 4; ++j) {
                unsigned q[4];
                load_matrices<false>(q, kernels + (8 * (4 * own + j) + lane % 8) * LINE + lane / 8 * 8);
                const float even = to_float(offsets.element[2 * j]), odd = to_float(offsets.element[2 * j + 1]);
                float product[4] = {even, odd, even, odd};
                mma<H>(product, p[0], q[0], q[1]);
                mma<H>(product, p[1], q[2], q[3]);
                for (int e = 0; e < 4; ++e)
                    sum[e / 2][2 * j + e % 2] = rectified && product[e] < 0 ? 0.f : product[e];
            }
            for (int half = 0; half < 2; ++half) {
                const unsigned position = first + 16 * m + 8 * half + lane / 4;
                if (position < positions) put(out + (long long)position * CHANNELS + channel, sum[half]);
            }
        }
    }
}

// in (height, width, channels) -> out (height + 2, width + 2, channels), whose frame is the other side.
template <typename T>
__global__ void network_wrap(const T* in, T* out, long long height, long long width, long long channels) {
    take_turn();
    const unsigned i = item(), groups = channels / EIGHT, across = width + 2, position = i / groups;
    if (i >= (height + 2) * across * groups) return;
    const long long row = inside(position / across - 1ll, height, CIRCULAR);
    const long long column = inside(position % across - 1ll, width, CIRCULAR);
    const T* from = in + (row * width + column) * channels + i % groups * EIGHT;
    *reinterpret_cast<Vector<T, EIGHT>*>(out + (long long)i * EIGHT) = load(from);
}

// in (height, width, channels) -> out (height / 2, width / 2, channels): means, or maxima if `way` is LARGEST.
template <typename T>
__global__ void network_pool(const T* in, T* out, long long height, long long width, long long channels, long long way) {
    take_turn();
    const unsigned i = item(), groups = channels / EIGHT, across = width / 2, position = i / groups;
    if (i >= height / 2 * across * groups) return;
    const long long row = position / across * 2, column = position % across * 2;
    const T* corner = in + (row * width + column) * channels + i % groups * EIGHT;
    float found[EIGHT] = {};
    for (int k = 0; k < 4; ++k) {
        const Vector<T, EIGHT> one = load(corner + (k / 2 * width + k % 2) * channels);
        for (int e = 0; e < EIGHT; ++e) {
            const float x = to_float(one.element[e]);
            found[e] = way == AVERAGE ? found[e] + x / 4 : k == 0 || x > found[e] ? x : found[e];
        }
    }
    put(out + (long long)i * EIGHT, found);
}

// Clears what does not belong to the feature at (row, column): all but the shares of the first of the largest of its four.
template <typename T>
__device__ inline void keep_largest(float (&share)[EIGHT], const T* corner, unsigned row, unsigned column,
                                    long long width, long long channels) {
    float largest[EIGHT];
    unsigned place[EIGHT] = {};
    for (unsigned k = 0; k < 4; ++k) {
        const Vector<T, EIGHT> one = load(corner + (k / 2 * width + k % 2) * channels);
        for (int e = 0; e < EIGHT; ++e) {
            const float x = to_float(one.element[e]);
            if (k > 0 && !(x > largest[e])) continue;
            largest[e] = x;
            place[e] = k;
        }
    }
    for (int e = 0; e < EIGHT; ++e)
        if (place[e] != row % 2 * 2 + column % 2) share[e] = 0;
}

// What comes down to a convolution, all (height, width, channels):
//     out = (features > 0) (ratio spread(incoming) + own + factors[CONTENT] (features - content)) + behind
// incoming comes from above, for AVERAGE and LARGEST (height / 2, width / 2, channels) from above the pooling: each of its
// values goes to all four features that it pools, or to the first of the largest. own is the losses' share at the ReLU,
// content what the content loss wants there, behind the losses' share at the convolution behind it, on the way back. All
// but features and out may be null. Items are eight channels of a position.
template <typename T>
struct Descent {
    const T *incoming, *own, *behind, *features, *content;
    const float *factors, *ratio;
    unsigned height, width, channels;
    long long way;

    // What comes from above to the i-th item where nothing is pooled: to be asked for early, since memory takes its time.
    __device__ Vector<T, EIGHT> arriving(unsigned i) const {
        return incoming && way == SAME ? load(incoming + (long long)i * EIGHT) : Vector<T, EIGHT>{};
    }

    // `sum`, a further share at the ReLU, becomes the i-th item; `passed` are the features.
    __device__ void finish(unsigned i, const Vector<T, EIGHT>& passed, const Vector<T, EIGHT>& arrived,
                           float (&sum)[EIGHT]) const {
        const unsigned groups = channels / EIGHT, position = i / groups;
        const long long place = (long long)i * EIGHT;
        if (own) add(sum, own + place);
        if (content) {
            const Vector<T, EIGHT> wanted = load(content + place);
            const float factor = factors[CONTENT];
            for (int e = 0; e < EIGHT; ++e) sum[e] += factor * (to_float(passed.element[e]) - to_float(wanted.element[e]));
        }
        const float times = ratio ? *ratio : 1.f;  // asked for again each time, as registers are rare
        if (incoming && way == SAME)
            for (int e = 0; e < EIGHT; ++e) sum[e] += times * to_float(arrived.element[e]);
        if (incoming && way != SAME) {
            const unsigned row = position / width, column = position % width;
            if (row / 2 < height / 2 && column / 2 < width / 2) {
                const long long c = i % groups * EIGHT;
                float share[EIGHT] = {};
                add(share, incoming + ((long long)(row / 2) * (width / 2) + column / 2) * channels + c);
                if (way == LARGEST) {
                    const T* corner = features + ((long long)(row / 2 * 2) * width + column / 2 * 2) * channels + c;
                    keep_largest(share, corner, row, column, width, channels);
                }
                for (int e = 0; e < EIGHT; ++e) sum[e] += times * share[e];
            }
        }
        for (int e = 0; e < EIGHT; ++e)
            if (!(to_float(passed.element[e]) > 0)) sum[e] = 0;
        if (behind) add(sum, behind + place);
    }
};

template <typename T>
__global__ void network_mask(const T* incoming, const T* own, const T* behind, const T* features, const T* content,
                             const float* factors, const float* ratio, T* out, long long height, long long width,
                             long long channels, long long way) {
    take_turn();
    const unsigned i = item(), high = height, broad = width, deep = channels;
    if (i >= high * broad * (deep / EIGHT)) return;
    const Descent<T> descent{incoming, own, behind, features, content, factors, ratio, high, broad, deep, way};
    const Vector<T, EIGHT> passed = load(features + (long long)i * EIGHT);
    float sum[EIGHT] = {};
    descent.finish(i, passed, descent.arriving(i), sum);
    put(out + (long long)i * EIGHT, sum);
}

// As network_mask where nothing is pooled, with a further share of the style loss at the ReLU: STYLE F lifted, where lifted
// (C, C) = LIFT (G - A) is symmetric, or null; C is the number of channels. At the first convolution, which has 64, `out`
// is not what comes down to it but out (TAPS, plane), its products with taps (FILLED, C): see network_gather.
//
// A warp takes 16 positions. Channels are dealt to the rows and columns of the products in such a way that a lane reads
// and gets eight neighbouring ones of each 32, at its two positions: what it reads is an operand as it is, and what it
// gets joins what it has read, and is an operand of the second product.
template <typename H, int C>
__global__ void __launch_bounds__(THREADS, RESIDENT) network_style(const H* incoming, const H* own, const H* behind,
                                                                   const H* features, H* out, long long height,
                                                                   long long width, const float* factors,
                                                                   const H* lifted, const float* ratio, const H* taps,
                                                                   long long plane) {
    take_turn();
    using Piece = Vector<H, EIGHT>;
    constexpr bool FIRST = C == 64;
    constexpr int LINE = C + 32, PARTS = C / 32;  // neighbouring rows lie in different banks
    __shared__ __align__(16) H matrix[C * LINE], kernel[FIRST ? FILLED * LINE : EIGHT];
    const unsigned positions = height * width, lane = threadIdx.x % 32, high = height, broad = width;
    const Descent<H> descent{incoming, own, behind, features, nullptr, nullptr, ratio, high, broad, C, SAME};
    for (int v = threadIdx.x; v < C * C / EIGHT && lifted; v += THREADS) {
        const int c = v / (C / EIGHT), line = c / 32 * 32 + c % 8 / 2 * 8 + c % 32 / 8 * 2 + c % 2;
        *reinterpret_cast<Piece*>(matrix + line * LINE + v % (C / EIGHT) * EIGHT) = load(lifted + v * EIGHT);
    }
    for (int v = threadIdx.x; v < FILLED * C / EIGHT && FIRST; v += THREADS)
        *reinterpret_cast<Piece*>(kernel + v / (C / EIGHT) * LINE + v % (C / EIGHT) * EIGHT) = load(taps + v * EIGHT);
    __syncthreads();
    const float factor = lifted ? factors[STYLE] : 0;
    const auto word = [](const Piece& piece, int i) { return reinterpret_cast<const unsigned*>(&piece)[i]; };
    const auto row = [&](const H* rows, int line, int part) {
        return load(rows + line * LINE + 32 * part + lane % 4 * EIGHT);
    };
    // Two products of depth 16: of the pieces of two rows with one of a column.
    const auto multiply = [&](float (&sum)[4], const Piece& upper, const Piece& lower, const Piece& column) {
        for (int i = 0; i < 4; i += 2) {
            const unsigned left[4] = {word(upper, i), word(lower, i), word(upper, i + 1), word(lower, i + 1)};
            mma<H>(sum, left, word(column, i), word(column, i + 1));
        }
    };
    for (unsigned first = 16 * (blockIdx.x * WARPS + threadIdx.x / 32); first < positions;
         first += 16 * WARPS * gridDim.x) {
        const auto position = [&](int half) { return first + 8 * half + lane / 4; };
        const auto item_of = [&](int half, int part) { return position(half) * (C / EIGHT) + 4 * part + lane % 4; };
        Piece passed[PARTS][2] = {}, arrived[PARTS][2] = {}, found[FIRST ? PARTS : 1][2] = {};
        for (int part = 0; part < PARTS; ++part)
            for (int half = 0; half < 2; ++half)
                if (position(half) < positions) {
                    passed[part][half] = load(features + (long long)item_of(half, part) * EIGHT);
                    arrived[part][half] = descent.arriving(item_of(half, part));
                }
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            float sum[2][EIGHT] = {};
            for (int i = 0; i < 4 && lifted; ++i) {
                float product[4] = {};
                for (int p = 0; p < PARTS; ++p)
                    multiply(product, passed[p][0], passed[p][1], row(matrix, 32 * part + 8 * i + lane / 4, p));
                for (int e = 0; e < 4; ++e) sum[e / 2][2 * i + e % 2] = factor * product[e];
            }
            for (int half = 0; half < 2; ++half) {
                if (position(half) >= positions) continue;
                descent.finish(item_of(half, part), passed[part][half], arrived[part][half], sum[half]);
                if constexpr (FIRST)
                    for (int e = 0; e < EIGHT; ++e) store(found[part][half].element + e, sum[half][e]);
                else
                    put(out + (long long)item_of(half, part) * EIGHT, sum[half]);
            }
        }
        if constexpr (FIRST)
            for (int m = 0; m < FILLED / 16; ++m)
                for (int half = 0; half < 2; ++half) {  // taps by positions: two neighbouring ones of these in a lane
                    float product[4] = {};
                    for (int p = 0; p < PARTS; ++p) {
                        const Piece upper = row(kernel, 16 * m + lane / 4, p), lower = row(kernel, 16 * m + 8 + lane / 4, p);
                        multiply(product, upper, lower, found[p][half]);
                    }
                    const unsigned place = first + 8 * half + lane % 4 * 2;
                    for (int e = 0; e < 2; ++e) {
                        const unsigned tap = 16 * m + 8 * e + lane / 4;
                        if (tap >= TAPS || place >= positions) continue;
                        Vector<H, 2> pair;
                        for (int i = 0; i < 2; ++i) store(pair.element + i, product[2 * e + i]);
                        *reinterpret_cast<Vector<H, 2>*>(out + tap * plane + place) = pair;
                    }
                }
    }
}

// products (TAPS, plane) of each position with the first convolution, turned, by place and colour -> gradient (3, height,
// width): its VJP, and that of network_image.
template <typename H>
__global__ void network_gather(const H* products, long long plane, float* gradient, long long height, long long width,
                               long long padding) {
    take_turn();
    const int tall = height, across = width, i = item();
    if (i >= tall * across) return;
    const int own_row = i / across, own_column = i % across;
    float sum[3] = {};
    // What the positions around a place, of the image or of its frame, have for it.
    const auto collect = [&](int row, int column) {
#pragma unroll
        for (int place = 0; place < TAPS / 3; ++place) {
            int y = row + place / 3 - 1, x = column + place % 3 - 1;
            if (padding == CIRCULAR) {
                y += y < 0 ? tall : y >= tall ? -tall : 0;
                x += x < 0 ? across : x >= across ? -across : 0;
            }
            const bool seen = 0 <= y && y < tall && 0 <= x && x < across;
            const H* from = products + 3 * place * plane + (seen ? y * across + x : 0);
            for (int c = 0; c < 3; ++c) sum[c] += seen ? to_float(from[c * plane]) : 0.f;
        }
    };
    collect(own_row, own_column);
    const bool inner = own_row > 1 && own_row + 2 < tall && own_column > 1 && own_column + 2 < across;
    if (!inner && (padding == REFLECT || padding == REPLICATE))
        for (const int row : {-1, own_row, tall})  // what stands for the pixel beyond the border
            for (const int column : {-1, own_column, across})
                if ((row != own_row || column != own_column) &&
                    (row == own_row || inside(row, height, padding) == own_row) &&
                    (column == own_column || inside(column, width, padding) == own_column))
                    collect(row, column);
    for (int c = 0; c < 3; ++c) gradient[c * height * width + i] = sum[c];
}

// in (height + 2 frame, width + 2 frame, EIGHT) -> gradient (3, height, width): the transpose of network_image.
template <typename T>
__global__ void network_gradient(const T* in, float* gradient, long long height, long long width, long long frame,
                                 long long padding) {
    take_turn();
    const unsigned i = item(), across = width, line = i / across, tall = height;
    if (i >= 3 * height * width) return;
    const long long own_row = line % tall, own_column = i % across, c = line / tall, wide = width + 2 * frame;
    if (!frame) {
        gradient[i] = to_float(in[(own_row * wide + own_column) * EIGHT + c]);
        return;
    }
    float sum = 0;
    for (const long long row : {-1ll, own_row, height})
        for (const long long column : {-1ll, own_column, width})
            if ((row == own_row || inside(row, height, padding) == own_row) &&
                (column == own_column || inside(column, width, padding) == own_column))
                sum += to_float(in[((row + frame) * wide + column + frame) * EIGHT + c]);
    gradient[i] = sum;
}
