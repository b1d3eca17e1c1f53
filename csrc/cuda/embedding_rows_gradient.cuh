// The gradient of the normalised rows (T,E): of their sum before LayerNorm, and of LayerNorm's weights.
//
// A block takes kGradientRows tokens, eight lanes a row, and computes again what the forward pass did not save. A row
// of up to kGatherColumns columns is read once and stays in registers. A wider row is read twice: first for its sums,
// then a tile of columns at a time. Tokens are summed within a block in a fixed order, then over blocks
// (embedding_tables_gradient.cuh). kGradientRows is the same on every chip, and so are the sums.
#pragma once

#include "../layer_schema.h"
#include "embedding_tile.cuh"
#include "hardware.cuh"

namespace albert_fast::cuda {

constexpr int kGradientRows = kSumTokens;  // tokens of a block
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroups = kThreads / kRowLanes;  // rows that a block works at together

// One number for each pair of a token and a table: the row that the token's gradient is added to, counted over all
// three gradients, words (none with inputs_embeds), types, positions; one more for tokens with a bad id. Stored in 16
// bits where that is enough, since the sort that follows passes over every byte.
struct Keys {
    void* values;
    bool narrow;

    __device__ __forceinline__ int get(std::int64_t i) const {
        return narrow ? static_cast<const std::int16_t*>(values)[i] : static_cast<const std::int32_t*>(values)[i];
    }
    __device__ __forceinline__ void set(std::int64_t i, std::int64_t key) const {
        if (narrow) {
            static_cast<std::int16_t*>(values)[i] = static_cast<std::int16_t>(key);
        } else {
            static_cast<std::int32_t*>(values)[i] = static_cast<std::int32_t>(key);
        }
    }
};

template <class Scalar>
struct RowsGradient : Embeddings<Scalar> {
    const Scalar* dnormed;     // (T,E)
    Scalar *normed, *dembeds;  // (T,E); dembeds null where there are ids
    float *dz, *partial;       // (T,padded); (blocks,2,padded): sums of a block's tokens for dln_weight and dln_bias
    Keys keys;                 // (3,T), or (2,T) with inputs_embeds: table by table
    std::int64_t padded;       // E rounded up to 16 bytes in every dtype
};

// The layout of a block's shared memory.
struct RowsGradientShared {
    RowGradient* rows;  // (kGradientRows), of rows that do not fit the registers
    float* sums;        // (kWarps,2,kGatherColumns)

    static constexpr int kBytes = kGradientRows * sizeof(RowGradient) + kWarps * 2 * kGatherColumns * sizeof(float);

    __device__ explicit RowsGradientShared(unsigned char* memory)
        : rows(reinterpret_cast<RowGradient*>(memory)),
          sums(reinterpret_cast<float*>(memory + kGradientRows * sizeof(RowGradient))) {}
};

// Elements column to column + kVector of a row of `width`, rounded to its type.
template <class Scalar>
__device__ __forceinline__ void store_vector(Scalar* row, std::int64_t column, std::int64_t width, bool wide,
                                             const float (&values)[kVector<Scalar>]) {
    Scalar items[kVector<Scalar>];
#pragma unroll
    for (int i = 0; i < kVector<Scalar>; ++i) items[i] = from_float<Scalar>(values[i]);
    if (wide && column < width) {
        store_16(row + column, items);
    } else {
#pragma unroll
        for (int i = 0; i < kVector<Scalar>; ++i) {
            if (column + i < width) row[column + i] = items[i];
        }
    }
}

// The same in float32, for a row that is padded to whole vectors.
template <int kItems>
__device__ __forceinline__ void store_floats(float* row, std::int64_t column, std::int64_t padded,
                                             const float (&values)[kItems]) {
    if (column >= padded) return;
#pragma unroll
    for (int i = 0; i < kItems; i += 4) store_16(row + column + i, values + i);
}

// This lane's share of kGatherColumns columns of the gradient of a token's LayerNorm; zeros for a token without rows.
template <class Scalar>
__device__ __forceinline__ void load_gradient(float (&dy)[kLaneColumns], const RowsGradient<Scalar>& a,
                                              std::int64_t token, bool good, std::int64_t first_column, int lane) {
    constexpr int kItems = kVector<Scalar>;
    const std::uint32_t state = row_state(a.dropout, token);
#pragma unroll
    for (int v = 0; v < kLaneColumns / kItems; ++v) {
        const std::int64_t column = first_column + lane_column<Scalar>(v, lane);
        float values[kItems] = {};
        if (good) load_vector(values, a.dnormed + token * a.E, column, a.E, a.wide_rows);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            dy[v * kItems + i] = a.drops ? apply_dropout(a.dropout, state, column + i, values[i]) : values[i];
        }
    }
}

