// From codes that arrive at run time to types and constants that templates take.
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
    dtype == kBfloat16 ? body(Bfloat16{}) : body(float{});
}

template <class Body>
static inline void with_flag(bool flag, Body body) {
    flag ? body(Flag<true>{}) : body(Flag<false>{});
}

// body(Activation<act>{}).
template <class Body>
static inline void with_activation(int act, Body body) {
    switch (act) {
        case kGeluTanh:
            return body(Activation<kGeluTanh>{});
        case kGeluErf:
            return body(Activation<kGeluErf>{});
        default:
            return body(Activation<kRelu>{});
    }
}

}  // namespace albert_fast::ALBERT_FAST_ISA
