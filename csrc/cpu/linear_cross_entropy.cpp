// The mean of cross_entropy(x W^T + bias, labels) over the labelled rows, and its gradients. At any time a thread holds
// kVocabularyBlock x kRowBlock logits, in the first cache.
//
// The labelled rows are divided into batches, the vocabulary into parts that depend only on its size. A task takes one
// batch and one part: it packs a block of the vocabulary as float32 once and multiplies all rows of the batch by it.
// Logits are stored transposed, one row for each word and one column for each row of x: so softmax runs over vectors of
// rows without sums across lanes, and one array serves all three products, as in attention.cpp. The products are our
// own: a library would write a block of logits to memory and read it again for softmax, and would need a copy of W in
// float32 if W is bfloat16.
//
// Forward: each part computes the maximum and the sum of exponentials of every row; these are merged in the order of
// the parts. Operations 2 N V E. Backward: softmax is computed again from the same two numbers of each row. (The
// rounding of their log-sum-exp would scale a whole row of large logits.) A part writes its rows of dW and its share of
// dx; the shares are added in the order of the parts. Operations 6 N V E.
//
// Label smoothing s (Szegedy et al. 2016, section 7) gives each word s / V of the label's weight. The loss is then
// logsumexp - (1 - s) logit[label] - s mean(logits): the forward sums the logits of every row beside their
// exponentials.
#include "choose.h"
#include "gemm.h"
#include "kernels.h"
#include "pack.h"

namespace albert_fast::ALBERT_FAST_ISA {
namespace {

constexpr std::int64_t kRowBlock = 64;          // the columns of one full tile of a product on AVX-512
constexpr std::int64_t kVocabularyBlock = 128;  // 32 KiB of logits; 64 KiB of weights for E = 128
constexpr std::int64_t kMaxParts = 64;          // more than most machines have cores
constexpr std::int64_t kBatch = 256;            // bounds the shares of dx: kMaxParts x kBatch x E floats

constexpr float kInfinity = __builtin_inff();

template <class T>
struct Inputs {
    Rows<const T> x, weight;
    const T* bias;
    const std::int64_t* labels;
    std::int64_t n, e, v;
    float smoothing;

    std::int64_t width() const { return round_up(e, kLanes); }
    Chunks parts() const { return Chunks(v, kVocabularyBlock, kMaxParts, kVocabularyBlock); }
};

// The labelled rows of x, in order.
struct Labelled {
    std::int32_t* rows;
    std::int64_t count;
};

template <class T>
Labelled find_labelled(const Inputs<T>& in, std::int32_t* rows) {
    std::int64_t count = 0;
    for (std::int64_t row = 0; row < in.n; ++row) {
        rows[count] = static_cast<std::int32_t>(row);
        count += in.labels[row] != kIgnored;
    }
    return {rows, count};
}

// Some labelled rows, packed: `lines` (size, width) in float32 and the same transposed, block after block.
struct Batch {
    const std::int32_t* rows;
    std::int64_t size;
    Chunks blocks;
    float *lines, *transposed;

    Batch(const Labelled& labelled, std::int64_t begin, float* lines, float* transposed)
        : rows(labelled.rows + begin),
          size(smaller(labelled.count - begin, kBatch)),
          blocks(size, 1, divide_up(size, kRowBlock), kLanes),
          lines(lines),
          transposed(transposed) {}

    std::int64_t count(std::int64_t block) const { return blocks.end(block) - blocks.begin(block); }
    std::int64_t columns(std::int64_t block) const { return round_up(count(block), kLanes); }

    template <class T>
    void pack(const Inputs<T>& in, int num_threads) const {
        const std::int64_t width = in.width();
        parallel_for(blocks.count, size * width < 16384 ? 1 : num_threads, [&](std::int64_t block) {
            const std::int64_t begin = blocks.begin(block);
            float* to = lines + begin * width;
            for (std::int64_t i = 0; i < count(block); ++i) {
                pack_rows(in.x, rows[begin + i], 0, 1, in.e, 1.0f, to + i * width, width);
            }
            transpose(to, width, count(block), transposed + begin * width, width, columns(block));
        });
    }
};

// A block of the vocabulary as float32: weights (count, width) and bias (count).
struct Words {
    std::int64_t first, count;
    float *weights, *bias;

