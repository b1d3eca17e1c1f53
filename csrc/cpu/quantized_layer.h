// The integer arithmetics of quantized_encoder.cpp: how rows of activations are rounded, and a layer of integer
// matrices.
#pragma once

#include "encoder_layer.h"
#include "integer_attention.h"

namespace albert_fast::ALBERT_FAST_ISA {

// Products of Format's integers: rows are rounded to a step of their own, just before they are multiplied.
template <class Format>
struct Integers {
    using Element = typename Format::Element;
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
    static std::int64_t operand_floats(std::int64_t rows, std::int64_t k) {
        return round_up(rows * rounded_row_bytes<Element>(k) / 4, 16) + round_up(2 * rows, 16);
    }
    static Operand operand(const float*, std::int64_t, float* memory, std::int64_t rows, std::int64_t k) {
        float* scales = memory + round_up(rows * rounded_row_bytes<Element>(k) / 4, 16);
        return {reinterpret_cast<char*>(memory), rounded_row_bytes<Element>(k), reinterpret_cast<RowScale*>(scales)};
    }

    // Row `row` of `to`, rounded for a product with `w`. Columns beyond k meet zeros in the packed weights.
    static void round(const float* from, const Matrix& w, const Operand& to, std::int64_t row) {
        to.scales[row] = round_row(RescaledRow{from, w.integers.rescale, w.integers.shift, w.k}, Format::kLevels,
                                   reinterpret_cast<Element*>(to.rows + row * to.stride));
    }

    static std::int64_t attention_floats(std::int64_t keys, std::int64_t head_dim) {
        return integer_attention_floats(keys, head_dim);
    }
    static void attention(const Inputs<float>& in, const Head& head, Rows<float> out) {
        integer_attention(in, head, out);
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
            : vectors{{at(row, 0), at(row, 0) + sizes.hidden, at(row, 0) + 2 * sizes.hidden},
                      at(row, 1),
                      at(row, 2),
                      at(row, 3),
                      at(row, 4),
                      at(row, 5),
                      at(row, 6),
                      at(row, 7)},
              sizes_(sizes) {
            for (int product = 0; product < 4; ++product) {
                const std::int64_t* slots = row + 8 + product * kProductSlots;
                all_[product] = {reinterpret_cast<const char*>(slots[kWeights]), at(slots, kScale), at(slots, kSum),
                                 at(slots, kRescale), at(slots, kShift)};
            }
        }

        Matrix qkv(std::int64_t part) const { return columns(kQkv, part * sizes_.width, sizes_.hidden); }
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
