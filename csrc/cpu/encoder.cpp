// The shared layer, all num_hidden_layers times, in one call: no Python, no allocation and as few barriers as can be
// between the first layer and the last.
//
// Weights are packed once (packed_gemm.h) and read by all layers. Two ways to share the work:
//
// By rows: a thread takes its rows of the batch through all layers. Only attention needs rows of others, and only where
// a sequence goes across a border between threads; borders are laid between sequences where that costs little balance,
// and then no thread ever waits. Rows go in blocks whose activations stay in a core's second cache, the feed-forward
// block's middle among them, which is made and used up in slices of kSlice columns.
//
// By columns: few rows leave all time to the reading of weights, so every thread takes all rows and reads its share of
// each matrix, with a barrier after each product.
//
// Sums do not depend on the way, the threads or the rest of the batch: a sequence's result is bitwise the same.
#include <algorithm>
#include <chrono>
#include <vector>

#include "attention_forward.h"
#include "encoder_layer.h"
#include "kernels.h"
#include "layer_norm.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

// Tiles of rows in a block, 126 rows on AVX-512: rows x (2 H + kSlice) floats stay below 2 MiB for H = 768.
constexpr std::int64_t kBlockTiles = 9;
constexpr std::int64_t kRowBlock = kBlockTiles * kPackedRows;
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
std::int64_t border(const Batch& batch, std::int64_t t, std::int64_t threads) {
    const std::int64_t target = batch.rows * t / threads;
    const std::int32_t* end = batch.cu_seqlens + batch.sequences + 1;
    const std::int32_t* after = std::lower_bound(batch.cu_seqlens, end, static_cast<std::int32_t>(target));
    std::int64_t nearest = *after;
    if (after != batch.cu_seqlens && target - *(after - 1) < nearest - target) nearest = *(after - 1);
    const std::int64_t off = nearest > target ? nearest - target : target - nearest;
    return off * threads * 16 <= batch.rows ? nearest : target;
}

// What a thread's time goes to; the names are `STAGES` in albert_fast/ops/encoder.py.
enum Stage : int { kProject, kAttention, kDense, kNorm, kUp, kDown, kCopy, kWait, kStages };

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

bool few_rows(std::int64_t rows, int threads) { return threads > 1 && rows <= kFewRows * threads; }

class Encoder {
public:
    // `wanted` may be null: all rows.
    Encoder(const Batch& batch, const Sizes& sizes, const Wanted* wanted, int act, int threads)
        : batch_(batch),
          sizes_(sizes),
          wanted_(wanted),
          act_(act),
          threads_(threads),
          few_(0),
          crossed_(few_rows(batch.rows, threads)) {
        const std::int64_t stride = sizes.stride, count = wanted == nullptr ? 0 : wanted->count;
        const std::int64_t rows = larger(batch.rows, count);
        const auto work_floats = [&](std::int64_t block, std::int64_t slices) {
            return 2 * Arrays::padded(block * stride) + Arrays::padded(block * middle_stride(slices));
        };
        few_ = smaller(rows, kFewRows * threads);
        const std::int64_t work = larger(threads * work_floats(kRowBlock, 1), work_floats(few_, sizes.slices()));
        Arrays arrays(scratch<Purpose::kShared>(2 * Arrays::padded(rows * stride) + 2 * Arrays::padded(count * stride) +
                                                Arrays::padded(batch.rows * 3 * stride) + work));
        hidden_ = arrays.take(batch.rows * stride);
        qkv_ = arrays.take(batch.rows * 3 * stride);
        context_ = arrays.take(rows * stride);
        residual_ = arrays.take(count * stride);
        queries_ = arrays.take(count * stride);
        work_ = arrays.take(work);
        for (int t = 0; t <= threads; ++t) {
            borders_.push_back(border(batch, t, threads));
            const std::int32_t* end = batch.cu_seqlens + batch.sequences + 1;
            crossed_ =
                crossed_ || !std::binary_search(batch.cu_seqlens, end, static_cast<std::int32_t>(borders_.back()));
        }
    }

