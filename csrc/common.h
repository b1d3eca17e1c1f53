// What bindings.cpp and every kernel agree on: codes and how an address becomes a pointer.
//
// Nothing here has a body that the linker could share between objects compiled for different instruction sets: whatever
// a kernel inlines lives in the namespace of its instruction set (csrc/cpu/vec.h) or has internal linkage.
#pragma once

#include <cstdint>

namespace albert_fast {

// Python hands over tensor.data_ptr(); 0 stands for "none" where an argument may be left out.
using Address = std::uintptr_t;

enum DtypeCode : int { kFloat32 = 0, kBfloat16 = 1 };
enum ActivationCode : int { kGeluTanh = 0, kGeluErf = 1, kRelu = 2 };

// Throws what Python wants a call to end with, KeyboardInterrupt say, once a signal has come. Kernels ask often, on the
// thread that called them: all but a few questions a second end at a look at the clock.
void check_signals();

}  // namespace albert_fast
