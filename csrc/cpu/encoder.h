// Runs the layer num_hidden_layers times in one call, without Python, without allocations and with as few barriers as
// possible between the first layer and the last. `Encoder` divides the work. Its parameter is the arithmetic of the
// products: Float32 (encoder_layer.h), or Integers (quantized_layer.h), which rounds rows where they are computed or
// just before they are multiplied.
//
// Weights are packed once and read by all layers. There are three ways to divide the work:
//
// By sequences, if they can be assigned to the threads evenly (encoder_call.h): a thread takes a group of sequences
// through all layers. The states of a group stay in its second cache, and no thread waits.
//
// By rows: a thread takes its rows of the batch through all layers. Attention needs other threads' rows if a sequence
// crosses a border between threads. A thread works on blocks of rows whose activations stay in a core's second cache.
// The feed-forward block's middle is computed and used up in slices of kSlice columns.
//
// By columns: with few rows the time goes into reading weights, so every thread takes all rows and reads its share of
// each matrix, with a barrier after each product.
//
// Sums do not depend on the way, on the number of threads or on the rest of the batch, so neither does a result.
#pragma once

#include <vector>

#include "encoder_layer.h"
#include "encoder_schedule.h"
#include "layer_norm.h"

namespace albert_fast::ALBERT_FAST_ISA {

template <class Format>
class Encoder {
    using Layer = typename Format::Layer;
    using Matrix = typename Format::Matrix;
    using Operand = typename Format::Operand;

public:
    // wanted: null for all rows. Once `region` has failed, work is skipped.
    Encoder(const Batch& batch, const Sizes& sizes, const WantedRows* wanted, int act, int threads, Region& region)
        : batch_(batch),
          sizes_(sizes),
          wanted_(wanted),
          region_(region),
          act_(act),
          threads_(threads),
          few_(0),
          row_block_(rows_of_block(sizes)),
          crossed_(few_rows(batch.rows, threads)) {
        const std::int64_t stride = sizes.stride, count = wanted == nullptr ? 0 : wanted->count;
        const std::int64_t rows = larger(batch.rows, count);
        const std::int64_t rounded = Format::operand_floats(rows, sizes.hidden);
        few_ = smaller(rows, kFewRows * threads);
        const std::int64_t work = larger(threads * work_floats(row_block_, 1), work_floats(few_, sizes.slices()));
        Arrays arrays(scratch<Purpose::kShared>(2 * Arrays::padded(rows * stride) + 2 * Arrays::padded(count * stride) +
                                                Arrays::padded(batch.rows * 3 * stride) + Arrays::padded(rounded) +
                                                work));
        hidden_ = arrays.take(batch.rows * stride);
        qkv_ = arrays.take(batch.rows * 3 * stride);
        context_ = arrays.take(rows * stride);
        residual_ = arrays.take(count * stride);
        queries_ = arrays.take(count * stride);
        // What the next product of a row reads, rounded: the states, then the context, then the states again.
        rounded_ = arrays.take(rounded);
        work_ = arrays.take(work);
        for (int t = 0; t <= threads; ++t) {
            borders_.push_back(border(batch, t, threads));
            const std::int32_t* end = batch.cu_seqlens + batch.sequences + 1;
            crossed_ =
                crossed_ || !std::binary_search(batch.cu_seqlens, end, static_cast<std::int32_t>(borders_.back()));
        }
    }

    // Allocates what a thread will need in `run`. A failure there would leave the other threads waiting at a barrier.
    void reserve() const {
        std::int64_t longest = 0;
        for (std::int64_t b = 0; b < batch_.sequences; ++b) {
            longest = larger(longest, batch_.cu_seqlens[b + 1] - batch_.cu_seqlens[b]);
        }
        const std::int64_t attention = Format::attention_floats(longest, sizes_.hidden / batch_.heads);
        scratch<Purpose::kTask>(larger(attention, round_up(sizes_.hidden, kLanes)));
    }