// The sums over all columns of a token's row. Afterwards `z_hat` (the normalised sum) and `dy` hold the last columns,
// as in row_statistics.
template <bool kOneTile, class Scalar>
__device__ __forceinline__ RowGradient row_gradient(float (&z_hat)[kLaneColumns], float (&dy)[kLaneColumns],
                                                    const RowsGradient<Scalar>& a, const TokenRows& rows,
                                                    std::int64_t token, int lane) {
    constexpr int kItems = kVector<Scalar>;
    const RowStatistics statistics = row_statistics<kOneTile>(z_hat, a, rows, lane);
    float sum = 0.0f, sum_z_hat = 0.0f;
    for (std::int64_t first = 0; first < (kOneTile ? 1 : a.E); first += kGatherColumns) {
        if constexpr (!kOneTile) gather(z_hat, a, rows, first, lane);
        load_gradient(dy, a, token, rows.word >= 0, first, lane);
#pragma unroll
        for (int v = 0; v < kLaneColumns / kItems; ++v) {
            float weight[kItems];
            load_vector(weight, a.ln_weight, first + lane_column<Scalar>(v, lane), a.E, a.wide_rows);
#pragma unroll
            for (int i = 0; i < kItems; ++i) {
                const int at = v * kItems + i;
                const float g = dy[at] * weight[i];
                sum += g;
                z_hat[at] = normalised(z_hat[at], statistics);
                sum_z_hat += g * z_hat[at];
            }
        }
    }
    const float width = static_cast<float>(a.E);
    return {statistics, sum_over_row_lanes(sum) / width, sum_over_row_lanes(sum_z_hat) / width};
}

// Stores a tile of a token's results and adds its part of dln_weight and dln_bias; all zeros for a token without rows.
template <class Scalar>
__device__ __forceinline__ void finish_tile(float (&dweight)[kLaneColumns], float (&dbias)[kLaneColumns],
                                            const float (&z_hat)[kLaneColumns], const float (&dy)[kLaneColumns],
                                            const RowsGradient<Scalar>& a, const RowGradient& row, std::int64_t token,
                                            bool good, std::int64_t first_column, int lane) {
    constexpr int kItems = kVector<Scalar>;
    const std::uint32_t state = row_state(a.dropout, token);
#pragma unroll
    for (int v = 0; v < kLaneColumns / kItems; ++v) {
        const std::int64_t column = first_column + lane_column<Scalar>(v, lane);
        float weight[kItems], bias[kItems], normed[kItems], dz[kItems];
        load_vector(weight, a.ln_weight, column, a.E, a.wide_rows);
        load_vector(bias, a.ln_bias, column, a.E, a.wide_rows);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            const int at = v * kItems + i;
            const bool used = good && column + i < a.E;
            const float x = used ? z_hat[at] : 0.0f;
            const float y = x * weight[i] + bias[i];
            const float dropped = a.drops ? apply_dropout(a.dropout, state, column + i, y) : y;
            normed[i] = used ? dropped : 0.0f;
            dz[i] = used ? layer_norm_gradient(dy[at] * weight[i], x, row) : 0.0f;
            dweight[at] += dy[at] * x;
            dbias[at] += dy[at];
        }
        if (token >= a.T) continue;
        store_vector(a.normed + token * a.E, column, a.E, a.wide_rows, normed);
        if (a.dembeds != nullptr) store_vector(a.dembeds + token * a.E, column, a.E, a.wide_rows, dz);
        store_floats(a.dz + token * a.padded, column, a.padded, dz);
    }
}

