// One vector of floats of the width that this object is compiled for, written with the vector extensions of GCC and
// Clang.
//
// Everything stands in the namespace of the instruction set and is static: an inline function with external linkage
// could be merged by the linker with the AVX-512 copy of the same function, and kill a CPU that lacks it.
#pragma once

#include <cstdint>

#include "../common.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace albert_fast::ALBERT_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t UintVec __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));

struct Bfloat16 {
    std::uint16_t bits;
};

// How many lanes of a vector hold elements: all, or at the end of a row the first `count`.
struct Full {};
struct Part {
    int count;
};

static inline Vec splat(float x) { return x - Vec{}; }
static inline UintVec splat(std::uint32_t x) { return x + UintVec{}; }

static inline UintVec bits_of(Vec x) {
    UintVec bits;
    __builtin_memcpy(&bits, &x, sizeof x);
    return bits;
}

static inline Vec from_bits(UintVec bits) {
    Vec x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

static inline UintVec lane_numbers() {
    UintVec lanes;
    for (int i = 0; i < kLanes; ++i) lanes[i] = i;
    return lanes;
}

// The larger, the smaller of both; y if either is NaN, so that a NaN in y stays. x86 has one instruction for it, which
// GCC does not find from the comparison.
static inline Vec larger(Vec x, Vec y) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_max_ps(0xFFFF, (__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (Vec)_mm256_max_ps((__m256)x, (__m256)y);
#else
    return x > y ? x : y;
#endif
}

static inline Vec smaller(Vec x, Vec y) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_min_ps(0xFFFF, (__m512)x, (__m512)y);
#elif defined(__AVX2__)
    return (Vec)_mm256_min_ps((__m256)x, (__m256)y);
#else
    return x < y ? x : y;
#endif
}

// x, but the compiler cannot fuse the product that computed it with a sum that follows.
static inline Vec rounded(Vec x) {
#if defined(__x86_64__)
    asm("" : "+x"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

// x in the lanes that count and zero elsewhere.
static inline Vec only(Vec x, Full) { return x; }
static inline Vec only(Vec x, Part lanes) {
    return lane_numbers() < static_cast<std::uint32_t>(lanes.count) ? x : Vec{};
}

static inline Vec widen(HalfVec half) {
#if defined(__AVX512F__)
    const UintVec bits = (UintVec)_mm512_maskz_cvtepu16_epi32(0xFFFF, (__m256i)half);  // GCC 12 takes four instructions
#else
    const UintVec bits = __builtin_convertvector(half, UintVec);
#endif
    return from_bits(bits << 16);
}

// Rounds to the nearest bfloat16, ties to even; a NaN becomes the quiet NaN 0x7FC0, as in torch.
static inline HalfVec narrow(Vec x) {
    const UintVec bits = bits_of(x);
    const UintVec rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return __builtin_convertvector(x == x ? rounded : splat(0x7FC0u), HalfVec);
}

static inline Vec load(const float* p, Full) {
    Vec x;
    __builtin_memcpy(&x, p, sizeof x);
    return x;
}

static inline void store(float* p, Vec x, Full) { __builtin_memcpy(p, &x, sizeof x); }

static inline Vec load(const Bfloat16* p, Full) {
    HalfVec half;
    __builtin_memcpy(&half, p, sizeof half);
    return widen(half);
}

static inline void store(Bfloat16* p, Vec x, Full) {
    const HalfVec half = narrow(x);
    __builtin_memcpy(p, &half, sizeof half);
}

// Loads and stores of a part touch no memory beyond it; the lanes beyond are loaded as zero.
static inline Vec load(const float* p, Part lanes) {
#if defined(__AVX512F__)
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << lanes.count) - 1), p);
#elif defined(__AVX2__)
    return (Vec)_mm256_maskload_ps(p, (__m256i)(lane_numbers() < static_cast<std::uint32_t>(lanes.count)));
#else
    Vec x{};
    for (int i = 0; i < lanes.count; ++i) x[i] = p[i];
    return x;
#endif
}

static inline void store(float* p, Vec x, Part lanes) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << lanes.count) - 1), (__m512)x);
#elif defined(__AVX2__)
    _mm256_maskstore_ps(p, (__m256i)(lane_numbers() < static_cast<std::uint32_t>(lanes.count)), (__m256)x);
#else
    for (int i = 0; i < lanes.count; ++i) p[i] = x[i];
#endif
}

static inline Vec load(const Bfloat16* p, Part lanes) {
    HalfVec half{};
    for (int i = 0; i < lanes.count; ++i) half[i] = p[i].bits;
    return widen(half);
}

static inline void store(Bfloat16* p, Vec x, Part lanes) {
    const HalfVec half = narrow(x);
    for (int i = 0; i < lanes.count; ++i) p[i].bits = half[i];
}

// Sum of all lanes, in an order that depends on the instruction set alone.
static inline float sum_lanes(Vec x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    // The masked form: GCC 12 warns of an uninitialised value inside the plain one.
    const __m256 eight =
        _mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 0) + _mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 1);
#else
    const __m256 eight = (__m256)x;
#endif
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
#else
    return (x[0] + x[2]) + (x[1] + x[3]);
#endif
}

// The largest of all lanes; undefined if one is NaN.
static inline float largest_lane(Vec x) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    const __m256 eight = _mm256_max_ps(_mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 0),
                                       _mm512_maskz_extractf32x8_ps(0xFF, (__m512)x, 1));
#else
    const __m256 eight = (__m256)x;
#endif
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return two[0] > two[1] ? two[0] : two[1];
#else
    const float a = x[0] > x[2] ? x[0] : x[2], b = x[1] > x[3] ? x[1] : x[3];
    return a > b ? a : b;
#endif
}

// Two vectors that are summed side by side.
struct VecPair {
    Vec first, second;

    VecPair& operator+=(VecPair other) {
        first += other.first;
        second += other.second;
        return *this;
    }
};

struct FloatPair {
    float first, second;
};

static inline VecPair only(VecPair x, Part lanes) { return {only(x.first, lanes), only(x.second, lanes)}; }
static inline FloatPair sum_lanes(VecPair x) { return {sum_lanes(x.first), sum_lanes(x.second)}; }

// Calls body(offset, Full or Part) for every vector of a row of n elements.
template <class Body>
static inline void for_vectors(std::int64_t n, Body body) {
    std::int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) body(i, Full{});
    if (i < n) body(i, Part{static_cast<int>(n - i)});
}

// Sum of term(offset, Full or Part), a Vec or a VecPair, over a row of n elements; four running sums hide the latency
// of the addition.
template <class Term>
static inline auto sum_row(std::int64_t n, Term term) {
    decltype(term(n, Full{})) a{}, b{}, c{}, d{};
    std::int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
        a += term(i, Full{});
        b += term(i + kLanes, Full{});
        c += term(i + 2 * kLanes, Full{});
        d += term(i + 3 * kLanes, Full{});
    }
    for (; i + kLanes <= n; i += kLanes) a += term(i, Full{});
    if (i < n) {
        const Part lanes{static_cast<int>(n - i)};
        b += only(term(i, lanes), lanes);
    }
    a += b;
    c += d;
    a += c;
    return sum_lanes(a);
}

}  // namespace albert_fast::ALBERT_FAST_ISA
