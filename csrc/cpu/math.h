// exp and the activations on vectors, to within a few units in the last place of float32.
#pragma once

#include "vec.h"

namespace albert_fast::ALBERT_FAST_ISA {

// exp(x) = 2^n * exp(r), n the nearest integer to x / ln 2. exp(r) = 1 + r + r^2 P(r), P minimax of degree 4 on
// |r| <= ln 2 / 2 (relative error 3e-9). Gives inf above 88.72, denormals and zero below -87.3, NaN for NaN.
static inline Vec exp(Vec x) {
    x = smaller(splat(89.0f), larger(splat(-104.0f), x));
    const float round_to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction
    const Vec shifted = x * 1.44269504f + round_to_integer;
    const Vec n = shifted - round_to_integer;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
    Vec p = 1.38146139e-3f * r + 8.36871006e-3f;
    p = p * r + 4.16683890e-2f;
    p = p * r + 1.66665211e-1f;
    p = p * r + 4.99999940e-1f;
    p = (p * r) * r + r + 1.0f;
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)n);
#else
    // Two factors, since 2^128 and 2^-150 are no normal numbers.
    const IntVec exponent = (IntVec)bits_of(shifted) - 0x4B400000;
    const IntVec half = exponent >> 1;
    return p * from_bits((UintVec)((half + 127) << 23)) * from_bits((UintVec)((exponent - half + 127) << 23));
#endif
}

// The standard normal distribution function below -|x|: exp(-x^2/2) erfcx(|x|/sqrt(2)) / 2 with erfcx(z) = t P(t),
// t = 3 / (3 + z), P minimax of degree 9 for z <= 10 (relative error 2e-9). `density` = exp(-x^2/2).
static inline Vec normal_tail(Vec magnitude, Vec density) {
    const Vec t = 1.0f / (magnitude * 0.23570226f + 1.0f);
    Vec p = 0.0557359122f * t - 0.292247862f;
    p = p * t + 0.535963893f;
    p = p * t - 0.441503376f;
    p = p * t + 0.403800964f;
    p = p * t - 0.00209512794f;
    p = p * t + 0.192215249f;
    p = p * t + 0.171405524f;
    p = p * t + 0.188689306f;
    p = p * t + 0.188035533f;
    return 0.5f * density * (t * p);
}

static inline Vec magnitude(Vec x) { return from_bits(bits_of(x) & 0x7FFFFFFFu); }

// forward(x) = act(x); backward(x, grad) = grad * act'(x).
template <int Code>
struct Activation;

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation for negative x.
template <>
struct Activation<kGeluTanh> {
    static inline Vec minus_twice_u(Vec x) { return x * (x * x * -0.0713548163f - 1.59576912f); }

    static inline Vec forward(Vec x) { return x / (exp(minus_twice_u(x)) + 1.0f); }

    static inline Vec backward(Vec x, Vec grad) {
        // s = 1 / (1 + exp(-2u)) and s (1 - s) from exp(-|2u|), which cannot overflow.
        const Vec z = minus_twice_u(x);
        const Vec e = exp(-magnitude(z));
        const Vec t = 1.0f / (e + 1.0f);
        const Vec s = z > 0.0f ? e * t : t;
        const Vec slope = x * x * 0.214064449f + 1.59576912f;
        return grad * (s + x * (e * t * t) * slope);
    }
};

// x Phi(x), Phi the standard normal distribution function.
template <>
struct Activation<kGeluErf> {
    static inline Vec distribution(Vec x, Vec density) {
        const Vec tail = normal_tail(magnitude(x), density);
        return x > 0.0f ? 1.0f - tail : tail;
    }

    static inline Vec forward(Vec x) { return x * distribution(x, exp(x * x * -0.5f)); }

    static inline Vec backward(Vec x, Vec grad) {
        const Vec density = exp(x * x * -0.5f);
        return grad * (distribution(x, density) + x * density * 0.398942280f);
    }
};

template <>
struct Activation<kRelu> {
    static inline Vec forward(Vec x) { return larger(Vec{}, x); }

    static inline Vec backward(Vec x, Vec grad) { return x <= 0.0f ? Vec{} : grad; }
};

}  // namespace albert_fast::ALBERT_FAST_ISA
