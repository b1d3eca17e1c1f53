// The product of a tile of normalised rows with proj_weight: 16-bit types on tensor cores, float32 on FMA.
#pragma once

#include "embedding_tile.cuh"
#include "hardware.cuh"

namespace albert_fast::cuda {

// Starts copying the rows first_row to first_row + kTileColumns of proj_weight, from column first_column on; outside of
// it there are zeros.
template <class Scalar>
__device__ __forceinline__ void load_weight(unsigned char* target, const Arguments<Scalar>& a, std::int64_t first_row,
                                            std::int64_t first_column) {
    constexpr int kItems = kVector<Scalar>, kVectors = kChunkBytes / 16;
    for (int i = threadIdx.x; i < kTileColumns * kVectors; i += kThreads) {
        const std::int64_t row = first_row + i / kVectors, column = first_column + i % kVectors * kItems;
        unsigned char* place = target + i / kVectors * kWeightStride + i % kVectors * 16;
        if (a.wide_rows) {
            const bool inside = row < a.H && column < a.E;
            copy_async_16(place, inside ? a.proj_weight + row * a.E + column : a.proj_weight, inside ? 16 : 0);
        } else {
#pragma unroll
            for (int j = 0; j < kItems; ++j) {
                const bool inside = row < a.H && column + j < a.E;
                reinterpret_cast<Scalar*>(place)[j] =
                    inside ? a.proj_weight[row * a.E + column + j] : from_float<Scalar>(0.0f);
            }
        }
    }
}

// The block's product on tensor cores: a warp multiplies 32 tokens by kTileColumns / kWarpsAcross columns.
template <class Scalar, int kTokens>
struct Product {
    static constexpr int kWarpsDown = kTokens / 32, kWarpsAcross = kThreads / 32 / kWarpsDown;
    static constexpr int kWarpColumns = kTileColumns / kWarpsAcross;
    static constexpr int kEights = kWarpColumns / 8;
    float sums[2][kEights][4] = {};  // [upper or lower 16 tokens][8 columns][as the accumulators of mma]

    const int lane = threadIdx.x % 32;
    const int warp_token = static_cast<int>(threadIdx.x) / 32 / kWarpsAcross * 32;
    const int warp_column = static_cast<int>(threadIdx.x) / 32 % kWarpsAcross * kWarpColumns;

    // `rows` points at the first token's first column of the chunk, `weight` at the chunk.
    __device__ __forceinline__ void add_chunk(const unsigned char* rows, std::int64_t stride,
                                              const unsigned char* weight) {
        const unsigned char* row = rows + (warp_token + lane % 16) * stride + lane / 16 * 16;
        const unsigned char* column =
            weight + (warp_column + lane % 8 + lane / 16 * 8) * kWeightStride + lane / 8 % 2 * 16;
#pragma unroll
        for (int k = 0; k < kChunkBytes; k += 32) {
            std::uint32_t a[2][4], b[4];
            load_matrices(a[0], row + k);
            load_matrices(a[1], row + 16 * stride + k);
#pragma unroll
            for (int n = 0; n < kEights; n += 2) {
                load_matrices(b, column + n * 8 * kWeightStride + k);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    multiply_add(sums[half][n], a[half], b, Scalar());
                    multiply_add(sums[half][n + 1], a[half], b + 2, Scalar());
                }
            }
        }
    }

    // Adds proj_bias and stores the tile; the sums start again from zero.
    __device__ __forceinline__ void store(const Arguments<Scalar>& a, std::int64_t first_token,
                                          std::int64_t first_column) {
        const int quad_lane = lane % 4;
#pragma unroll
        for (int n = 0; n < kEights; n += 4) {
            const std::int64_t column = first_column + warp_column + n * 8;
            float bias[4][2];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    const std::int64_t own = column + i * 8 + quad_lane * 2 + j;
                    bias[i][j] = own < a.H ? to_float(a.proj_bias[own]) : 0.0f;
                }
            }
#pragma unroll
            for (int eight_rows = 0; eight_rows < 4; ++eight_rows) {
                std::uint32_t words[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float* pair = sums[eight_rows / 2][n + i] + eight_rows % 2 * 2;
                    const Scalar items[2] = {from_float<Scalar>(pair[0] + bias[i][0]),
                                             from_float<Scalar>(pair[1] + bias[i][1])};
                    memcpy(&words[i], items, sizeof items);
                    pair[0] = pair[1] = 0.0f;
                }
                transpose_in_quad(words);
                const std::int64_t token = first_token + warp_token + eight_rows * 8 + lane / 4;
                if (token < a.T) store_eight(a, words, token, column + quad_lane * 8);
            }
        }
    }

