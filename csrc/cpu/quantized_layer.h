// The integer arithmetics of quantized_encoder.cpp: how rows of activations are rounded, and a layer of integer matrices.
#pragma once

#include <cfloat>

#include "encoder_layer.h"
#include "integer_gemm.h"
#include "math.h"

namespace albert_fast::ALBERT_FAST_ISA {

// `levels` / extent, or 0 where a row is too small to be told from zero.
static inline float inverse_step(float extent, float levels) {
    const float inverse = levels / extent;
    return extent > 0.0f && inverse < FLT_MAX ? inverse : 0.0f;
}

// A row as it is rounded: x * rescale + shift, element by element.
struct RescaledRow {
    const float *row, *rescale, *shift;
    std::int64_t n;

    template <class Lanes>
    Vec at(std::int64_t i, Lanes lanes) const {
        return load(row + i, lanes) * load(rescale + i, lanes) + load(shift + i, lanes);
    }
};

// The smallest and largest element of a row, zero among them; `damage` is NaN where it holds a NaN or an infinity.
struct Extent {
    float low, high, damage;

    explicit Extent(const RescaledRow& row) {
        Vec least[2] = {}, most[2] = {};
        damage = sum_row(row.n, [&](std::int64_t i, auto lanes) {
            const int side = i / kLanes % 2;  // two chains of comparisons hide their latency
            const Vec x = row.at(i, lanes);
            least[side] = smaller(least[side], x);
            most[side] = larger(most[side], x);
            return x * 0.0f;
        });
        low = -largest_lane(-smaller(least[0], least[1]));
        high = largest_lane(larger(most[0], most[1]));
    }
};

// to (n) = the nearest integers of x * inverse + zero, within [0, 255].
static inline RowScale round_row(const RescaledRow& row, float levels, std::uint8_t* to) {
    typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
    const Extent extent(row);
    const float range = extent.high - extent.low, inverse = inverse_step(range, levels);
    const float zero = __builtin_rintf(-extent.low * inverse), shift = kRoundToInteger + zero;
    for_vectors(row.n, [&](std::int64_t i, auto lanes) {
        const Vec x = row.at(i, lanes) * inverse + shift;
        const Vec within = smaller(splat(kRoundToInteger + levels), larger(splat(kRoundToInteger), x));
        const Bytes bytes = __builtin_convertvector(bits_of(within) & 0xFFu, Bytes);
        __builtin_memcpy(to + i, &bytes, sizeof bytes);
    });
    return {(inverse > 0.0f ? range / levels : 0.0f) + extent.damage, zero};
}

// Likewise for integers with a sign in [-levels, levels], without a zero point.
static inline RowScale round_row(const RescaledRow& row, float levels, std::int16_t* to) {
    typedef std::int16_t Shorts __attribute__((vector_size(2 * kLanes)));
    const Extent extent(row);
    const float most = extent.high > -extent.low ? extent.high : -extent.low, inverse = inverse_step(most, levels);
    for_vectors(row.n, [&](std::int64_t i, auto lanes) {
        const Vec x = row.at(i, lanes) * inverse + kRoundToInteger;
        const Shorts shorts = __builtin_convertvector((IntVec)bits_of(x) - 0x4B400000, Shorts);
        __builtin_memcpy(to + i, &shorts, sizeof shorts);
    });
    return {(inverse > 0.0f ? most / levels : 0.0f) + extent.damage, 0.0f};
}

// Products of Format's integers: rows are rounded to a step of their own, just before they are multiplied.
template <class Format>
struct Integers {
    using Element = typename Format::Element;
    static constexpr std::int64_t kColumnsOfPanel = kColumns;
    static constexpr std::int64_t kRowsOfTile = kIntegerRows;
    static constexpr bool kRounds = true;

    struct Matrix {
        IntegerMatrix integers;
        std::int64_t k;
    };

    // Rounded rows, kept apart from the floats: elements `stride` bytes a row, and a scale a row.
    struct Operand {
        char* rows;
        std::int64_t stride;
        RowScale* scales;

