// The integer arithmetic of quantized_encoder.cpp: how rows of activations are rounded, and where a layer's integer
// matrices lie.
#pragma once

#include "encoder_layer.h"
#include "integer_attention.h"

namespace albert_fast::ALBERT_FAST_ISA {

// Products in Format's integers. Each row of activations is rounded, to a step of its own, just before it is
// multiplied.
template <class Format>
struct Integers {
    using Element = typename Format::Element;
    static constexpr std::int64_t kRowsOfTile = kIntegerRows;
    static constexpr bool kRounds = true;

    struct Matrix {
        IntegerMatrix integers;
        std::int64_t k;
    };

    // The left side of a product: rounded rows, `stride` bytes apart, and the scale of each row.
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

    // Rounds a row into row `row` of `to`, for a product with `w`. Columns beyond k meet zeros in the packed weights.
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

    // A layer of integer matrices.
    class Layer {
    public:
        // A row of the table: the tensors of Vector, then for each Product those of ProductTensor.
        static constexpr int kTableColumns = Vector::kCount + Product::kCount * ProductTensor::kCount;

        LayerVectors vectors;

        Layer(const std::int64_t* row, const Sizes& sizes) : vectors(vectors_of(row, sizes.hidden)), sizes_(sizes) {
            for (int product = 0; product < Product::kCount; ++product) {
                const std::int64_t* own = row + Vector::kCount + product * ProductTensor::kCount;
                all_[product] = {reinterpret_cast<const char*>(own[ProductTensor::kIntegers]),
                                 at(own, ProductTensor::kScales), at(own, ProductTensor::kSums),
                                 at(own, ProductTensor::kRescales), at(own, ProductTensor::kShifts)};
            }
        }

        Matrix qkv(std::int64_t part) const { return columns(Product::kQkv, part * sizes_.width, sizes_.hidden); }
        Matrix dense() const { return columns(Product::kDense, 0, sizes_.hidden); }
        Matrix ffn(std::int64_t slice) const { return columns(Product::kFfn, slice * kSlice, sizes_.hidden); }
        // The matrix's columns of one slice: they are packed together, for all channels, and have sums of their own.
        Matrix ffn_output(std::int64_t slice) const {
            IntegerMatrix part = all_[Product::kFfnOutput];
            part.packed += slice * steps(kSlice) * sizes_.panels() * kStepBytes;
            part.sum += slice * sizes_.width;
            part.rescale += slice * kSlice;
            part.shift += slice * kSlice;
            return {part, sizes_.slice_columns(slice)};
        }

    private:
        IntegerMatrix all_[Product::kCount];
        Sizes sizes_;

        static LayerVectors vectors_of(const std::int64_t* row, std::int64_t hidden) {
            const float* qkv_bias = at(row, Vector::kQkvBias);
            return {{qkv_bias, qkv_bias + hidden, qkv_bias + 2 * hidden},
                    at(row, Vector::kDenseBias),
                    at(row, Vector::kNormWeight),
                    at(row, Vector::kNormBias),
                    at(row, Vector::kFfnBias),
                    at(row, Vector::kFfnOutputBias),
                    at(row, Vector::kFullNormWeight),
                    at(row, Vector::kFullNormBias)};
        }

        // The channels from `first` on; a panel begins there.
        Matrix columns(Product::Index product, std::int64_t first, std::int64_t k) const {
            IntegerMatrix part = all_[product];
            part.packed += first / kColumns * steps(k) * kStepBytes;
            part.scale += first;
            part.sum += first;
            return {part, k};
        }
    };
};

}  // namespace albert_fast::ALBERT_FAST_ISA
