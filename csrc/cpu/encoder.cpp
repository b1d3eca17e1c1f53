// The encoder in float32: packing of its matrices, and the call from Python. encoder_call.h has the work.
#include "encoder_call.h"
#include "kernels.h"

namespace albert_fast::ALBERT_FAST_ISA {

std::int64_t encoder_packed_size_cpu(std::int64_t H, std::int64_t I) {
    return Float32::Layer::floats(Sizes(H, I, kPanel));
}

void encoder_pack_cpu(Address query, Address key, Address value, Address dense, Address ffn, Address ffn_output,
                      Address packed, std::int64_t H, std::int64_t I, int num_threads) {
    const Sizes sizes(H, I, kPanel);
    float* to = pointer<float>(packed);
    use_large_pages(to, static_cast<std::size_t>(Float32::Layer::floats(sizes)) * sizeof(float));
    struct Panel {
        const float* from;
        std::int64_t row, count, k;
        float* to;
    };
    std::vector<Panel> panels;
    const auto add = [&](const float* from, std::int64_t row, std::int64_t n, std::int64_t k) {
        for (std::int64_t begin = 0; begin < n; begin += kPanel) {
            panels.push_back({from + begin * row, row, smaller(kPanel, n - begin), k, to});
            to += kPanel * k;
        }
    };
    for (const Address matrix : {query, key, value, dense}) add(pointer<float>(matrix), H, H, H);
    add(pointer<float>(ffn), H, I, H);
    for (std::int64_t slice = 0; slice < sizes.slices(); ++slice) {
        add(pointer<float>(ffn_output) + slice * kSlice, I, H, sizes.slice_columns(slice));
    }
    parallel_for(static_cast<std::int64_t>(panels.size()), num_threads, [&](std::int64_t i) {
        const Panel& panel = panels[i];
        pack_panel(panel.from, panel.row, panel.count, panel.k, panel.to);
    });
}

bool encoder_fwd_cpu(Address x, Address out, Address table, Address order, std::int64_t layers, Address cu_seqlens,
                     std::int64_t B, std::int64_t T, Address wanted_rows, Address cu_wanted, std::int64_t wanted_count,
                     std::int64_t H, std::int64_t I, std::int64_t num_heads, double scale, double eps, int act,
                     Address profile, int num_threads) {
    EncoderCall call(x, out, table, order, layers, cu_seqlens, B, T, wanted_rows, cu_wanted, wanted_count, num_heads,
                     scale, eps, act, profile, num_threads);
    if (!call.prepare()) return false;
    run_encoder<Float32>(call, Sizes(H, I, kPanel));
    return true;
}

}  // namespace albert_fast::ALBERT_FAST_ISA
