// The CUDA half of embedding_projection, as plain C: addresses, sizes and a stream, no framework.
#pragma once

#include <cstdint>

// out (T,H) = dropout(LayerNorm((word[ids] + token_type[types]) + position[positions])) proj_weight^T + proj_bias.
//
// ids, types, positions: (T) int64 on the device. word (V,E), token_type (Y,E), position (P,E), ln_weight, ln_bias (E),
// proj_weight (H,E), proj_bias (H), out (T,H): contiguous, of the dtype 0 float32, 1 bfloat16 or 2 float16. With ids
// null, `word` holds the rows (T,E) themselves and V is not used. Sums and statistics are float32; the normalised rows
// are rounded to the dtype before the product. dropout_p in [0, 1), replayed from `seed`, rows and columns counted in
// (T,E).
//
// first_bad: one int64 on the device, INT64_MAX on entry. An id outside its table is never looked up: its row of out is
// proj_bias, and first_bad becomes the smallest token * 3 + table (0 ids, 1 types, 2 positions).
//
// Runs on the current device, ordered on `stream` (a cudaStream_t), and does not wait. Returns a cudaError_t:
// cudaErrorInvalidValue for an unknown dtype, else what the launch said. T = 0 or H = 0 launches nothing.
extern "C" int embedding_projection_fwd_cuda(const std::int64_t* ids, const std::int64_t* types,
                                             const std::int64_t* positions, const void* word, const void* token_type,
                                             const void* position, const void* ln_weight, const void* ln_bias,
                                             const void* proj_weight, const void* proj_bias, void* out,
                                             std::int64_t* first_bad, std::int64_t T, std::int64_t E, std::int64_t H,
                                             std::int64_t V, std::int64_t Y, std::int64_t P, double eps,
                                             double dropout_p, std::int64_t seed, int dtype, void* stream);