    // What one thread does; all threads call it, inside one parallel region.
    void run(int thread, const float* x, const std::vector<Layer>& layers, float* out, double* profile) const {
        Clock clock(profile == nullptr ? nullptr : profile + thread * kStages);
        const bool by_columns = few_rows(batch_.rows, threads_);
        const Team team = by_columns ? Team{thread, threads_} : Team{0, 1};
        const Range rows = by_columns ? Range{0, batch_.rows} : Range{borders_[thread], borders_[thread + 1]};
        const Range own = by_columns ? team.share(batch_.rows) : rows;
        copy_rows(x, sizes_.hidden, own, hidden_, sizes_.stride);
        clock.lap(kCopy);
        barrier(by_columns, clock);
        for (std::size_t i = 0; i < layers.size(); ++i) {
            const bool whole = wanted_ == nullptr || i + 1 < layers.size();
            project(team, rows, hidden_, sizes_.stride, layers[i], {whole ? 0 : 1, 3}, qkv_, 3 * sizes_.stride);
            clock.lap(kProject);
            if (!whole) return last(thread, layers[i], out, clock);
            barrier(crossed_, clock);
            attend(team, rows, {qkv_, 3 * sizes_.stride}, batch_.cu_seqlens);
            clock.lap(kAttention);
            barrier(crossed_, clock);
            finish(team, work_of(thread, by_columns), rows, layers[i], hidden_, hidden_, clock);
        }
        copy_rows(hidden_, sizes_.stride, own, out, sizes_.hidden);
        clock.lap(kCopy);
    }

private:
    // What a team needs beside the rows: attended and product (block x hidden), middle (block x columns of the slices).
    struct Work {
        float *attended, *product, *middle;
        std::int64_t block, slices, middle_row;
    };

    const Batch& batch_;
    const Sizes& sizes_;
    const Wanted* wanted_;
    int act_, threads_;
    std::int64_t few_;  // rows at most, by columns
    bool crossed_;      // whether a thread needs keys that another one makes
    std::vector<std::int64_t> borders_;
    float *hidden_, *qkv_, *context_, *residual_, *queries_, *work_;

    static std::int64_t middle_stride(std::int64_t slices) { return row_stride(slices * kSlice); }

    Work work_of(int thread, bool by_columns) const {
        const std::int64_t block = by_columns ? few_ : kRowBlock, slices = by_columns ? sizes_.slices() : 1;
        const std::int64_t rows = Arrays::padded(block * sizes_.stride), row = middle_stride(slices);
        float* memory = work_ + (by_columns ? 0 : thread * (2 * rows + Arrays::padded(block * row)));
        return {memory, memory + rows, memory + 2 * rows, block, slices, row};
    }

