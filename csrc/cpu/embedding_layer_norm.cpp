// dropout(LayerNorm(word + token type + position)) for packed tokens, or without token types. It is
// embedding_projection too, up to its product, which linear.cpp or torch computes. The gather, the additions, LayerNorm
// and dropout are one pass; the gradient scatters without atomics.
#include "choose.h"
#include "dropout.h"
#include "kernels.h"
#include "layer_norm.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

template <class T>
struct Tables {
    const std::int64_t *ids, *types, *positions;
    const T *word, *type, *position;
    std::int64_t n;

    std::int64_t word_row(std::int64_t token) const { return ids == nullptr ? token : ids[token]; }

    // (word + type) + position, the order of the sum in Hugging Face; word + position without types.
    template <bool kTypes, class Lanes>
    Vec sum(std::int64_t token, std::int64_t i, Lanes lanes) const {
        Vec words = load(word + word_row(token) * n + i, lanes);
        if constexpr (kTypes) words = words + load(type + types[token] * n + i, lanes);
        return words + load(position + positions[token] * n + i, lanes);
    }
};

// The code of the first id outside its table, or -1.
std::int64_t first_bad_id(const std::int64_t* ids, const std::int64_t* types, const std::int64_t* positions,
                          std::int64_t tokens, std::int64_t V, std::int64_t Y, std::int64_t P) {
    const auto outside = [](std::int64_t id, std::int64_t size) { return id < 0 || id >= size; };
    for (std::int64_t token = 0; token < tokens; ++token) {
        if (ids != nullptr && outside(ids[token], V)) return token * 3;
        if (types != nullptr && outside(types[token], Y)) return token * 3 + 1;
        if (outside(positions[token], P)) return token * 3 + 2;
    }
    return -1;
}

template <bool kDropout, bool kTypes, class T>
void forward(const Tables<T>& in, const T* weight, const T* bias, T* out, float* mean, float* rstd, std::int64_t tokens,
             float eps, const Dropout& dropout, int num_threads) {
    const std::int64_t n = in.n;
    parallel_rows(tokens, n, num_threads, [&](std::int64_t begin, std::int64_t end) {
        float* line = scratch<Purpose::kTask>(round_up(n, kLanes));
        for (std::int64_t row = begin; row < end; ++row) {
            const std::uint32_t state = dropout.row_state(static_cast<std::uint32_t>(row));
            const RowStatistics statistics = normalise_row(
                line, n, eps, [&](std::int64_t i, auto lanes) { return in.template sum<kTypes>(row, i, lanes); });
            mean[row] = statistics.mean;
            rstd[row] = statistics.rstd;
            scale_row(line, n, statistics, weight, bias, [&](std::int64_t i, Vec y, auto lanes) {
                if constexpr (kDropout) y = dropout.apply(y, state, i);
                store(out + row * n + i, y, lanes);
            });
        }
    });
}

// Adds row t of dz (tokens, n) to row row_of(t) of table, for all t in order. Each thread takes some of the columns, so
// two threads never write to the same element, and every sum is in the order of the tokens.
template <class RowOf>
void scatter_add(const float* dz, float* table, std::int64_t tokens, std::int64_t n, int num_threads, RowOf row_of) {
    constexpr std::int64_t kSlice = 2 * kLanes;
    parallel_for(divide_up(n, kSlice), tokens * n < 16384 ? 1 : num_threads, [&](std::int64_t slice) {
        const std::int64_t first = slice * kSlice;
        const std::int64_t width = smaller(n - first, kSlice);
        for (std::int64_t token = 0; token < tokens; ++token) {
            const float* from = dz + token * n + first;
            float* to = table + row_of(token) * n + first;
            for_vectors(width, [&](std::int64_t i, auto lanes) {
                store(to + i, load(to + i, lanes) + load(from + i, lanes), lanes);
            });
        }
    });
}