    template <class T>
    Words(const Inputs<T>& in, std::int64_t first, std::int64_t end, float* weights, float* bias)
        : first(first), count(smaller(end - first, kVocabularyBlock)), weights(weights), bias(bias) {
        pack_rows(in.weight, first, 0, count, in.e, 1.0f, weights, in.width());
        pack_rows(Rows<const T>{in.bias, 0}, 0, first, 1, count, 1.0f, bias, count);
    }

    // logits (count, columns) of one block of rows, without the bias.
    void multiply_rows(const Batch& batch, std::int64_t block, std::int64_t e, std::int64_t width,
                       float* logits) const {
        const std::int64_t columns = batch.columns(block);
        multiply({weights, width, 1}, batch.transposed + batch.blocks.begin(block) * width, columns, logits, columns,
                 count, columns, e, false);
    }

    // Calls body(row of the batch, its label's logit) for every row of the block whose label is among these words.
    template <class T, class Body>
    void for_labels(const Inputs<T>& in, const Batch& batch, std::int64_t block, float* logits, Body body) const {
        const std::int64_t begin = batch.blocks.begin(block), columns = batch.columns(block);
        for (std::int64_t i = 0; i < batch.count(block); ++i) {
            const std::int64_t word = in.labels[batch.rows[begin + i]] - first;
            if (word >= 0 && word < count) body(begin + i, logits[word * columns + i]);
        }
    }
};

// The largest logit of every row, and the sum of exp(logit - largest); with label smoothing also the sum of
// logit - largest, whose rounding does not grow with what all logits of a row share.
struct Softmax {
    float *maximum, *sum, *below = nullptr;

    // A maximum of -infinity is not subtracted: a row of -infinity would become NaN.
    static Vec shift(Vec maximum) { return maximum == splat(-kInfinity) ? Vec{} : maximum; }

