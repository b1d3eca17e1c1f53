// embedding_projection: gather three tables, add, LayerNorm, dropout, and the product E -> H, in one pass.
//
// A block takes kTokens tokens. It normalises their rows into shared memory (eight lanes a row), then walks over the
// output's columns, 128 at a time, and over E in chunks of 128 bytes, while the next chunks of proj_weight arrive in
// the background. 16-bit types multiply on tensor cores. Written bytes bound it: at E = 128 the product takes a third
// of the time that storing (T,H) takes, so mma.sync is enough.
//
// float32 multiplies on plain FMA, also where torch is asked for TF32, for which it would need a second product and its
// tiles. By the peaks of an H100 (67 TFLOP/s of FMA) the product of 32,768 tokens at E = 128, H = 768 is 6.4 GFLOP, 96
// us, and storing its 101 MB takes 34 us at 3.0 TB/s: TF32 could save 62 us, once a forward. The layers behind it
// are 5.6 TFLOP, 11 ms at the peak of TF32 (495 TFLOP/s): 0.6 % of the whole.
//
// Where the rows of a tile do not fit shared memory (E of a thousand and more) they are normalised again, 128 columns
// at a time, whenever the product needs them.
//
// Backward: cuBLAS multiplies, dnormed = grad proj_weight before and dproj_weight = grad^T normed after; both read grad
// (T,H), and the sums of one pass over it, H E floats, do not fit a block's shared memory. What is left is bound by
// memory. For every token, with s bytes an element and E' = E rounded up to eight: the rows kernel reads the three rows
// and dnormed, 4 E s, and writes normed and dz, E s + 4 E' (with inputs_embeds also their gradient, E s); keys of two
// or four bytes are sorted, three a token; the runs kernel reads dz three times, 12 E', and chunks' sums are 3 E' / 4
// at most, written and read. About 50 operations an element, 3 more for the tables. At E = 128 in bfloat16, 3.6 KB in
// all, beside the 4.6 KB of reading grad three times at H = 768, for the products and the gradient of proj_bias.
#include "embedding_projection.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "../layer_schema.h"
#include "embedding_product.cuh"
#include "embedding_rows_gradient.cuh"
#include "embedding_tables_gradient.cuh"
#include "embedding_tile.cuh"

namespace albert_fast::cuda {

constexpr int kMultiprocessorBlocks = 2;  // blocks that share a multiprocessor and hide each other's latency

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
        __syncthreads();  // this step's weights and the rows have arrived, and the last step's are not read any more
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

// The properties of the current device.
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
    // The limit holds for the process, not for this call, so all threads set the same one, whatever their E.
    if (const cudaError_t error =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes)) {
        return error;
    }
    // With few tokens the columns are divided too, so that all multiprocessors have work.
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
        // Large tiles read proj_weight less often, but need two blocks on a multiprocessor and enough tokens for all.
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

template <class Scalar>
bool fills_16(std::int64_t n) {
    return n * static_cast<std::int64_t>(sizeof(Scalar)) % 16 == 0;
}

// The look-ups of the forward pass and its gradient, with pointers of the element type.
template <class Scalar>
Embeddings<Scalar> typed_embeddings(const std::int64_t* ids, const std::int64_t* types, const std::int64_t* positions,
                                    const void* word, const void* token_type, const void* position,
                                    const void* ln_weight, const void* ln_bias, std::int64_t T, std::int64_t E,
                                    std::int64_t V, std::int64_t Y, std::int64_t P, double eps, double dropout_p,
                                    std::int64_t seed, bool wide) {
    const auto typed = [](const void* address) { return static_cast<const Scalar*>(address); };
    return {ids,
            types,
            positions,
            typed(word),
            typed(token_type),
            typed(position),
            typed(ln_weight),
            typed(ln_bias),
            T,
            E,
            V,
            Y,
            P,
            static_cast<float>(eps),
            make_dropout(dropout_p, seed),
            dropout_p > 0.0,
            wide};
}

// Calls run with a value of the element type, from which run takes the type.
template <class Run>
int with_dtype(int dtype, Run run) {
    using Code = albert_fast::DtypeCode;
    if (dtype == Code::kFloat32) return run(float());
    if (dtype == Code::kBfloat16) return run(__nv_bfloat16());
    if (dtype == Code::kFloat16) return run(__half());
    return cudaErrorInvalidValue;
}

