// A layer of the encoder as encoder.cpp reads it: sizes, matrices packed in one piece of memory, vectors as the model
// has them.
#pragma once

#include "packed_gemm.h"

namespace albert_fast::ALBERT_FAST_ISA {

// Columns of the feed-forward block's middle that are made and used up at a time.
constexpr std::int64_t kSlice = 768;

// Sizes of a layer and where its parts stand in packed memory.
struct Sizes {
    std::int64_t hidden, middle, width, stride;

    Sizes(std::int64_t hidden, std::int64_t middle)
        : hidden(hidden), middle(middle), width(round_up(hidden, kPanel)), stride(row_stride(hidden)) {}

    std::int64_t panels() const { return width / kPanel; }
    std::int64_t slices() const { return divide_up(middle, kSlice); }
    std::int64_t slice_end(std::int64_t slice) const { return smaller(middle, (slice + 1) * kSlice); }
    std::int64_t slice_columns(std::int64_t slice) const { return slice_end(slice) - slice * kSlice; }
    // Query, key and value, each from a whole panel on.
    std::int64_t qkv() const { return 3 * packed_size(hidden, hidden); }
    std::int64_t dense() const { return packed_size(hidden, hidden); }
    std::int64_t ffn() const { return packed_size(middle, hidden); }
    std::int64_t ffn_output() const { return width * middle; }
    std::int64_t packed() const { return qkv() + dense() + ffn() + ffn_output(); }
};

// One of the distinct layers. Vectors are those of the model, matrices are packed.
struct Layer {
    const float *qkv, *dense, *ffn, *ffn_output;
    const float *qkv_bias, *dense_bias, *norm_weight, *norm_bias;
    const float *ffn_bias, *ffn_output_bias, *full_norm_weight, *full_norm_bias;
};

// Addresses in a layer's row of the table that Python hands over; the order of `WEIGHTS` in albert_fast/ops/encoder.py.
enum Slot : int {
    kQkv,
    kQkvBias,
    kDense,
    kDenseBias,
    kNormWeight,
    kNormBias,
    kFfn,
    kFfnBias,
    kFfnOutput,
    kFfnOutputBias,
    kFullNormWeight,
    kFullNormBias,
    kPacked,
    kSlots
};

static inline const float* at(const std::int64_t* row, Slot slot) { return reinterpret_cast<const float*>(row[slot]); }

static inline Layer layer_of(const std::int64_t* row, const Sizes& sizes) {
    const float* packed = at(row, kPacked);
    const float *dense = packed + sizes.qkv(), *ffn = dense + sizes.dense(), *ffn_output = ffn + sizes.ffn();
    return {packed,
            dense,
            ffn,
            ffn_output,
            at(row, kQkvBias),
            at(row, kDenseBias),
            at(row, kNormWeight),
            at(row, kNormBias),
            at(row, kFfnBias),
            at(row, kFfnOutputBias),
            at(row, kFullNormWeight),
            at(row, kFullNormBias)};
}

// Element [begin, begin + kLanes) of a vector of n elements, zero beyond it.
static inline Vec load_padded(const float* vector, std::int64_t begin, std::int64_t n) {
    if (begin + kLanes <= n) return load(vector + begin, Full{});
    return begin < n ? load(vector + begin, Part{static_cast<int>(n - begin)}) : Vec{};
}

}  // namespace albert_fast::ALBERT_FAST_ISA
