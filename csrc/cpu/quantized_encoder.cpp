// The encoder on integer weights: activations are rounded row by row to 8 bits (Int8) or 14 (Int16), everything between
// the products is float32. encoder_call.h runs the layers; albert_fast/quantization/rounding.py rounds the weights.
#include "encoder_call.h"
#include "kernels.h"
#include "quantized_layer.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

// Multiplies full tiles whose operands stay in the first cache; returns the operations of one thread.
template <class Format>
std::int64_t repeat_tile(std::int64_t repeats, int num_threads) {
    constexpr std::int64_t kSteps = 64, kOutputs = kIntegerRows * kColumns;
    parallel_for(num_threads, num_threads, [&](std::int64_t) {
        float* memory = scratch<Purpose::kTask>(kOutputs + kSteps * (kIntegerRows + kColumns + 1));
        char* operands = reinterpret_cast<char*>(memory + kOutputs);
        __builtin_memset(operands, 1, static_cast<std::size_t>(4 * kSteps * (kIntegerRows + kColumns)));
        const char* panel = operands + 4 * kSteps * kIntegerRows;
        for (std::int64_t i = 0; i < repeats; ++i) {
            integer_tile<Format, kIntegerRows>(
                operands, 4 * kSteps, panel, kSteps, Fetch{panel, 0},
                [&](int r, int v, Vec sum) { store(memory + r * kColumns + v * kLanes, sum, Full{}); });
        }
    });
    return 2 * repeats * kSteps * Format::kGroup * kOutputs;
}

}  // namespace

void use_large_pages_cpu(Address memory, std::int64_t bytes) {
    use_large_pages(pointer<void>(memory), static_cast<std::size_t>(bytes));
}

std::int64_t quantized_encoder_limit_cpu(int bits, std::int64_t repeats, int num_threads) {
    return bits == 8 ? repeat_tile<Int8>(repeats, num_threads) : repeat_tile<Int16>(repeats, num_threads);
}

bool quantized_encoder_fwd_cpu(const EncoderArguments& arguments, int bits) {
    EncoderCall call(arguments);
    if (!call.prepare()) return false;
    const Sizes sizes(arguments.H, arguments.I, kColumns);
    bits == 8 ? run_encoder<Integers<Int8>>(call, sizes) : run_encoder<Integers<Int16>>(call, sizes);
    return true;
}

}  // namespace albert_fast::ALBERT_FAST_ISA