template <bool kDropout, bool kTypes, class T>
void backward(const Tables<T>& in, const T* grad, const T* weight, const float* mean, const float* rstd, float* dword,
              float* dtype_table, float* dposition, float* dweight, float* dbias, std::int64_t tokens,
              const Dropout& dropout, int num_threads) {
    const std::int64_t n = in.n;
    // With inputs_embeds, row t of `word` belongs to token t alone: its gradient needs no sum and is written in place.
    const bool gathered = in.ids != nullptr;
    Scratch memory;
    float* dz_rows = gathered ? memory.get(tokens * n) : dword;
    layer_norm_backward<false>(
        tokens, n, weight, mean, rstd, dweight, dbias, nullptr, num_threads,
        [&](std::int64_t row, std::int64_t i, auto lanes) { return in.template sum<kTypes>(row, i, lanes); },
        [&](std::int64_t row, std::int64_t i, auto lanes) {
            const Vec dy = load(grad + row * n + i, lanes);
            if constexpr (kDropout) return dropout.apply(dy, dropout.row_state(static_cast<std::uint32_t>(row)), i);
            return dy;
        },
        [&](std::int64_t row, std::int64_t i, Vec dz, auto lanes) {
            store(dz_rows + row * n + i, dz, lanes);
            return dz;
        });
    if (gathered) scatter_add(dz_rows, dword, tokens, n, num_threads, [&](std::int64_t t) { return in.ids[t]; });
    if constexpr (kTypes) {
        scatter_add(dz_rows, dtype_table, tokens, n, num_threads, [&](std::int64_t t) { return in.types[t]; });
    }
    scatter_add(dz_rows, dposition, tokens, n, num_threads, [&](std::int64_t t) { return in.positions[t]; });
}

template <class T>
Tables<T> tables(Address ids, Address types, Address positions, Address word, Address type, Address position,
                 std::int64_t n) {
    return {pointer<std::int64_t>(ids),
            pointer<std::int64_t>(types),
            pointer<std::int64_t>(positions),
            pointer<T>(word),
            pointer<T>(type),
            pointer<T>(position),
            n};
}

}  // namespace

std::int64_t embedding_layer_norm_fwd_cpu(Address ids, Address types, Address positions, Address word, Address type,
                                          Address position, Address ln_w, Address ln_b, Address out, Address mean,
                                          Address rstd, std::int64_t T, std::int64_t E, std::int64_t V, std::int64_t Y,
                                          std::int64_t P, double eps, double dropout_p, std::int64_t seed, int dtype,
                                          int num_threads) {
    const std::int64_t bad = first_bad_id(pointer<std::int64_t>(ids), pointer<std::int64_t>(types),
                                          pointer<std::int64_t>(positions), T, V, Y, P);
    if (bad >= 0) return bad;
    const Dropout dropout(dropout_p, seed);
    with_dtype(dtype, [&](auto element) {
        using Element = decltype(element);
        with_flag(dropout.active, [&](auto active) {
            with_flag(types != 0, [&](auto typed) {
                forward<active.value, typed.value>(tables<Element>(ids, types, positions, word, type, position, E),
                                                   pointer<Element>(ln_w), pointer<Element>(ln_b),
                                                   pointer<Element>(out), pointer<float>(mean), pointer<float>(rstd), T,
                                                   static_cast<float>(eps), dropout, num_threads);
            });
        });
    });
    return -1;
}

std::int64_t embedding_layer_norm_bwd_cpu(Address grad, Address ids, Address types, Address positions, Address word,
                                          Address type, Address position, Address ln_w, Address mean, Address rstd,
                                          Address dword, Address dtype_table, Address dposition, Address dln_w,
                                          Address dln_b, std::int64_t T, std::int64_t E, std::int64_t V, std::int64_t Y,
                                          std::int64_t P, double dropout_p, std::int64_t seed, int dtype,
                                          int num_threads) {
    const std::int64_t bad = first_bad_id(pointer<std::int64_t>(ids), pointer<std::int64_t>(types),
                                          pointer<std::int64_t>(positions), T, V, Y, P);
    if (bad >= 0) return bad;
    const Dropout dropout(dropout_p, seed);
    with_dtype(dtype, [&](auto element) {
        using Element = decltype(element);
        with_flag(dropout.active, [&](auto active) {
            with_flag(types != 0, [&](auto typed) {
                backward<active.value, typed.value>(
                    tables<Element>(ids, types, positions, word, type, position, E), pointer<Element>(grad),
                    pointer<Element>(ln_w), pointer<float>(mean), pointer<float>(rstd), pointer<float>(dword),
                    pointer<float>(dtype_table), pointer<float>(dposition), pointer<float>(dln_w),
                    pointer<float>(dln_b), T, dropout, num_threads);
            });
        });
    });
    return -1;
}

}  // namespace albert_fast::ALBERT_FAST_ISA
