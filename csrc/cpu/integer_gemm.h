// Products of integers with weights that are packed once: out (rows x N) = A (rows x K) W^T. Each row of A has its own
// scale (and in Int8 its own zero point); each row of W, an output channel, has its own scale.
//
// W is packed in panels of kColumns channels, [N / kColumns][K / kGroup][kColumns][kGroup]: kGroup neighbours in K fill
// the 32 bits whose products one instruction adds up in one lane (vpdpbusd: u8 x s8, four of them; vpdpwssd: s16 x s16,
// two). The layout is the same on every instruction set. Integer sums are exact, so they are the same on all of them
// too.
#pragma once

#include "math.h"
#include "packed_gemm.h"

namespace albert_fast::ALBERT_FAST_ISA {

constexpr std::int64_t kColumns = kIntegerPanel;
constexpr int kColumnVectors = static_cast<int>(kColumns / kLanes);
// One step of a panel: kGroup elements of K for all of its columns.
constexpr std::int64_t kStepBytes = 4 * kColumns;
#if defined(__AVX512F__)
constexpr int kIntegerRows = 10;  // 20 sums; 14 rows fit the registers too, but not 32 KiB of first cache with a panel
#elif defined(__AVX2__) || defined(__aarch64__)
constexpr int kIntegerRows = 3;
#else
constexpr int kIntegerRows = 1;
#endif

// The nearest integers of x, |x| < 2^22; ties go to even ones.
static inline IntVec nearest(Vec x) { return (IntVec)bits_of(x + kRoundToInteger) - 0x4B400000; }

static inline Vec to_float(IntVec x) { return __builtin_convertvector(x, Vec); }

// Sums of products of pairs of 16-bit integers, one pair a lane.
static inline IntVec pairs(IntVec x, IntVec y) {
#if defined(__AVX512F__)
    return (IntVec)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
    return (IntVec)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#else
    return (x >> 16) * (y >> 16) + ((x << 16) >> 16) * ((y << 16) >> 16);
#endif
}

// The scale and zero point of a row of A; its elements stand for scale * (element - zero).
struct RowScale {
    float scale, zero;
};

// Activations are unsigned 8-bit integers with a zero point, weights signed 8-bit integers. Sums of K < 66,000 products
// fit 32 bits.
struct Int8 {
    using Element = std::uint8_t;
    using Weight = std::int8_t;
    static constexpr int kGroup = 4;
    static constexpr float kLevels = kInt8Levels;
    static constexpr bool kHasZero = true, kInRuns = false;

    // sum + the four products of each lane; `a` holds a group of A in every lane.
    static inline IntVec dot(IntVec sum, IntVec a, IntVec w) {
#if defined(__AVX512VNNI__)
        return (IntVec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a, (__m512i)w);
#else
        // Even and odd elements as pairs of 16 bits, which is exact; AVX2's u8 x s8 instruction saturates.
        const IntVec low = (a & 0x00FF00FF), high = ((IntVec)((UintVec)a >> 8)) & 0x00FF00FF;
        return sum + pairs(low, low_bytes(w)) + pairs(high, high_bytes(w));
#endif
    }

private:
    typedef std::int16_t ShortVec __attribute__((vector_size(4 * kLanes)));
    static inline IntVec low_bytes(IntVec x) { return (IntVec)((ShortVec)((ShortVec)x << 8) >> 8); }
    static inline IntVec high_bytes(IntVec x) { return (IntVec)((ShortVec)x >> 8); }
};

// Activations and weights are signed 16-bit integers; activations use 14 bits. Sums move to float32 after every run of
// kRun steps, kIntegerRun elements: weights are rounded so that the sum of a run fits 32 bits (`int16_scale` in
// albert_fast/quantization/rounding.py).
struct Int16 {
    using Element = std::int16_t;
    using Weight = std::int16_t;
    static constexpr int kGroup = 2;
    static constexpr float kLevels = kInt16Levels;
    static constexpr std::int64_t kRun = kIntegerRun / kGroup;
    static constexpr bool kHasZero = false, kInRuns = true;

    static inline IntVec dot(IntVec sum, IntVec a, IntVec w) {
#if defined(__AVX512VNNI__)
        return (IntVec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)w);
#else
        return sum + pairs(a, w);
#endif
    }
};

