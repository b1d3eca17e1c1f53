// A dense product outside the layers, and its activation: out = act(x W^T + bias), W packed once (packed_gemm.h).
//
// In a library, the order of a product's sums depends on the number of rows, and a compiled kernel may be kept for each
// number. Here the order of a row's sums does not depend on the other rows, and only W is kept.
#include "kernels.h"
#include "math.h"
#include "packed_gemm.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

// Rows that a task takes at a time, whole tiles for every instruction set: they stay in the caches from panel to panel.
constexpr std::int64_t kRowsOfTask = 84;
// With fewer multiplications a task does not pay, so small products run on the calling thread alone.
constexpr std::int64_t kProductOfTask = 1 << 16;

struct Identity {
    static Vec forward(Vec x) { return x; }
};

struct Tanh {
    static Vec forward(Vec x) { return tanh(x); }
};

template <class Act>
void forward(const float* x, std::int64_t x_row, const float* packed, const float* bias, float* out, std::int64_t rows,
             std::int64_t n, std::int64_t k, int num_threads) {
    const std::int64_t panels = divide_up(n, kPanel), blocks = divide_up(rows, kRowsOfTask);
    const std::int64_t work = rows * panels * kPanel * k / kProductOfTask;
    // Each block of rows has enough groups of panels to give every thread four tasks.
    const std::int64_t wanted = smaller(divide_up(4 * num_threads, larger(blocks, 1)), work / larger(blocks, 1));
    const std::int64_t groups = larger(smaller(wanted, panels), 1);
    parallel_for(blocks * groups, work < 2 ? 1 : num_threads, [&](std::int64_t task) {
        const std::int64_t first_row = task / groups * kRowsOfTask, group = task % groups;
        const float* from = x + first_row * x_row;
        packed_product(from, x_row, smaller(rows - first_row, kRowsOfTask), packed, k, panels * group / groups,
                       panels * (group + 1) / groups, [&](std::int64_t row, std::int64_t column, Vec sum) {
                           float* to = out + (first_row + row) * n + column;
                           for_vectors(smaller(n - column, kLanes), [&](std::int64_t, auto lanes) {
                               const Vec b = bias == nullptr ? Vec{} : load(bias + column, lanes);
                               store(to, Act::forward(sum + b), lanes);
                           });
                       });
    });
}

}  // namespace

std::int64_t linear_packed_size_cpu(std::int64_t N, std::int64_t K) { return packed_size(N, K); }

void linear_pack_cpu(Address weight, Address packed, std::int64_t N, std::int64_t K, int num_threads) {
    use_large_pages(pointer<float>(packed), static_cast<std::size_t>(packed_size(N, K)) * sizeof(float));
    parallel_for(divide_up(N, kPanel), num_threads, [&](std::int64_t panel) {
        const std::int64_t first = panel * kPanel;
        pack_panel(pointer<float>(weight) + first * K, K, smaller(N - first, kPanel), K,
                   pointer<float>(packed) + first * K);
    });
}

void linear_fwd_cpu(Address x, std::int64_t x_stride, Address packed, Address bias, Address out, std::int64_t T,
                    std::int64_t N, std::int64_t K, bool tanh, int num_threads) {
    const auto run = tanh ? forward<Tanh> : forward<Identity>;
    run(pointer<float>(x), x_stride, pointer<float>(packed), pointer<float>(bias), pointer<float>(out), T, N, K,
        num_threads);
}

}  // namespace albert_fast::ALBERT_FAST_ISA