// Adds up a tile's sums over the rows of the block: four rows of a warp, then the warps in order.
template <class Scalar>
__device__ __forceinline__ void store_sums(float (&dweight)[kLaneColumns], float (&dbias)[kLaneColumns],
                                           const RowsGradient<Scalar>& a, float* shared, std::int64_t first_column) {
    constexpr int kItems = kVector<Scalar>;
    const int lane = threadIdx.x % kRowLanes, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
#pragma unroll
        for (int distance = kRowLanes; distance < kWarp; distance *= 2) {
            dweight[i] += __shfl_xor_sync(0xFFFFFFFFu, dweight[i], distance);
            dbias[i] += __shfl_xor_sync(0xFFFFFFFFu, dbias[i], distance);
        }
    }
    if (threadIdx.x % kWarp < kRowLanes) {
        float* own = shared + warp * 2 * kGatherColumns;
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
            const int column = lane_column<Scalar>(i / kItems, lane) + i % kItems;
            own[column] = dweight[i];
            own[kGatherColumns + column] = dbias[i];
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 2 * kGatherColumns; i += kThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int other = 0; other < kWarps; ++other) sum += shared[other * 2 * kGatherColumns + i];
        const std::int64_t column = first_column + i % kGatherColumns;
        if (column < a.padded) {
            a.partial[(static_cast<std::int64_t>(blockIdx.x) * 2 + i / kGatherColumns) * a.padded + column] = sum;
        }
    }
    __syncthreads();  // the next tile's sums use the same memory
}

template <class Scalar>
__device__ __forceinline__ void store_keys(const RowsGradient<Scalar>& a, const TokenRows& rows, std::int64_t token) {
    const bool good = rows.word >= 0;
    const std::int64_t words = a.ids == nullptr ? 0 : a.V;
    const std::int64_t none = words + a.Y + a.P;
    if (a.ids != nullptr) a.keys.set(token, good ? rows.word : none);
    const std::int64_t types = a.ids == nullptr ? 0 : a.T;
    a.keys.set(types + token, good ? words + rows.token_type : none);
    a.keys.set(types + a.T + token, good ? words + a.Y + rows.position : none);
}

// Blocks that share a multiprocessor: two if the registers of a row are at most 128.
template <class Scalar, bool kOneTile>
constexpr int kGradientBlocks = kOneTile && sizeof(Scalar) < sizeof(float) ? 2 : 1;

// Block x: tokens x * kGradientRows on. kOneTile: E is kGatherColumns at most.
template <class Scalar, bool kOneTile>
__global__ void __launch_bounds__(kThreads, (kGradientBlocks<Scalar, kOneTile>))
    embedding_projection_bwd_rows_kernel(const RowsGradient<Scalar> a) {
    extern __shared__ uint4 shared_memory[];
    const RowsGradientShared shared(reinterpret_cast<unsigned char*>(shared_memory));
    const int lane = threadIdx.x % kRowLanes, group = threadIdx.x / kRowLanes;
    const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.x) * kGradientRows;
    const auto look_up = [&](int row) {
        int bad = -1;
        return first_token + row < a.T ? token_rows(a, first_token + row, bad) : TokenRows{-1, 0, 0};
    };
    float z_hat[kLaneColumns], dy[kLaneColumns];
    if constexpr (!kOneTile) {
        for (int row = group; row < kGradientRows; row += kGroups) {
            const RowGradient gradient = row_gradient<kOneTile>(z_hat, dy, a, look_up(row), first_token + row, lane);
            if (lane == 0) shared.rows[row] = gradient;
        }
        __syncthreads();
    }
    for (std::int64_t first = 0; first < (kOneTile ? 1 : a.E); first += kGatherColumns) {
        float dweight[kLaneColumns] = {}, dbias[kLaneColumns] = {};
        for (int row = group; row < kGradientRows; row += kGroups) {
            const std::int64_t token = first_token + row;
            const TokenRows rows = look_up(row);
            if (first == 0 && lane == 0 && token < a.T) store_keys(a, rows, token);
            RowGradient gradient;
            if constexpr (kOneTile) {
                gradient = row_gradient<kOneTile>(z_hat, dy, a, rows, token, lane);
            } else {
                gradient = shared.rows[row];
                gather(z_hat, a, rows, first, lane);
#pragma unroll
                for (int i = 0; i < kLaneColumns; ++i) z_hat[i] = normalised(z_hat[i], gradient.statistics);
                load_gradient(dy, a, token, rows.word >= 0, first, lane);
            }
            finish_tile(dweight, dbias, z_hat, dy, a, gradient, token, rows.word >= 0, first, lane);
        }
        store_sums(dweight, dbias, a, shared.sums, first);
    }
}

}  // namespace albert_fast::cuda
