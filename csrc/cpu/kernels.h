// Declares the CPU kernels, once for each instruction set: bindings.cpp includes this file with ALBERT_FAST_ISA set to
// portable, avx2, avx512 and avx512_vnni in turn, hence no include guard. Every csrc/cpu/<op>.cpp includes it for its
// own set.
//
// For all functions: a tensor is contiguous unless a stride (in elements) is given. T = tokens, H = hidden size, N =
// row length. `dtype`, a DtypeCode, is the type of every tensor that is not marked f32 or int. Sums and statistics are
// float32. Results do not depend on num_threads. Dropout is off for dropout_p = 0; csrc/cpu/dropout.h defines which
// elements it keeps.
#include "../common.h"
#include "../encoder_arguments.h"

namespace albert_fast::ALBERT_FAST_ISA {

// out (T,E) = dropout(LayerNorm(word[ids] + type[types] + position[positions])); ids, types, positions (T) int64; word
// (V,E), type (Y,E), position (P,E); ln_w, ln_b (E); mean, rstd (T) f32. ids = 0: word holds (T,E) rows, V is not used.
// types = 0: there are no token types. Returns -1, or token * 3 + table (0 word, 1 type, 2 position) of the first id
// outside its table; then nothing is written.
std::int64_t embedding_layer_norm_fwd_cpu(Address ids, Address types, Address positions, Address word, Address type,
                                          Address position, Address ln_w, Address ln_b, Address out, Address mean,
                                          Address rstd, std::int64_t T, std::int64_t E, std::int64_t V, std::int64_t Y,
                                          std::int64_t P, double eps, double dropout_p, std::int64_t seed, int dtype,
                                          int num_threads);

// grad (T,E) is the gradient of out. Adds to dword (V,E; (T,E) for ids = 0), dtype_table (Y,E), dposition (P,E), all
// f32 and zeroed by the caller; writes dln_w, dln_b (E) f32. types = 0 leaves dtype_table alone. Returns as the
// forward.
std::int64_t embedding_layer_norm_bwd_cpu(Address grad, Address ids, Address types, Address positions, Address word,
                                          Address type, Address position, Address ln_w, Address mean, Address rstd,
                                          Address dword, Address dtype_table, Address dposition, Address dln_w,
                                          Address dln_b, std::int64_t T, std::int64_t E, std::int64_t V, std::int64_t Y,
                                          std::int64_t P, double dropout_p, std::int64_t seed, int dtype,
                                          int num_threads);

// out (Tq,H) = dropout(softmax(scale * q k^T)) v for every sequence and head, H = num_heads * head_dim; q (Tq,H), k and
// v (T,H); cu_q, cu_k (B+1) int32; lse (num_heads,Tq) f32 = log of the sum of exp(scale * q k^T). With key_lengths (B)
// int32, or 0 for none, cu_k (B) holds where the keys of each sequence begin, in any order. Causal: query i of Sq sees
// the keys 0 to i + Sk - Sq. A query that sees no key gives out = 0 and lse = -inf. Returns false, and writes nothing,
// where cu_q or cu_k does not run from 0 to Tq or T without falling, keys lie outside [0, T), or a sequence has more
// than longest_q queries or longest_k keys.
bool attention_fwd_cpu(Address q, Address k, Address v, Address out, Address lse, Address cu_q, Address cu_k,
                       Address key_lengths, bool causal, std::int64_t B, std::int64_t Tq, std::int64_t T,
                       std::int64_t longest_q, std::int64_t longest_k, std::int64_t num_heads, std::int64_t head_dim,
                       std::int64_t q_stride, std::int64_t k_stride, std::int64_t v_stride, std::int64_t out_stride,
                       double scale, double dropout_p, std::int64_t seed, int dtype, int num_threads);

// dq (Tq,H), dk, dv (T,H) from grad_out (Tq,H), what the forward was given, and the lse that it returned. Returns what
// the forward does.
bool attention_bwd_cpu(Address grad_out, Address q, Address k, Address v, Address lse, Address dq, Address dk,
                       Address dv, Address cu_q, Address cu_k, bool causal, std::int64_t B, std::int64_t Tq,
                       std::int64_t T, std::int64_t longest_q, std::int64_t longest_k, std::int64_t num_heads,
                       std::int64_t head_dim, std::int64_t go_stride, std::int64_t q_stride, std::int64_t k_stride,
                       std::int64_t v_stride, std::int64_t dq_stride, std::int64_t dk_stride, std::int64_t dv_stride,
                       double scale, double dropout_p, std::int64_t seed, int dtype, int num_threads);

// out (T,N) = dropout(act(x (T,N) + bias (N))); out may be x.
void bias_gelu_fwd_cpu(Address x, Address bias, Address out, std::int64_t T, std::int64_t N, int act, double dropout_p,
                       std::int64_t seed, int dtype, int num_threads);

// dx (T,N) and dbias (N) f32 from grad (T,N); dx may be grad.
void bias_gelu_bwd_cpu(Address grad, Address x, Address bias, Address dx, Address dbias, std::int64_t T, std::int64_t N,
                       int act, double dropout_p, std::int64_t seed, int dtype, int num_threads);

// out (T,N) = LayerNorm(dropout(x (T,N) + bias (N)) + residual (T,N)) with weight, ln_bias (N); mean, rstd (T) f32.
void add_layer_norm_fwd_cpu(Address x, Address bias, Address residual, Address weight, Address ln_bias, Address out,
                            Address mean, Address rstd, std::int64_t T, std::int64_t N, double eps, double dropout_p,
                            std::int64_t seed, int dtype, int num_threads);

// dx (T,N), dresidual (T,N), dbias, dweight, dln_bias (N) f32 from grad (T,N). dresidual = 0 when dropout_p = 0: it is
// dx.
void add_layer_norm_bwd_cpu(Address grad, Address x, Address bias, Address residual, Address weight, Address mean,
                            Address rstd, Address dx, Address dresidual, Address dbias, Address dweight,
                            Address dln_bias, std::int64_t T, std::int64_t N, double dropout_p, std::int64_t seed,
                            int dtype, int num_threads);

// out (T,N) = LayerNorm(act(x (T,N) + bias (N))) with weight, ln_bias (N); mean, rstd (T) f32.
void gelu_layer_norm_fwd_cpu(Address x, Address bias, Address weight, Address ln_bias, Address out, Address mean,
                             Address rstd, std::int64_t T, std::int64_t N, double eps, int act, int dtype,
                             int num_threads);

// dx (T,N), dbias, dweight, dln_bias (N) f32 from grad (T,N).
void gelu_layer_norm_bwd_cpu(Address grad, Address x, Address bias, Address weight, Address mean, Address rstd,
                             Address dx, Address dbias, Address dweight, Address dln_bias, std::int64_t T,
                             std::int64_t N, int act, int dtype, int num_threads);

// loss () f32 = the mean of -log softmax(logits)[label] over the rows whose label is not -100, 0 without any, for
// logits (N,V) = x (N,E) weight (V,E)^T + bias (V); labels (N) int64. row_max, row_sum (N) f32: the largest logit of
// each row and the sum of exp(logit - row_max), both 0 where the label is -100. label_smoothing in [0, 1] is the weight
// of each label that all V words share. Returns -1, or the first row whose label is neither -100 nor within [0, V);
// then nothing is written.
std::int64_t linear_cross_entropy_fwd_cpu(Address x, Address weight, Address bias, Address labels, Address loss,
                                          Address row_max, Address row_sum, std::int64_t N, std::int64_t E,
                                          std::int64_t V, double label_smoothing, int dtype, int num_threads);

// dx (N,E), dweight (V,E) f32, dbias (V) f32 from grad () f32, what the forward accepted, and row_max and row_sum as it
// returned them.
void linear_cross_entropy_bwd_cpu(Address grad, Address x, Address weight, Address bias, Address labels,
                                  Address row_max, Address row_sum, Address dx, Address dweight, Address dbias,
                                  std::int64_t N, std::int64_t E, std::int64_t V, double label_smoothing, int dtype,
                                  int num_threads);

// Floats of weight (N,K) f32 in the layout of linear_fwd_cpu, which differs between instruction sets; and that layout.
std::int64_t linear_packed_size_cpu(std::int64_t N, std::int64_t K);
void linear_pack_cpu(Address weight, Address packed, std::int64_t N, std::int64_t K, int num_threads);

// out (T,N) = x (T,K) weight^T + bias (N), or tanh of that; all f32; bias = 0: none. A row's result does not
// depend on the other rows, to the bit.
void linear_fwd_cpu(Address x, std::int64_t x_stride, Address packed, Address bias, Address out, std::int64_t T,
                    std::int64_t N, std::int64_t K, bool tanh, int num_threads);

// Floats of a layer's four matrices in the layout of encoder_fwd_cpu, which differs between instruction sets.
std::int64_t encoder_packed_size_cpu(std::int64_t H, std::int64_t I);

// packed from query, key, value, dense (H,H each), ffn (I,H), ffn_output (H,I), all f32.
void encoder_pack_cpu(Address query, Address key, Address value, Address dense, Address ffn, Address ffn_output,
                      Address packed, std::int64_t H, std::int64_t I, int num_threads);

// All layers, without dropout; encoder_arguments.h says what is read and written. A row of the table has the addresses
// of the tensors in Weight, then that of the packed matrices. Returns false, and writes nothing, where cu_seqlens or
// cu_wanted does not run from 0 to T or wanted_count without falling, or a wanted row lies outside its sequence.
bool encoder_fwd_cpu(const EncoderArguments& arguments);

// The same with matrices of `bits` (8 or 16) bits and activations that are rounded row by row. A row of the table has
// the addresses of the tensors in Vector, then for each Product those of the tensors in ProductTensor: the packed
// integers (csrc/cpu/integer_gemm.h), the scale and the sum of integers of each channel, the factor and the shift of
// each activation. Compiled for AVX512-VNNI too.
bool quantized_encoder_fwd_cpu(const EncoderArguments& arguments, int bits);

// Asks the operating system for large pages under memory that has not been written to yet.
void use_large_pages_cpu(Address memory, std::int64_t bytes);

// Multiplies `repeats` tiles of integers on every thread, from the first cache alone; returns the operations of one
// thread. Its time gives the highest rate that products can reach.
std::int64_t quantized_encoder_limit_cpu(int bits, std::int64_t repeats, int num_threads);

}  // namespace albert_fast::ALBERT_FAST_ISA
