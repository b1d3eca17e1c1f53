// softmax(scale * Q K^T) V over packed sequences, forward and backward, with no array of all scores of a sequence.
//
// Forward: a task takes one head of one sequence, or a share of its queries if there are too few heads for all threads;
// with one query each, as in decoding, several heads.
//
// Backward: P is computed again from the saved log-sum-exp (Dao et al. 2022, "FlashAttention"); then dP = dO V^T,
// dS = P * (dP - rowsum(P * dP)), dV = P^T dO, dQ = scale dS K, dK = scale dS^T Q. The row sum is taken over keys
// and not as rowsum(dO * O): so it is exact for one key, and does not suffer from the rounding of a bfloat16 output.
#include "attention_forward.h"
#include "kernels.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

// One query of a decoder, which reads the cached keys and values where they are: packed, they would be used once, and
// vectors of queries would be empty but for one lane. Its head has at least one key.
template <class T>
void one_query(const Inputs<T>& in, const Head& head, Rows<T> out, float* lse) {
    const std::int64_t d = in.shape.head_dim, keys = head.keys, padded = round_up(keys, kLanes);
    Arrays arrays(scratch<Purpose::kTask>(Arrays::padded(round_up(d, kLanes)) + Arrays::padded(padded)));
    float* query = arrays.take(round_up(d, kLanes));
    float* weights = arrays.take(padded);
    pack_rows(in.q, head.first_query, head.column, 1, d, in.scale, query, round_up(d, kLanes));
    Vec largest = splat(-__builtin_inff());
    for (std::int64_t key = 0; key < padded; ++key) {
        if (key < keys) {
            const T* line = in.k.at(head.first_key + key, head.column);
            weights[key] =
                sum_row(d, [&](std::int64_t i, auto lanes) { return load(line + i, lanes) * load(query + i, Full{}); });
        } else {
            weights[key] = -__builtin_inff();
        }
    }
    for (std::int64_t key = 0; key < padded; key += kLanes) largest = larger(largest, load(weights + key, Full{}));
    const Vec maximum = splat(largest_lane(largest));
    const float sum = sum_row(padded, [&](std::int64_t key, auto lanes) {
        const Vec p = exp(load(weights + key, lanes) - maximum);
        store(weights + key, p, lanes);
        return p;
    });
    lse[head.first_query] = maximum[0] + __builtin_logf(sum);
    T* target = out.at(head.first_query, head.column);
    for_vectors(d, [&](std::int64_t c, auto lanes) {
        const T* line = in.v.at(head.first_key, head.column + c);
        Vec sums[4] = {};  // hide the latency of the addition
        std::int64_t key = 0;
        for (; key + 4 <= keys; key += 4) {
#pragma GCC unroll 4
            for (int u = 0; u < 4; ++u) sums[u] += weights[key + u] * load(line + (key + u) * in.v.stride, lanes);
        }
        for (; key < keys; ++key) sums[0] += weights[key] * load(line + key * in.v.stride, lanes);
        store(target + c, ((sums[0] + sums[1]) + (sums[2] + sums[3])) / sum, lanes);
    });
}

template <bool kDropout, class T>
void attend(const Inputs<T>& in, const Head& head, std::int64_t part, std::int64_t parts, Rows<T> out, float* lse) {
    lse += head.number * in.shape.all_queries();
    if constexpr (!kDropout) {
        if (in.shape.key_lengths != nullptr && head.queries == 1 && head.blind == 0 && head.keys > 0) {
            if (part == 0) one_query(in, head, out, lse);
            return;
        }
    }
    forward_task<kDropout>(in, head, part, parts, out, lse);
}

template <bool kDropout, class T>
void forward(const Inputs<T>& in, Rows<T> out, float* lse, int num_threads) {
    const Shape& shape = in.shape;
    const std::int64_t heads = shape.sequences * shape.heads;
    if (shape.key_lengths != nullptr && shape.all_queries() <= shape.sequences) {
        std::int64_t keys = 0;
        for (std::int64_t b = 0; b < shape.sequences; ++b) keys += shape.keys(b);
        const std::int64_t work = shape.head_dim * (1 + keys / larger(shape.sequences, 1));
        return parallel_rows(heads, work, num_threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                attend<kDropout>(in, Head(shape, i / shape.heads, i % shape.heads), 0, 1, out, lse);
            }
        });
    }
    const std::int32_t* order = longest_first(shape);
    // K and V are packed once for each part, so a head is split only to give every thread something to do.
    const std::int64_t parts = heads >= 2 * num_threads || heads == 0 ? 1 : divide_up(2 * num_threads, heads);
    parallel_for(heads * parts, num_threads, [&](std::int64_t task) {
        const std::int64_t part = task % parts, number = task / parts % shape.heads;
        const Head head(shape, order[task / parts / shape.heads], number);
        attend<kDropout>(in, head, part, parts, out, lse);
    });
}

