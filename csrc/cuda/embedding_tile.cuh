// A tile of embedding rows in shared memory: gathered from three tables, added, normalised, dropped out.
//
// Eight lanes share a row and hold 128 of its columns in registers, so that four rows of a warp are looked up at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "embedding_row.cuh"

namespace albert_fast::cuda {

constexpr int kThreads = 256, kWarp = 32, kRowLanes = 8;
constexpr int kTileColumns = 128;    // columns of the output at a time
constexpr int kChunkBytes = 128;     // of a row of proj_weight at a time
constexpr int kPadBytes = 16;        // after each row in shared memory, so that eight rows fall on different banks
constexpr int kStages = 3;           // chunks of proj_weight in shared memory: one in use, two on their way
constexpr int kGatherColumns = 128;  // columns of an embedding row that eight lanes hold in registers
constexpr int kLaneColumns = kGatherColumns / kRowLanes;
constexpr int kWeightStride = kChunkBytes + kPadBytes;
constexpr int kWeightBytes = kTileColumns * kWeightStride;

// What the normalised rows (T,E) are computed from.
template <class Scalar>
struct Embeddings {
    const std::int64_t *ids, *types, *positions;                       // (T); ids null: word is (T,E)
    const Scalar *word, *token_type, *position, *ln_weight, *ln_bias;  // (V,E), (Y,E), (P,E), (E), (E)
    std::int64_t T, E, V, Y, P;
    float eps;
    Dropout dropout;
    bool drops;      // dropout_p > 0
    bool wide_rows;  // rows of width E start on 16 bytes
};

template <class Scalar>
struct Arguments : Embeddings<Scalar> {
    const Scalar *proj_weight, *proj_bias;  // (H,E), (H)
    Scalar* out;                            // (T,H)
    long long* first_bad;                   // ()
    std::int64_t H;
    bool wide_output;  // rows of out start on 16 bytes
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <class Scalar>
__device__ __forceinline__ Scalar from_float(float x) {
    if constexpr (std::is_same_v<Scalar, float>) return x;
    if constexpr (std::is_same_v<Scalar, __nv_bfloat16>) return __float2bfloat16_rn(x);
    if constexpr (std::is_same_v<Scalar, __half>) return __float2half_rn(x);
}

template <class Scalar>
constexpr int kVector = 16 / sizeof(Scalar);  // elements in 16 bytes
template <class Scalar>
constexpr int kChunk = kChunkBytes / sizeof(Scalar);  // elements in a chunk of proj_weight

// Bytes of a normalised row in shared memory: the whole row if rows are resident, else the columns gathered at a time.
template <class Scalar>
__host__ __device__ __forceinline__ std::int64_t row_stride(std::int64_t E, bool resident) {
    const std::int64_t columns = resident ? (E + kChunk<Scalar> - 1) / kChunk<Scalar> * kChunk<Scalar> : kGatherColumns;
    return columns * static_cast<std::int64_t>(sizeof(Scalar)) + kPadBytes;
}

// The layout of a block's shared memory.
template <class Scalar, int kTokens>
struct Shared {
    TokenRows* tokens;          // (kTokens)
    RowStatistics* statistics;  // (kTokens)
    unsigned char* weight;      // kStages chunks of kTileColumns rows
    unsigned char* rows;        // (kTokens), row_stride bytes each

    __device__ explicit Shared(unsigned char* memory)
        : tokens(reinterpret_cast<TokenRows*>(memory)),
          statistics(reinterpret_cast<RowStatistics*>(memory + kTokens * sizeof(TokenRows))),
          weight(memory + kTokens * (sizeof(TokenRows) + sizeof(RowStatistics))),
          rows(weight + kStages * kWeightBytes) {}