// Launches a backward kernel; every device has its shared memory without raising the limit.
template <class... Parameters, class... Values>
cudaError_t launch_blocks(void (*kernel)(Parameters...), dim3 blocks, int threads, int bytes, void* stream,
                          Values... values) {
    cudaLaunchConfig_t config = {};
    config.gridDim = blocks;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = static_cast<std::size_t>(bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    return cudaLaunchKernelEx(&config, kernel, values...);
}

inline unsigned block_count(std::int64_t items, std::int64_t in_a_block) {
    return static_cast<unsigned>((items + in_a_block - 1) / in_a_block);
}

constexpr int kJoinBytes = kJoinThreads * sizeof(Four);

inline std::int64_t padded_width(std::int64_t E) { return (E + kPadColumns - 1) / kPadColumns * kPadColumns; }

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
    return with_dtype(dtype, [&](auto zero) -> int {
        using Scalar = decltype(zero);
        const auto typed = [](const void* address) { return static_cast<const Scalar*>(address); };
        const bool wide =
            fills_16<Scalar>(E) && on_16_bytes({word, token_type, position, ln_weight, ln_bias, proj_weight});
        const auto embeddings = typed_embeddings<Scalar>(ids, types, positions, word, token_type, position, ln_weight,
                                                         ln_bias, T, E, V, Y, P, eps, dropout_p, seed, wide);
        const Arguments<Scalar> arguments{embeddings,
                                          typed(proj_weight),
                                          typed(proj_bias),
                                          static_cast<Scalar*>(out),
                                          reinterpret_cast<long long*>(first_bad),
                                          H,
                                          fills_16<Scalar>(H) && on_16_bytes({out})};
        return choose_and_launch(arguments, device, static_cast<cudaStream_t>(stream));
    });
}

extern "C" int embedding_projection_bwd_rows_cuda(
    const void* dnormed, const std::int64_t* ids, const std::int64_t* types, const std::int64_t* positions,
    const void* word, const void* token_type, const void* position, const void* ln_weight, const void* ln_bias,
    void* normed, void* dembeds, float* dz, float* partial, void* keys, void* dln_weight, void* dln_bias,
    std::int64_t T, std::int64_t E, std::int64_t V, std::int64_t Y, std::int64_t P, double eps, double dropout_p,
    std::int64_t seed, int key_bytes, int dtype, void* stream) {
    using namespace albert_fast::cuda;
    return with_dtype(dtype, [&](auto zero) -> int {
        using Scalar = decltype(zero);
        const auto typed = [](const void* address) { return static_cast<const Scalar*>(address); };
        const bool wide = fills_16<Scalar>(E) && on_16_bytes({dnormed, word, token_type, position, ln_weight, ln_bias,
                                                              normed, dembeds, dln_weight, dln_bias});
        const auto embeddings = typed_embeddings<Scalar>(ids, types, positions, word, token_type, position, ln_weight,
                                                         ln_bias, T, E, V, Y, P, eps, dropout_p, seed, wide);
        const RowsGradient<Scalar> arguments{
            embeddings, typed(dnormed), static_cast<Scalar*>(normed), static_cast<Scalar*>(dembeds),
            dz,         partial,        Keys{keys, key_bytes == 2},   padded_width(E)};
        const std::int64_t blocks = block_count(T, kGradientRows);
        if (blocks > 0) {
            const auto kernel = E <= kGatherColumns ? embedding_projection_bwd_rows_kernel<Scalar, true>
                                                    : embedding_projection_bwd_rows_kernel<Scalar, false>;
            const cudaError_t error = launch_blocks(kernel, dim3(static_cast<unsigned>(blocks)), kThreads,
                                                    RowsGradientShared::kBytes, stream, arguments);
            if (error) return error;
        }
        return launch_blocks(embedding_projection_bwd_weights_kernel<Scalar>, dim3(2, block_count(E, kJoinColumns)),
                             kJoinThreads, kJoinBytes, stream, static_cast<const float*>(partial), blocks,
                             static_cast<Scalar*>(dln_weight), static_cast<Scalar*>(dln_bias), E, padded_width(E),
                             wide);
    });
}

extern "C" int embedding_projection_bwd_tables_cuda(const void* keys, const std::int64_t* order, const float* dz,
                                                    float* partial, void* dword, void* dtype_table, void* dposition,
                                                    std::int64_t T, std::int64_t E, std::int64_t V, std::int64_t Y,
                                                    std::int64_t P, std::int64_t padding_idx, int key_bytes, int dtype,
                                                    void* stream) {
    using namespace albert_fast::cuda;
    if (T == 0) return cudaSuccess;
    return with_dtype(dtype, [&](auto zero) -> int {
        using Scalar = decltype(zero);
        const auto typed = [](void* address) { return static_cast<Scalar*>(address); };
        const std::int64_t pairs = (dword == nullptr ? 2 : 3) * T;
        const TablesGradient<Scalar> arguments{Keys{const_cast<void*>(keys), key_bytes == 2},
                                               order,
                                               dz,
                                               partial,
                                               typed(dword),
                                               typed(dtype_table),
                                               typed(dposition),
                                               pairs,
                                               T,
                                               E,
                                               padded_width(E),
                                               dword == nullptr ? 0 : V,
                                               Y,
                                               P,
                                               padding_idx,
                                               fills_16<Scalar>(E) && on_16_bytes({dword, dtype_table, dposition})};
        if (const cudaError_t error =
                launch_blocks(embedding_projection_bwd_runs_kernel<Scalar>, dim3(block_count(pairs, kThreads)),
                              kThreads, 0, stream, arguments)) {
            return error;
        }
        return launch_blocks(embedding_projection_bwd_join_kernel<Scalar>, dim3(block_count(pairs, kWarp)),
                             kJoinThreads, kJoinBytes, stream, arguments);
    });
}