    // Runs one thread's work. All threads call it, inside one parallel region, after reserve().
    void run(int thread, const float* hidden, const std::vector<Layer>& layers, float* out, double* profile) const {
        Clock clock(profile == nullptr ? nullptr : profile + thread * Stage::kCount);
        const bool by_columns = few_rows(batch_.rows, threads_);
        const Team team = by_columns ? Team{thread, threads_} : Team{0, 1};
        const Range rows = by_columns ? Range{0, batch_.rows} : Range{borders_[thread], borders_[thread + 1]};
        const Range own = by_columns ? team.share(batch_.rows) : rows;
        // A head that two threads share would be prepared twice: its keys and values are rounded or packed first.
        const bool by_heads = by_columns || (crossed_ && batch_.heads % threads_ == 0);
        const Team heads = by_heads ? Team{thread, threads_} : team;
        copy_rows(hidden, sizes_.hidden, own, hidden_, sizes_.stride);
        clock.lap(Stage::kCopy);
        round(own, hidden_, layers[0].qkv(0), operand(hidden_), clock);
        barrier(by_columns, clock);
        for (std::size_t i = 0; i < layers.size(); ++i) {
            const bool whole = wanted_ == nullptr || i + 1 < layers.size();
            project(team, rows, operand(hidden_), layers[i], {whole ? 0 : 1, 3}, qkv_, 3 * sizes_.stride);
            clock.lap(Stage::kProject);
            if (!whole) return last(thread, layers[i], out, clock);
            barrier(crossed_, clock);
            attend(heads, by_heads ? Range{0, batch_.rows} : rows, {qkv_, 3 * sizes_.stride}, batch_.cu_seqlens);
            clock.lap(Stage::kAttention);
            barrier(crossed_, clock);
            const bool more = i + 1 < layers.size();
            const Matrix next = layers[more ? i + 1 : i].qkv(0);
            finish(team, work_of(thread, by_columns), rows, layers[i], hidden_, hidden_, more ? &next : nullptr, clock);
        }
        copy_rows(hidden_, sizes_.stride, own, out, sizes_.hidden);
        clock.lap(Stage::kCopy);
    }

    // Rows of a block, in whole tiles: its floats fill three quarters of the second cache, and it has at most 126 rows.
    static std::int64_t rows_of_block(const Sizes& sizes) {
        const std::int64_t row = static_cast<std::int64_t>(sizeof(float)) * (2 * sizes.stride + middle_stride(1));
        const std::int64_t tiles = second_cache_bytes() * 3 / 4 / (row * Format::kRowsOfTile);
        return smaller(larger(tiles, 1), 126 / Format::kRowsOfTile) * Format::kRowsOfTile;
    }

private:
    // A team's memory for a block of rows: attended and product (block x hidden), middle (block x columns of the
    // slices), and the rounded rows of attended and of each slice of middle.
    struct Work {
        float *attended, *product, *middle, *rounded;
        std::int64_t block, slices, middle_row;
    };

    const Batch& batch_;
    const Sizes& sizes_;
    const WantedRows* wanted_;
    Region& region_;
    int act_, threads_;
    std::int64_t few_;        // rows at most, by columns
    std::int64_t row_block_;  // by rows
    bool crossed_;            // whether a thread needs keys that another one makes
    std::vector<std::int64_t> borders_;
    float *hidden_, *qkv_, *context_, *residual_, *queries_, *rounded_, *work_;

    static std::int64_t middle_stride(std::int64_t slices) { return row_stride(slices * kSlice); }

    std::int64_t work_floats(std::int64_t block, std::int64_t slices) const {
        return 2 * Arrays::padded(block * sizes_.stride) + Arrays::padded(block * middle_stride(slices)) +
               Arrays::padded(Format::operand_floats(block, sizes_.hidden)) +
               slices * Arrays::padded(Format::operand_floats(block, kSlice));
    }

    Work work_of(int thread, bool by_columns) const {
        const std::int64_t block = by_columns ? few_ : row_block_, slices = by_columns ? sizes_.slices() : 1;
        Arrays arrays(work_ + (by_columns ? 0 : thread * work_floats(block, slices)));
        Work work{nullptr, nullptr, nullptr, nullptr, block, slices, middle_stride(slices)};
        work.attended = arrays.take(block * sizes_.stride);
        work.product = arrays.take(block * sizes_.stride);
        work.middle = arrays.take(block * work.middle_row);
        work.rounded = arrays.take(0);
        return work;
    }