template <class T>
struct Gradients {
    Rows<const T> grad_out;
    const float* lse;
    Rows<T> dq, dk, dv;
};

struct RowSums {
    Vec p, product;

    void operator+=(const RowSums& other) {
        p += other.p;
        product += other.product;
    }
};

// For one vector of queries: turns scores into P (with dropout applied), and dprobabilities (dO V^T) into dS. Both have
// a row for each key.
template <bool kDropout>
inline void softmax_backward(float* scores, float* dprobabilities, std::int64_t row, std::int64_t keys, Vec lse,
                             const Dropout& dropout, UintVec state) {
    const auto drop = [&](Vec x, std::int64_t key) {
        if constexpr (kDropout) return dropout.apply(x, state, splat(static_cast<std::uint32_t>(key)));
        return x;
    };
    // P is normalised again: when softmax is saturated, scores are far larger than 1 and the rounding of lse scales a
    // whole row of P; but dP - rowsum(P * dP) cancels only if the row sums to 1.
    const RowSums sums = sum_in_blocks(keys, [&](std::int64_t key) {
        const Vec p = exp(load(scores + key * row, Full{}) - lse);
        const Vec dp = rounded(drop(load(dprobabilities + key * row, Full{}), key));
        store(scores + key * row, p, Full{});
        store(dprobabilities + key * row, dp, Full{});
        return RowSums{p, p * dp};
    });
    const Vec normal = 1.0f / sums.p, mean = sums.product / sums.p;
    for (std::int64_t key = 0; key < keys; ++key) {
        const Vec p = load(scores + key * row, Full{}) * normal;
        store(dprobabilities + key * row, p * (load(dprobabilities + key * row, Full{}) - mean), Full{});
        store(scores + key * row, drop(p, key), Full{});
    }
}

template <bool kDropout, class T>
void backward_task(const Inputs<T>& in, const Head& head, const Gradients<T>& g) {
    const std::int64_t d = in.shape.head_dim, width = round_up(d, kLanes);
    zero_rows(g.dq, head.first_query - head.blind, head.column, head.blind, d);
    if (head.keys == 0 || head.queries == 0) {
        zero_rows(g.dq, head.first_query, head.column, head.queries, d);
        zero_rows(g.dk, head.first_key, head.column, head.keys, d);
        zero_rows(g.dv, head.first_key, head.column, head.keys, d);
        return;
    }
    const float* lse = g.lse + head.number * in.shape.all_queries();
    const std::int64_t block_size = kQueryBlock * width, keys_size = Arrays::padded(head.keys * width);
    Arrays arrays(
        scratch<Purpose::kTask>(4 * keys_size + 4 * block_size + 2 * Arrays::padded(head.keys * kQueryBlock)));
    float* keys = arrays.take(keys_size);
    float* values = arrays.take(keys_size);
    float* dkeys = arrays.take(keys_size);
    float* dvalues = arrays.take(keys_size);
    float* rows = arrays.take(block_size);  // scale * Q
    float* grad_rows = arrays.take(block_size);
    float* transposed = arrays.take(block_size);
    float* drows = arrays.take(block_size);
    float* probabilities = arrays.take(head.keys * kQueryBlock);
    float* dscores = arrays.take(head.keys * kQueryBlock);
    pack_rows(in.k, head.first_key, head.column, head.keys, d, 1.0f, keys, width);
    pack_rows(in.v, head.first_key, head.column, head.keys, d, 1.0f, values, width);
    const Chunks blocks = query_blocks(head.queries);
    // The first block writes the sums of the keys that it sees, later blocks add to them.
    const std::int64_t written = head.seen(head.first_query + blocks.end(0) - 1) * width;
    float* const summed[] = {dkeys, dvalues};
    for (float* sums : summed) __builtin_memset(sums + written, 0, sizeof(float) * (head.keys * width - written));
    for (std::int64_t block = 0; block < blocks.count; ++block) {
        const std::int64_t query = head.first_query + blocks.begin(block);
        const std::int64_t count = blocks.end(block) - blocks.begin(block), columns = round_up(count, kLanes);
        const std::int64_t seen = head.seen(query + count - 1);
        pack_rows(in.q, query, head.column, count, d, in.scale, rows, width);
        transpose(rows, width, count, transposed, width, columns);
        multiply({keys, width, 1}, transposed, columns, probabilities, columns, seen, columns, d, false);
        pack_rows(g.grad_out, query, head.column, count, d, 1.0f, grad_rows, width);
        transpose(grad_rows, width, count, transposed, width, columns);
        multiply({values, width, 1}, transposed, columns, dscores, columns, seen, columns, d, false);
        for (std::int64_t j = 0; j < columns; j += kLanes) {
            // Columns beyond the queries hold numbers that no product reads.
            const Part lanes{static_cast<int>(smaller(count - j, kLanes))};
            hide_unseen(head, probabilities + j, columns, query + j, seen);
            softmax_backward<kDropout>(probabilities + j, dscores + j, columns, seen, load(lse + query + j, lanes),
                                       in.dropout, head.dropout_state(in.dropout, query + j));
        }
        multiply({probabilities, columns, 1}, grad_rows, width, dvalues, width, seen, width, count, block > 0);
        multiply({dscores, columns, 1}, rows, width, dkeys, width, seen, width, count, block > 0);
        multiply({dscores, 1, columns}, keys, width, drows, width, count, width, seen, false);
        unpack_rows(drows, width, count, d, in.scale, g.dq, query, head.column);
    }
    unpack_rows(dkeys, width, head.keys, d, 1.0f, g.dk, head.first_key, head.column);
    unpack_rows(dvalues, width, head.keys, d, 1.0f, g.dv, head.first_key, head.column);
}