    static void barrier([[maybe_unused]] bool needed, [[maybe_unused]] Clock& clock) {
#if defined(_OPENMP)
        if (needed) {
#pragma omp barrier
            clock.lap(kWait);
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
        const std::int64_t tiles = divide_up(rows.size(), kPackedRows), count = divide_up(rows.size(), most);
        const auto begin = [&](std::int64_t i) {
            return smaller(rows.begin + tiles * i / count * kPackedRows, rows.end);
        };
        for (std::int64_t i = 0; i < count; ++i) body(Range{begin(i), begin(i + 1)});
    }

    // The parts `parts` of query, key and value (0, 1, 2) of rows of `from`, one after another from each whole panel
    // on.
    void project(Team team, Range rows, const float* from, std::int64_t from_row, const Layer& layer, Range parts,
                 float* to, std::int64_t to_row) const {
        const std::int64_t hidden = sizes_.hidden, panels = sizes_.panels();
        const Range mine = team.share(parts.size() * panels);
        in_blocks(rows, kRowBlock, [&](Range block) {
            for (std::int64_t part = parts.begin; part < parts.end; ++part) {
                const std::int64_t offset = (part - parts.begin) * panels;
                const float* bias = layer.qkv_bias + part * hidden;
                float* target = to + block.begin * to_row + part * sizes_.stride;
                packed_product(from + block.begin * from_row, from_row, block.size(), layer.qkv + part * sizes_.dense(),
                               hidden, larger(mine.begin - offset, 0), smaller(mine.end - offset, panels),
                               [&](std::int64_t row, std::int64_t column, Vec sum) {
                                   store(target + row * to_row + column, sum + load_padded(bias, column, hidden),
                                         Full{});
                               });
            }
        });
    }

    // context_ = attention of the queries `rows`, which begin at cu_queries, to the keys of their sequences.
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
                if (head.queries > 0) forward_task<false>(in, head, 0, 1, Rows<float>{context_, stride}, nullptr);
            }
        }
    }

    // to = LayerNorm(product + bias + residual) for rows one stride apart.
    void add_norm(Range rows, const float* product, const float* bias, const float* residual, const float* weight,
                  const float* norm_bias, float* to) const {
        const std::int64_t n = sizes_.hidden, stride = sizes_.stride;
        float* line = scratch<Purpose::kTask>(round_up(n, kLanes));
        for (std::int64_t row = rows.begin; row < rows.end; ++row) {
            const RowStatistics statistics = normalise_row(line, n, batch_.eps, [&](std::int64_t i, auto lanes) {
                const Vec sum = load(product + row * stride + i, lanes) + load(bias + i, lanes);
                return sum + load(residual + row * stride + i, lanes);
            });
            scale_row(line, n, statistics, weight, norm_bias,
                      [&](std::int64_t i, Vec y, auto lanes) { store(to + row * stride + i, y, lanes); });
        }
    }

    // What follows attention: to = LayerNorm(FFN(a) + a), a = LayerNorm(dense(context_) + residual).
    void finish(Team team, const Work& work, Range rows, const Layer& layer, const float* residual, float* to,
                Clock& clock) const {
        const std::int64_t stride = sizes_.stride, hidden = sizes_.hidden;
        const Range panels = team.share(sizes_.panels());
        const bool shared = team.size > 1;
        in_blocks(rows, work.block, [&](Range block) {
            const std::int64_t count = block.size(), offset = block.begin * stride;
            const Range mine = team.share(count);
            const auto into_product = [&](std::int64_t row, std::int64_t column, Vec sum) {
                store(work.product + row * stride + column, sum, Full{});
            };
            const auto onto_product = [&](std::int64_t row, std::int64_t column, Vec sum) {
                float* target = work.product + row * stride + column;
                store(target, load(target, Full{}) + sum, Full{});
            };
            packed_product(context_ + offset, stride, count, layer.dense, hidden, panels.begin, panels.end,
                           into_product);
            clock.lap(kDense);
            barrier(shared, clock);
            add_norm(mine, work.product, layer.dense_bias, residual + offset, layer.norm_weight, layer.norm_bias,
                     work.attended);
            clock.lap(kNorm);
            barrier(shared, clock);
            for (std::int64_t first = 0; first < sizes_.slices(); first += work.slices) {
                const std::int64_t last = smaller(first + work.slices, sizes_.slices());
                for (std::int64_t slice = first; slice < last; ++slice) {
                    middle(team, work, count, layer, slice, work.middle + (slice - first) * kSlice);
                }
                clock.lap(kUp);
                barrier(shared, clock);
                for (std::int64_t slice = first; slice < last; ++slice) {
                    const float *from = work.middle + (slice - first) * kSlice,
                                *packed = layer.ffn_output + slice * kSlice * sizes_.width;
                    const std::int64_t depth = sizes_.slice_columns(slice);
                    if (slice == 0) {
                        packed_product(from, work.middle_row, count, packed, depth, panels.begin, panels.end,
                                       into_product);
                    } else {
                        packed_product(from, work.middle_row, count, packed, depth, panels.begin, panels.end,
                                       onto_product);
                    }
                }
                clock.lap(kDown);
            }
            barrier(shared, clock);
            add_norm(mine, work.product, layer.ffn_output_bias, work.attended, layer.full_norm_weight,
                     layer.full_norm_bias, to + offset);
            clock.lap(kNorm);
            barrier(shared, clock);
        });
    }

    // to (rows x slice) = act(attended W^T + bias).
    void middle(Team team, const Work& work, std::int64_t rows, const Layer& layer, std::int64_t slice,
                float* to) const {
        const std::int64_t begin = slice * kSlice;
        const Range panels = team.share(divide_up(sizes_.slice_columns(slice), kPanel));
        with_activation(act_, [&](auto act) {
            packed_product(work.attended, sizes_.stride, rows, layer.ffn + begin * sizes_.hidden, sizes_.hidden,
                           panels.begin, panels.end, [&](std::int64_t row, std::int64_t column, Vec sum) {
                               const Vec b = load_padded(layer.ffn_bias, begin + column, sizes_.middle);
                               store(to + row * work.middle_row + column, decltype(act)::forward(sum + b), Full{});
                           });
        });
    }

    // The last layer for the wanted rows, once keys and values of all rows are made.
    void last(int thread, const Layer& layer, float* out, Clock& clock) const {
        const std::int64_t stride = sizes_.stride;
        const bool by_columns = few_rows(wanted_->count, threads_);
        const Team team = by_columns ? Team{thread, threads_} : Team{0, 1};
        const Range own = Team{thread, threads_}.share(wanted_->count);
        const Range rows = by_columns ? Range{0, wanted_->count} : own;
        barrier(threads_ > 1, clock);
        for (std::int64_t row = own.begin; row < own.end; ++row) {
            copy_rows(hidden_ + wanted_->rows[row] * stride, stride, {0, 1}, residual_ + row * stride, stride);
        }
        clock.lap(kCopy);
        barrier(by_columns, clock);
        project(team, rows, residual_, stride, layer, {0, 1}, queries_, stride);
        clock.lap(kProject);
        barrier(by_columns, clock);
        attend(team, rows, {queries_, stride}, wanted_->cu_seqlens);
        clock.lap(kAttention);
        barrier(by_columns, clock);
        finish(team, work_of(thread, by_columns), rows, layer, residual_, residual_, clock);
        copy_rows(residual_, stride, own, out, sizes_.hidden);
        clock.lap(kCopy);
    }
};

}  // namespace