    // The states or the context as the left side of a product.
    Operand operand(const float* rows) const {
        const std::int64_t count = larger(batch_.rows, wanted_ == nullptr ? 0 : wanted_->count);
        return Format::operand(rows, sizes_.stride, rounded_, count, sizes_.hidden);
    }

    Operand attended(const Work& work) const {
        return Format::operand(work.attended, sizes_.stride, work.rounded, work.block, sizes_.hidden);
    }

    // A slice of middle as the left side of a product; slices count from the first that the team holds.
    Operand middle(const Work& work, std::int64_t slice) const {
        float* memory = work.rounded + Arrays::padded(Format::operand_floats(work.block, sizes_.hidden)) +
                        slice * Arrays::padded(Format::operand_floats(work.block, kSlice));
        return Format::operand(work.middle + slice * kSlice, work.middle_row, memory, work.block, kSlice);
    }

    // Rounds rows of floats, one stride apart, for their product with `matrix`.
    void round(Range rows, const float* from, const Matrix& matrix, const Operand& to, Clock& clock) const {
        if constexpr (Format::kRounds) {
            for (std::int64_t row = rows.begin; row < rows.end; ++row) {
                Format::round(from + row * sizes_.stride, matrix, to, row);
            }
            clock.lap(Stage::kRounding);
        }
    }

    static void barrier([[maybe_unused]] bool needed, [[maybe_unused]] Clock& clock) {
#if defined(_OPENMP)
        if (needed) {
#pragma omp barrier
            clock.lap(Stage::kWait);
        }
#endif
    }

    static void copy_rows(const float* from, std::int64_t from_row, Range rows, float* to, std::int64_t to_row) {
        const std::size_t bytes = sizeof(float) * static_cast<std::size_t>(smaller(from_row, to_row));
        for (std::int64_t row = rows.begin; row < rows.end; ++row) {
            __builtin_memcpy(to + row * to_row, from + row * from_row, bytes);
        }
    }

    // body(block) for `rows` in even blocks of whole tiles, at most `most` rows each.
    template <class Body>
    static void in_blocks(Range rows, std::int64_t most, Body body) {
        constexpr std::int64_t kTile = Format::kRowsOfTile;
        const std::int64_t tiles = divide_up(rows.size(), kTile), count = divide_up(rows.size(), most);
        const auto begin = [&](std::int64_t i) { return smaller(rows.begin + tiles * i / count * kTile, rows.end); };
        for (std::int64_t i = 0; i < count; ++i) body(Range{begin(i), begin(i + 1)});
    }

    // to = the products of the rows of `from` with those of query, key and value (0, 1, 2) that `parts` names. Each of
    // them begins at a whole panel.
    void project(Team team, Range rows, const Operand& from, const Layer& layer, Range parts, float* to,
                 std::int64_t to_row) const {
        const std::int64_t hidden = sizes_.hidden, panels = sizes_.panels();
        const Range mine = team.share(parts.size() * panels);
        in_blocks(rows, row_block_, [&](Range block) {
            if (region_.stopped()) return;
            for (std::int64_t part = parts.begin; part < parts.end; ++part) {
                const std::int64_t offset = (part - parts.begin) * panels;
                const float* bias = layer.vectors.qkv_bias[part];
                float* target = to + block.begin * to_row + part * sizes_.stride;
                Format::product(
                    from.from(block.begin), block.size(), layer.qkv(part), larger(mine.begin - offset, 0),
                    smaller(mine.end - offset, panels), [&](std::int64_t row, std::int64_t column, Vec sum) {
                        store(target + row * to_row + column, sum + load_padded(bias, column, hidden), Full{});
                    });
            }
        });
    }

