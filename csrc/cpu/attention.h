// What the forward and the backward pass of attention share: where tensors stand, the blocks of queries, the order of
// the tasks, and the packing of a head's rows into aligned float32.
//
// Scores are kept transposed, one row for each key and one column for each query of a block: then softmax runs over
// vectors of queries with no sum across lanes, keys need no transpose, and products with P and with P^T read the same
// array.
#pragma once

#include "choose.h"
#include "dropout.h"
#include "gemm.h"
#include "parallel.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace albert_fast::ALBERT_FAST_ISA {

// 48 queries are 8 tiles of 6 rows for P V, and 3 vectors of 16 for the scores.
constexpr std::int64_t kQueryBlock = 48;
// Rows of the hash for head h start at h * kHeadStride.
constexpr std::uint32_t kHeadStride = 0x10001u;

// A (tokens, heads * head_dim) tensor whose rows are `stride` elements apart.
template <class T>
struct Rows {
    T* data;
    std::int64_t stride;

    T* at(std::int64_t token, std::int64_t column) const { return data + token * stride + column; }
};

struct Shape {
    std::int64_t sequences, heads, head_dim;
    const std::int32_t *cu_q, *cu_k;

    std::int64_t queries(std::int64_t sequence) const { return cu_q[sequence + 1] - cu_q[sequence]; }
    std::int64_t keys(std::int64_t sequence) const { return cu_k[sequence + 1] - cu_k[sequence]; }
    std::int64_t all_queries() const { return cu_q[sequences]; }
};

// The sequences from the most work to the least (in 64 steps), so that no thread starts a long one last.
static inline const std::int32_t* longest_first(const Shape& shape) {
    constexpr int kSteps = 64;
    const auto cost = [&](std::int64_t b) { return static_cast<double>(shape.queries(b)) * shape.keys(b); };
    double most = 1.0;
    for (std::int64_t b = 0; b < shape.sequences; ++b) most = cost(b) > most ? cost(b) : most;
    const auto step = [&](std::int64_t b) { return kSteps - 1 - static_cast<int>(cost(b) / most * (kSteps - 1)); };
    std::int64_t first[kSteps + 1] = {};
    for (std::int64_t b = 0; b < shape.sequences; ++b) ++first[step(b) + 1];
    for (int i = 0; i < kSteps; ++i) first[i + 1] += first[i];
    std::int32_t* order = reinterpret_cast<std::int32_t*>(scratch<Purpose::kShared>(shape.sequences));
    for (std::int64_t b = 0; b < shape.sequences; ++b) order[first[step(b)]++] = static_cast<std::int32_t>(b);
    return order;
}

// The queries of a sequence in blocks of whole vectors, as even as that allows.
static inline Chunks query_blocks(std::int64_t queries) {
    return Chunks(queries, 1, larger(divide_up(queries, kQueryBlock), 1), kLanes);
}

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