    static std::int64_t bytes(std::int64_t E, bool resident) {
        return kTokens * (sizeof(TokenRows) + sizeof(RowStatistics)) + kStages * kWeightBytes +
               kTokens * row_stride<Scalar>(E, resident);
    }
};

// Elements column to column + kVector of a row of `width` as float32, zeros beyond its end.
template <class Scalar>
__device__ __forceinline__ void load_vector(float (&values)[kVector<Scalar>], const Scalar* row, std::int64_t column,
                                            std::int64_t width, bool wide) {
    Scalar items[kVector<Scalar>];
    if (wide && column < width) {
        const uint4 raw = *reinterpret_cast<const uint4*>(row + column);
        memcpy(items, &raw, sizeof raw);
    } else {
#pragma unroll
        for (int i = 0; i < kVector<Scalar>; ++i) {
            items[i] = column + i < width ? row[column + i] : from_float<Scalar>(0.0f);
        }
    }
#pragma unroll
    for (int i = 0; i < kVector<Scalar>; ++i) values[i] = to_float(items[i]);
}

// The column at which this lane's vector v begins, counted from the first of kGatherColumns.
template <class Scalar>
__device__ __forceinline__ int lane_column(int v, int lane) {
    return (v * kRowLanes + lane) * kVector<Scalar>;
}

// This lane's share of kGatherColumns columns of a token's summed embeddings; zeros for a token without rows.
template <class Scalar>
__device__ __forceinline__ void gather(float (&z)[kLaneColumns], const Embeddings<Scalar>& a, const TokenRows& rows,
                                       std::int64_t first_column, int lane) {
    constexpr int kItems = kVector<Scalar>;
#pragma unroll
    for (int v = 0; v < kLaneColumns / kItems; ++v) {
        const std::int64_t column = first_column + lane_column<Scalar>(v, lane);
        float word[kItems] = {}, token_type[kItems] = {}, position[kItems] = {};
        if (rows.word >= 0) {
            load_vector(word, a.word + rows.word * a.E, column, a.E, a.wide_rows);
            load_vector(token_type, a.token_type + rows.token_type * a.E, column, a.E, a.wide_rows);
            load_vector(position, a.position + rows.position * a.E, column, a.E, a.wide_rows);
        }
#pragma unroll
        for (int i = 0; i < kItems; ++i) z[v * kItems + i] = embedding_sum(word[i], token_type[i], position[i]);
    }
}

// Normalises what `gather` read and writes it to shared memory; `row` points at first_column there.
template <class Scalar>
__device__ __forceinline__ void store_normalised(Scalar* row, const float (&z)[kLaneColumns],
                                                 const Embeddings<Scalar>& a, std::int64_t token, bool good,
                                                 const RowStatistics& statistics, std::int64_t first_column,
                                                 std::int64_t end_column, int lane) {
    constexpr int kItems = kVector<Scalar>;
    const std::uint32_t state = row_state(a.dropout, token);
#pragma unroll
    for (int v = 0; v < kLaneColumns / kItems; ++v) {
        const std::int64_t column = first_column + lane_column<Scalar>(v, lane);
        if (column >= end_column) continue;
        float weight[kItems], bias[kItems];
        load_vector(weight, a.ln_weight, column, a.E, a.wide_rows);
        load_vector(bias, a.ln_bias, column, a.E, a.wide_rows);
        Scalar items[kItems];
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
            float value = layer_norm(z[v * kItems + i], statistics, weight[i], bias[i]);
            if (a.drops) value = apply_dropout(a.dropout, state, column + i, value);
            items[i] = from_float<Scalar>(good && column + i < a.E ? value : 0.0f);
        }
        uint4 raw;
        memcpy(&raw, items, sizeof raw);
        *reinterpret_cast<uint4*>(row + lane_column<Scalar>(v, lane)) = raw;
    }
}

__device__ __forceinline__ float sum_over_row_lanes(float x) {
#pragma unroll
    for (int distance = 1; distance < kRowLanes; distance *= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    return x;
}

// Mean and deviation of a token's summed embeddings. Afterwards `z` holds this lane's share of the last kGatherColumns
// columns, which may be all. Wider rows are gathered again, from the L1 cache.
template <bool kOneTile, class Scalar>
__device__ __forceinline__ RowStatistics row_statistics(float (&z)[kLaneColumns], const Embeddings<Scalar>& a,
                                                        const TokenRows& rows, int lane) {
    const std::int64_t end = kOneTile ? 1 : a.E;
    float sum = 0.0f, squares = 0.0f;
    for (std::int64_t first = 0; first < end; first += kGatherColumns) {
        gather(z, a, rows, first, lane);
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) sum += z[i];
    }
    const float mean = sum_over_row_lanes(sum) / static_cast<float>(a.E);
    for (std::int64_t first = 0; first < end; first += kGatherColumns) {
        if (!kOneTile && a.E > kGatherColumns) gather(z, a, rows, first, lane);
#pragma unroll
        for (int i = 0; i < kLaneColumns; ++i) {
            constexpr int kItems = kVector<Scalar>;
            const std::int64_t column = first + lane_column<Scalar>(i / kItems, lane) + i % kItems;
            const float centred = column < a.E ? z[i] - mean : 0.0f;
            squares += centred * centred;
        }
    }
    return {mean, reciprocal_deviation(mean, sum_over_row_lanes(squares), a.E, a.eps)};
}

// The rows that a token adds up, and the first table that does not have its row, or -1.
template <class Scalar>
__device__ __forceinline__ TokenRows token_rows(const Embeddings<Scalar>& a, std::int64_t token, int& bad) {
    TokenRows rows{a.ids == nullptr ? token : a.ids[token], a.types[token], a.positions[token]};
    bad = first_bad_table(rows, a.ids == nullptr ? a.T : a.V, a.Y, a.P);
    if (bad >= 0) rows.word = -1;
    return rows;
}

// Reads and checks the ids of the block's tokens; one thread a token.
template <class Scalar, int kTokens>
__device__ __forceinline__ void find_rows(const Arguments<Scalar>& a, const Shared<Scalar, kTokens>& shared,
                                          std::int64_t first_token) {
    if (static_cast<int>(threadIdx.x) >= kTokens) return;
    const std::int64_t token = first_token + threadIdx.x;
    TokenRows rows{-1, 0, 0};
    if (token < a.T) {
        int bad;
        rows = token_rows(a, token, bad);
        if (bad >= 0) atomicMin(a.first_bad, static_cast<long long>(token * 3 + bad));
    }
    shared.tokens[threadIdx.x] = rows;
}

// Mean and deviation of the block's rows, and the normalised rows themselves where they are resident.
template <class Scalar, int kTokens, bool kResident>
__device__ __forceinline__ void normalise_rows(const Arguments<Scalar>& a, const Shared<Scalar, kTokens>& shared,
                                               std::int64_t first_token) {
    const int lane = threadIdx.x % kRowLanes;
    const std::int64_t stride = row_stride<Scalar>(a.E, kResident);
    const std::int64_t end_column = (stride - kPadBytes) / static_cast<std::int64_t>(sizeof(Scalar));
    for (int row = threadIdx.x / kRowLanes; row < kTokens; row += kThreads / kRowLanes) {
        const TokenRows rows = shared.tokens[row];
        float z[kLaneColumns];
        const RowStatistics statistics = row_statistics<false>(z, a, rows, lane);
        if constexpr (kResident) {
            Scalar* target = reinterpret_cast<Scalar*>(shared.rows + row * stride);
            for (std::int64_t first = 0; first < end_column; first += kGatherColumns) {
                if (a.E > kGatherColumns) gather(z, a, rows, first, lane);
                store_normalised(target + first, z, a, first_token + row, rows.word >= 0, statistics, first, end_column,
                                 lane);
            }
        } else if (lane == 0) {
            shared.statistics[row] = statistics;
        }
    }
}

// Columns first_column to first_column + kGatherColumns of the block's normalised rows, for rows that are not resident.
template <class Scalar, int kTokens>
__device__ __forceinline__ void refill_rows(const Arguments<Scalar>& a, const Shared<Scalar, kTokens>& shared,
                                            std::int64_t first_token, std::int64_t first_column) {
    const int lane = threadIdx.x % kRowLanes;
    for (int row = threadIdx.x / kRowLanes; row < kTokens; row += kThreads / kRowLanes) {
        const TokenRows rows = shared.tokens[row];
        float z[kLaneColumns];
        gather(z, a, rows, first_column, lane);
        Scalar* target = reinterpret_cast<Scalar*>(shared.rows + row * row_stride<Scalar>(a.E, false));
        store_normalised(target, z, a, first_token + row, rows.word >= 0, shared.statistics[row], first_column,
                         first_column + kGatherColumns, lane);
    }
}

}  // namespace albert_fast::cuda