    // context_ = attention of the queries `rows`; cu_queries says where each sequence's queries begin.
    void attend(Team team, Range rows, Rows<const float> queries, const std::int32_t* cu_queries) const {
        const std::int64_t stride = sizes_.stride;
        const Shape shape{batch_.sequences, batch_.heads, sizes_.hidden / batch_.heads, cu_queries, batch_.cu_seqlens};
        const Inputs<float> in{
            queries,        {qkv_ + stride, 3 * stride}, {qkv_ + 2 * stride, 3 * stride}, shape, batch_.scale,
            Dropout(0.0, 0)};
        const Range heads = team.share(batch_.heads);
        const std::int32_t* end = cu_queries + batch_.sequences + 1;
        std::int64_t b = std::upper_bound(cu_queries, end, static_cast<std::int32_t>(rows.begin)) - cu_queries - 1;
        for (; b < batch_.sequences && cu_queries[b] < rows.end; ++b) {
            for (std::int64_t number = heads.begin; number < heads.end; ++number) {
                const Head head = Head(shape, b, number).within(rows.begin, rows.end);
                if (head.queries > 0 && !region_.stopped()) Format::attention(in, head, Rows<float>{context_, stride});
            }
        }
    }

    // to = LayerNorm(product + bias + residual) for rows one stride apart; also rounds each row for `matrix`, unless
    // null.
    void add_norm(Range rows, const float* product, const float* bias, const float* residual, const float* weight,
                  const float* norm_bias, float* to, const Matrix* matrix, const Operand& rounded) const {
        const std::int64_t n = sizes_.hidden, stride = sizes_.stride;
        float* line = scratch<Purpose::kTask>(round_up(n, kLanes));  // see reserve(): this allocates nothing
        for (std::int64_t row = rows.begin; row < rows.end; ++row) {
            const RowStatistics statistics = normalise_row(line, n, batch_.eps, [&](std::int64_t i, auto lanes) {
                const Vec sum = load(product + row * stride + i, lanes) + load(bias + i, lanes);
                return sum + load(residual + row * stride + i, lanes);
            });
            scale_row(line, n, statistics, weight, norm_bias,
                      [&](std::int64_t i, Vec y, auto lanes) { store(to + row * stride + i, y, lanes); });
            if (matrix != nullptr) Format::round(to + row * stride, *matrix, rounded, row);
        }
    }

    // The rest of a layer after attention: a = LayerNorm(dense(context_) + residual), to = LayerNorm(FFN(a) + a).
    // Rounds `to` for the next layer's product, unless `next` is null.
    void finish(Team team, const Work& work, Range rows, const Layer& layer, const float* residual, float* to,
                const Matrix* next, Clock& clock) const {
        const std::int64_t stride = sizes_.stride;
        const LayerVectors& vectors = layer.vectors;
        const Range panels = team.share(sizes_.panels());
        const bool shared = team.size > 1;
        in_blocks(rows, work.block, [&](Range block) {
            const std::int64_t count = block.size(), offset = block.begin * stride;
            const Range mine = team.share(count), mine_of_all{block.begin + mine.begin, block.begin + mine.end};
            const auto into_product = [&](std::int64_t row, std::int64_t column, Vec sum) {
                store(work.product + row * stride + column, sum, Full{});
            };
            const auto onto_product = [&](std::int64_t row, std::int64_t column, Vec sum) {
                float* target = work.product + row * stride + column;
                store(target, load(target, Full{}) + sum, Full{});
            };
            round(mine_of_all, context_, layer.dense(), operand(context_), clock);
            barrier(shared && Format::kRounds, clock);
            if (!region_.stopped()) {
                Format::product(operand(context_).from(block.begin), count, layer.dense(), panels.begin, panels.end,
                                into_product);
            }
            clock.lap(Stage::kDense);
            barrier(shared, clock);
            const Matrix up = layer.ffn(0);
            add_norm(mine, work.product, vectors.dense_bias, residual + offset, vectors.norm_weight, vectors.norm_bias,
                     work.attended, &up, attended(work));
            clock.lap(Stage::kNorm);
            barrier(shared, clock);
            for (std::int64_t first = 0; first < sizes_.slices(); first += work.slices) {
                const std::int64_t last = smaller(first + work.slices, sizes_.slices());
                for (std::int64_t slice = first; slice < last; ++slice) {
                    fill_middle(team, work, count, layer, slice, work.middle + (slice - first) * kSlice);
                }
                clock.lap(Stage::kUp);
                barrier(shared, clock);
                if constexpr (Format::kRounds) {
                    for (std::int64_t slice = first; slice < last; ++slice) {
                        for (std::int64_t row = mine.begin; row < mine.end; ++row) {
                            Format::round(work.middle + row * work.middle_row + (slice - first) * kSlice,
                                          layer.ffn_output(slice), middle(work, slice - first), row);
                        }
                    }
                    clock.lap(Stage::kRounding);
                    barrier(shared, clock);
                }
                for (std::int64_t slice = first; slice < last && !region_.stopped(); ++slice) {
                    const Operand from = middle(work, slice - first);
                    const Matrix matrix = layer.ffn_output(slice);
                    if (slice == 0) {
                        Format::product(from, count, matrix, panels.begin, panels.end, into_product);
                    } else {
                        Format::product(from, count, matrix, panels.begin, panels.end, onto_product);
                    }
                }
                clock.lap(Stage::kDown);
            }
            barrier(shared, clock);
            add_norm(mine, work.product, vectors.ffn_output_bias, work.attended, vectors.full_norm_weight,
                     vectors.full_norm_bias, to + offset, next, operand(to).from(block.begin));
            clock.lap(Stage::kNorm);
            barrier(shared, clock);
        });
    }

