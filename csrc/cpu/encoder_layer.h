// A layer of the encoder as encoder.h reads it: its sizes, its vectors as the model has them, its matrices packed in
// one piece of memory. `Float32` is the arithmetic of encoder.cpp; quantized_layer.h has that of quantized_encoder.cpp.
#pragma once

#include "../layer_schema.h"
#include "attention_forward.h"
#include "packed_gemm.h"

namespace albert_fast::ALBERT_FAST_ISA {

// Sizes of a layer whose matrices are packed in panels of `panel` columns.
struct Sizes {
    std::int64_t hidden, middle, panel, width, stride;

    Sizes(std::int64_t hidden, std::int64_t middle, std::int64_t panel)
        : hidden(hidden), middle(middle), panel(panel), width(round_up(hidden, panel)), stride(row_stride(width)) {}

    std::int64_t panels() const { return width / panel; }
    std::int64_t slices() const { return divide_up(middle, kSlice); }
    std::int64_t slice_end(std::int64_t slice) const { return smaller(middle, (slice + 1) * kSlice); }
    std::int64_t slice_columns(std::int64_t slice) const { return slice_end(slice) - slice * kSlice; }
};

// The vectors of a layer; qkv_bias has the biases of query, key and value.
struct LayerVectors {
    const float *qkv_bias[3], *dense_bias, *norm_weight, *norm_bias;
    const float *ffn_bias, *ffn_output_bias, *full_norm_weight, *full_norm_bias;
};

// The tensor whose address is in column `column` of a row of Python's table.
static inline const float* at(const std::int64_t* row, int column) {
    return reinterpret_cast<const float*>(row[column]);
}

// Elements [begin, begin + kLanes) of a vector of n elements, zeros beyond its end.
static inline Vec load_padded(const float* vector, std::int64_t begin, std::int64_t n) {
    if (begin + kLanes <= n) return load(vector + begin, Full{});
    return begin < n ? load(vector + begin, Part{static_cast<int>(n - begin)}) : Vec{};
}

// Products in float32, which read activations in place.
struct Float32 {
    static constexpr std::int64_t kRowsOfTile = kPackedRows;
    static constexpr bool kRounds = false;

    // k columns of all panels of a part of a matrix.
    struct Matrix {
        const float* packed;
        std::int64_t k;
    };

    // The left side of a product: rows of floats, `stride` apart.
    struct Operand {
        const float* rows;
        std::int64_t stride;

        Operand from(std::int64_t row) const { return {rows + row * stride, stride}; }
    };

    static std::int64_t operand_floats(std::int64_t, std::int64_t) { return 0; }
    static Operand operand(const float* rows, std::int64_t stride, float*, std::int64_t, std::int64_t) {
        return {rows, stride};
    }
    static void round(const float*, const Matrix&, const Operand&, std::int64_t) {}

    static std::int64_t attention_floats(std::int64_t keys, std::int64_t head_dim) {
        return forward_floats(keys, head_dim);
    }
    static void attention(const Inputs<float>& in, const Head& head, Rows<float> out) {
        forward_task<false>(in, head, 0, 1, out, nullptr);
    }

    template <class Emit>
    static void product(const Operand& a, std::int64_t rows, const Matrix& w, std::int64_t first, std::int64_t last,
                        Emit emit) {
        packed_product(a.rows, a.stride, rows, w.packed, w.k, first, last, emit);
    }

    // Where a layer's matrices lie in packed memory.
    class Layer {
    public:
        // A row of the table: the tensors of Weight, then the packed matrices.
        static constexpr int kPacked = Weight::kCount, kTableColumns = kPacked + 1;

        LayerVectors vectors;

        Layer(const std::int64_t* row, const Sizes& sizes)
            : vectors{{at(row, Weight::kQueryBias), at(row, Weight::kKeyBias), at(row, Weight::kValueBias)},
                      at(row, Weight::kDenseBias),
                      at(row, Weight::kNormWeight),
                      at(row, Weight::kNormBias),
                      at(row, Weight::kFfnBias),
                      at(row, Weight::kFfnOutputBias),
                      at(row, Weight::kFullNormWeight),
                      at(row, Weight::kFullNormBias)},
              packed_(at(row, kPacked)),
              sizes_(sizes) {}

        // Query, key or value (0, 1, 2), each from a whole panel on.
        Matrix qkv(std::int64_t part) const { return {packed_ + part * square(sizes_), sizes_.hidden}; }
        Matrix dense() const { return {packed_ + 3 * square(sizes_), sizes_.hidden}; }
        Matrix ffn(std::int64_t slice) const {
            return {packed_ + 4 * square(sizes_) + slice * kSlice * sizes_.hidden, sizes_.hidden};
        }
        Matrix ffn_output(std::int64_t slice) const {
            const float* all = packed_ + 4 * square(sizes_) + up(sizes_);
            return {all + slice * kSlice * sizes_.width, sizes_.slice_columns(slice)};
        }

        static std::int64_t floats(const Sizes& sizes) {
            return 4 * square(sizes) + up(sizes) + sizes.width * sizes.middle;
        }

    private:
        const float* packed_;
        Sizes sizes_;

        static std::int64_t square(const Sizes& sizes) { return sizes.width * sizes.hidden; }
        static std::int64_t up(const Sizes& sizes) { return round_up(sizes.middle, kPanel) * sizes.hidden; }
    };
};

}  // namespace albert_fast::ALBERT_FAST_ISA
