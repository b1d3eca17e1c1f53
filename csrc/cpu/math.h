// exp and the activations on vectors, to within a few units in the last place of float32.
#pragma once

#include "vec.h"

namespace albert_fast::ALBERT_FAST_ISA {

constexpr float kRoundToInteger = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for a fraction

// p * 2^n for p near 1, n an integer in [-151, 250] and shifted = n + kRoundToInteger; inf, denormals and zero where
// that is the result.
static inline Vec times_power_of_two(Vec p, [[maybe_unused]] Vec n, [[maybe_unused]] Vec shifted) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_scalef_ps(0xFFFF, (__m512)p, (__m512)n);
#else
    // Two factors, since 2^128 and 2^-150 are no normal numbers.
    const IntVec exponent = (IntVec)bits_of(shifted) - 0x4B400000;
    const IntVec half = exponent >> 1;
    return p * from_bits((UintVec)((half + 127) << 23)) * from_bits((UintVec)((exponent - half + 127) << 23));
#endif
}

// exp(x) for x <= 88, NaN for NaN: 2^n exp(r), n the integer nearest to x / ln 2, exp(r) = 1 + r + r^2 P(r) with P
// minimax of degree 4 on |r| <= ln 2 / 2 (relative error 3e-9).
static inline Vec exp(Vec x) {
    x = larger(splat(-104.0f), x);
    const Vec shifted = x * 1.44269504f + kRoundToInteger;
    const Vec n = shifted - kRoundToInteger;
    const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts; n times the first is exact
    Vec p = 1.38146139e-3f * r + 8.36871006e-3f;
    p = p * r + 4.16683890e-2f;
    p = p * r + 1.66665211e-1f;
    p = p * r + 4.99999940e-1f;
    p = (p * r) * r + r + 1.0f;
    return times_power_of_two(p, n, shifted);
}

// 2^x for x <= 250, NaN for NaN: 2^n 2^f, n the integer nearest to x, 2^f = 1 + f P(f) with P minimax of degree 5 on
// |f| <= 1/2 (relative error 2e-9). Cheaper than exp where a factor log2(e) goes into constants that are there anyway.
static inline Vec exp2(Vec x) {
    x = larger(splat(-150.0f), x);
    const Vec shifted = x + kRoundToInteger;
    const Vec n = shifted - kRoundToInteger;
    const Vec f = x - n;
    Vec p = 1.53533605e-4f * f + 1.33988739e-3f;
    p = p * f + 9.61843692e-3f;
    p = p * f + 5.55033237e-2f;
    p = p * f + 2.40226477e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return times_power_of_two(p, n, shifted);
}

static inline Vec magnitude(Vec x) { return from_bits(bits_of(x) & 0x7FFFFFFFu); }

// x + x^3 P(x^2), P minimax of degree 4, for |x| < 0.625, where 1 - 2 / (exp(2|x|) + 1) would cancel.
static inline Vec tanh(Vec x) {
    const Vec size = magnitude(x), square = x * x;
    Vec p = -5.70498873e-3f * square + 2.06390888e-2f;
    p = p * square - 5.37397156e-2f;
    p = p * square + 1.33314422e-1f;
    p = p * square - 3.33332819e-1f;
    const Vec large = 1.0f - 2.0f / (exp(smaller(splat(20.0f), size + size)) + 1.0f);
    const Vec signed_large = from_bits(bits_of(large) | (bits_of(x) & 0x80000000u));
    return size < 0.625f ? x + x * (p * square) : signed_large;
}

// exp(-x^2 / 2).
static inline Vec normal_density(Vec x) { return exp2(x * x * -0.721347520f); }

// The standard normal distribution function at -|x|: exp(-x^2/2) erfcx(|x|/sqrt(2)) / 2 with erfcx(z) = t Q(t),
// t = 3 / (3 + z), Q minimax of degree 9 for z <= 10 (relative error 2e-9); Q holds the factor 1/2.
static inline Vec normal_tail(Vec x, Vec density) {
    const Vec t = 1.0f / (magnitude(x) * 0.23570226f + 1.0f);
    Vec q = 0.0278679561f * t - 0.146123931f;
    q = q * t + 0.267981946f;
    q = q * t - 0.220751688f;
    q = q * t + 0.201900482f;
    q = q * t - 0.00104756397f;
    q = q * t + 0.0961076245f;
    q = q * t + 0.085702762f;
    q = q * t + 0.094344653f;
    q = q * t + 0.0940177664f;
    return density * (t * q);
}

// forward(x) = act(x); backward(x, grad) = grad * act'(x).
template <int Code>
struct Activation;

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): no cancellation for negative x.
template <>
struct Activation<ActivationCode::kGeluTanh> {
    // log2(exp(-2u)).
    static inline Vec exponent(Vec x) { return x * (x * x * -0.102943240f - 2.30220820f); }

    static inline Vec forward(Vec x) { return x / (exp2(smaller(splat(200.0f), exponent(x))) + 1.0f); }

    static inline Vec backward(Vec x, Vec grad) {
        // s = 1 / (1 + exp(-2u)) and s (1 - s) from exp(-|2u|), which cannot overflow.
        const Vec w = exponent(x);
        const Vec e = exp2(-magnitude(w));
        const Vec t = 1.0f / (e + 1.0f);
        const Vec s = w > 0.0f ? e * t : t;
        const Vec slope = x * x * 0.214064449f + 1.59576912f;
        return grad * (s + x * (e * t * t) * slope);
    }
};

// x Phi(x), Phi the standard normal distribution function.
template <>
struct Activation<ActivationCode::kGeluErf> {
    static inline Vec distribution(Vec x, Vec density) {
        const Vec tail = normal_tail(x, density);
        return x > 0.0f ? 1.0f - tail : tail;
    }

    static inline Vec forward(Vec x) { return x * distribution(x, normal_density(x)); }

    static inline Vec backward(Vec x, Vec grad) {
        const Vec density = normal_density(x);
        return grad * (distribution(x, density) + x * density * 0.398942280f);
    }
};

template <>
struct Activation<ActivationCode::kRelu> {
    static inline Vec forward(Vec x) { return larger(Vec{}, x); }

    static inline Vec backward(Vec x, Vec grad) { return x <= 0.0f ? Vec{} : grad; }
};

}  // namespace albert_fast::ALBERT_FAST_ISA
