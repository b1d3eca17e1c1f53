// Attention of one head of one sequence in integers, for encoders whose products are integers: Q K^T and V^T P^T
// through the tiles of integer_gemm.h, softmax in float32 between them.
//
// Keys are rounded to 14 bits, each with its own scale; queries to 13 bits (more for narrow heads), so that sums of up
// to 64 products fit 32 bits; values to 13 bits, column by column; probabilities to 13 bits of the largest. The error
// is about 1e-4 of an output, small beside the rounding of the products around it, and the rate is twice that of
// float32.
//
// A block of queries is one panel. Scores have one row for each key and one column for each query, so softmax runs over
// vectors of queries, and pairs of rows of probabilities are the panel that the second product reads.
#pragma once

#include "attention_forward.h"
#include "rounding.h"

namespace albert_fast::ALBERT_FAST_ISA {

// The largest integer of probabilities. Sums of 64 products of it with kValueLevels fit 32 bits.
constexpr float kProbabilityLevels = kInt16Levels;

// Sums move to float32 after every kShortRun elements; heads of up to kShortRun columns do without.
constexpr std::int64_t kShortRun = 64;
struct Int16OneRun : Int16 {
    static constexpr bool kInRuns = false;
};
struct Int16ShortRuns : Int16 {
    static constexpr std::int64_t kRun = kShortRun / kGroup;
};

// A row that is rounded without a factor and a shift.
struct PlainRow {
    const float* row;
    std::int64_t n;

