// Sums over the rows of an array, for the gradients of biases and LayerNorm weights.
//
// The rows are divided into chunks, which depend only on their number. A chunk adds four rows at a time in registers,
// and these to its own row of partial sums. The partial sums are added in the order of the chunks. So the result does
// not depend on the number of threads, and its error grows with the length of a chunk, not with the number of rows.
#pragma once

#include "parallel.h"

namespace albert_fast::ALBERT_FAST_ISA {

constexpr int kRowGroup = 4;

static inline Chunks summation_chunks(std::int64_t rows) { return Chunks(rows, 16, 64, kRowGroup); }

// Zeroed partial sums of `arrays` arrays of n columns for every chunk.
class ColumnSums {
public:
    ColumnSums(const Chunks& chunks, int arrays, std::int64_t n)
        : chunks_(chunks.count), arrays_(arrays), n_(n), width_(round_up(n, kLanes)) {
        partial_ = scratch<Purpose::kShared>(chunks_ * arrays_ * width_);
    }

    // The partial sums of one array in one chunk; zeroed once by the chunk's task through clear().
    float* row(std::int64_t chunk, int array) const { return partial_ + (chunk * arrays_ + array) * width_; }

    void clear(std::int64_t chunk) const { __builtin_memset(row(chunk, 0), 0, sizeof(float) * arrays_ * width_); }

    // sums (n) = the partial sums of an array, added in the order of the chunks.
    void finish(int array, float* sums, int num_threads) const {
        const Chunks slices(n_, larger(65536 / larger(chunks_, 1), 1), 1 << 20, kLanes);
        parallel_for(slices.count, num_threads, [&](std::int64_t slice) {
            const std::int64_t begin = slices.begin(slice);
            for_vectors(slices.end(slice) - begin, [&](std::int64_t i, auto lanes) {
                Vec total{};
                for (std::int64_t c = 0; c < chunks_; ++c) total += load(row(c, array) + begin + i, Full{});
                store(sums + begin + i, total, lanes);
            });
        });
    }

private:
    std::int64_t chunks_, arrays_, n_, width_;
    float* partial_;
};

static inline void add_to(float* sums, Vec x) { store(sums, load(sums, Full{}) + x, Full{}); }

}  // namespace albert_fast::ALBERT_FAST_ISA
