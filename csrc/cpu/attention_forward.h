// The forward pass of attention for one head of one sequence; attention.cpp runs it as its tasks, encoder.h between its
// products.
//
// Causal: a block of queries multiplies the keys that its last query sees, and hides those that others do not see.
//
// K and V are packed once. Then for each block of queries: scores, softmax, product with V. Operations 4 Sq Sk d. The
// two products run near the arithmetic limit; everything else takes about a tenth of their time for d = 64.
#pragma once

#include "attention.h"

namespace albert_fast::ALBERT_FAST_ISA {

template <class T>
struct Inputs {
    Rows<const T> q, k, v;
    Shape shape;
    float scale;
    Dropout dropout;
};

// One head of one sequence: its first column, and where its tokens start. If causal, its queries are those that see a
// key; `blind` others, which see none, lie before them.
struct Head {
    bool causal;
    std::int64_t sequence, number, column, first_key, keys, blind, first_query, queries;

    Head(const Shape& shape, std::int64_t sequence, std::int64_t number)
        : causal(shape.causal),
          sequence(sequence),
          number(number),
          column(number * shape.head_dim),
          first_key(shape.cu_k[sequence]),
          keys(shape.keys(sequence)),
          blind(causal ? larger(shape.queries(sequence) - keys, 0) : 0),
          first_query(shape.cu_q[sequence] + blind),
          queries(shape.queries(sequence) - blind) {}

    // How many keys, from the first on, the query at packed index `query` sees.
    std::int64_t seen(std::int64_t query) const { return causal ? query - first_query + 1 + keys - queries : keys; }

    // The same head, with only those of its queries that lie in [begin, end) of the packed batch.
    Head within(std::int64_t begin, std::int64_t end) const {
        Head part = *this;
        part.first_query = larger(first_query, begin);
        part.queries = larger(smaller(first_query + queries, end) - part.first_query, 0);
        return part;
    }

