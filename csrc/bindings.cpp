// The Python module albert_fast._C: everything that the extension exports. Arguments are addresses of tensors' memory,
// sizes, and strides in elements; csrc/cpu/kernels.h describes each. Before a call, Python checks shapes, dtypes,
// devices and memory (albert_fast/runtime/operands.py), and it holds the memory until the call returns. Functions that
// read ids, labels or ranges check these before they use them as indices. The GIL is released while a kernel runs.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common.h"

#define ALBERT_FAST_ISA portable
#include "cpu/kernels.h"
#undef ALBERT_FAST_ISA
#if defined(ALBERT_FAST_HAS_AVX2)
#define ALBERT_FAST_ISA avx2
#include "cpu/kernels.h"
#undef ALBERT_FAST_ISA
#endif
#if defined(ALBERT_FAST_HAS_AVX512)
#define ALBERT_FAST_ISA avx512
#include "cpu/kernels.h"
#undef ALBERT_FAST_ISA
#endif
#if defined(ALBERT_FAST_HAS_AVX512_VNNI)
#define ALBERT_FAST_ISA avx512_vnni
#include "cpu/kernels.h"
#undef ALBERT_FAST_ISA
#endif

#if defined(ALBERT_FAST_CUDA)
#include "cuda/embedding_projection.h"
#endif

namespace py = pybind11;

namespace {

// Instruction sets; each includes those before it.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Vnni, kCount };
constexpr const char* kIsaNames[] = {"portable", "avx2", "avx512", "avx512_vnni"};

bool is_compiled(Isa isa) {
#if defined(ALBERT_FAST_HAS_AVX512_VNNI)
    if (isa == Isa::kAvx512Vnni) return true;
#endif
#if defined(ALBERT_FAST_HAS_AVX512)
    if (isa == Isa::kAvx512) return true;
#endif
#if defined(ALBERT_FAST_HAS_AVX2)
    if (isa == Isa::kAvx2) return true;
#endif
    return isa == Isa::kPortable;
}

// Whether this CPU and its operating system run everything that setup.py's flags for the instruction set allow.
bool is_supported([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::kAvx2) return avx2;
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == Isa::kAvx512) return avx512;
    if (isa == Isa::kAvx512Vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
    return isa == Isa::kPortable;
}

std::string lower(std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
    return text;
}

// The instruction set that ALBERT_FAST_ISA names (upper or lower case), else the widest that is compiled in and that
// this CPU has.
Isa choose_isa() {
    const char* forced = std::getenv("ALBERT_FAST_ISA");
    const std::string wanted = forced == nullptr ? "" : lower(forced);
    std::string usable;
    for (int i = static_cast<int>(Isa::kCount) - 1; i >= 0; --i) {
        const Isa isa = static_cast<Isa>(i);
        if (!is_compiled(isa) || !is_supported(isa)) continue;
        if (wanted.empty() || wanted == kIsaNames[i]) return isa;
        usable += (usable.empty() ? "" : ", ") + std::string(kIsaNames[i]);
    }
    std::string reason = "no such instruction set is known";
    for (int i = 0; i < static_cast<int>(Isa::kCount); ++i) {
        if (wanted != kIsaNames[i]) continue;
        reason = is_compiled(static_cast<Isa>(i)) ? "this CPU does not have it" : "not compiled into this build";
    }
    throw std::runtime_error("ALBERT_FAST_ISA=" + std::string(forced) + ": " + reason + "; here it may be " + usable +
                             ", or unset for the first of these");
}

// While a kernel runs, Python is asked for signals this often.
constexpr std::chrono::milliseconds kSignalInterval{200};
thread_local std::chrono::steady_clock::time_point next_question;
unsigned long main_thread = 0;  // Python runs signal handlers there alone

// Lives while a kernel runs: releases the GIL and starts the interval until the first question.
struct KernelCall {
    KernelCall() { next_question = std::chrono::steady_clock::now() + kSignalInterval; }

