// Adds the rows of dz (T,E) to the gradients of the three tables, and joins blocks' partial sums, without atomics.
//
// The pairs of token and table are sorted by the row they add to, and by token within a row, so that each row's pairs
// are one run. A warp adds up a chunk of kWarp neighbouring pairs. It writes the sums of runs that lie inside its
// chunk. The partial sums of a run that crosses chunks are joined in order by a block of its own. So the work is
// divided well both for two rows with thousands of tokens each (the types) and for thousands of rows with two, and the
// order of a sum depends on the ids alone.
#pragma once

#include "embedding_rows_gradient.cuh"

namespace albert_fast::cuda {

static_assert(kWarp == kSumPairs, "a warp makes a partial sum");

constexpr int kJoinWarps = 16, kJoinThreads = kJoinWarps * kWarp;
constexpr int kFours = 4, kJoinColumns = kWarp * kFours;  // columns of a lane and of a warp at a time
constexpr int kAhead = 8;                                 // rows on their way at a time

template <class Scalar>
struct TablesGradient {
    Keys keys;                  // (pairs), ascending
    const std::int64_t* order;  // (pairs): the index of each pair before the sort, T of each table
    const float* dz;            // (T,padded)
    float* partial;             // (chunks,2,padded): of the run from the chunk before, of the run into the next
    Scalar *dword, *dtype_table, *dposition;    // (V,E), (Y,E), (P,E), zeros
    std::int64_t pairs, T, E, padded, V, Y, P;  // V is 0 with inputs_embeds
    std::int64_t padding_idx;                   // the row of dword that stays zero, or -1
    bool wide;                                  // rows of width E start on 16 bytes

    // The row of a gradient that a key stands for; null for tokens with a bad id and for the padding row.
    __device__ __forceinline__ Scalar* target(std::int64_t key) const {
        if (key < V) return key == padding_idx ? nullptr : dword + key * E;
        if (key < V + Y) return dtype_table + (key - V) * E;
        return key < V + Y + P ? dposition + (key - V - Y) * E : nullptr;
    }
    __device__ __forceinline__ float* partial_sum(std::int64_t chunk, bool goes_on) const {
        return partial + (chunk * 2 + (goes_on ? 1 : 0)) * padded;
    }
};

struct alignas(16) Four {
    float x[kFours] = {};

    __device__ __forceinline__ void load(const float* from) { *this = *reinterpret_cast<const Four*>(from); }
    __device__ __forceinline__ void store(float* to) const { *reinterpret_cast<Four*>(to) = *this; }
    __device__ __forceinline__ void add(const Four& other) {
#pragma unroll
        for (int i = 0; i < kFours; ++i) x[i] += other.x[i];
    }
    // Columns column to column + 4 of a row of `width`, rounded to its type.
    template <class Scalar>
    __device__ __forceinline__ void store_row(Scalar* row, std::int64_t column, std::int64_t width, bool wide) const {
        struct alignas(kFours * sizeof(Scalar)) Rounded {
            Scalar items[kFours];
        } rounded;
#pragma unroll
        for (int i = 0; i < kFours; ++i) rounded.items[i] = from_float<Scalar>(x[i]);
        if (wide && column < width) {
            *reinterpret_cast<Rounded*>(row + column) = rounded;
        } else {
#pragma unroll
            for (int i = 0; i < kFours; ++i) {
                if (column + i < width) row[column + i] = rounded.items[i];
            }
        }
    }
};

// Warp w of the grid: pairs w * kWarp on.
template <class Scalar>
__global__ void __launch_bounds__(kThreads, 2) embedding_projection_bwd_runs_kernel(const TablesGradient<Scalar> a) {
    const int lane = threadIdx.x % kWarp;
    const std::int64_t chunk = static_cast<std::int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
    const std::int64_t first = chunk * kWarp;
    if (first >= a.pairs) return;
    const int count = static_cast<int>(a.pairs - first < kWarp ? a.pairs - first : kWarp);
    int own_key = -1;
    std::int64_t own_token = 0;
    if (lane < count) {
        own_key = a.keys.get(first + lane);
        const std::int64_t pair = a.order[first + lane];
        own_token = pair - (pair >= a.T ? a.T : 0) - (pair >= 2 * a.T ? a.T : 0);
    }
    const int before = first > 0 ? a.keys.get(first - 1) : -1;
    const int after = first + count < a.pairs ? a.keys.get(first + count) : -1;
    for (std::int64_t tile = 0; tile < a.padded; tile += kJoinColumns) {
        const std::int64_t column = tile + lane * kFours;
        const bool inside = column < a.padded;
        bool begins_here = __shfl_sync(0xFFFFFFFFu, own_key, 0) != before, ended = false;
        Four sum;
        for (int start = 0; start < count; start += kAhead) {
            Four rows[kAhead];
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                const std::int64_t token = __shfl_sync(0xFFFFFFFFu, own_token, start + i);
                if (inside && start + i < count) rows[i].load(a.dz + token * a.padded + column);
            }
#pragma unroll
            for (int i = 0; i < kAhead; ++i) {
                if (start + i >= count) break;
                const int key = __shfl_sync(0xFFFFFFFFu, own_key, start + i);
                const int following = __shfl_sync(0xFFFFFFFFu, own_key, (start + i + 1) % kWarp);
                sum.add(rows[i]);
                ended = key != (start + i + 1 < count ? following : after);
                if (!ended) continue;
                Scalar* row = a.target(key);
                if (!begins_here) {
                    if (inside) sum.store(a.partial_sum(chunk, false) + column);
                } else if (row != nullptr && inside) {
                    sum.store_row(row, column, a.E, a.wide);
                }
                sum = Four();
                begins_here = true;
            }
        }
        if (!ended && inside) sum.store(a.partial_sum(chunk, begins_here) + column);
    }
}

