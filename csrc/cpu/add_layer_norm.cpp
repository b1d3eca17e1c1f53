// LayerNorm(dropout(x + bias) + residual), which follows the last product of attention and of the feed-forward block.
// One pass over memory: forward reads x and residual and writes out; backward reads grad, x and residual and writes dx
// (and dresidual, which differs from dx only under dropout).
#include "choose.h"
#include "dropout.h"
#include "kernels.h"
#include "layer_norm.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

template <class T>
struct Arrays {
    const T *x, *bias, *residual;
    std::int64_t n;

    // dropout(x + bias) + residual for one vector of a row; `state` is the row's part of the dropout hash.
    template <bool kDropout, class Lanes>
    Vec sum(std::int64_t row, std::int64_t i, const Dropout& dropout, std::uint32_t state, Lanes lanes) const {
        Vec added = load(x + row * n + i, lanes) + load(bias + i, lanes);
        if constexpr (kDropout) added = dropout.apply(added, state, i);
        return added + load(residual + row * n + i, lanes);
    }
};

template <bool kDropout, class T>
void forward(const Arrays<T>& in, const T* weight, const T* ln_bias, T* out, float* mean, float* rstd,
             std::int64_t rows, float eps, const Dropout& dropout, int num_threads) {
    const std::int64_t n = in.n;
    parallel_rows(rows, n, num_threads, [&](std::int64_t begin, std::int64_t end) {
        float* line = scratch<Purpose::kTask>(round_up(n, kLanes));
        for (std::int64_t row = begin; row < end; ++row) {
            const std::uint32_t state = dropout.row_state(static_cast<std::uint32_t>(row));
            const RowStatistics statistics = normalise_row(line, n, eps, [&](std::int64_t i, auto lanes) {
                return in.template sum<kDropout>(row, i, dropout, state, lanes);
            });
            mean[row] = statistics.mean;
            rstd[row] = statistics.rstd;
            scale_row(line, n, statistics, weight, ln_bias,
                      [&](std::int64_t i, Vec y, auto lanes) { store(out + row * n + i, y, lanes); });
        }
    });
}

template <bool kDropout, class T>
void backward(const Arrays<T>& in, const T* grad, const T* weight, const float* mean, const float* rstd, T* dx,
              T* dresidual, float* dbias, float* dweight, float* dln_bias, std::int64_t rows, const Dropout& dropout,
              int num_threads) {
    const std::int64_t n = in.n;
    const auto state_of = [&](std::int64_t row) { return dropout.row_state(static_cast<std::uint32_t>(row)); };
    layer_norm_backward<true>(
        rows, n, weight, mean, rstd, dweight, dln_bias, dbias, num_threads,
        [&](std::int64_t row, std::int64_t i, auto lanes) {
            return in.template sum<kDropout>(row, i, dropout, state_of(row), lanes);
        },
        [&](std::int64_t row, std::int64_t i, auto lanes) { return load(grad + row * n + i, lanes); },
        [&](std::int64_t row, std::int64_t i, Vec dz, auto lanes) {
            if constexpr (kDropout) {
                store(dresidual + row * n + i, dz, lanes);
                dz = dropout.apply(dz, state_of(row), i);
            }
            store(dx + row * n + i, dz, lanes);
            return dz;
        });
}

}  // namespace

void add_layer_norm_fwd_cpu(Address x, Address bias, Address residual, Address weight, Address ln_bias, Address out,
                            Address mean, Address rstd, std::int64_t T, std::int64_t N, double eps, double dropout_p,
                            std::int64_t seed, int dtype, int num_threads) {
    const Dropout dropout(dropout_p, seed);
    with_dtype(dtype, [&](auto element) {
        using Element = decltype(element);
        const Arrays<Element> in{pointer<Element>(x), pointer<Element>(bias), pointer<Element>(residual), N};
        with_flag(dropout.active, [&](auto active) {
            forward<active.value>(in, pointer<Element>(weight), pointer<Element>(ln_bias), pointer<Element>(out),
                                  pointer<float>(mean), pointer<float>(rstd), T, static_cast<float>(eps), dropout,
                                  num_threads);
        });
    });
}

void add_layer_norm_bwd_cpu(Address grad, Address x, Address bias, Address residual, Address weight, Address mean,
                            Address rstd, Address dx, Address dresidual, Address dbias, Address dweight,
                            Address dln_bias, std::int64_t T, std::int64_t N, double dropout_p, std::int64_t seed,
                            int dtype, int num_threads) {
    const Dropout dropout(dropout_p, seed);
    with_dtype(dtype, [&](auto element) {
        using Element = decltype(element);
        const Arrays<Element> in{pointer<Element>(x), pointer<Element>(bias), pointer<Element>(residual), N};
        with_flag(dropout.active, [&](auto active) {
            backward<active.value>(in, pointer<Element>(grad), pointer<Element>(weight), pointer<float>(mean),
                                   pointer<float>(rstd), pointer<Element>(dx), pointer<Element>(dresidual),
                                   pointer<float>(dbias), pointer<float>(dweight), pointer<float>(dln_bias), T, dropout,
                                   num_threads);
        });
    });
}

}  // namespace albert_fast::ALBERT_FAST_ISA
