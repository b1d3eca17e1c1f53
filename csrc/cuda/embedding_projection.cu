// embedding_projection: gather three tables, add, LayerNorm, dropout, and the product E -> H, in one pass.
//
// A block takes kTokens tokens. It normalises their rows into shared memory (eight lanes a row), then walks over the
// output's columns, 128 at a time, and over E in chunks of 128 bytes, while the next chunks of proj_weight arrive in
// the background. 16-bit types multiply on tensor cores, float32 on plain FMA: no TF32. Written bytes bound it: at E =
// 128 the product takes a third of the time that storing (T,H) takes, so mma.sync is enough.
//
// Where the rows of a tile do not fit shared memory (E of a thousand and more) they are normalised again, 128 columns
// at a time, whenever the product needs them.
#include "embedding_projection.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "embedding_tile.cuh"
#include "hardware.cuh"

namespace albert_fast::cuda {

constexpr int kMultiprocessorBlocks = 2;  // blocks that share a multiprocessor and hide each other's latency

// Starts to bring rows first_row to first_row + kTileColumns, columns first_column on, of proj_weight; zeros outside
// it.
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
            *reinterpret_cast<uint4*>(target) = make_uint4(words[0], words[1], words[2], words[3]);
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

// Block (x, y): tokens x * kTokens on, tiles of columns y * column_tiles on.
template <class Scalar, int kTokens, bool kResident>
__global__ void __launch_bounds__(kThreads, kResident ? kMultiprocessorBlocks : 1)
    embedding_projection_fwd_kernel(const Arguments<Scalar> a, const int column_tiles) {
    extern __shared__ uint4 shared_memory[];
    const Shared<Scalar, kTokens> shared(reinterpret_cast<unsigned char*>(shared_memory));
    const std::int64_t first_token = static_cast<std::int64_t>(blockIdx.x) * kTokens;
    const std::int64_t first_column = static_cast<std::int64_t>(blockIdx.y) * column_tiles * kTileColumns;
    const std::int64_t left = (a.H - first_column + kTileColumns - 1) / kTileColumns;
    const std::int64_t tiles = left < column_tiles ? left : column_tiles;
    const std::int64_t chunks = (a.E + kChunk<Scalar> - 1) / kChunk<Scalar>;
    const std::int64_t steps = tiles * chunks;  // a tile's chunks one after another, then the next tile's
    const std::int64_t stride = row_stride<Scalar>(a.E, kResident);
    constexpr int kGatherChunks = kGatherColumns / kChunk<Scalar>;

    const auto load_step = [&](std::int64_t step) {
        if (step < steps) {
            load_weight(shared.weight + step % kStages * kWeightBytes, a, first_column + step / chunks * kTileColumns,
                        step % chunks * kChunk<Scalar>);
        }
        commit_copies();  // an empty group too, so that the number of groups tells the step
    };

    for (int step = 0; step < kStages - 1; ++step) load_step(step);
    find_rows(a, shared, first_token);
    __syncthreads();
    normalise_rows<Scalar, kTokens, kResident>(a, shared, first_token);

    Product<Scalar, kTokens> product;
    for (std::int64_t step = 0; step < steps; ++step) {
        const std::int64_t chunk = step % chunks;
        wait_for_copies<kStages - 2>();
        __syncthreads();  // this step's weights and the rows are there, and nobody reads the last step's any more
        load_step(step + kStages - 1);
        if constexpr (!kResident) {
            if (chunk % kGatherChunks == 0) {
                refill_rows(a, shared, first_token, chunk * kChunk<Scalar>);
                __syncthreads();
            }
        }
        const std::int64_t first_byte = (kResident ? chunk : chunk % kGatherChunks) * kChunkBytes;
        product.add_chunk(shared.rows + first_byte, stride, shared.weight + step % kStages * kWeightBytes);
        if (chunk == chunks - 1) product.store(a, first_token, first_column + step / chunks * kTileColumns);
    }
}

// What the current device has.
struct Device {
    int multiprocessors = 0, shared_bytes = 0;
};

inline cudaError_t ask_device(Device& found) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device)) return error;
    if (const cudaError_t error =
            cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount, device)) {
        return error;
    }
    return cudaDeviceGetAttribute(&found.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

template <class Scalar, int kTokens, bool kResident>
cudaError_t launch(const Arguments<Scalar>& a, const Device& device, cudaStream_t stream) {
    const auto kernel = embedding_projection_fwd_kernel<Scalar, kTokens, kResident>;
    const int bytes = static_cast<int>(Shared<Scalar, kTokens>::bytes(a.E, kResident));
    if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
        return error;
    }
    // Few tokens: the columns are shared out as well, so that all multiprocessors have work.
    const std::int64_t token_blocks = (a.T + kTokens - 1) / kTokens, tiles = (a.H + kTileColumns - 1) / kTileColumns;
    const std::int64_t wanted =
        std::max<std::int64_t>(1, kMultiprocessorBlocks * device.multiprocessors / token_blocks);
    const std::int64_t column_tiles = (tiles + std::min(tiles, wanted) - 1) / std::min(tiles, wanted);
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3(static_cast<unsigned>(token_blocks), static_cast<unsigned>((tiles + column_tiles - 1) / column_tiles));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
    config.stream = stream;
    return cudaLaunchKernelEx(&config, kernel, a, static_cast<int>(column_tiles));
}

