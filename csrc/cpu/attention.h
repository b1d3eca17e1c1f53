// The sequences, the blocks of queries and the order of tasks, for the forward and the backward pass of attention.
//
// Scores are stored transposed, one row for each key and one column for each query of a block. So softmax runs over
// vectors of queries without sums across lanes, keys need no transpose, and products with P and P^T read the same
// array.
#pragma once

#include "choose.h"
#include "dropout.h"
#include "gemm.h"
#include "pack.h"

namespace albert_fast::ALBERT_FAST_ISA {

// 48 queries are 8 tiles of 6 rows for P V, and 3 vectors of 16 for the scores.
constexpr std::int64_t kQueryBlock = 48;

struct Shape {
    std::int64_t sequences, heads, head_dim;
    const std::int32_t *cu_q, *cu_k;
    const std::int32_t* key_lengths = nullptr;  // if given, cu_k holds where each sequence's keys begin, without an end
    bool causal = false;                        // query i sees the keys 0 to i + keys - queries

    std::int64_t queries(std::int64_t sequence) const { return cu_q[sequence + 1] - cu_q[sequence]; }
    std::int64_t keys(std::int64_t sequence) const {
        return key_lengths != nullptr ? key_lengths[sequence] : cu_k[sequence + 1] - cu_k[sequence];
    }
    std::int64_t all_queries() const { return cu_q[sequences]; }
};

// Whether cu_seqlens runs from 0 to `tokens` without falling, in steps of at most `longest`.
static inline bool is_ranges(const std::int32_t* cu_seqlens, std::int64_t sequences, std::int64_t tokens,
                             std::int64_t longest) {
    if (cu_seqlens[0] != 0 || cu_seqlens[sequences] != tokens) return false;
    for (std::int64_t b = 0; b < sequences; ++b) {
        const std::int64_t length = static_cast<std::int64_t>(cu_seqlens[b + 1]) - cu_seqlens[b];
        if (length < 0 || length > longest) return false;
    }
    return true;
}

// Whether the keys of every sequence lie in [0, tokens) and are at most `longest`.
static inline bool is_key_ranges(const std::int32_t* begins, const std::int32_t* lengths, std::int64_t sequences,
                                 std::int64_t tokens, std::int64_t longest) {
    for (std::int64_t b = 0; b < sequences; ++b) {
        const std::int64_t end = static_cast<std::int64_t>(begins[b]) + lengths[b];
        if (begins[b] < 0 || lengths[b] < 0 || lengths[b] > longest || end > tokens) return false;
    }
    return true;
}

// The sequences from the most work to the least (in 64 steps), so that no thread starts a long one last.
static inline const std::int32_t* longest_first(const Shape& shape) {
    constexpr int kSteps = 64;
    const auto cost = [&](std::int64_t b) { return static_cast<double>(shape.queries(b)) * shape.keys(b); };
    double most = 1.0;
    for (std::int64_t b = 0; b < shape.sequences; ++b) most = cost(b) > most ? cost(b) : most;
    const auto step = [&](std::int64_t b) { return kSteps - 1 - static_cast<int>(cost(b) / most * (kSteps - 1)); };
    std::int64_t first[kSteps + 1] = {};
    for (std::int64_t b = 0; b < shape.sequences; ++b) ++first[step(b) + 1];
    for (int i = 0; i < kSteps; ++i) first[i + 1] += first[i];
    std::int32_t* order = reinterpret_cast<std::int32_t*>(scratch<Purpose::kShared>(shape.sequences));
    for (std::int64_t b = 0; b < shape.sequences; ++b) order[first[step(b)]++] = static_cast<std::int32_t>(b);
    return order;
}

// Divides the queries of a sequence into blocks of whole vectors, as evenly as possible.
static inline Chunks query_blocks(std::int64_t queries) {
    return Chunks(queries, 1, larger(divide_up(queries, kQueryBlock), 1), kLanes);
}

}  // namespace albert_fast::ALBERT_FAST_ISA
