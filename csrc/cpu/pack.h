// Copies between tensors of either dtype and aligned float32 arrays whose rows are whole vectors, which gemm.h reads.
#pragma once

#include "parallel.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace albert_fast::ALBERT_FAST_ISA {

// A (tokens, columns) tensor whose rows are `stride` elements apart.
template <class T>
struct Rows {
    T* data;
    std::int64_t stride;

    T* at(std::int64_t token, std::int64_t column) const { return data + token * stride + column; }
};

// to (rows, width) = factor * from (rows, n), columns beyond n zero; width is n rounded up to whole vectors.
template <class T>
static inline void pack_rows(Rows<const T> from, std::int64_t token, std::int64_t column, std::int64_t rows,
                             std::int64_t n, float factor, float* to, std::int64_t width) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const T* line = from.at(token + row, column);
        float* target = to + row * width;
        for_vectors(n, [&](std::int64_t i, auto lanes) { store(target + i, load(line + i, lanes) * factor, Full{}); });
    }
}

// to (rows, n) = factor * from (rows, width), columns beyond n left out.
template <class T>
static inline void unpack_rows(const float* from, std::int64_t width, std::int64_t rows, std::int64_t n, float factor,
                               Rows<T> to, std::int64_t token, std::int64_t column) {
    for (std::int64_t row = 0; row < rows; ++row) {
        const float* source = from + row * width;
        T* line = to.at(token + row, column);
        for_vectors(n, [&](std::int64_t i, auto lanes) { store(line + i, load(source + i, Full{}) * factor, lanes); });
    }
}

template <class T>
static inline void zero_rows(Rows<T> to, std::int64_t token, std::int64_t column, std::int64_t rows, std::int64_t n) {
    for (std::int64_t row = 0; row < rows; ++row) __builtin_memset(to.at(token + row, column), 0, sizeof(T) * n);
}

// to (n, width) = the transpose of from (rows, from_width), columns beyond `rows` zero. n and width are multiples of 4,
// and `from` has rows for all of width: those beyond `rows` are overwritten with zeros first.
static inline void transpose(float* from, std::int64_t from_width, std::int64_t rows, float* to, std::int64_t n,
                             std::int64_t width) {
    __builtin_memset(from + rows * from_width, 0, sizeof(float) * (width - rows) * from_width);
    for (std::int64_t j = 0; j < width; j += 4) {
        for (std::int64_t i = 0; i < n; i += 4) {
            const float* source = from + j * from_width + i;
            float* target = to + i * width + j;
#if defined(__SSE__)
            __m128 a = _mm_loadu_ps(source), b = _mm_loadu_ps(source + from_width);
            __m128 c = _mm_loadu_ps(source + 2 * from_width), d = _mm_loadu_ps(source + 3 * from_width);
            _MM_TRANSPOSE4_PS(a, b, c, d);
            _mm_storeu_ps(target, a);
            _mm_storeu_ps(target + width, b);
            _mm_storeu_ps(target + 2 * width, c);
            _mm_storeu_ps(target + 3 * width, d);
#else
            for (int r = 0; r < 4; ++r) {
                for (int s = 0; s < 4; ++s) target[s * width + r] = source[r * from_width + s];
            }
#endif
        }
    }
}

// Cuts one piece of scratch memory into arrays of whole cache lines.
class Arrays {
public:
    explicit Arrays(float* memory) : next_(memory) {}

    float* take(std::int64_t floats) {
        float* taken = next_;
        next_ += padded(floats);
        return taken;
    }

    static std::int64_t padded(std::int64_t floats) { return round_up(floats, 16); }

private:
    float* next_;
};

}  // namespace albert_fast::ALBERT_FAST_ISA
