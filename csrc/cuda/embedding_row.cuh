// The arithmetic of one embedding row, without the division of work in a block. The functions compile for the GPU and
// for the host, where tests run them.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define ALBERT_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ALBERT_FAST_HOST_DEVICE inline
#endif

namespace albert_fast::cuda {

// Replayable dropout: an element is kept iff hash32(seed, row, column) >= threshold. All members are the same for a
// tensor.
struct Dropout {
    std::uint32_t low, high, threshold;
    float scale;
};

// p in [0, 1). For p = 0 every hash passes the threshold.
ALBERT_FAST_HOST_DEVICE Dropout make_dropout(double p, std::int64_t seed) {
    const std::uint64_t bits = static_cast<std::uint64_t>(seed);
    return {static_cast<std::uint32_t>(bits), static_cast<std::uint32_t>(bits >> 32),
            static_cast<std::uint32_t>(p * 4294967296.0), static_cast<float>(1.0 / (1.0 - p))};
}

ALBERT_FAST_HOST_DEVICE std::uint32_t mix(std::uint32_t x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return x;
}

// The part of the hash that the elements of a row share.
ALBERT_FAST_HOST_DEVICE std::uint32_t row_state(const Dropout& dropout, std::int64_t row) {
    return mix(dropout.low ^ (static_cast<std::uint32_t>(row) * 0x9E3779B1u));
}

// value / (1 - p) where the element is kept, 0 * value where not, so that a dropped NaN stays NaN, as in torch.
ALBERT_FAST_HOST_DEVICE float apply_dropout(const Dropout& dropout, std::uint32_t state, std::int64_t column,
                                            float value) {
    const std::uint32_t hash = mix(state ^ (dropout.high ^ (static_cast<std::uint32_t>(column) * 0x85EBCA77u)));
    return value * (hash >= dropout.threshold ? dropout.scale : 0.0f);
}

// Which rows of the three tables a token adds up; word < 0: none, because an id lies outside its table.
struct TokenRows {
    std::int64_t word, token_type, position;
};

// 0, 1 or 2 for the first table that its id lies outside of, -1 where all are fine.
ALBERT_FAST_HOST_DEVICE int first_bad_table(const TokenRows& rows, std::int64_t V, std::int64_t Y, std::int64_t P) {
    if (rows.word < 0 || rows.word >= V) return 0;
    if (rows.token_type < 0 || rows.token_type >= Y) return 1;
    return rows.position < 0 || rows.position >= P ? 2 : -1;
}

// Adds in the order of Hugging Face's sum.
ALBERT_FAST_HOST_DEVICE float embedding_sum(float word, float token_type, float position) {
    return (word + token_type) + position;
}

struct RowStatistics {
    float mean, rstd;
};

// 1 / standard deviation, from the mean and the sum of squares of a row's E centred elements. As in torch's layer_norm
// on a CPU, a row of whole vectors becomes NaN if the square of its mean exceeds float.
ALBERT_FAST_HOST_DEVICE float reciprocal_deviation(float mean, float squares, std::int64_t E, float eps) {
    const float overflow = E % 16 == 0 ? 0.0f * (mean * mean) : 0.0f;
    return 1.0f / sqrtf(squares / static_cast<float>(E) + overflow + eps);
}

ALBERT_FAST_HOST_DEVICE float normalised(float z, const RowStatistics& row) { return (z - row.mean) * row.rstd; }

ALBERT_FAST_HOST_DEVICE float layer_norm(float z, const RowStatistics& row, float weight, float bias) {
    return normalised(z, row) * weight + bias;
}

// What the gradient of LayerNorm needs to know of a whole row: the means of g and of g z_hat, where g is the gradient
// of the output times ln_weight.
struct RowGradient {
    RowStatistics statistics;
    float mean_g, mean_g_z_hat;
};

ALBERT_FAST_HOST_DEVICE float layer_norm_gradient(float g, float z_hat, const RowGradient& row) {
    return (g - row.mean_g - z_hat * row.mean_g_z_hat) * row.statistics.rstd;
}

}  // namespace albert_fast::cuda