    template <class Lanes>
    Vec at(std::int64_t i, Lanes lanes) const {
        return load(row + i, lanes);
    }
};

// The low halves of two vectors of integers, side by side in every lane.
static inline IntVec pair_up(IntVec first, IntVec second) { return (first & 0xFFFF) | (second << 16); }

// `to` (columns / 2 rounded up to 4, width) = the transpose of rows of pairs of 16-bit integers; as transpose(), on
// pairs.
static inline void transpose_pairs(char* from, std::int64_t from_row, std::int64_t rows, char* to, std::int64_t pairs,
                                   std::int64_t width) {
    transpose(reinterpret_cast<float*>(from), from_row / 4, rows, reinterpret_cast<float*>(to), round_up(pairs, 4),
              width);
}

// Softmax over the keys for one vector of queries, without the division by its sum, which is returned: scores (a row
// for each key, kColumns apart) become rounded probabilities in pairs of keys.
static inline Vec softmax_pairs(const float* scores, std::int64_t keys, float* probabilities) {
    Vec maximum = load(scores, Full{});
    for (std::int64_t key = 1; key < keys; ++key) maximum = larger(maximum, load(scores + key * kColumns, Full{}));
    return sum_in_blocks(divide_up(keys, 2), [&](std::int64_t pair) {
        const float* at = scores + 2 * pair * kColumns;
        const Vec first = exp(load(at, Full{}) - maximum);
        const Vec second = 2 * pair + 1 < keys ? exp(load(at + kColumns, Full{}) - maximum) : Vec{};
        const IntVec both = pair_up(nearest(first * kProbabilityLevels), nearest(second * kProbabilityLevels));
        __builtin_memcpy(probabilities + pair * kColumns, &both, sizeof both);
        return first + second;
    });
}

// Rounds the values of a head column by column: to (d, keys) in pairs of keys, rows `stride` bytes apart.
static inline void round_values(const Rows<const float>& v, const Head& head, std::int64_t d, float* pairs,
                                RowScale* scales, char* to, std::int64_t stride) {
    const std::int64_t width = round_up(d, kLanes), pair_rows = divide_up(head.keys, 2);
    for (std::int64_t j = 0; j < d; j += kLanes) {
        const Part lanes{static_cast<int>(smaller(d - j, kLanes))};
        Vec most{}, spoilt{};
        for (std::int64_t key = 0; key < head.keys; ++key) {
            const Vec x = load(v.at(head.first_key + key, head.column + j), lanes);
            most = larger(most, magnitude(x));
            spoilt += x * 0.0f;
        }
        Vec inverse{};
        for (int i = 0; i < lanes.count; ++i) {
            inverse[i] = inverse_step(most[i], kValueLevels);
            scales[j + i] = {(inverse[i] > 0.0f ? most[i] / kValueLevels : 0.0f) + spoilt[i], 0.0f};
        }
        for (std::int64_t pair = 0; pair < pair_rows; ++pair) {
            const float* first = v.at(head.first_key + 2 * pair, head.column + j);
            const bool two = 2 * pair + 1 < head.keys;
            const IntVec low = nearest(load(first, lanes) * inverse);
            const IntVec high = two ? nearest(load(first + v.stride, lanes) * inverse) : IntVec{};
            const IntVec both = pair_up(low, high);
            __builtin_memcpy(pairs + pair * width + j, &both, sizeof both);
        }
    }
    transpose(pairs, width, pair_rows, reinterpret_cast<float*>(to), round_up(d, 4), stride / 4);
}

// The scratch memory of integer_attention, in floats.
static inline std::int64_t integer_attention_floats(std::int64_t keys, std::int64_t d) {
    const std::int64_t steps = divide_up(d, 2), row = rounded_row_bytes<std::int16_t>(d);
    const std::int64_t value_row = rounded_row_bytes<std::int16_t>(round_up(keys, 8)), width = round_up(d, kLanes);
    const std::int64_t pair_rows = divide_up(keys, 2);
    return Arrays::padded(keys * row / 4) + Arrays::padded(2 * keys) + Arrays::padded(round_up(d, 4) * value_row / 4) +
           Arrays::padded(2 * width) + Arrays::padded(larger(value_row / 4, pair_rows) * width) +
           Arrays::padded(kColumns * row / 4) + Arrays::padded((steps + 4) * kColumns) + 2 * Arrays::padded(kColumns) +
           Arrays::padded((keys + 1) * kColumns) + Arrays::padded((pair_rows + 1) * kColumns) +
           2 * Arrays::padded(round_up(d, kColumns) * kColumns);
}

// out = softmax(scale * q k^T) v for the queries of `head`.
static inline void integer_attention(const Inputs<float>& in, const Head& head, Rows<float> out) {
    const std::int64_t d = in.shape.head_dim, steps = divide_up(d, 2), keys = head.keys;
    const std::int64_t row = rounded_row_bytes<std::int16_t>(d), pair_rows = divide_up(keys, 2);
    const std::int64_t value_row = rounded_row_bytes<std::int16_t>(round_up(keys, 8)), width = round_up(d, kLanes);
    if (keys == 0) return zero_rows(out, head.first_query, head.column, head.queries, d);
    constexpr std::int64_t kLargest = (std::int64_t{1} << 31) - 1;
    const float query_levels = smaller(kInt16Levels, kLargest / (kInt16Levels * smaller(d, kShortRun)));
    Arrays arrays(scratch<Purpose::kTask>(integer_attention_floats(keys, d)));
    char* rounded_keys = reinterpret_cast<char*>(arrays.take(keys * row / 4));
    RowScale* key_scales = reinterpret_cast<RowScale*>(arrays.take(2 * keys));
    char* rounded_values = reinterpret_cast<char*>(arrays.take(round_up(d, 4) * value_row / 4));
    RowScale* value_scales = reinterpret_cast<RowScale*>(arrays.take(2 * width));
    float* pairs = arrays.take(larger(value_row / 4, pair_rows) * width);
    char* query_rows = reinterpret_cast<char*>(arrays.take(kColumns * row / 4));
    float* queries = arrays.take((steps + 4) * kColumns);
    float *query_scales = arrays.take(kColumns), *normalisers = arrays.take(kColumns);
    float* scores = arrays.take((keys + 1) * kColumns);
    float* probabilities = arrays.take((pair_rows + 1) * kColumns);
    float* columns = arrays.take(round_up(d, kColumns) * kColumns);
    float* rows = arrays.take(round_up(d, kColumns) * kColumns);

    for (std::int64_t key = 0; key < keys; ++key) {
        key_scales[key] = round_row(PlainRow{in.k.at(head.first_key + key, head.column), d}, Int16::kLevels,
                                    reinterpret_cast<std::int16_t*>(rounded_keys + key * row));
    }
    round_values(in.v, head, d, pairs, value_scales, rounded_values, value_row);
    for (std::int64_t first = 0; first < head.queries; first += kColumns) {
        const std::int64_t query = head.first_query + first, count = smaller(head.queries - first, kColumns);
        for (std::int64_t i = 0; i < kColumns; ++i) {
            if (i < count) {
                query_scales[i] = round_row(PlainRow{in.q.at(query + i, head.column), d}, query_levels,
                                            reinterpret_cast<std::int16_t*>(query_rows + i * row))
                                      .scale *
                                  in.scale;
            } else {
                query_scales[i] = 0.0f;
            }
        }
        transpose_pairs(query_rows, row, count, reinterpret_cast<char*>(queries), steps, kColumns);
        const IntegerMatrix as_matrix{reinterpret_cast<const char*>(queries), query_scales, nullptr, nullptr, nullptr};
        const auto to_scores = [&](std::int64_t key, std::int64_t column, Vec score) {
            store(scores + key * kColumns + column, score, Full{});
        };
        if (d <= kShortRun) {
            integer_product<Int16OneRun>(rounded_keys, row, key_scales, keys, as_matrix, steps, 0, 1, to_scores);
        } else {
            integer_product<Int16ShortRuns>(rounded_keys, row, key_scales, keys, as_matrix, steps, 0, 1, to_scores);
        }
        for (std::int64_t j = 0; j < kColumns; j += kLanes) {
            const Vec sum = softmax_pairs(scores + j, keys, probabilities + j);
            store(normalisers + j, 1.0f / (sum * kProbabilityLevels), Full{});
        }
        integer_product<Int16ShortRuns>(
            rounded_values, value_row, value_scales, d,
            {reinterpret_cast<const char*>(probabilities), normalisers, nullptr, nullptr, nullptr}, pair_rows, 0, 1,
            [&](std::int64_t column, std::int64_t i, Vec value) {
                store(columns + column * kColumns + i, value, Full{});
            });
        const std::int64_t out_width = round_up(d, 4);
        transpose(columns, kColumns, d, rows, kColumns, out_width);
        for (std::int64_t i = 0; i < count; ++i) {
            float* target = out.at(query + i, head.column);
            for_vectors(d, [&](std::int64_t c, auto lanes) {
                store(target + c, load(rows + i * out_width + c, lanes), lanes);
            });
        }
    }
}

}  // namespace albert_fast::ALBERT_FAST_ISA
