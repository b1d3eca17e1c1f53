// Replayable dropout: a hash of (seed, row, column) decides whether an element is kept. So nothing is stored for the
// backward pass, and every backend drops the same elements.
//   x = mix(low(seed) ^ row * 0x9E3779B1);  x = mix(x ^ high(seed) ^ column * 0x85EBCA77);  kept iff x >= floor(p *
//   2^32)
#pragma once

#include "vec.h"

namespace albert_fast::ALBERT_FAST_ISA {

template <class U>
static inline U mix(U x) {
    x ^= x >> 16;
    x *= 0x7FEB352Du;
    x ^= x >> 15;
    x *= 0x846CA68Bu;
    x ^= x >> 16;
    return x;
}

struct Dropout {
    std::uint32_t low, high, threshold;
    float scale;
    bool active;

    Dropout(double p, std::int64_t seed)
        : low(static_cast<std::uint32_t>(seed)),
          high(static_cast<std::uint32_t>(static_cast<std::uint64_t>(seed) >> 32)),
          threshold(p < 1.0 ? static_cast<std::uint32_t>(p * 4294967296.0) : 0xFFFFFFFFu),
          scale(p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f),
          active(p > 0.0) {}

    // The part of the hash that the elements of a row share; rows may be one number or a vector of them.
    template <class U>
    inline U row_state(U rows) const {
        return mix(low ^ (rows * 0x9E3779B1u));
    }

    // x / (1 - p) where the element at (row of the state, column) is kept, 0 * x elsewhere (so a NaN stays, as in
    // torch).
    inline Vec apply(Vec x, UintVec state, UintVec columns) const {
        const UintVec hash = mix(state ^ high ^ (columns * 0x85EBCA77u));
        return x * (hash >= threshold ? splat(scale) : Vec{});
    }

    // For kLanes neighbouring columns of one row.
    inline Vec apply(Vec x, std::uint32_t state, std::int64_t column) const {
        return apply(x, splat(state), lane_numbers() + static_cast<std::uint32_t>(column));
    }
};

}  // namespace albert_fast::ALBERT_FAST_ISA
