// What bindings.cpp and every kernel share: addresses and the check for signals.
//
// No function is defined here: the linker would keep one copy of it for all instruction sets. What a kernel inlines is
// in the namespace of its instruction set (csrc/cpu/vec.h) or has internal linkage.
#pragma once

#include <cstdint>

#include "layer_schema.h"

namespace albert_fast {

// A tensor's data_ptr() in Python; 0 for an argument that was left out.
using Address = std::uintptr_t;

// Throws Python's exception, KeyboardInterrupt say, once a signal has arrived. Kernels call this often, on the thread
// that called them; most calls only read the clock, a few a second ask Python.
void check_signals();

}  // namespace albert_fast
