// LayerNorm of a row and its gradient, for all operators that end in one. The operator passes a function that computes
// the input of LayerNorm, in registers, so it is never stored.
#pragma once

#include "column_sums.h"

namespace albert_fast::ALBERT_FAST_ISA {

struct RowStatistics {
    float mean, rstd;
};

// 0, or NaN where torch's layer_norm gives NaN: it joins the moments of whole vectors, and the square of the mean
// exceeds float for rows near 1e25.
static inline float moments_overflow(float mean, std::int64_t n) {
    constexpr std::int64_t kTorchLanes = kLanes > 8 ? 16 : 8;
    return n < kTorchLanes || n % kTorchLanes == 0 ? 0.0f * (mean * mean) : 0.0f;
}

// Fills row (n, kept in L1) with input(i, lanes) and returns its statistics. The variance comes from the
// differences from the mean, which do not cancel as E[x^2] - E[x]^2 does.
template <class Input>
static inline RowStatistics normalise_row(float* row, std::int64_t n, float eps, Input input) {
    const float total = sum_row(n, [&](std::int64_t i, auto lanes) {
        const Vec x = input(i, lanes);
        store(row + i, x, Full{});
        return x;
    });
    const float mean = total / static_cast<float>(n);
    const float squares = sum_row(n, [&](std::int64_t i, auto) {
        const Vec difference = load(row + i, Full{}) - mean;
        return difference * difference;
    });
    const float variance = squares / static_cast<float>(n) + moments_overflow(mean, n);
    return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

// out(i, (x - mean) * rstd * weight + bias, lanes) for every vector of the row that normalise_row filled.
template <class T, class Output>
static inline void scale_row(const float* row, std::int64_t n, RowStatistics statistics, const T* weight, const T* bias,
                             Output out) {
    for_vectors(n, [&](std::int64_t i, auto lanes) {
        const Vec x = (load(row + i, Full{}) - statistics.mean) * statistics.rstd;
        out(i, x * load(weight + i, lanes) + load(bias + i, lanes), lanes);
    });
}

// The functions that the gradient needs from an operator, each for one vector of one row:
//   Vec input(row, i, lanes)            what was normalised
//   Vec grad(row, i, lanes)             the gradient of the normalised row times weight plus bias
//   Vec emit(row, i, dz, lanes)         stores the gradient dz of the input; returns what its bias sum takes
// sums: 0 = weight, 1 = bias of LayerNorm, 2 = what emit returned (where kHasInputBias).
template <bool kHasInputBias, class T, class Input, class Grad, class Emit>
struct LayerNormBackward {
    std::int64_t n;
    const T* weight;
    const float *mean, *rstd;
    Input input;
    Grad grad;
    Emit emit;

    // Rows [first, first + kRows).
    template <int kRows>
    void group(std::int64_t first, const ColumnSums& sums, std::int64_t chunk) const {
        const std::int64_t width = round_up(n, kLanes);
        float* normalised = scratch<Purpose::kTask>(kRows * width);
        float scale[kRows], grad_mean[kRows], product_mean[kRows];
        for (int r = 0; r < kRows; ++r) {
            const float row_mean = mean[first + r], row_scale = rstd[first + r];
            const FloatPair totals = sum_row(n, [&](std::int64_t i, auto lanes) {
                const Vec x = (input(first + r, i, lanes) - row_mean) * row_scale;
                store(normalised + r * width + i, x, Full{});
                const Vec scaled = grad(first + r, i, lanes) * load(weight + i, lanes);
                return VecPair{scaled, scaled * x};
            });
            scale[r] = row_scale;
            grad_mean[r] = totals.first / static_cast<float>(n);
            product_mean[r] = totals.second / static_cast<float>(n);
        }
        float *weight_sums = sums.row(chunk, 0), *bias_sums = sums.row(chunk, 1);
        for_vectors(n, [&](std::int64_t i, auto lanes) {
            const Vec w = load(weight + i, lanes);
            Vec weight_sum{}, bias_sum{}, input_sum{};
            for (int r = 0; r < kRows; ++r) {
                const Vec x = load(normalised + r * width + i, Full{});
                const Vec dy = grad(first + r, i, lanes);
                // In a row of equal numbers scale is huge: dy * w must be rounded as it was for its mean.
                const Vec dz = (rounded(dy * w) - grad_mean[r] - x * product_mean[r]) * scale[r];
                weight_sum += dy * x;
                bias_sum += dy;
                const Vec emitted = emit(first + r, i, dz, lanes);
                if constexpr (kHasInputBias) input_sum += emitted;
            }
            add_to(weight_sums + i, weight_sum);
            add_to(bias_sums + i, bias_sum);
            if constexpr (kHasInputBias) add_to(sums.row(chunk, 2) + i, input_sum);
        });
    }
};

// The gradient for `rows` rows of n; writes dweight, dln_bias and, where kHasInputBias, dbias (n each).
template <bool kHasInputBias, class T, class Input, class Grad, class Emit>
static inline void layer_norm_backward(std::int64_t rows, std::int64_t n, const T* weight, const float* mean,
                                       const float* rstd, float* dweight, float* dln_bias, float* dbias,
                                       int num_threads, Input input, Grad grad, Emit emit) {
    const LayerNormBackward<kHasInputBias, T, Input, Grad, Emit> work{n, weight, mean, rstd, input, grad, emit};
    const Chunks chunks = summation_chunks(rows);
    const ColumnSums sums(chunks, kHasInputBias ? 3 : 2, n);
    parallel_for(chunks.count, num_threads, [&](std::int64_t chunk) {
        sums.clear(chunk);
        const std::int64_t end = chunks.end(chunk);
        std::int64_t row = chunks.begin(chunk);
        for (; row + kRowGroup <= end; row += kRowGroup) work.template group<kRowGroup>(row, sums, chunk);
        for (; row < end; ++row) work.template group<1>(row, sums, chunk);
    });
    sums.finish(0, dweight, num_threads);
    sums.finish(1, dln_bias, num_threads);
    if constexpr (kHasInputBias) sums.finish(2, dbias, num_threads);
}

}  // namespace albert_fast::ALBERT_FAST_ISA
