// Matrix products of one block. 16-bit elements: a TILE x TILE product on the tensor cores; warps lie 2 x 4 in it, each
// with 64 x 32 elements. fp32: a TILE_FP32 x TILE_FP32 product in exact fp32 arithmetic, 4 x 4 elements a thread.

#include "layers.cuh"

constexpr int TILE = 128;
constexpr int CHUNK = 32;  // of the summed index k, held in shared memory at a time
constexpr int PAD = 8;     // elements after a row: eight rows then lie in different banks
constexpr int OPERAND = TILE * (CHUNK + PAD);  // elements that a tile takes at most, in either orientation

// rows x columns elements, whose rows lie `stride` apart; what is outside counts as zero.
template <typename S>
struct Matrix {
    const S* data;
    long long rows, columns, stride;
};

// Eight neighbouring elements times `factor`, as T. The factor of elements that are T already has to be one.
template <typename T, typename S>
__device__ inline uint4 fetch(const Matrix<S>& source, long long row, long long column, float factor) {
    const S* from = source.data + row * source.stride + column;
    alignas(16) T found[8];
    if (row < source.rows && column + 8 <= source.columns && source.stride % 8 == 0) {
        if constexpr (sizeof(S) == sizeof(T)) return *reinterpret_cast<const uint4*>(from);
        const float4 low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
        const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
        for (int i = 0; i < 8; ++i) store(found + i, factor * all[i]);
    } else {
#pragma unroll 1  // rare: no registers for it
        for (int i = 0; i < 8; ++i)
            store(found + i, row < source.rows && column + i < source.columns ? factor * to_float(from[i]) : 0.f);
    }
    return *reinterpret_cast<uint4*>(found);
}

// One operand of the product. Its tile has TILE indices and CHUNK values of k; INNER says that k is contiguous.
template <typename T, bool INNER>
struct Operand {
    static constexpr int ROWS = INNER ? TILE : CHUNK, COLUMNS = INNER ? CHUNK : TILE, STRIDE = COLUMNS + PAD;
    static constexpr int VECTORS = ROWS * COLUMNS / 8 / THREADS;
    uint4 held[VECTORS];

    // Global memory -> registers; the loads are on their way while the chunk before is multiplied.
    template <typename S>
    __device__ void load(const Matrix<S>& source, long long index0, long long k0, float factor) {
        for (int v = 0; v < VECTORS; ++v) {
            const int i = v * THREADS + threadIdx.x, row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
            held[v] = fetch<T>(source, (INNER ? index0 : k0) + row, (INNER ? k0 : index0) + column, factor);
        }
    }

    // Registers -> shared memory.
    __device__ void put(T* tile) const {
        for (int v = 0; v < VECTORS; ++v) {
            const int i = v * THREADS + threadIdx.x, row = i / (COLUMNS / 8), column = i % (COLUMNS / 8) * 8;
            *reinterpret_cast<uint4*>(tile + row * STRIDE + column) = held[v];
        }
    }

    // The 16 x 16 fragment (index, k) at (index0, k0) of the tile.
    __device__ static void fragment(unsigned (&q)[4], const T* tile, int index0, int k0) {
        const int lane = threadIdx.x % 32;
        if (INNER)
            load_matrices<false>(q, tile + (index0 + lane % 16) * STRIDE + k0 + lane / 16 * 8);
        else
            load_matrices<true>(q, tile + (k0 + lane % 8 + lane / 16 * 8) * STRIDE + index0 + lane / 8 % 2 * 8);
    }
};

struct Product {
    float sum[4][4][4] = {};  // 16 x 8 pieces, down and across; then the elements of a lane

    __device__ static int row() { return threadIdx.x / 128 * 64; }
    __device__ static int column() { return threadIdx.x / 32 % 4 * 32; }