std::int64_t encoder_packed_size_cpu(std::int64_t H, std::int64_t I) { return Sizes(H, I).packed(); }

void encoder_pack_cpu(Address qkv, Address dense, Address ffn, Address ffn_output, Address packed, std::int64_t H,
                      std::int64_t I, int num_threads) {
    const Sizes sizes(H, I);
    float* to = pointer<float>(packed);
    use_large_pages(to, static_cast<std::size_t>(sizes.packed()) * sizeof(float));
    struct Panel {
        const float* from;
        std::int64_t row, count, k;
        float* to;
    };
    std::vector<Panel> panels;
    const auto add = [&](const float* from, std::int64_t row, std::int64_t n, std::int64_t k) {
        for (std::int64_t begin = 0; begin < n; begin += kPanel) {
            panels.push_back({from + begin * row, row, smaller(kPanel, n - begin), k, to});
            to += kPanel * k;
        }
    };
    for (int part = 0; part < 3; ++part) add(pointer<float>(qkv) + part * H * H, H, H, H);
    add(pointer<float>(dense), H, H, H);
    add(pointer<float>(ffn), H, I, H);
    for (std::int64_t slice = 0; slice < sizes.slices(); ++slice) {
        add(pointer<float>(ffn_output) + slice * kSlice, I, H, sizes.slice_columns(slice));
    }
    parallel_for(static_cast<std::int64_t>(panels.size()), num_threads, [&](std::int64_t i) {
        const Panel& panel = panels[i];
        pack_panel(panel.from, panel.row, panel.count, panel.k, panel.to);
    });
}

void encoder_fwd_cpu(Address x, Address out, Address table, Address order, std::int64_t layers, Address cu_seqlens,
                     std::int64_t B, std::int64_t T, Address wanted_rows, Address cu_wanted, std::int64_t wanted_count,
                     std::int64_t H, std::int64_t I, std::int64_t num_heads, double scale, double eps, int act,
                     Address profile, int num_threads) {
    const Sizes sizes(H, I);
    const Batch batch{
        T, B, num_heads, pointer<std::int32_t>(cu_seqlens), static_cast<float>(scale), static_cast<float>(eps)};
    const Wanted asked{pointer<std::int64_t>(wanted_rows), pointer<std::int32_t>(cu_wanted), wanted_count};
    std::vector<Layer> all;
    for (std::int64_t i = 0; i < layers; ++i) {
        all.push_back(layer_of(pointer<std::int64_t>(table) + pointer<std::int64_t>(order)[i] * kSlots, sizes));
    }
    const int threads = static_cast<int>(larger(smaller(num_threads, T), 1));
    const Wanted* wanted = cu_wanted ? &asked : nullptr;
#if defined(_OPENMP)
    if (threads > 1) {
        const Encoder encoder(batch, sizes, wanted, act, threads);
        bool done = true;
#pragma omp parallel num_threads(threads)
        {
            if (omp_get_num_threads() == threads) {
                encoder.run(omp_get_thread_num(), pointer<float>(x), all, pointer<float>(out),
                            pointer<double>(profile));
            } else if (omp_get_thread_num() == 0) {
                done = false;  // inside another parallel region, or at the limit of threads
            }
        }
        if (done) return;
    }
#endif
    const Encoder alone(batch, sizes, wanted, act, 1);
    alone.run(0, pointer<float>(x), all, pointer<float>(out), pointer<double>(profile));
}

}  // namespace albert_fast::ALBERT_FAST_ISA
