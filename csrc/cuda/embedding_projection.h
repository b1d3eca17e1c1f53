// The CUDA half of embedding_projection, as plain C: addresses, sizes and a stream, no framework.
#pragma once

#include <cstdint>

// out (T,H) = dropout(LayerNorm((word[ids] + token_type[types]) + position[positions])) proj_weight^T + proj_bias.
//
// ids, types, positions: (T) int64 on the device. word (V,E), token_type (Y,E), position (P,E), ln_weight, ln_bias (E),
// proj_weight (H,E), proj_bias (H), out (T,H): contiguous, of one dtype, a DtypeCode of ../layer_schema.h. With ids
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

// The gradients of what embedding_projection_fwd_cuda computes, apart from its product and the sort between these two.
//
// dnormed (T,E): the gradient of the normalised rows, after dropout. The ids, tables and dropout are the forward's; a
// token with a bad id has no rows, so it adds to no gradient. Writes
//   normed (T,E): the normalised rows again, for the gradient of proj_weight; dln_weight, dln_bias (E);
//   dembeds (T,E): the gradient of the rows (T,E) where ids is null, else null;
//   dz (T,E') float32: the gradient of the rows' sum, zeros from column E to E', which is E rounded up to 8;
//   keys (3,T), or (2,T) where ids is null: which row of the gradients, words (V, none where ids is null), types (Y)
//   and positions (P) counted on, each token adds to, and V + Y + P for a token with a bad id. int16 with key_bytes =
//   2, if that holds V + Y + P, else int32.
// partial: room for ceil(T / 64) * 2 * E' float32. The dtype's buffers are contiguous, and everything starts on 16
// bytes or is read element by element. Every element is written; with T = 0 that is dln_weight and dln_bias.
extern "C" int embedding_projection_bwd_rows_cuda(
    const void* dnormed, const std::int64_t* ids, const std::int64_t* types, const std::int64_t* positions,
    const void* word, const void* token_type, const void* position, const void* ln_weight, const void* ln_bias,
    void* normed, void* dembeds, float* dz, float* partial, void* keys, void* dln_weight, void* dln_bias,
    std::int64_t T, std::int64_t E, std::int64_t V, std::int64_t Y, std::int64_t P, double eps, double dropout_p,
    std::int64_t seed, int key_bytes, int dtype, void* stream);

// dword (V,E), dtype_table (Y,E), dposition (P,E), zeros on entry, get the sums of their tokens' rows of dz; dword is
// null where there were no ids. keys and order: the keys above and their places (int64), sorted by key, equal keys in
// the order of their tokens. padding_idx: the row of dword that stays zero, or -1. partial: room for ceil(pairs / 32) *
// 2 * E' float32, pairs being 3 T or 2 T.
extern "C" int embedding_projection_bwd_tables_cuda(const void* keys, const std::int64_t* order, const float* dz,
                                                    float* partial, void* dword, void* dtype_table, void* dposition,
                                                    std::int64_t T, std::int64_t E, std::int64_t V, std::int64_t Y,
                                                    std::int64_t P, std::int64_t padding_idx, int key_bytes, int dtype,
                                                    void* stream);
