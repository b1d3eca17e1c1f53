// act(x + bias) between the two products of the feed-forward block, and its gradient. One pass over memory.
#include "choose.h"
#include "column_sums.h"
#include "kernels.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

template <class Act, class T>
void forward(const T* x, const T* bias, T* out, std::int64_t rows, std::int64_t n, int num_threads) {
    parallel_rows(rows, n, num_threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
            for_vectors(n, [&](std::int64_t i, auto lanes) {
                const Vec y = Act::forward(load(x + row * n + i, lanes) + load(bias + i, lanes));
                store(out + row * n + i, y, lanes);
            });
        }
    });
}

// dx of kRows rows, and their sum added to `sums`.
template <class Act, int kRows, class T>
inline void backward_group(const T* grad, const T* x, const T* bias, T* dx, float* sums, std::int64_t first,
                           std::int64_t n) {
    for_vectors(n, [&](std::int64_t i, auto lanes) {
        const Vec b = load(bias + i, lanes);
        Vec total{};
        for (std::int64_t row = first; row < first + kRows; ++row) {
            const Vec d = Act::backward(load(x + row * n + i, lanes) + b, load(grad + row * n + i, lanes));
            store(dx + row * n + i, d, lanes);
            total += d;
        }
        add_to(sums + i, total);
    });
}

template <class Act, class T>
void backward(const T* grad, const T* x, const T* bias, T* dx, float* dbias, std::int64_t rows, std::int64_t n,
              int num_threads) {
    const Chunks chunks = summation_chunks(rows);
    const ColumnSums sums(chunks, 1, n);
    parallel_for(chunks.count, num_threads, [&](std::int64_t chunk) {
        sums.clear(chunk);
        std::int64_t row = chunks.begin(chunk);
        for (; row + kRowGroup <= chunks.end(chunk); row += kRowGroup) {
            backward_group<Act, kRowGroup>(grad, x, bias, dx, sums.row(chunk, 0), row, n);
        }
        for (; row < chunks.end(chunk); ++row) {
            backward_group<Act, 1>(grad, x, bias, dx, sums.row(chunk, 0), row, n);
        }
    });
    sums.finish(0, dbias, num_threads);
}

}  // namespace

void bias_gelu_fwd_cpu(Address x, Address bias, Address out, std::int64_t T, std::int64_t N, int act, int dtype,
                       int num_threads) {
    with_activation(act, [&](auto activation) {
        with_dtype(dtype, [&](auto element) {
            using Element = decltype(element);
            forward<decltype(activation)>(pointer<Element>(x), pointer<Element>(bias), pointer<Element>(out), T, N,
                                          num_threads);
        });
    });
}

void bias_gelu_bwd_cpu(Address grad, Address x, Address bias, Address dx, Address dbias, std::int64_t T, std::int64_t N,
                       int act, int dtype, int num_threads) {
    with_activation(act, [&](auto activation) {
        with_dtype(dtype, [&](auto element) {
            using Element = decltype(element);
            backward<decltype(activation)>(pointer<Element>(grad), pointer<Element>(x), pointer<Element>(bias),
                                           pointer<Element>(dx), pointer<float>(dbias), T, N, num_threads);
        });
    });
}

}  // namespace albert_fast::ALBERT_FAST_ISA
