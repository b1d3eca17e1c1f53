// A call of an encoder, and how its batch is shared out: groups of sequences that a thread takes through all layers by
// itself, or all threads together on one Encoder.
#pragma once

#include <optional>
#include <vector>

#include "encoder.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace albert_fast::ALBERT_FAST_ISA {

// What encoder_fwd_cpu and quantized_encoder_fwd_cpu are given: see kernels.h.
class EncoderCall {
public:
    const float* x;
    float* out;
    const std::int64_t *table, *order;
    std::int64_t layers;
    Batch batch;
    Wanted wanted;  // without a cu_seqlens where all rows are
    int act;
    double* profile;
    int num_threads;

    EncoderCall(Address x, Address out, Address table, Address order, std::int64_t layers, Address cu_seqlens,
                std::int64_t B, std::int64_t T, Address wanted_rows, Address cu_wanted, std::int64_t wanted_count,
                std::int64_t num_heads, double scale, double eps, int act, Address profile, int num_threads)
        : x(pointer<float>(x)),
          out(pointer<float>(out)),
          table(pointer<std::int64_t>(table)),
          order(pointer<std::int64_t>(order)),
          layers(layers),
          batch{T, B, num_heads, pointer<std::int32_t>(cu_seqlens), static_cast<float>(scale), static_cast<float>(eps)},
          wanted{pointer<std::int64_t>(wanted_rows), pointer<std::int32_t>(cu_wanted), wanted_count},
          act(act),
          profile(pointer<double>(profile)),
          num_threads(num_threads) {}

    const Wanted* asked() const { return wanted.cu_seqlens == nullptr ? nullptr : &wanted; }

    // Whether ranges and rows lie where kernels.h says; then a row of a sequence without tokens is kNoRow.
    bool prepare() {
        if (!is_ranges(batch.cu_seqlens, batch.sequences, batch.rows, batch.rows)) return false;
        if (asked() == nullptr) return true;
        if (!is_ranges(wanted.cu_seqlens, batch.sequences, wanted.count, wanted.count)) return false;
        rows_.assign(wanted.rows, wanted.rows + wanted.count);
        for (std::int64_t b = 0; b < batch.sequences; ++b) {
            const std::int64_t begin = batch.cu_seqlens[b], end = batch.cu_seqlens[b + 1];
            for (std::int64_t i = wanted.cu_seqlens[b]; i < wanted.cu_seqlens[b + 1]; ++i) {
                if (begin == end) {
                    rows_[i] = kNoRow;
                } else if (rows_[i] < begin || rows_[i] >= end) {
                    return false;
                }
            }
        }
        wanted.rows = rows_.data();
        return true;
    }

private:
    std::vector<std::int64_t> rows_;
};

// All layers for one group of sequences, on one thread: their states stay in its second cache from layer to layer.
template <class Format>
static inline void run_group(const EncoderCall& call, const Sizes& sizes,
                             const std::vector<typename Format::Layer>& layers, Group group, double* profile,
                             Region& region) {
    const std::int32_t* cu = call.batch.cu_seqlens + group.first;
    const std::int64_t sequences = group.last - group.first, first_row = cu[0];
    std::vector<std::int32_t> borders, wanted_borders;
    std::vector<std::int64_t> wanted_rows;
    for (std::int64_t b = 0; b <= sequences; ++b) borders.push_back(cu[b] - cu[0]);
    const Batch batch{borders.back(), sequences, call.batch.heads, borders.data(), call.batch.scale, call.batch.eps};
    Wanted wanted{};
    std::int64_t first_out = first_row;
    if (call.asked() != nullptr) {
        const std::int32_t* cu_wanted = call.wanted.cu_seqlens + group.first;
        first_out = cu_wanted[0];
        for (std::int64_t b = 0; b <= sequences; ++b) wanted_borders.push_back(cu_wanted[b] - cu_wanted[0]);
        for (std::int64_t i = 0; i < wanted_borders.back(); ++i) {
            const std::int64_t row = call.wanted.rows[first_out + i];
            wanted_rows.push_back(row == kNoRow ? kNoRow : row - first_row);
        }
        wanted = {wanted_rows.data(), wanted_borders.data(), wanted_borders.back()};
    }
    const Encoder<Format> encoder(batch, sizes, call.asked() == nullptr ? nullptr : &wanted, call.act, 1, region);
    encoder.reserve();
    encoder.run(0, call.x + first_row * sizes.hidden, layers, call.out + first_out * sizes.hidden, profile);
}

template <class Format>
static inline void run_encoder(const EncoderCall& call, const Sizes& sizes) {
    std::vector<typename Format::Layer> layers;
    for (std::int64_t i = 0; i < call.layers; ++i) {
        layers.emplace_back(call.table + call.order[i] * Format::Layer::kSlots, sizes);
    }
    // Attention's share of a row's operations, a key: 4 H of 2 (4 H^2 + 2 H I).
    const double pair_cost = 1.0 / static_cast<double>(2 * sizes.hidden + sizes.middle);
    const std::int64_t most = Encoder<Format>::rows_of_block(sizes);
    const int threads = static_cast<int>(larger(smaller(call.num_threads, call.batch.rows), 1));
    Region region;
    const auto run_groups = [&](const Deal& deal, int thread, double* profile) {
        for (const Group& group : deal.of(thread)) {
            region.run([&] { run_group<Format>(call, sizes, layers, group, profile, region); });
        }
    };
#if defined(_OPENMP)
    if (threads > 1) {
        const Deal deal(call.batch, most, pair_cost, threads);
        std::optional<const Encoder<Format>> together;
        if (few_rows(call.batch.rows, threads) || !deal.even) {
            together.emplace(call.batch, sizes, call.asked(), call.act, threads, region);
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
                // Threads must agree to run: behind the barrier no thread changes the count any more.
#pragma omp barrier
                if (ready == threads) together->run(thread, call.x, layers, call.out, call.profile);
            } else {
                run_groups(deal, thread, call.profile == nullptr ? nullptr : call.profile + thread * kStages);
            }
        }
        if (done) return region.finish();
    }
#endif
    run_groups(Deal(call.batch, most, pair_cost, 1), 0, call.profile);
    region.finish();
}

}  // namespace albert_fast::ALBERT_FAST_ISA