    // The dropout state of kLanes queries of this head, from packed index `query` on.
    UintVec dropout_state(const Dropout& dropout, std::int64_t query) const {
        const std::uint32_t row = static_cast<std::uint32_t>(number) * kHeadStride + static_cast<std::uint32_t>(query);
        return dropout.row_state(lane_numbers() + row);
    }
};

// Sum of term(key) over all keys, in blocks, which keeps the rounding error small.
template <class Term>
static inline auto sum_in_blocks(std::int64_t keys, Term term) {
    constexpr std::int64_t kBlock = 32;
    decltype(term(keys)) sum{};
    for (std::int64_t begin = 0; begin < keys; begin += kBlock) {
        const std::int64_t end = smaller(begin + kBlock, keys);
        decltype(sum) block_sum{};
        for (std::int64_t key = begin; key < end; ++key) block_sum += term(key);
        sum += block_sum;
    }
    return sum;
}

// Sets scores to -inf where a vector of queries, from packed index `query` on, does not see the key; `keys` is what the
// block computes.
static inline void hide_unseen(const Head& head, float* scores, std::int64_t row, std::int64_t query,
                               std::int64_t keys) {
    const std::int64_t first = head.seen(query);
    for (std::int64_t key = first; key < keys; ++key) {
        const UintVec behind = splat(static_cast<std::uint32_t>(key - first));
        float* at = scores + key * row;
        store(at, behind < lane_numbers() ? load(at, Full{}) : splat(-__builtin_inff()), Full{});
    }
}

// Softmax over the keys for one vector of queries, without the division by its sum: scores (a row for each key, `row`
// apart) become exp(score - maximum), with dropout applied.
template <bool kDropout>
static inline void softmax(float* scores, std::int64_t row, std::int64_t keys, const Dropout& dropout, UintVec state,
                           Vec& maximum, Vec& sum) {
    maximum = load(scores, Full{});
    for (std::int64_t key = 1; key < keys; ++key) maximum = larger(maximum, load(scores + key * row, Full{}));
    sum = sum_in_blocks(keys, [&](std::int64_t key) {
        const Vec p = exp(load(scores + key * row, Full{}) - maximum);
        Vec kept = p;
        if constexpr (kDropout) kept = dropout.apply(p, state, splat(static_cast<std::uint32_t>(key)));
        store(scores + key * row, kept, Full{});
        return p;
    });
}

// The scratch memory of forward_task, in floats.
static inline std::int64_t forward_floats(std::int64_t keys, std::int64_t head_dim) {
    const std::int64_t width = round_up(head_dim, kLanes);
    return 2 * Arrays::padded(keys * width) + 2 * kQueryBlock * width + Arrays::padded(keys * kQueryBlock) +
           2 * kQueryBlock;
}

// The results of `count` queries that see no key, from packed index `query` on; lse may be null.
template <class T>
static inline void without_keys(const Head& head, std::int64_t head_dim, std::int64_t query, std::int64_t count,
                                Rows<T> out, float* lse) {
    zero_rows(out, query, head.column, count, head_dim);
    for (std::int64_t i = query; lse != nullptr && i < query + count; ++i) lse[i] = -__builtin_inff();
}

// Computes the queries of part `part` of `parts`; lse may be null.
template <bool kDropout, class T>
static inline void forward_task(const Inputs<T>& in, const Head& head, std::int64_t part, std::int64_t parts,
                                Rows<T> out, float* lse) {
    const std::int64_t d = in.shape.head_dim, width = round_up(d, kLanes);
    const Chunks blocks = query_blocks(head.queries);
    const std::int64_t first = blocks.count * part / parts, last = blocks.count * (part + 1) / parts;
    if (part == 0) without_keys(head, d, head.first_query - head.blind, head.blind, out, lse);
    if (first == last) return;
    if (head.keys == 0) {
        const std::int64_t begin = blocks.begin(first), end = blocks.end(last - 1);
        return without_keys(head, d, head.first_query + begin, end - begin, out, lse);
    }
    Arrays arrays(scratch<Purpose::kTask>(forward_floats(head.keys, d)));
    float* keys = arrays.take(head.keys * width);
    float* values = arrays.take(head.keys * width);
    float* rows = arrays.take(kQueryBlock * width);  // Q's block, later the output's
    float* queries = arrays.take(kQueryBlock * width);
    float* scores = arrays.take(head.keys * kQueryBlock);
    float* sums = arrays.take(kQueryBlock);
    float* maxima = arrays.take(kQueryBlock);
    pack_rows(in.k, head.first_key, head.column, head.keys, d, 1.0f, keys, width);
    pack_rows(in.v, head.first_key, head.column, head.keys, d, 1.0f, values, width);
    for (std::int64_t block = first; block < last; ++block) {
        const std::int64_t query = head.first_query + blocks.begin(block);
        const std::int64_t count = blocks.end(block) - blocks.begin(block), columns = round_up(count, kLanes);
        const std::int64_t seen = head.seen(query + count - 1);
        pack_rows(in.q, query, head.column, count, d, in.scale, rows, width);
        transpose(rows, width, count, queries, width, columns);
        multiply({keys, width, 1}, queries, columns, scores, columns, seen, columns, d, false);
        for (std::int64_t j = 0; j < columns; j += kLanes) {
            Vec maximum, sum;
            hide_unseen(head, scores + j, columns, query + j, seen);
            softmax<kDropout>(scores + j, columns, seen, in.dropout, head.dropout_state(in.dropout, query + j), maximum,
                              sum);
            store(maxima + j, maximum, Full{});
            store(sums + j, sum, Full{});
        }
        multiply({scores, 1, columns}, values, width, rows, width, count, width, seen, false);
        for (std::int64_t i = 0; i < count; ++i) {
            if (lse != nullptr) lse[query + i] = maxima[i] + __builtin_logf(sums[i]);
            const float* line = rows + i * width;
            T* target = out.at(query + i, head.column);
            for_vectors(
                d, [&](std::int64_t c, auto lanes) { store(target + c, load(line + c, Full{}) / sums[i], lanes); });
        }
    }
}

}  // namespace albert_fast::ALBERT_FAST_ISA
