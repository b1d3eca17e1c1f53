// Calls a template with the type or constant that a code at run time names.
#pragma once

#include "math.h"

namespace albert_fast::ALBERT_FAST_ISA {

template <bool kValue>
struct Flag {
    static constexpr bool value = kValue;
};

// body(float{}) or body(Bfloat16{}).
template <class Body>
static inline void with_dtype(int dtype, Body body) {
    dtype == DtypeCode::kBfloat16 ? body(Bfloat16{}) : body(float{});
}

template <class Body>
static inline void with_flag(bool flag, Body body) {
    flag ? body(Flag<true>{}) : body(Flag<false>{});
}

// body(Activation<act>{}).
template <class Body>
static inline void with_activation(int act, Body body) {
    switch (act) {
        case ActivationCode::kGeluTanh:
            return body(Activation<ActivationCode::kGeluTanh>{});
        case ActivationCode::kGeluErf:
            return body(Activation<ActivationCode::kGeluErf>{});
        default:
            return body(Activation<ActivationCode::kRelu>{});
    }
}

}  // namespace albert_fast::ALBERT_FAST_ISA