    // sum += factor * left right^T over k from `begin` to `end`, for the TILE rows of `left` from row0 and those of
    // `right` from column0, both (index, k). `shared` holds 4 OPERAND elements, free again after a barrier.
    template <bool LEFT_INNER, bool RIGHT_INNER, typename T, typename S>
    __device__ void add(const Matrix<S>& left, long long row0, float factor, const Matrix<T>& right, long long column0,
                        long long begin, long long end, T* shared) {
        Operand<T, LEFT_INNER> a;
        Operand<T, RIGHT_INNER> b;
        const long long rows = LEFT_INNER ? left.rows : left.columns;
        const long long columns = RIGHT_INNER ? right.rows : right.columns;
        const bool busy = row0 + row() < rows && column0 + column() < columns;
        a.load(left, row0, begin, factor);
        b.load(right, column0, begin, 1.f);
        int stage = 0;
        for (long long k0 = begin; k0 < end; k0 += CHUNK, stage ^= 1) {
            T *left_tile = shared + 2 * stage * OPERAND, *right_tile = left_tile + OPERAND;
            a.put(left_tile);
            b.put(right_tile);
            __syncthreads();  // with two stages, the next put cannot meet a reader that is still behind this barrier
            if (k0 + CHUNK < end) {
                a.load(left, row0, k0 + CHUNK, factor);
                b.load(right, column0, k0 + CHUNK, 1.f);
            }
            if (!busy) continue;
#pragma unroll 1  // for the sake of registers
            for (int k = 0; k < CHUNK; k += 16) {
                unsigned p[4][4], q[2][4];
                for (int i = 0; i < 4; ++i) a.fragment(p[i], left_tile, row() + 16 * i, k);
                for (int j = 0; j < 2; ++j) b.fragment(q[j], right_tile, column() + 16 * j, k);
                for (int i = 0; i < 4; ++i)
                    for (int j = 0; j < 4; ++j) mma<T>(sum[i][j], p[i], q[j / 2][j % 2], q[j / 2][j % 2 + 2]);
            }
        }
    }

    // use(row, column, value) for this thread's elements of the tile.
    template <typename Use>
    __device__ void each(Use use) const {
        const int lane = threadIdx.x % 32;
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j)
                for (int e = 0; e < 4; ++e)
                    use(row() + 16 * i + lane / 4 + e / 2 * 8, column() + 8 * j + lane % 4 * 2 + e % 2, sum[i][j][e]);
    }
};

constexpr int TILE_FP32 = 64;
constexpr int CHUNK_FP32 = 16;

// (index, k) elements in fp32, `indices` of them, with any strides.
struct View {
    const float* data;
    long long indices, index_stride, k_stride;

    __device__ void load(float (*tile)[TILE_FP32 + 1], long long index0, long long k0, long long end) const {
        for (int i = threadIdx.x; i < TILE_FP32 * CHUNK_FP32; i += THREADS) {
            const bool across = index_stride == 1;  // neighbouring threads read neighbouring addresses
            const int c = across ? i % TILE_FP32 : i / CHUNK_FP32, k = across ? i / TILE_FP32 : i % CHUNK_FP32;
            const bool inside = index0 + c < indices && k0 + k < end;
            tile[k][c] = inside ? data[(index0 + c) * index_stride + (k0 + k) * k_stride] : 0.f;
        }
    }
};

struct ProductFp32 {
    float sum[4][4] = {};

    // sum += left right^T, as Product::add does it.
    __device__ void add(const View& left, long long row0, const View& right, long long column0, long long begin,
                        long long end) {
        __shared__ float rows[CHUNK_FP32][TILE_FP32 + 1], columns[CHUNK_FP32][TILE_FP32 + 1];
        const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;
        for (long long k0 = begin; k0 < end; k0 += CHUNK_FP32) {
            left.load(rows, row0, k0, end);
            right.load(columns, column0, k0, end);
            __syncthreads();
            for (int k = 0; k < CHUNK_FP32; ++k)
                for (int i = 0; i < 4; ++i)
                    for (int j = 0; j < 4; ++j) sum[i][j] += rows[k][ty * 4 + i] * columns[k][tx * 4 + j];
            __syncthreads();
        }
    }

    template <typename Use>
    __device__ void each(Use use) const {
        for (int i = 0; i < 4; ++i)
            for (int j = 0; j < 4; ++j) use(threadIdx.x / 16 * 4 + i, threadIdx.x % 16 * 4 + j, sum[i][j]);
    }
};

// Rows and columns of the tile that a block computes for elements of this type.
template <typename T>
constexpr int tile = sizeof(T) == 2 ? TILE : TILE_FP32;