    // to (rows x slice) = act(attended W^T + bias).
    void fill_middle(Team team, const Work& work, std::int64_t rows, const Layer& layer, std::int64_t slice,
                     float* to) const {
        const std::int64_t begin = slice * kSlice;
        const Range panels = team.share(divide_up(sizes_.slice_columns(slice), sizes_.panel));
        if (region_.stopped()) return;
        with_activation(act_, [&](auto act) {
            Format::product(attended(work), rows, layer.ffn(slice), panels.begin, panels.end,
                            [&](std::int64_t row, std::int64_t column, Vec sum) {
                                const Vec b = load_padded(layer.vectors.ffn_bias, begin + column, sizes_.middle);
                                store(to + row * work.middle_row + column, decltype(act)::forward(sum + b), Full{});
                            });
        });
    }

    // The last layer for the wanted rows, after the keys and values of all rows.
    void last(int thread, const Layer& layer, float* out, Clock& clock) const {
        const std::int64_t stride = sizes_.stride;
        const bool by_columns = few_rows(wanted_->count, threads_);
        const Team team = by_columns ? Team{thread, threads_} : Team{0, 1};
        const Range own = Team{thread, threads_}.share(wanted_->count);
        const Range rows = by_columns ? Range{0, wanted_->count} : own;
        barrier(threads_ > 1, clock);
        for (std::int64_t row = own.begin; row < own.end; ++row) {
            if (wanted_->rows[row] == kNoRow) {
                __builtin_memset(residual_ + row * stride, 0, sizeof(float) * static_cast<std::size_t>(stride));
            } else {
                copy_rows(hidden_ + wanted_->rows[row] * stride, stride, {0, 1}, residual_ + row * stride, stride);
            }
        }
        clock.lap(Stage::kCopy);
        round(own, residual_, layer.qkv(0), operand(residual_), clock);
        barrier(by_columns, clock);
        project(team, rows, operand(residual_), layer, {0, 1}, queries_, stride);
        clock.lap(Stage::kProject);
        barrier(by_columns, clock);
        attend(team, rows, {queries_, stride}, wanted_->cu_wanted);
        clock.lap(Stage::kAttention);
        barrier(by_columns, clock);
        finish(team, work_of(thread, by_columns), rows, layer, residual_, residual_, nullptr, clock);
        copy_rows(residual_, stride, own, out, sizes_.hidden);
        clock.lap(Stage::kCopy);
    }
};

}  // namespace albert_fast::ALBERT_FAST_ISA