    py::gil_scoped_release released;
};

#if defined(ALBERT_FAST_HAS_AVX512_VNNI)
#define IF_VNNI(function) isa >= Isa::kAvx512Vnni ? albert_fast::avx512_vnni::function:
#else
#define IF_VNNI(function)
#endif
#if defined(ALBERT_FAST_HAS_AVX512)
#define IF_AVX512(function) isa >= Isa::kAvx512 ? albert_fast::avx512::function:
#else
#define IF_AVX512(function)
#endif
#if defined(ALBERT_FAST_HAS_AVX2)
#define IF_AVX2(function) isa >= Isa::kAvx2 ? albert_fast::avx2::function:
#else
#define IF_AVX2(function)
#endif

#if defined(ALBERT_FAST_CUDA)
// Makes a function of pointers a function of addresses.
template <class T>
using Given = std::conditional_t<std::is_pointer_v<T>, albert_fast::Address, T>;

template <class T>
T received(Given<T> value) {
    if constexpr (std::is_pointer_v<T>) {
        return reinterpret_cast<T>(value);
    } else {
        return value;
    }
}

template <class Result, class... Parameters>
auto by_address(Result (*function)(Parameters...)) {
    return [function](Given<Parameters>... values) { return function(received<Parameters>(values)...); };
}
#endif

// Makes a function of EncoderArguments, and maybe more numbers, a function of all fields one by one.
template <class... More>
auto by_field(bool (*function)(const albert_fast::EncoderArguments&, More...)) {
    using albert_fast::Address;
    return [function](Address hidden, Address out, Address table, Address layer_indices, std::int64_t steps,
                      Address cu_seqlens, std::int64_t B, std::int64_t T, Address wanted_rows, Address cu_wanted,
                      std::int64_t wanted_count, std::int64_t H, std::int64_t I, std::int64_t num_heads,
                      double softmax_scale, double eps, int act, Address profile, int num_threads, More... more) {
        return function({hidden, out, table, layer_indices, steps, cu_seqlens, B, T, wanted_rows, cu_wanted,
                         wanted_count, H, I, num_heads, softmax_scale, eps, act, profile, num_threads},
                        more...);
    };
}

template <class List>
py::tuple names() {
    py::tuple all(static_cast<int>(List::kCount));
    for (int i = 0; i < List::kCount; ++i) all[i] = List::kNames[i];
    return all;
}

py::dict schema() {
    py::dict all;
    all["weights"] = names<albert_fast::Weight>();
    all["vectors"] = names<albert_fast::Vector>();
    all["products"] = names<albert_fast::Product>();
    all["product_tensors"] = names<albert_fast::ProductTensor>();
    all["stages"] = names<albert_fast::Stage>();
    all["acts"] = names<albert_fast::ActivationCode>();
    all["dtypes"] = names<albert_fast::DtypeCode>();
    all["slice"] = albert_fast::kSlice;
    all["panel"] = albert_fast::kIntegerPanel;
    all["run"] = albert_fast::kIntegerRun;
    all["head_stride"] = albert_fast::kHeadStride;
    all["ignored"] = albert_fast::kIgnored;
    all["cuda_buffers"] = py::make_tuple(albert_fast::kPadColumns, albert_fast::kSumTokens, albert_fast::kSumPairs);
    all["levels"] = py::make_tuple(albert_fast::kInt8Levels, albert_fast::kInt16Levels, albert_fast::kValueLevels);
    return all;
}

py::dict build_info(Isa isa) {
    py::list compiled, archs;
    for (int i = 0; i < static_cast<int>(Isa::kCount); ++i) {
        if (is_compiled(static_cast<Isa>(i))) compiled.append(kIsaNames[i]);
    }
    py::dict info;
    info["compiler"] = __VERSION__;
    info["isa_compiled"] = compiled;
    info["isa"] = kIsaNames[static_cast<int>(isa)];
#if defined(_OPENMP)
    info["openmp"] = true;
#else
    info["openmp"] = false;
#endif
#if defined(ALBERT_FAST_CUDA)
    info["cuda"] = true;
    info["cuda_archs"] = py::str(ALBERT_FAST_CUDA_ARCHS).attr("split")(",");
#else
    info["cuda"] = false;
    info["cuda_archs"] = archs;
#endif
    return info;
}

}  // namespace

void albert_fast::check_signals() {
    const auto now = std::chrono::steady_clock::now();
    if (now < next_question) return;
    next_question = now + kSignalInterval;
    if (PyThread_get_thread_ident() != main_thread) return;
    const py::gil_scoped_acquire held;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

PYBIND11_MODULE(_C, module) {
    const Isa isa = choose_isa();
    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    module.def(
        "build_info", [isa] { return build_info(isa); },
        "What was compiled in, and the instruction set that was chosen when the module was imported.");
    module.def("schema", schema, "The lists and numbers of csrc/layer_schema.h, which Python compares with its own.");

// The function for the chosen instruction set. Most are compiled for AVX2 and AVX-512 beside the portable one, some
// for AVX512-VNNI too.
#define UP_TO_AVX512(function) (IF_AVX512(function) IF_AVX2(function) albert_fast::portable::function)
#define UP_TO_VNNI(function) (IF_VNNI(function) IF_AVX512(function) IF_AVX2(function) albert_fast::portable::function)
#define EXPORT(function) module.def(#function, UP_TO_AVX512(function), py::call_guard<KernelCall>())
    EXPORT(embedding_layer_norm_fwd_cpu);
    EXPORT(embedding_layer_norm_bwd_cpu);
    EXPORT(attention_fwd_cpu);
    EXPORT(attention_bwd_cpu);
    EXPORT(bias_gelu_fwd_cpu);
    EXPORT(bias_gelu_bwd_cpu);
    EXPORT(add_layer_norm_fwd_cpu);
    EXPORT(add_layer_norm_bwd_cpu);
    EXPORT(gelu_layer_norm_fwd_cpu);
    EXPORT(gelu_layer_norm_bwd_cpu);
    EXPORT(linear_cross_entropy_fwd_cpu);
    EXPORT(linear_cross_entropy_bwd_cpu);
    EXPORT(linear_packed_size_cpu);
    EXPORT(linear_pack_cpu);
    EXPORT(linear_fwd_cpu);
    EXPORT(encoder_packed_size_cpu);
    EXPORT(encoder_pack_cpu);
#undef EXPORT
#define EXPORT(function) module.def(#function, UP_TO_VNNI(function), py::call_guard<KernelCall>())
    EXPORT(quantized_encoder_limit_cpu);
    EXPORT(use_large_pages_cpu);
#undef EXPORT
#define EXPORT(function, CHOICE) module.def(#function, by_field(CHOICE(function)), py::call_guard<KernelCall>())
    EXPORT(encoder_fwd_cpu, UP_TO_AVX512);
    EXPORT(quantized_encoder_fwd_cpu, UP_TO_VNNI);
#undef EXPORT
#if defined(ALBERT_FAST_CUDA)
#define EXPORT(function) module.def(#function, by_address(function), py::call_guard<KernelCall>())
    EXPORT(embedding_projection_fwd_cuda);
    EXPORT(embedding_projection_bwd_rows_cuda);
    EXPORT(embedding_projection_bwd_tables_cuda);
#undef EXPORT
#endif
}
