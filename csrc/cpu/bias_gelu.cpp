// dropout(act(x + bias)) between the two products of the feed-forward block, and its gradient. One pass over memory.
#include "choose.h"
#include "column_sums.h"
#include "dropout.h"
#include "kernels.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

template <class Act, bool kDropout, class T>
void forward(const T* x, const T* bias, T* out, std::int64_t rows, std::int64_t n, const Dropout& dropout,
             int num_threads) {
    parallel_rows(rows, n, num_threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            const std::uint32_t state = dropout.row_state(static_cast<std::uint32_t>(row));
            for_vectors(n, [&](std::int64_t i, auto lanes) {
                Vec y = Act::forward(load(x + row * n + i, lanes) + load(bias + i, lanes));
                if constexpr (kDropout) y = dropout.apply(y, state, i);
                store(out + row * n + i, y, lanes);
            });
        }
    });
}

// Computes dx of kRows rows, and adds their sum to `sums`.
template <class Act, bool kDropout, int kRows, class T>
inline void backward_group(const T* grad, const T* x, const T* bias, T* dx, float* sums, std::int64_t first,
                           std::int64_t n, const Dropout& dropout) {
    std::uint32_t states[kRows];
    for (int i = 0; i < kRows; ++i) states[i] = dropout.row_state(static_cast<std::uint32_t>(first + i));
    for_vectors(n, [&](std::int64_t i, auto lanes) {
        const Vec b = load(bias + i, lanes);
        Vec total{};
        for (std::int64_t row = first; row < first + kRows; ++row) {
            Vec g = load(grad + row * n + i, lanes);
            if constexpr (kDropout) g = dropout.apply(g, states[row - first], i);
            const Vec d = Act::backward(load(x + row * n + i, lanes) + b, g);
            store(dx + row * n + i, d, lanes);
            total += d;
        }
        add_to(sums + i, total);
    });
}

template <class Act, bool kDropout, class T>
void backward(const T* grad, const T* x, const T* bias, T* dx, float* dbias, std::int64_t rows, std::int64_t n,
              const Dropout& dropout, int num_threads) {
    const Chunks chunks = summation_chunks(rows);
    const ColumnSums sums(chunks, 1, n);
    parallel_for(chunks.count, num_threads, [&](std::int64_t chunk) {
        sums.clear(chunk);
        std::int64_t row = chunks.begin(chunk);
        for (; row + kRowGroup <= chunks.end(chunk); row += kRowGroup) {
            backward_group<Act, kDropout, kRowGroup>(grad, x, bias, dx, sums.row(chunk, 0), row, n, dropout);
        }
        for (; row < chunks.end(chunk); ++row) {
            backward_group<Act, kDropout, 1>(grad, x, bias, dx, sums.row(chunk, 0), row, n, dropout);
        }
    });
    sums.finish(0, dbias, num_threads);
}

}  // namespace

void bias_gelu_fwd_cpu(Address x, Address bias, Address out, std::int64_t T, std::int64_t N, int act, double dropout_p,
                       std::int64_t seed, int dtype, int num_threads) {
    const Dropout dropout(dropout_p, seed);
    with_activation(act, [&](auto activation) {
        with_dtype(dtype, [&](auto element) {
            using Element = decltype(element);
            with_flag(dropout.active, [&](auto active) {
                forward<decltype(activation), active.value>(pointer<Element>(x), pointer<Element>(bias),
                                                            pointer<Element>(out), T, N, dropout, num_threads);
            });
        });
    });
}

void bias_gelu_bwd_cpu(Address grad, Address x, Address bias, Address dx, Address dbias, std::int64_t T, std::int64_t N,
                       int act, double dropout_p, std::int64_t seed, int dtype, int num_threads) {
    const Dropout dropout(dropout_p, seed);
    with_activation(act, [&](auto activation) {
        with_dtype(dtype, [&](auto element) {
            using Element = decltype(element);
            with_flag(dropout.active, [&](auto active) {
                backward<decltype(activation), active.value>(pointer<Element>(grad), pointer<Element>(x),
                                                             pointer<Element>(bias), pointer<Element>(dx),
                                                             pointer<float>(dbias), T, N, dropout, num_threads);
            });
        });
    });
}

}  // namespace albert_fast::ALBERT_FAST_ISA
