// Products with weights that are packed once and used in every layer: out (rows x N) = A (rows x K) W^T, W (N x K).
//
// W is packed in panels of two vectors of its rows, [N / kPanel][K][kPanel], the order in which a tile reads it: a tile
// of up to kTileRows rows of A and one panel keeps its sums in registers while K runs, loads two vectors a step and
// broadcasts an element of each row. Bias, activation or an earlier sum are applied to the sums before they are stored.
// Every sum runs over K in order in every tile, so a row's result does not depend on the other rows.
#pragma once

#include "parallel.h"

namespace albert_fast::ALBERT_FAST_ISA {

constexpr std::int64_t kPanel = 2 * kLanes;
#if defined(__AVX512F__)
constexpr int kPackedRows = 14;  // 28 sums, 2 vectors of the panel, 1 element: 31 of 32 registers
#elif defined(__aarch64__)
constexpr int kPackedRows = 12;
#else
constexpr int kPackedRows = 6;
#endif
// How far ahead of a tile its panel is fetched into the first cache, in bytes: 12 steps of 128.
constexpr std::int64_t kPrefetch = 1536;

// The distance between rows of an array with n columns: whole panels, and no multiple of 1 KiB, whose rows would
// compete for the same lines of the first cache.
static inline std::int64_t row_stride(std::int64_t n) {
    const std::int64_t stride = round_up(n, kPanel);
    return stride % 256 == 0 ? stride + 16 : stride;
}

// Floats of a packed (n x k) matrix.
static inline std::int64_t packed_size(std::int64_t n, std::int64_t k) { return round_up(n, kPanel) * k; }

// packed = one panel of the first `count` rows and k columns of w, whose rows are `stride` apart; the rest is zero.
static inline void pack_panel(const float* w, std::int64_t stride, std::int64_t count, std::int64_t k, float* packed) {
    for (std::int64_t j = 0; j < kPanel; ++j) {
        for (std::int64_t i = 0; i < k; ++i) packed[i * kPanel + j] = j < count ? w[j * stride + i] : 0.0f;
    }
}

// The part of the next panel that a tile fetches into the second cache while it works, `step` bytes with every step.
// Without it, the first tile of a panel would wait for memory, which the other tiles leave idle.
struct Fetch {
    const char* from;
    std::int64_t step;
};

// emit(row, vector, sum) for the sums of one tile: rows [0, kRows) of A and one panel, vectors 0 and 1 of it.
template <int kRows, class Emit>
static inline void packed_tile(const float* a, std::int64_t a_row, const float* panel, std::int64_t k, Fetch fetch,
                               Emit emit) {
    Vec sums[kRows][2] = {};
    for (std::int64_t step = 0; step < k; ++step) {
        const float* at = panel + step * kPanel;
        const Vec first = load(at, Full{}), second = load(at + kLanes, Full{});
        const char* near = reinterpret_cast<const char*>(at) + kPrefetch;
        const char* next = fetch.from + step * fetch.step;
        __builtin_prefetch(near);
        __builtin_prefetch(next, 0, 2);
        if constexpr (kLanes == 16) {
            __builtin_prefetch(near + 64);
            __builtin_prefetch(next + 64, 0, 2);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
            const Vec element = splat(a[r * a_row + step]);
            sums[r][0] += element * first;
            sums[r][1] += element * second;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
        emit(r, 0, sums[r][0]);
        emit(r, 1, sums[r][1]);
    }
}

template <int kRows, class Emit>
static inline void packed_tile_of(std::int64_t rows, const float* a, std::int64_t a_row, const float* panel,
                                  std::int64_t k, Fetch fetch, Emit emit) {
    if (rows == kRows) return packed_tile<kRows>(a, a_row, panel, k, fetch, emit);
    if constexpr (kRows > 1) packed_tile_of<kRows - 1>(rows, a, a_row, panel, k, fetch, emit);
}

// emit(row, column, Vec) for every vector of columns [first * kPanel, last * kPanel) of A W^T, all rows of A; `packed`
// holds all panels.
template <class Emit>
static inline void packed_product(const float* a, std::int64_t a_row, std::int64_t rows, const float* packed,
                                  std::int64_t k, std::int64_t first, std::int64_t last, Emit emit) {
    // Full tiles, then one with the remaining rows; but two even tiles instead of a full and a small one, since a small
    // one would wait for its panel.
    const std::int64_t tiles = divide_up(rows, kPackedRows), size = tiles == 2 ? divide_up(rows, 2) : kPackedRows;
    const std::int64_t bytes = k * kPanel * static_cast<std::int64_t>(sizeof(float));
    for (std::int64_t p = first; p < last; ++p) {
        const char* next = reinterpret_cast<const char*>(packed) + (p + 1) * bytes;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            const std::int64_t begin = tile * size;
            packed_tile_of<kPackedRows>(smaller(rows - begin, size), a + begin * a_row, a_row, packed + p * k * kPanel,
                                        k, Fetch{next + bytes * tile / tiles, kPanel * 4 / tiles},
                                        [&](int r, int v, Vec sum) { emit(begin + r, p * kPanel + v * kLanes, sum); });
        }
    }
}

}  // namespace albert_fast::ALBERT_FAST_ISA