    // Takes in one vector of columns of logits, `row` apart, and leaves the bias added to them; `words_before` of them
    // were taken in before.
    template <bool kSmoothing>
    void update(const Words& words, float* logits, std::int64_t row, std::int64_t at, std::int64_t words_before) const {
        const Vec before = load(maximum + at, Full{});
        Vec largest = before;
        for (std::int64_t word = 0; word < words.count; ++word) {
            const Vec logit = load(logits + word * row, Full{}) + words.bias[word];
            store(logits + word * row, logit, Full{});
            largest = larger(largest, logit);
        }
        const Vec subtracted = shift(largest);
        Vec added{}, differences{};
        for (std::int64_t word = 0; word < words.count; ++word) {
            const Vec difference = load(logits + word * row, Full{}) - subtracted;
            added += exp(difference);
            if constexpr (kSmoothing) differences += difference;
        }
        if constexpr (kSmoothing) {
            const Vec raised = (shift(before) - subtracted) * static_cast<float>(words_before);
            store(below + at, load(below + at, Full{}) + (raised + differences), Full{});
        }
        store(maximum + at, largest, Full{});
        store(sum + at, load(sum + at, Full{}) * exp(before - subtracted) + added, Full{});
    }
};

template <bool kSmoothing, class T>
void forward_task(const Inputs<T>& in, const Batch& batch, std::int64_t begin, std::int64_t end, const Softmax& softmax,
                  float* targets) {
    const std::int64_t width = in.width();
    Arrays arrays(scratch<Purpose::kTask>(kVocabularyBlock * (width + kRowBlock + 1)));
    float* weights = arrays.take(kVocabularyBlock * width);
    float* logits = arrays.take(kVocabularyBlock * kRowBlock);
    float* bias = arrays.take(kVocabularyBlock);
    for_vectors(round_up(batch.size, kLanes), [&](std::int64_t i, auto lanes) {
        store(softmax.maximum + i, splat(-kInfinity), lanes);
        store(softmax.sum + i, Vec{}, lanes);
        if constexpr (kSmoothing) store(softmax.below + i, Vec{}, lanes);
    });
    for (std::int64_t word = begin; word < end; word += kVocabularyBlock) {
        const Words words(in, word, end, weights, bias);
        for (std::int64_t block = 0; block < batch.blocks.count; ++block) {
            const std::int64_t columns = batch.columns(block);
            words.multiply_rows(batch, block, in.e, width, logits);
            for (std::int64_t j = 0; j < columns; j += kLanes) {
                softmax.update<kSmoothing>(words, logits + j, columns, batch.blocks.begin(block) + j, word - begin);
            }
            words.for_labels(in, batch, block, logits, [&](std::int64_t row, float logit) { targets[row] = logit; });
        }
    }
}

// The softmax (n) of whole rows from that of all parts of the vocabulary; returns the sum of the rows' losses.
double merge(const Batch& batch, const Softmax* parts, const Chunks& words, const float* targets,
             const Softmax& softmax, double smoothing) {
    const std::int64_t count = words.count;
    double total = 0.0;
    for (std::int64_t i = 0; i < batch.size; i += kLanes) {
        Vec maximum = splat(-kInfinity), sum{};
        for (std::int64_t p = 0; p < count; ++p) maximum = larger(maximum, load(parts[p].maximum + i, Full{}));
        const Vec subtracted = Softmax::shift(maximum);
        for (std::int64_t p = 0; p < count; ++p) {
            sum += load(parts[p].sum + i, Full{}) * exp(load(parts[p].maximum + i, Full{}) - subtracted);
        }
        for (std::int64_t lane = 0; lane < smaller(batch.size - i, kLanes); ++lane) {
            softmax.maximum[batch.rows[i + lane]] = subtracted[lane];
            softmax.sum[batch.rows[i + lane]] = sum[lane];
            // The large numbers are subtracted first, so that a small loss is not lost in the rounding of a
            // log-sum-exp.
            const float behind = subtracted[lane] - targets[i + lane];
            if (smoothing == 0.0) {
                total += __builtin_logf(sum[lane]) + behind;
                continue;
            }
            double below = 0.0;  // the sum of logit - largest over the whole vocabulary
            for (std::int64_t p = 0; p < count; ++p) {
                const float largest = parts[p].maximum[i + lane];
                const double raised = largest == -kInfinity ? -subtracted[lane] : largest - subtracted[lane];
                below += parts[p].below[i + lane] + raised * static_cast<double>(words.end(p) - words.begin(p));
            }
            const double mean = below / static_cast<double>(words.rows);
            total += __builtin_logf(sum[lane]) + (1.0 - smoothing) * behind - smoothing * mean;
        }
    }
    return total;
}

template <class T>
void forward(const Inputs<T>& in, float* loss, const Softmax& softmax, int num_threads) {
    const std::int64_t width = in.width();
    const Chunks parts = in.parts();
    Arrays arrays(scratch<Purpose::kShared>(Arrays::padded(in.n) + 2 * kBatch * width + (3 * kMaxParts + 1) * kBatch));
    const Labelled labelled = find_labelled(in, reinterpret_cast<std::int32_t*>(arrays.take(in.n)));
    float* lines = arrays.take(kBatch * width);
    float* transposed = arrays.take(kBatch * width);
    float* targets = arrays.take(kBatch);
    Softmax shares[kMaxParts];
    for (Softmax& share : shares) share = {arrays.take(kBatch), arrays.take(kBatch), arrays.take(kBatch)};
    for (std::int64_t row = 0; row < in.n; ++row) softmax.maximum[row] = softmax.sum[row] = 0.0f;
    double total = 0.0;
    for (std::int64_t row = 0; row < labelled.count; row += kBatch) {
        const Batch batch(labelled, row, lines, transposed);
        batch.pack(in, num_threads);
        parallel_for(parts.count, num_threads, [&](std::int64_t part) {
            with_flag(in.smoothing != 0.0f, [&](auto smoothing) {
                forward_task<smoothing.value>(in, batch, parts.begin(part), parts.end(part), shares[part], targets);
            });
        });
        total += merge(batch, shares, parts, targets, softmax, in.smoothing);
    }
    *loss = static_cast<float>(total / static_cast<double>(larger(labelled.count, 1)));
}

struct Gradients {
    Softmax softmax;
    float scale;     // gradient of the loss / number of labelled rows
    float on_label;  // what the label's logit loses: scale * (1 - smoothing)
    float uniform;   // what every logit loses: scale * smoothing / V
    float *dweight, *dbias;
};

// Turns one block of logits into gradients of the logits, and adds their sums to dbias.
template <class T>
void softmax_backward(const Inputs<T>& in, const Words& words, const Batch& batch, std::int64_t block,
                      const Gradients& g, float* logits, float* dbias) {
    const std::int64_t begin = batch.blocks.begin(block), count = batch.count(block), columns = batch.columns(block);
    float maximum[kRowBlock] = {}, factor[kRowBlock] = {};
    for (std::int64_t i = 0; i < count; ++i) {
        maximum[i] = g.softmax.maximum[batch.rows[begin + i]];
        factor[i] = g.scale / g.softmax.sum[batch.rows[begin + i]];
    }
    for (std::int64_t word = 0; word < words.count; ++word) {
        for (std::int64_t j = 0; j < columns; j += kLanes) {
            float* at = logits + word * columns + j;
            const Vec logit = load(at, Full{}) + words.bias[word];
            store(at, exp(logit - load(maximum + j, Full{})) * load(factor + j, Full{}) - g.uniform, Full{});
        }
    }
    words.for_labels(in, batch, block, logits, [&](std::int64_t, float& logit) { logit -= g.on_label; });
    for (std::int64_t word = 0; word < words.count; ++word) {
        const float* line = logits + word * columns;
        dbias[word] += sum_row(count, [&](std::int64_t j, auto lanes) { return load(line + j, lanes); });
    }
}

// dx (batch.size, width) is this part's share.
template <class T>
void backward_task(const Inputs<T>& in, const Batch& batch, std::int64_t begin, std::int64_t end, const Gradients& g,
                   bool first_batch, float* dx) {
    const std::int64_t width = in.width();
    Arrays arrays(scratch<Purpose::kTask>(kVocabularyBlock * (2 * width + kRowBlock + 1)));
    float* weights = arrays.take(kVocabularyBlock * width);
    float* dweight = arrays.take(kVocabularyBlock * width);
    float* logits = arrays.take(kVocabularyBlock * kRowBlock);
    float* bias = arrays.take(kVocabularyBlock);
    for (std::int64_t word = begin; word < end; word += kVocabularyBlock) {
        const Words words(in, word, end, weights, bias);
        const Rows<float> kept{g.dweight + word * in.e, in.e};
        if (first_batch) {
            __builtin_memset(dweight, 0, sizeof(float) * words.count * width);
            __builtin_memset(g.dbias + word, 0, sizeof(float) * words.count);
        } else {
            pack_rows(Rows<const float>{kept.data, kept.stride}, 0, 0, words.count, in.e, 1.0f, dweight, width);
        }
        for (std::int64_t block = 0; block < batch.blocks.count; ++block) {
            const std::int64_t row = batch.blocks.begin(block), count = batch.count(block);
            const std::int64_t columns = batch.columns(block);
            words.multiply_rows(batch, block, in.e, width, logits);
            softmax_backward(in, words, batch, block, g, logits, g.dbias + word);
            multiply({logits, columns, 1}, batch.lines + row * width, width, dweight, width, words.count, width, count,
                     true);
            multiply({logits, 1, columns}, weights, width, dx + row * width, width, count, width, words.count,
                     word > begin);
        }
        unpack_rows(dweight, width, words.count, in.e, 1.0f, kept, 0, 0);
    }
}

template <class T>
void backward(const Inputs<T>& in, Rows<T> dx, float grad, Gradients g, int num_threads) {
    const std::int64_t width = in.width();
    const Chunks parts = in.parts();
    const std::int64_t batch_rows = smaller(kBatch, in.n), share = Arrays::padded(batch_rows * width);
    Arrays arrays(scratch<Purpose::kShared>(Arrays::padded(in.n) + 2 * kBatch * width + parts.count * share));
    const Labelled labelled = find_labelled(in, reinterpret_cast<std::int32_t*>(arrays.take(in.n)));
    float* lines = arrays.take(kBatch * width);
    float* transposed = arrays.take(kBatch * width);
    float* shares = arrays.take(parts.count * share);
    g.scale = grad / static_cast<float>(larger(labelled.count, 1));
    g.uniform = g.scale * in.smoothing / static_cast<float>(in.v);
    g.on_label = g.scale - g.uniform * static_cast<float>(in.v);  // so that what a row loses adds up to the scale
    zero_rows(dx, 0, 0, in.n, in.e);
    if (labelled.count == 0) {
        __builtin_memset(g.dweight, 0, sizeof(float) * in.v * in.e);
        __builtin_memset(g.dbias, 0, sizeof(float) * in.v);
    }
    for (std::int64_t row = 0; row < labelled.count; row += kBatch) {
        const Batch batch(labelled, row, lines, transposed);
        batch.pack(in, num_threads);
        parallel_for(parts.count, num_threads, [&](std::int64_t part) {
            backward_task(in, batch, parts.begin(part), parts.end(part), g, row == 0, shares + part * share);
        });
        parallel_rows(batch.size, parts.count * width, num_threads, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t i = begin; i < end; ++i) {
                for_vectors(in.e, [&](std::int64_t column, auto lanes) {
                    Vec sum{};
                    for (std::int64_t part = 0; part < parts.count; ++part) {
                        sum += load(shares + part * share + i * width + column, Full{});
                    }
                    store(dx.at(batch.rows[i], column), sum, lanes);
                });
            }
        });
    }
}

