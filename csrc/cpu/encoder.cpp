// The encoder in float32: packs a layer's matrices, and runs all layers of a call (encoder_call.h).
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

bool encoder_fwd_cpu(const EncoderArguments& arguments) {
    EncoderCall call(arguments);
    if (!call.prepare()) return false;
    run_encoder<Float32>(call, Sizes(arguments.H, arguments.I, kPanel));
    return true;
}

}  // namespace albert_fast::ALBERT_FAST_ISA