// The sum of four columns over `count` rows: warp w adds rows w, w + kJoinWarps, ... and the first warp, which gets the
// result, the warps' sums in order. Every thread of the block takes part.
template <class RowAt>
__device__ __forceinline__ Four block_sum(std::int64_t count, bool inside, Four* shared, RowAt row_at) {
    Four sum;
#pragma unroll 4
    for (std::int64_t row = threadIdx.x / kWarp; row < count; row += kJoinWarps) {
        Four next;
        if (inside) next.load(row_at(row));
        sum.add(next);
    }
    sum.store(shared[threadIdx.x].x);
    __syncthreads();
    for (int other = kWarp; threadIdx.x < kWarp && other < kJoinThreads; other += kWarp) {
        Four next;
        next.load(shared[other + threadIdx.x].x);
        sum.add(next);
    }
    __syncthreads();  // the next sum uses the same memory
    return sum;
}

// The last chunk whose first pair has this key, where chunk `low` is known to be one.
template <class Scalar>
__device__ __forceinline__ std::int64_t last_chunk(const TablesGradient<Scalar>& a, int key, std::int64_t low) {
    const auto holds = [&](std::int64_t chunk) { return chunk * kWarp < a.pairs && a.keys.get(chunk * kWarp) == key; };
    std::int64_t step = 1;
    for (; holds(low + step); step *= 2) low += step;
    for (; step > 0; step /= 2) {
        if (holds(low + step)) low += step;
    }
    return low;
}

// Block x joins the run that begins in chunk x and continues in the next, if there is one.
template <class Scalar>
__global__ void __launch_bounds__(kJoinThreads) embedding_projection_bwd_join_kernel(const TablesGradient<Scalar> a) {
    extern __shared__ uint4 shared_memory[];
    const std::int64_t chunk = blockIdx.x, next = (chunk + 1) * kWarp;
    if (next >= a.pairs) return;
    const int key = a.keys.get(next - 1);
    const bool goes_on = a.keys.get(next) == key;
    const bool begins_here = chunk == 0 || a.keys.get(chunk * kWarp - 1) != key;
    Scalar* row = a.target(key);
    if (!goes_on || !begins_here || row == nullptr) return;
    const std::int64_t count = last_chunk(a, key, chunk + 1) - chunk + 1;
    for (std::int64_t tile = 0; tile < a.padded; tile += kJoinColumns) {
        const std::int64_t column = tile + threadIdx.x % kWarp * kFours;
        const bool inside = column < a.padded;
        const Four sum = block_sum(count, inside, reinterpret_cast<Four*>(shared_memory),
                                   [&](std::int64_t i) { return a.partial_sum(chunk + i, i == 0) + column; });
        if (threadIdx.x < kWarp && inside) sum.store_row(row, column, a.E, a.wide);
    }
}

// Block (x, y): dln_weight (x = 0) or dln_bias (1), kJoinColumns columns, from the sums (blocks,2,padded) of all
// blocks.
template <class Scalar>
__global__ void __launch_bounds__(kJoinThreads)
    embedding_projection_bwd_weights_kernel(const float* partial, const std::int64_t blocks, Scalar* dln_weight,
                                            Scalar* dln_bias, const std::int64_t E, const std::int64_t padded,
                                            const bool wide) {
    extern __shared__ uint4 shared_memory[];
    const std::int64_t column = static_cast<std::int64_t>(blockIdx.y) * kJoinColumns + threadIdx.x % kWarp * kFours;
    const bool inside = column < padded;
    const Four sum = block_sum(blocks, inside, reinterpret_cast<Four*>(shared_memory), [&](std::int64_t block) {
        return partial + (block * 2 + blockIdx.x) * padded + column;
    });
    if (threadIdx.x < kWarp && inside) sum.store_row(blockIdx.x == 0 ? dln_weight : dln_bias, column, E, wide);
}

}  // namespace albert_fast::cuda
