// The product of small float32 matrices that stay in the caches, for attention and linear_cross_entropy.
//
//   C (rows x columns) = A (rows x depth) B (depth x columns), or C += A B
//
// B and C are row-major with rows of whole vectors (columns is a multiple of kLanes, the caller pads); A is read
// element by element with any strides, so it may be a transpose. A tile of C stays in registers over the whole depth;
// each step loads a few vectors of B and multiplies them by a few broadcast elements of A.
#pragma once

#include "vec.h"

namespace albert_fast::ALBERT_FAST_ISA {

// Element (i, k) is data[i * row + k * step].
struct Strided {
    const float* data;
    std::int64_t row, step;
};

// Rows and vectors of a full tile: as many sums as the registers hold beside the vectors of B and one element of A (32
// registers on AVX-512 and ARM, 16 elsewhere).
constexpr int kTileRows = 6;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

template <int kRows, int kVectors>
static inline void multiply_tile(Strided a, const float* b, std::int64_t b_row, float* c, std::int64_t c_row,
                                 std::int64_t depth, bool add) {
    Vec sums[kRows][kVectors] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
        Vec factor[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) factor[v] = load(b + k * b_row + v * kLanes, Full{});
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
            const Vec element = splat(a.data[r * a.row + k * a.step]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[r][v] += element * factor[v];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
            float* to = c + r * c_row + v * kLanes;
            store(to, add ? load(to, Full{}) + sums[r][v] : sums[r][v], Full{});
        }
    }
}

// A strip of `kVectors` vectors of C: full tiles, then one with the rows that remain.
template <int kVectors>
static inline void multiply_strip(Strided a, const float* b, std::int64_t b_row, float* c, std::int64_t c_row,
                                  std::int64_t rows, std::int64_t depth, bool add) {
    std::int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        multiply_tile<kTileRows, kVectors>({a.data + i * a.row, a.row, a.step}, b, b_row, c + i * c_row, c_row, depth,
                                           add);
    }
    const Strided rest{a.data + i * a.row, a.row, a.step};
    switch (rows - i) {
        case 5:
            return multiply_tile<5, kVectors>(rest, b, b_row, c + i * c_row, c_row, depth, add);
        case 4:
            return multiply_tile<4, kVectors>(rest, b, b_row, c + i * c_row, c_row, depth, add);
        case 3:
            return multiply_tile<3, kVectors>(rest, b, b_row, c + i * c_row, c_row, depth, add);
        case 2:
            return multiply_tile<2, kVectors>(rest, b, b_row, c + i * c_row, c_row, depth, add);
        case 1:
            return multiply_tile<1, kVectors>(rest, b, b_row, c + i * c_row, c_row, depth, add);
        default:
            return;
    }
}

// C = A B, or with `add` C += A B, over the whole depth at once.
static inline void multiply_depth(Strided a, const float* b, std::int64_t b_row, float* c, std::int64_t c_row,
                                  std::int64_t rows, std::int64_t columns, std::int64_t depth, bool add) {
    std::int64_t j = 0;
    for (; j + kTileVectors * kLanes <= columns; j += kTileVectors * kLanes) {
        multiply_strip<kTileVectors>(a, b + j, b_row, c + j, c_row, rows, depth, add);
    }
    switch ((columns - j) / kLanes) {
#if defined(__AVX512F__) || defined(__aarch64__)
        case 3:
            return multiply_strip<3>(a, b + j, b_row, c + j, c_row, rows, depth, add);
        case 2:
            return multiply_strip<2>(a, b + j, b_row, c + j, c_row, rows, depth, add);
#endif
        case 1:
            return multiply_strip<1>(a, b + j, b_row, c + j, c_row, rows, depth, add);
        default:
            return;
    }
}

// C = A B, or with `add` C += A B. The depth is divided into blocks: a block of B stays in the caches, and short sums
// keep the rounding error small. The order of every sum depends on the depth alone.
static inline void multiply(Strided a, const float* b, std::int64_t b_row, float* c, std::int64_t c_row,
                            std::int64_t rows, std::int64_t columns, std::int64_t depth, bool add) {
    constexpr std::int64_t kBlock = 64;
    for (std::int64_t k = 0; k == 0 || k < depth; k += kBlock) {
        const std::int64_t length = depth - k < kBlock ? depth - k : kBlock;
        multiply_depth({a.data + k * a.step, a.row, a.step}, b + k * b_row, b_row, c, c_row, rows, columns, length,
                       add || k > 0);
    }
}

}  // namespace albert_fast::ALBERT_FAST_ISA
