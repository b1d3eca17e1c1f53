// The Python module albert_fast._C: an index of what the extension exports. Arguments are addresses
// of tensors' memory, sizes and strides in elements; csrc/cpu/kernels.h says what each means. Python checks shapes,
// dtypes, devices and memory before it calls (albert_fast/operands.py) and holds the memory until the call returns;
// functions that read ids, labels or ranges check these before they follow them. The GIL is released while a kernel
// runs.
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

// In order: what one has, the next has too.
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

// Whether this CPU (and its operating system) runs what setup.py's flags for the instruction set let the compiler use.
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

// The instruction set that ALBERT_FAST_ISA names, in any case, else the widest that is compiled in and that this CPU
// has.
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

// How long a kernel may run before Python is asked for signals, and then again and again.
constexpr std::chrono::milliseconds kSignalInterval{200};
thread_local std::chrono::steady_clock::time_point next_question;
unsigned long main_thread = 0;  // Python runs signal handlers there alone

// Around a kernel: the GIL is released, and the time until the first question begins.
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
// A function of pointers as one of addresses.
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

// CHOICES: the instruction sets beside the portable one that a function is compiled for, the widest first.
#define EXPORT_FOR(CHOICES, function) \
    module.def(#function, CHOICES albert_fast::portable::function, py::call_guard<KernelCall>())
#define EXPORT(function) EXPORT_FOR(IF_AVX512(function) IF_AVX2(function), function)
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
    EXPORT(encoder_fwd_cpu);
#undef EXPORT
#define EXPORT(function) EXPORT_FOR(IF_VNNI(function) IF_AVX512(function) IF_AVX2(function), function)
    EXPORT(quantized_encoder_fwd_cpu);
    EXPORT(quantized_encoder_limit_cpu);
    EXPORT(use_large_pages_cpu);
#undef EXPORT
#undef EXPORT_FOR
#if defined(ALBERT_FAST_CUDA)
#define EXPORT(function) module.def(#function, by_address(function), py::call_guard<KernelCall>())
    EXPORT(embedding_projection_fwd_cuda);
    EXPORT(embedding_projection_bwd_rows_cuda);
    EXPORT(embedding_projection_bwd_tables_cuda);
#undef EXPORT
#endif
}