template <bool kDropout, class T>
void backward(const Inputs<T>& in, const Gradients<T>& gradients, int num_threads) {
    const std::int32_t* order = longest_first(in.shape);
    parallel_for(in.shape.sequences * in.shape.heads, num_threads, [&](std::int64_t task) {
        const Head head(in.shape, order[task / in.shape.heads], task % in.shape.heads);
        backward_task<kDropout>(in, head, gradients);
    });
}

}  // namespace

bool attention_fwd_cpu(Address q, Address k, Address v, Address out, Address lse, Address cu_q, Address cu_k,
                       Address key_lengths, bool causal, std::int64_t B, std::int64_t Tq, std::int64_t T,
                       std::int64_t longest_q, std::int64_t longest_k, std::int64_t num_heads, std::int64_t head_dim,
                       std::int64_t q_stride, std::int64_t k_stride, std::int64_t v_stride, std::int64_t out_stride,
                       double scale, double dropout_p, std::int64_t seed, int dtype, int num_threads) {
    const Shape shape{B,
                      num_heads,
                      head_dim,
                      pointer<std::int32_t>(cu_q),
                      pointer<std::int32_t>(cu_k),
                      pointer<std::int32_t>(key_lengths),
                      causal};
    const bool inside = shape.key_lengths != nullptr ? is_key_ranges(shape.cu_k, shape.key_lengths, B, T, longest_k)
                                                     : is_ranges(shape.cu_k, B, T, longest_k);
    if (!inside || !is_ranges(shape.cu_q, B, Tq, longest_q)) return false;
    with_dtype(dtype, [&](auto element) {
        using Element = decltype(element);
        const Inputs<Element> in{{pointer<Element>(q), q_stride}, {pointer<Element>(k), k_stride},
                                 {pointer<Element>(v), v_stride}, shape,
                                 static_cast<float>(scale),       Dropout(dropout_p, seed)};
        with_flag(in.dropout.active, [&](auto active) {
            forward<active.value>(in, Rows<Element>{pointer<Element>(out), out_stride}, pointer<float>(lse),
                                  num_threads);
        });
    });
    return true;
}

bool attention_bwd_cpu(Address grad_out, Address q, Address k, Address v, Address lse, Address dq, Address dk,
                       Address dv, Address cu_q, Address cu_k, bool causal, std::int64_t B, std::int64_t Tq,
                       std::int64_t T, std::int64_t longest_q, std::int64_t longest_k, std::int64_t num_heads,
                       std::int64_t head_dim, std::int64_t go_stride, std::int64_t q_stride, std::int64_t k_stride,
                       std::int64_t v_stride, std::int64_t dq_stride, std::int64_t dk_stride, std::int64_t dv_stride,
                       double scale, double dropout_p, std::int64_t seed, int dtype, int num_threads) {
    const Shape shape{B,       num_heads, head_dim, pointer<std::int32_t>(cu_q), pointer<std::int32_t>(cu_k),
                      nullptr, causal};
    if (!is_ranges(shape.cu_q, B, Tq, longest_q) || !is_ranges(shape.cu_k, B, T, longest_k)) return false;
    with_dtype(dtype, [&](auto element) {
        using Element = decltype(element);
        const Inputs<Element> in{{pointer<Element>(q), q_stride}, {pointer<Element>(k), k_stride},
                                 {pointer<Element>(v), v_stride}, shape,
                                 static_cast<float>(scale),       Dropout(dropout_p, seed)};
        const Gradients<Element> gradients{{pointer<Element>(grad_out), go_stride},
                                           pointer<float>(lse),
                                           {pointer<Element>(dq), dq_stride},
                                           {pointer<Element>(dk), dk_stride},
                                           {pointer<Element>(dv), dv_stride}};
        with_flag(in.dropout.active, [&](auto active) { backward<active.value>(in, gradients, num_threads); });
    });
    return true;
}

}  // namespace albert_fast::ALBERT_FAST_ISA