private:
    // Lane t of four holds word t of four rows of words; afterwards it holds all four words of row t, 16 bytes to
    // store.
    __device__ __forceinline__ void transpose_in_quad(std::uint32_t (&words)[4]) const {
        const bool odd = lane % 2 == 1, upper = lane / 2 % 2 == 1;
#pragma unroll
        for (int pair = 0; pair < 4; pair += 2) {
            const std::uint32_t sent = odd ? words[pair] : words[pair + 1];
            const std::uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, sent, 1);
            words[pair] = odd ? received : words[pair];
            words[pair + 1] = odd ? words[pair + 1] : received;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const std::uint32_t sent = upper ? words[i] : words[i + 2];
            const std::uint32_t received = __shfl_xor_sync(0xFFFFFFFFu, sent, 2);
            words[i] = upper ? received : words[i];
            words[i + 2] = upper ? words[i + 2] : received;
        }
    }

    __device__ __forceinline__ void store_eight(const Arguments<Scalar>& a, const std::uint32_t (&words)[4],
                                                std::int64_t token, std::int64_t column) const {
        Scalar* target = a.out + token * a.H + column;
        if (a.wide_output && column < a.H) {
            store_16(target, words);
            return;
        }
        Scalar items[8];
        memcpy(items, words, sizeof items);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (column + i < a.H) target[i] = items[i];
        }
    }
};

// The same in float32: a warp has kTokens / 8 tokens, a lane four columns, 32 apart so that lanes store neighbours.
template <int kTokens>
struct Product<float, kTokens> {
    static constexpr int kWarpTokens = kTokens / (kThreads / 32), kLaneTileColumns = kTileColumns / 32;
    float sums[kWarpTokens][kLaneTileColumns] = {};

    const int lane = threadIdx.x % 32;
    const int warp_token = static_cast<int>(threadIdx.x) / 32 * kWarpTokens;

    __device__ __forceinline__ void add_chunk(const unsigned char* rows, std::int64_t stride,
                                              const unsigned char* weight) {
        for (int k = 0; k < kChunkBytes; k += 16) {
            float4 w[kLaneTileColumns];
#pragma unroll
            for (int j = 0; j < kLaneTileColumns; ++j) {
                w[j] = *reinterpret_cast<const float4*>(weight + (lane + 32 * j) * kWeightStride + k);
            }
#pragma unroll
            for (int i = 0; i < kWarpTokens; ++i) {
                const float4 x = *reinterpret_cast<const float4*>(rows + (warp_token + i) * stride + k);
#pragma unroll
                for (int j = 0; j < kLaneTileColumns; ++j) {
                    sums[i][j] = fmaf(x.x, w[j].x, sums[i][j]);
                    sums[i][j] = fmaf(x.y, w[j].y, sums[i][j]);
                    sums[i][j] = fmaf(x.z, w[j].z, sums[i][j]);
                    sums[i][j] = fmaf(x.w, w[j].w, sums[i][j]);
                }
            }
        }
    }

    __device__ __forceinline__ void store(const Arguments<float>& a, std::int64_t first_token,
                                          std::int64_t first_column) {
#pragma unroll
        for (int j = 0; j < kLaneTileColumns; ++j) {
            const std::int64_t column = first_column + lane + 32 * j;
            const float bias = column < a.H ? a.proj_bias[column] : 0.0f;
#pragma unroll
            for (int i = 0; i < kWarpTokens; ++i) {
                const std::int64_t token = first_token + warp_token + i;
                if (token < a.T && column < a.H) a.out[token * a.H + column] = sums[i][j] + bias;
                sums[i][j] = 0.0f;
            }
        }
    }
};

}  // namespace albert_fast::cuda