// One weight matrix as the kernel reads it.
struct IntegerMatrix {
    const char* packed;  // panels, kStepBytes * steps each
    const float* scale;  // (N rounded up to kColumns)
    const float* sum;    // likewise: of each channel's integers, for the zero point
    // (K): an activation is multiplied by rescale, then shift is added, then it is rounded.
    const float *rescale, *shift;
};

// emit(row, vector, sum) for the integer sums, as floats, of one tile: rows [0, kRows) of A and one panel.
template <class Format, int kRows, class Emit>
static inline void integer_tile(const char* a, std::int64_t a_row, const char* panel, std::int64_t steps, Fetch fetch,
                                Emit emit) {
    [[maybe_unused]] float totals[Format::kInRuns ? kRows : 1][kColumns] = {};
    for (std::int64_t begin = 0; begin < steps;) {
        std::int64_t end = steps;
        if constexpr (Format::kInRuns) end = smaller(begin + Format::kRun, steps);
        IntVec sums[kRows][kColumnVectors] = {};
        for (std::int64_t step = begin; step < end; ++step) {
            const char* at = panel + step * kStepBytes;
            IntVec weights[kColumnVectors];
#pragma GCC unroll 8
            for (int v = 0; v < kColumnVectors; ++v) __builtin_memcpy(&weights[v], at + 4 * kLanes * v, 4 * kLanes);
            __builtin_prefetch(at + kPrefetch);
            __builtin_prefetch(at + kPrefetch + 64);
            __builtin_prefetch(fetch.from + step * fetch.step, 0, 2);
            __builtin_prefetch(fetch.from + step * fetch.step + 64, 0, 2);
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r) {
                std::int32_t group;
                __builtin_memcpy(&group, a + r * a_row + 4 * step, 4);
                const IntVec splatted = group - IntVec{};
#pragma GCC unroll 8
                for (int v = 0; v < kColumnVectors; ++v) sums[r][v] = Format::dot(sums[r][v], splatted, weights[v]);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
            for (int v = 0; v < kColumnVectors; ++v) {
                const Vec sum = to_float(sums[r][v]);
                if constexpr (Format::kInRuns) {
                    float* total = &totals[r][v * kLanes];
                    const Vec all = load(total, Full{}) + sum;
                    end == steps ? emit(r, v, all) : store(total, all, Full{});
                } else {
                    emit(r, v, sum);
                }
            }
        }
        begin = end;
    }
}

template <class Format, int kRows, class Emit>
static inline void integer_tile_of(std::int64_t rows, const char* a, std::int64_t a_row, const char* panel,
                                   std::int64_t steps, Fetch fetch, Emit emit) {
    if (rows == kRows) return integer_tile<Format, kRows>(a, a_row, panel, steps, fetch, emit);
    if constexpr (kRows > 1) integer_tile_of<Format, kRows - 1>(rows, a, a_row, panel, steps, fetch, emit);
}

// emit(row, column, Vec) for every vector of the panels [first, last) of A W^T in float32; a row of A is `a_row` bytes
// and holds `steps` groups, `scales` one entry a row.
template <class Format, class Emit>
static inline void integer_product(const char* a, std::int64_t a_row, const RowScale* scales, std::int64_t rows,
                                   const IntegerMatrix& w, std::int64_t steps, std::int64_t first, std::int64_t last,
                                   Emit emit) {
    const std::int64_t tiles = divide_up(rows, kIntegerRows), size = tiles == 2 ? divide_up(rows, 2) : kIntegerRows;
    const std::int64_t bytes = steps * kStepBytes;
    for (std::int64_t p = first; p < last; ++p) {
        const char* panel = w.packed + p * bytes;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            const std::int64_t begin = tile * size;
            integer_tile_of<Format, kIntegerRows>(
                smaller(rows - begin, size), a + begin * a_row, a_row, panel, steps,
                Fetch{panel + bytes + bytes * tile / tiles, kStepBytes / tiles}, [&](int r, int v, Vec sum) {
                    const std::int64_t column = p * kColumns + v * kLanes;
                    const RowScale row = scales[begin + r];
                    // rounded() keeps the compiler from fusing a product with a sum in some tiles and not in others.
                    if constexpr (Format::kHasZero) sum -= rounded(row.zero * load(w.sum + column, Full{}));
                    emit(begin + r, column, rounded(sum * (row.scale * load(w.scale + column, Full{}))));
                });
        }
    }
}

}  // namespace albert_fast::ALBERT_FAST_ISA