template <class T>
Inputs<T> inputs(Address x, Address weight, Address bias, Address labels, std::int64_t n, std::int64_t e,
                 std::int64_t v, double smoothing) {
    return {
        {pointer<T>(x), e},           {pointer<T>(weight), e}, pointer<T>(bias), pointer<std::int64_t>(labels), n, e, v,
        static_cast<float>(smoothing)};
}

}  // namespace

std::int64_t linear_cross_entropy_fwd_cpu(Address x, Address weight, Address bias, Address labels, Address loss,
                                          Address row_max, Address row_sum, std::int64_t N, std::int64_t E,
                                          std::int64_t V, double label_smoothing, int dtype, int num_threads) {
    for (std::int64_t row = 0; row < N; ++row) {
        const std::int64_t label = pointer<std::int64_t>(labels)[row];
        if (label != kIgnored && (label < 0 || label >= V)) return row;
    }
    with_dtype(dtype, [&](auto element) {
        forward(inputs<decltype(element)>(x, weight, bias, labels, N, E, V, label_smoothing), pointer<float>(loss),
                Softmax{pointer<float>(row_max), pointer<float>(row_sum)}, num_threads);
    });
    return -1;
}

void linear_cross_entropy_bwd_cpu(Address grad, Address x, Address weight, Address bias, Address labels,
                                  Address row_max, Address row_sum, Address dx, Address dweight, Address dbias,
                                  std::int64_t N, std::int64_t E, std::int64_t V, double label_smoothing, int dtype,
                                  int num_threads) {
    with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        Gradients gradients{};
        gradients.softmax = {pointer<float>(row_max), pointer<float>(row_sum)};
        gradients.dweight = pointer<float>(dweight);
        gradients.dbias = pointer<float>(dbias);
        backward(inputs<T>(x, weight, bias, labels, N, E, V, label_smoothing), Rows<T>{pointer<T>(dx), E},
                 *pointer<float>(grad), gradients, num_threads);
    });
}

}  // namespace albert_fast::ALBERT_FAST_ISA