template <class Scalar>
cudaError_t choose_and_launch(const Arguments<Scalar>& a, const Device& device, cudaStream_t stream) {
    if constexpr (!std::is_same_v<Scalar, float>) {
        // Large tiles read proj_weight less often, but want two blocks on a multiprocessor and enough tokens for all.
        const bool fits = Shared<Scalar, 128>::bytes(a.E, true) * kMultiprocessorBlocks <= device.shared_bytes;
        if (fits && a.T >= 128 * device.multiprocessors) return launch<Scalar, 128, true>(a, device, stream);
    }
    if (Shared<Scalar, 64>::bytes(a.E, true) <= device.shared_bytes) return launch<Scalar, 64, true>(a, device, stream);
    return launch<Scalar, 64, false>(a, device, stream);
}

inline bool on_16_bytes(std::initializer_list<const void*> addresses) {
    return std::all_of(addresses.begin(), addresses.end(),
                       [](const void* address) { return reinterpret_cast<std::uintptr_t>(address) % 16 == 0; });
}

}  // namespace albert_fast::cuda

extern "C" int embedding_projection_fwd_cuda(const std::int64_t* ids, const std::int64_t* types,
                                             const std::int64_t* positions, const void* word, const void* token_type,
                                             const void* position, const void* ln_weight, const void* ln_bias,
                                             const void* proj_weight, const void* proj_bias, void* out,
                                             std::int64_t* first_bad, std::int64_t T, std::int64_t E, std::int64_t H,
                                             std::int64_t V, std::int64_t Y, std::int64_t P, double eps,
                                             double dropout_p, std::int64_t seed, int dtype, void* stream) {
    using namespace albert_fast::cuda;
    if (T == 0 || H == 0) return cudaSuccess;
    Device device;
    if (const cudaError_t error = ask_device(device)) return error;
    const auto run = [&](auto zero) -> int {
        using Scalar = decltype(zero);
        const auto typed = [](const void* address) { return static_cast<const Scalar*>(address); };
        const auto fills_16 = [](std::int64_t n) { return n * static_cast<std::int64_t>(sizeof(Scalar)) % 16 == 0; };
        const Arguments<Scalar> arguments{
            ids,
            types,
            positions,
            typed(word),
            typed(token_type),
            typed(position),
            typed(ln_weight),
            typed(ln_bias),
            typed(proj_weight),
            typed(proj_bias),
            static_cast<Scalar*>(out),
            reinterpret_cast<long long*>(first_bad),
            T,
            E,
            H,
            V,
            Y,
            P,
            static_cast<float>(eps),
            make_dropout(dropout_p, seed),
            dropout_p > 0.0,
            fills_16(E) && on_16_bytes({word, token_type, position, ln_weight, ln_bias, proj_weight}),
            fills_16(H) && on_16_bytes({out})};
        return choose_and_launch(arguments, device, static_cast<cudaStream_t>(stream));
    };
    if (dtype == 0) return run(float());
    if (dtype == 1) return run(__nv_bfloat16());
    if (dtype == 2) return run(__half());
    return cudaErrorInvalidValue;
}
