// What the encoder divides its work by: the batch, ranges of it, threads and their borders, and a clock of stages.
#pragma once

#include <algorithm>
#include <chrono>

#include "parallel.h"

namespace albert_fast::ALBERT_FAST_ISA {

// Rows a thread at which reading all weights for them costs more than the barriers of going by columns.
constexpr std::int64_t kFewRows = 48;

struct Batch {
    std::int64_t rows, sequences, heads;
    const std::int32_t* cu_seqlens;
    float scale, eps;
};

// The tokens that the last layer is asked for: packed rows, and where each sequence's begin among them.
struct Wanted {
    const std::int64_t* rows;
    const std::int32_t* cu_seqlens;
    std::int64_t count;
};

// Rows, panels or heads [begin, end).
struct Range {
    std::int64_t begin, end;

    std::int64_t size() const { return end - begin; }
};

// The threads that work on the same rows, and this thread's place among them: all by columns, one alone by rows.
struct Team {
    int place, size;

    Range share(std::int64_t count) const { return {count * place / size, count * (place + 1) / size}; }
};

// Where thread t of `threads` begins by rows: at a border between sequences if there is one near.
static inline std::int64_t border(const Batch& batch, std::int64_t t, std::int64_t threads) {
    const std::int64_t target = batch.rows * t / threads;
    const std::int32_t* end = batch.cu_seqlens + batch.sequences + 1;
    const std::int32_t* after = std::lower_bound(batch.cu_seqlens, end, static_cast<std::int32_t>(target));
    std::int64_t nearest = *after;
    if (after != batch.cu_seqlens && target - *(after - 1) < nearest - target) nearest = *(after - 1);
    const std::int64_t off = nearest > target ? nearest - target : target - nearest;
    return off * threads * 16 <= batch.rows ? nearest : target;
}

// What a thread's time goes to; the names are `STAGES` in albert_fast/ops/encoder.py.
enum Stage : int { kProject, kAttention, kDense, kNorm, kUp, kDown, kRounding, kCopy, kWait, kStages };

// Adds the time since the last lap to a stage; does nothing where nobody asks.
class Clock {
public:
    explicit Clock(double* seconds) : seconds_(seconds) {
        if (seconds_ != nullptr) last_ = now();
    }

    void lap(Stage stage) {
        if (seconds_ == nullptr) return;
        const double time = now();
        seconds_[stage] += time - last_;
        last_ = time;
    }

private:
    static double now() {
        return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    }

    double* seconds_;
    double last_ = 0.0;
};

static inline bool few_rows(std::int64_t rows, int threads) { return threads > 1 && rows <= kFewRows * threads; }

}  // namespace albert_fast::ALBERT_FAST_ISA
