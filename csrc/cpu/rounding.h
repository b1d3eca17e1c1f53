// Rounds rows of floats to integers, each row with its own step: the left sides of integer_gemm.h's products.
#pragma once

#include <cfloat>

#include "integer_gemm.h"

namespace albert_fast::ALBERT_FAST_ISA {

// The distance in bytes between rounded rows of k elements: whole vectors, since rounding stores them, and no multiple
// of 1 KiB.
template <class Element>
static inline std::int64_t rounded_row_bytes(std::int64_t k) {
    const std::int64_t bytes = round_up(k * static_cast<std::int64_t>(sizeof(Element)), 64);
    return bytes % 1024 == 0 ? bytes + 64 : bytes;
}

// `levels` / extent, or 0 for a row whose elements are too small to be distinguished from zero.
static inline float inverse_step(float extent, float levels) {
    const float inverse = levels / extent;
    return extent > 0.0f && inverse < FLT_MAX ? inverse : 0.0f;
}

// A row that is rounded after x * rescale + shift, element by element.
struct RescaledRow {
    const float *row, *rescale, *shift;
    std::int64_t n;

    template <class Lanes>
    Vec at(std::int64_t i, Lanes lanes) const {
        return load(row + i, lanes) * load(rescale + i, lanes) + load(shift + i, lanes);
    }
};

// The smallest and largest element of a row, zero among them; `damage` is NaN if the row has a NaN or an infinity.
struct Extent {
    float low, high, damage;

    template <class Row>
    explicit Extent(const Row& row) {
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
template <class Row>
static inline RowScale round_row(const Row& row, float levels, std::uint8_t* to) {
    typedef std::uint8_t Bytes __attribute__((vector_size(kLanes)));
    const Extent extent(row);
    // Halved first: the range of a finite row may exceed float's largest number.
    const float range = 0.5f * extent.high - 0.5f * extent.low, steps = 0.5f * levels;
    const float inverse = inverse_step(range, steps);
    const float zero = __builtin_rintf(-extent.low * inverse), shift = kRoundToInteger + zero;
    for_vectors(row.n, [&](std::int64_t i, auto lanes) {
        const Vec x = row.at(i, lanes) * inverse + shift;
        const Vec within = smaller(splat(kRoundToInteger + levels), larger(splat(kRoundToInteger), x));
        const Bytes bytes = __builtin_convertvector(bits_of(within) & 0xFFu, Bytes);
        __builtin_memcpy(to + i, &bytes, sizeof bytes);
    });
    return {(inverse > 0.0f ? range / steps : 0.0f) + extent.damage, zero};
}

// Likewise for integers with a sign in [-levels, levels], without a zero point.
template <class Row>
static inline RowScale round_row(const Row& row, float levels, std::int16_t* to) {
    typedef std::int16_t Shorts __attribute__((vector_size(2 * kLanes)));
    const Extent extent(row);
    const float most = extent.high > -extent.low ? extent.high : -extent.low, inverse = inverse_step(most, levels);
    for_vectors(row.n, [&](std::int64_t i, auto lanes) {
        const Shorts shorts = __builtin_convertvector(nearest(row.at(i, lanes) * inverse), Shorts);
        __builtin_memcpy(to + i, &shorts, sizeof shorts);
    });
    return {(inverse > 0.0f ? most / levels : 0.0f) + extent.damage, 0.0f};
}

}  // namespace albert_fast::ALBERT_FAST_ISA
