// What stands between the convolutions of a network: the frame around the image, pooling, and on the way back the masks
// of the ReLUs. Activations are (height, width, channels); but for the image, channels are multiples of EIGHT.

#include "common.cuh"

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
__device__ inline long long inside(long long place, long long length, long long padding) {
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

// in (height, width, channels) -> out (height + 2, width + 2, channels), whose frame is the other side.
template <typename T>
__global__ void network_wrap(const T* in, T* out, long long height, long long width, long long channels) {
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

// out = (features > 0) (spread(incoming) + own) + behind, all (height, width, channels). incoming comes from above, for
// AVERAGE and LARGEST (height / 2, width / 2, channels) from above the pooling: each of its values goes to all four
// features that it pools, or to the first of the largest. own is the losses' share at the ReLU, behind that at the
// convolution behind it, on the way back; these three may be null.
template <typename T>
__global__ void network_mask(const T* incoming, const T* own, const T* behind, const T* features, T* out,
                             long long height, long long width, long long channels, long long way) {
    const unsigned i = item(), groups = channels / EIGHT, position = i / groups, across = width;
    if (i >= height * width * groups) return;
    const long long place = (long long)i * EIGHT;
    const Vector<T, EIGHT> passed = load(features + place);
    float sum[EIGHT] = {};
    if (own) add(sum, own + place);
    if (incoming && way == SAME) add(sum, incoming + place);
    if (incoming && way != SAME) {
        const unsigned row = position / across, column = position % across;
        if (row / 2 < height / 2 && column / 2 < across / 2) {
            const long long c = i % groups * EIGHT;
            float share[EIGHT] = {};
            add(share, incoming + ((long long)(row / 2) * (across / 2) + column / 2) * channels + c);
            if (way == LARGEST) {
                const T* corner = features + (row / 2 * 2 * width + column / 2 * 2) * channels + c;
                keep_largest(share, corner, row, column, width, channels);
            }
            for (int e = 0; e < EIGHT; ++e) sum[e] += share[e];
        }
    }
    for (int e = 0; e < EIGHT; ++e)
        if (!(to_float(passed.element[e]) > 0)) sum[e] = 0;
    if (behind) add(sum, behind + place);
    put(out + place, sum);
}

// in (height + 2 frame, width + 2 frame, EIGHT) -> gradient (3, height, width): the transpose of network_image.
template <typename T>
__global__ void network_gradient(const T* in, float* gradient, long long height, long long width, long long frame,
                                 long long padding) {
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
