// Runs one call of an encoder. Either each thread takes groups of sequences through all layers by itself, or all
// threads work together on one Encoder.
#pragma once

#include <optional>
#include <vector>

#include "../encoder_arguments.h"
#include "encoder.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace albert_fast::ALBERT_FAST_ISA {

// The arguments of a call, as pointers and records of the encoder.
class EncoderCall {
public:
    const float* hidden;
    float* out;
    const std::int64_t *table, *layer_indices;
    std::int64_t steps;
    Batch batch;
    int act;
    double* profile;
    int num_threads;

    explicit EncoderCall(const EncoderArguments& from)
        : hidden(pointer<float>(from.hidden)),
          out(pointer<float>(from.out)),
          table(pointer<std::int64_t>(from.table)),
          layer_indices(pointer<std::int64_t>(from.layer_indices)),
          steps(from.steps),
          batch{from.T,
                from.B,
                from.num_heads,
                pointer<std::int32_t>(from.cu_seqlens),
                static_cast<float>(from.softmax_scale),
                static_cast<float>(from.eps)},
          act(from.act),
          profile(pointer<double>(from.profile)),
          num_threads(from.num_threads),
          wanted_{pointer<std::int64_t>(from.wanted_rows), pointer<std::int32_t>(from.cu_wanted), from.wanted_count} {}

    // The rows that the last layer is computed for; null: all.
    const WantedRows* wanted() const { return wanted_.cu_wanted == nullptr ? nullptr : &wanted_; }

    // Whether cu_seqlens, cu_wanted and wanted_rows are as kernels.h asks. Then wanted rows of sequences without tokens
    // have become kNoRow.
    bool prepare() {
        if (!is_ranges(batch.cu_seqlens, batch.sequences, batch.rows, batch.rows)) return false;
        if (wanted() == nullptr) return true;
        if (!is_ranges(wanted_.cu_wanted, batch.sequences, wanted_.count, wanted_.count)) return false;
        rows_.assign(wanted_.rows, wanted_.rows + wanted_.count);
        for (std::int64_t b = 0; b < batch.sequences; ++b) {
            const std::int64_t begin = batch.cu_seqlens[b], end = batch.cu_seqlens[b + 1];
            for (std::int64_t i = wanted_.cu_wanted[b]; i < wanted_.cu_wanted[b + 1]; ++i) {
                if (begin == end) {
                    rows_[i] = kNoRow;
                } else if (rows_[i] < begin || rows_[i] >= end) {
                    return false;
                }
            }
        }
        wanted_.rows = rows_.data();
        return true;
    }

private:
    WantedRows wanted_;
    std::vector<std::int64_t> rows_;
};

// Runs all layers for one group of sequences on one thread: their states stay in its second cache from layer to layer.
template <class Format>
static inline void run_group(const EncoderCall& call, const Sizes& sizes,
                             const std::vector<typename Format::Layer>& layers, Group group, double* profile,
                             Region& region) {
    const std::int32_t* cu = call.batch.cu_seqlens + group.first;
    const std::int64_t sequences = group.last - group.first, first_row = cu[0];
    std::vector<std::int32_t> cu_seqlens, cu_wanted;
    std::vector<std::int64_t> wanted_rows;
    for (std::int64_t b = 0; b <= sequences; ++b) cu_seqlens.push_back(cu[b] - cu[0]);
    const Batch batch{cu_seqlens.back(), sequences,        call.batch.heads,
                      cu_seqlens.data(), call.batch.scale, call.batch.eps};
    WantedRows wanted{};
    std::int64_t first_out = first_row;
    if (const WantedRows* all = call.wanted()) {
        const std::int32_t* cu_all = all->cu_wanted + group.first;
        first_out = cu_all[0];
        for (std::int64_t b = 0; b <= sequences; ++b) cu_wanted.push_back(cu_all[b] - cu_all[0]);
        for (std::int64_t i = 0; i < cu_wanted.back(); ++i) {
            const std::int64_t row = all->rows[first_out + i];
            wanted_rows.push_back(row == kNoRow ? kNoRow : row - first_row);
        }
        wanted = {wanted_rows.data(), cu_wanted.data(), cu_wanted.back()};
    }
    const Encoder<Format> encoder(batch, sizes, call.wanted() == nullptr ? nullptr : &wanted, call.act, 1, region);
    encoder.reserve();
    encoder.run(0, call.hidden + first_row * sizes.hidden, layers, call.out + first_out * sizes.hidden, profile);
}

template <class Format>
static inline void run_encoder(const EncoderCall& call, const Sizes& sizes) {
    std::vector<typename Format::Layer> layers;
    for (std::int64_t i = 0; i < call.steps; ++i) {
        layers.emplace_back(call.table + call.layer_indices[i] * Format::Layer::kTableColumns, sizes);
    }
    // A key costs a query 4 H operations, the products of a row cost 2 (4 H^2 + 2 H I): their ratio.
    const double pair_cost = 1.0 / static_cast<double>(2 * sizes.hidden + sizes.middle);
    const std::int64_t block_rows = Encoder<Format>::rows_of_block(sizes);
    const int threads = static_cast<int>(larger(smaller(call.num_threads, call.batch.rows), 1));
    Region region;
    const auto run_groups = [&](const GroupAssignment& groups, int thread, double* profile) {
        for (const Group& group : groups.of(thread)) {
            region.run([&] { run_group<Format>(call, sizes, layers, group, profile, region); });
        }
    };
#if defined(_OPENMP)
    if (threads > 1) {
        const GroupAssignment groups(call.batch, block_rows, pair_cost, threads);
        std::optional<const Encoder<Format>> together;
        if (few_rows(call.batch.rows, threads) || !groups.even) {
            together.emplace(call.batch, sizes, call.wanted(), call.act, threads, region);
        }
        bool done = true;
        std::atomic<int> ready{0};
#pragma omp parallel num_threads(threads)
        {
            const int thread = omp_get_thread_num();
            if (omp_get_num_threads() != threads) {
                if (thread == 0) done = false;  // inside another parallel region, or at the limit of threads
            } else if (together) {
                ready += region.run([&] { together->reserve(); });
                // All threads run or none: behind the barrier the count does not change any more.
#pragma omp barrier
                if (ready == threads) together->run(thread, call.hidden, layers, call.out, call.profile);
            } else {
                run_groups(groups, thread, call.profile == nullptr ? nullptr : call.profile + thread * Stage::kCount);
            }
        }
        if (done) return region.finish();
    }
#endif
    run_groups(GroupAssignment(call.batch, block_rows, pair_cost, 1), 0, call.profile);
    region.finish();
}

}  // namespace albert_fast::ALBERT_FAST_ISA
