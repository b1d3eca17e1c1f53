// LayerNorm(act(x + bias)): the transform of the masked language model's head, and its gradient. One pass over memory.
#include "choose.h"
#include "kernels.h"
#include "layer_norm.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

template <class Act, class T>
void forward(const T* x, const T* bias, const T* weight, const T* ln_bias, T* out, float* mean, float* rstd,
             std::int64_t rows, std::int64_t n, float eps, int num_threads) {
    parallel_rows(rows, n, num_threads, [&](std::int64_t begin, std::int64_t end) {
        float* line = scratch<Purpose::kTask>(round_up(n, kLanes));
        for (std::int64_t row = begin; row < end; ++row) {
            const RowStatistics statistics = normalise_row(line, n, eps, [&](std::int64_t i, auto lanes) {
                return Act::forward(load(x + row * n + i, lanes) + load(bias + i, lanes));
            });
            mean[row] = statistics.mean;
            rstd[row] = statistics.rstd;
            scale_row(line, n, statistics, weight, ln_bias,
                      [&](std::int64_t i, Vec y, auto lanes) { store(out + row * n + i, y, lanes); });
        }
    });
}

template <class Act, class T>
void backward(const T* grad, const T* x, const T* bias, const T* weight, const float* mean, const float* rstd, T* dx,
              float* dbias, float* dweight, float* dln_bias, std::int64_t rows, std::int64_t n, int num_threads) {
    const auto biased = [&](std::int64_t row, std::int64_t i, auto lanes) {
        return load(x + row * n + i, lanes) + load(bias + i, lanes);
    };
    layer_norm_backward<true>(
        rows, n, weight, mean, rstd, dweight, dln_bias, dbias, num_threads,
        [&](std::int64_t row, std::int64_t i, auto lanes) { return Act::forward(biased(row, i, lanes)); },
        [&](std::int64_t row, std::int64_t i, auto lanes) { return load(grad + row * n + i, lanes); },
        [&](std::int64_t row, std::int64_t i, Vec dz, auto lanes) {
            const Vec d = Act::backward(biased(row, i, lanes), dz);
            store(dx + row * n + i, d, lanes);
            return d;
        });
}

}  // namespace

void gelu_layer_norm_fwd_cpu(Address x, Address bias, Address weight, Address ln_bias, Address out, Address mean,
                             Address rstd, std::int64_t T, std::int64_t N, double eps, int act, int dtype,
                             int num_threads) {
    with_activation(act, [&](auto activation) {
        with_dtype(dtype, [&](auto element) {
            using Element = decltype(element);
            forward<decltype(activation)>(pointer<Element>(x), pointer<Element>(bias), pointer<Element>(weight),
                                          pointer<Element>(ln_bias), pointer<Element>(out), pointer<float>(mean),
                                          pointer<float>(rstd), T, N, static_cast<float>(eps), num_threads);
        });
    });
}

void gelu_layer_norm_bwd_cpu(Address grad, Address x, Address bias, Address weight, Address mean, Address rstd,
                             Address dx, Address dbias, Address dweight, Address dln_bias, std::int64_t T,
                             std::int64_t N, int act, int dtype, int num_threads) {
    with_activation(act, [&](auto activation) {
        with_dtype(dtype, [&](auto element) {
            using Element = decltype(element);
            backward<decltype(activation)>(pointer<Element>(grad), pointer<Element>(x), pointer<Element>(bias),
                                           pointer<Element>(weight), pointer<float>(mean), pointer<float>(rstd),
                                           pointer<Element>(dx), pointer<float>(dbias), pointer<float>(dweight),
                                           pointer<float>(dln_bias), T, N, num_threads);
        });
    });
}

}  // namespace albert_fast::ALBERT_FAST_ISA
