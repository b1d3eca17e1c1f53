// How the encoder divides its work: the batch, ranges of its rows, the threads and their groups of sequences; and a
// clock that counts the time of each stage.
#pragma once

#include <algorithm>
#include <chrono>
#include <utility>
#include <vector>

#include "../layer_schema.h"
#include "parallel.h"

namespace albert_fast::ALBERT_FAST_ISA {

// Up to this many rows a thread, reading all weights costs a thread more than the barriers of working by columns.
constexpr std::int64_t kFewRows = 48;

struct Batch {
    std::int64_t rows, sequences, heads;
    const std::int32_t* cu_seqlens;
    float scale, eps;
};

// Stands for a wanted row of a sequence without tokens.
constexpr std::int64_t kNoRow = -1;

// The rows of the packed batch that the last layer is computed for, sequence by sequence.
struct WantedRows {
    const std::int64_t* rows;       // (count)
    const std::int32_t* cu_wanted;  // (sequences + 1): where each sequence's rows begin among them, and count
    std::int64_t count;
};

// Rows, panels or heads [begin, end).
struct Range {
    std::int64_t begin, end;

    std::int64_t size() const { return end - begin; }
};

// The threads that work on the same rows, and this thread's rank among them. By columns a team is all threads, by rows
// each thread is a team of its own.
struct Team {
    int rank, size;

    Range share(std::int64_t count) const { return {count * rank / size, count * (rank + 1) / size}; }
};

// The first row of thread t of `threads` by rows: at a border between sequences if one is near.
static inline std::int64_t border(const Batch& batch, std::int64_t t, std::int64_t threads) {
    const std::int64_t target = batch.rows * t / threads;
    const std::int32_t* end = batch.cu_seqlens + batch.sequences + 1;
    const std::int32_t* after = std::lower_bound(batch.cu_seqlens, end, static_cast<std::int32_t>(target));
    std::int64_t nearest = *after;
    if (after != batch.cu_seqlens && target - *(after - 1) < nearest - target) nearest = *(after - 1);
    const std::int64_t off = nearest > target ? nearest - target : target - nearest;
    return off * threads * 16 <= batch.rows ? nearest : target;
}

// Sequences [first, last) of the batch, which one thread takes through all layers by itself.
struct Group {
    std::int64_t first, last;
};

// Which groups of sequences each thread takes. Neighbouring sequences form groups of about `most` rows; the costliest
// group is assigned first, each to the thread that has least to do so far. `even` says whether all threads then have
// about the same to do.
class GroupAssignment {
public:
    GroupAssignment(const Batch& batch, std::int64_t most, double pair_cost, int threads) : groups_(threads) {
        const auto rows_to = [&](std::int64_t b) { return batch.cu_seqlens[b]; };
        std::vector<std::pair<double, Group>> all;
        double total = 0.0;
        for (std::int64_t first = 0; first < batch.sequences;) {
            double cost = 0.0;
            std::int64_t last = first;
            do {
                const double length = rows_to(last + 1) - rows_to(last);
                cost += length + pair_cost * length * length;
            } while (++last < batch.sequences && rows_to(last + 1) - rows_to(first) <= most);
            all.push_back({cost, {first, last}});
            total += cost;
            first = last;
        }
        std::stable_sort(all.begin(), all.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
        std::vector<double> load(threads, 0.0);
        for (const auto& [cost, group] : all) {
            const auto least = std::min_element(load.begin(), load.end());
            *least += cost;
            groups_[least - load.begin()].push_back(group);
        }
        even = *std::max_element(load.begin(), load.end()) * threads <= total * (1.0 + 1.0 / 16);
    }

    const std::vector<Group>& of(int thread) const { return groups_[thread]; }

    bool even;

private:
    std::vector<std::vector<Group>> groups_;
};

// Adds the time since the last lap to a stage; does nothing without a place for the seconds (Stage::kCount).
class Clock {
public:
    explicit Clock(double* seconds) : seconds_(seconds) {
        if (seconds_ != nullptr) last_ = now();
    }

    void lap(Stage::Index stage) {
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