        Operand from(std::int64_t row) const { return {rows + row * stride, stride, scales + row}; }
    };

    static std::int64_t steps(std::int64_t k) { return divide_up(k, Format::kGroup); }
    // Whole vectors, since rounding stores them, and no multiple of 1 KiB.
    static std::int64_t operand_stride(std::int64_t k) {
        const std::int64_t bytes = round_up(k * static_cast<std::int64_t>(sizeof(Element)), 64);
        return bytes % 1024 == 0 ? bytes + 64 : bytes;
    }
    static std::int64_t operand_floats(std::int64_t rows, std::int64_t k) {
        return round_up(rows * operand_stride(k) / 4, 16) + round_up(2 * rows, 16);
    }
    static Operand operand(const float*, std::int64_t, float* memory, std::int64_t rows, std::int64_t k) {
        float* scales = memory + round_up(rows * operand_stride(k) / 4, 16);
        return {reinterpret_cast<char*>(memory), operand_stride(k), reinterpret_cast<RowScale*>(scales)};
    }

    // Row `row` of `to`, rounded for a product with `w`. Columns beyond k meet zeros in the packed weights.
    static void round(const float* from, const Matrix& w, const Operand& to, std::int64_t row) {
        to.scales[row] = round_row({from, w.integers.rescale, w.integers.shift, w.k}, Format::kLevels,
                                   reinterpret_cast<Element*>(to.rows + row * to.stride));
    }

    template <class Emit>
    static void product(const Operand& a, std::int64_t rows, const Matrix& w, std::int64_t first, std::int64_t last,
                        Emit emit) {
        integer_product<Format>(a.rows, a.stride, a.scales, rows, w.integers, steps(w.k), first, last, emit);
    }

    // A layer; kernels.h says what its row of the table holds.
    class Layer {
    public:
        enum Product : int { kQkv, kDense, kFfn, kFfnOutput };
        enum Slot : int { kWeights, kScale, kSum, kRescale, kShift, kProductSlots };
        static constexpr int kSlots = 8 + 4 * kProductSlots;

        LayerVectors vectors;

        Layer(const std::int64_t* row, const Sizes& sizes)
            : vectors{at(row, 0), at(row, 1), at(row, 2), at(row, 3), at(row, 4), at(row, 5), at(row, 6), at(row, 7)},
              sizes_(sizes) {
            for (int product = 0; product < 4; ++product) {
                const std::int64_t* slots = row + 8 + product * kProductSlots;
                all_[product] = {reinterpret_cast<const char*>(slots[kWeights]),
                                 at(slots, kScale),
                                 at(slots, kSum),
                                 at(slots, kRescale),
                                 at(slots, kShift)};
            }
        }

        Matrix qkv(std::int64_t part) const {
            return columns(kQkv, part * sizes_.width, sizes_.hidden);
        }
        Matrix dense() const { return columns(kDense, 0, sizes_.hidden); }
        Matrix ffn(std::int64_t slice) const { return columns(kFfn, slice * kSlice, sizes_.hidden); }
        // A slice of its rows: all channels of each slice are packed together, and have sums of their own.
        Matrix ffn_output(std::int64_t slice) const {
            IntegerMatrix part = all_[kFfnOutput];
            part.packed += slice * steps(kSlice) * sizes_.panels() * kStepBytes;
            part.sum += slice * sizes_.width;
            part.rescale += slice * kSlice;
            part.shift += slice * kSlice;
            return {part, sizes_.slice_columns(slice)};
        }

    private:
        IntegerMatrix all_[4];
        Sizes sizes_;

        // The channels from `first` on, the first of a panel.
        Matrix columns(Product product, std::int64_t first, std::int64_t k) const {
            IntegerMatrix part = all_[product];
            part.packed += first / kColumns * steps(k) * kStepBytes;
            part.scale += first;
            part.sum += first;
            return {part, k};
        }
    };
};

}  // namespace albert_fast::ALBERT_FAST_ISA
