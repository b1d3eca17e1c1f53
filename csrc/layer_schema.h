// What Python and C++ must agree on: the order of a layer's tensors, the stages of the clock and some numbers.
//
// Python has the same lists (albert_fast/ops/_schema.py). When it loads the extension it compares them with what
// bindings.cpp reports under `schema`, so that an extension built from other sources is refused.
#pragma once

#include <cstdint>

namespace albert_fast {

// Columns of the feed-forward block's middle that are computed, rounded and used up together.
constexpr std::int64_t kSlice = 768;
// Output channels in a panel of packed integers.
constexpr std::int64_t kIntegerPanel = 32;
// Elements of a row of 16-bit integers whose products are added up in 32 bits.
constexpr std::int64_t kIntegerRun = 256;
// Dropout of attention: the rows of the hash of head h begin at h * kHeadStride.
constexpr std::uint32_t kHeadStride = 0x10001u;
// The label that linear_cross_entropy ignores.
constexpr std::int64_t kIgnored = -100;
// Sizes of the buffers of embedding_projection's CUDA functions: columns are padded to a multiple of kPadColumns (16
// bytes of the smallest dtype); a partial sum is over kSumTokens tokens, or kSumPairs pairs of a token and a table.
constexpr int kPadColumns = 8, kSumTokens = 64, kSumPairs = 32;
// The largest integer of activations in 8 bits (from 0) and in 16 bits (from minus it), and of attention's values.
constexpr int kInt8Levels = 255, kInt16Levels = 8191, kValueLevels = 4095;

// Each list below makes an enum, whose kCount is its length, and the names that Python knows its members by.
#define ALBERT_FAST_MEMBER(constant, name) constant,
#define ALBERT_FAST_NAME(constant, name) name,
#define ALBERT_FAST_LIST(Type, LIST)                                      \
    struct Type {                                                         \
        enum Index : int { LIST(ALBERT_FAST_MEMBER) kCount };             \
        static constexpr const char* kNames[] = {LIST(ALBERT_FAST_NAME)}; \
    };

// The tensors of a layer in float32. A row of encoder_fwd_cpu's table holds their addresses in this order, and behind
// them the address of the packed matrices.
#define ALBERT_FAST_WEIGHTS(X)             \
    X(kQuery, "query")                     \
    X(kQueryBias, "query_bias")            \
    X(kKey, "key")                         \
    X(kKeyBias, "key_bias")                \
    X(kValue, "value")                     \
    X(kValueBias, "value_bias")            \
    X(kDense, "dense")                     \
    X(kDenseBias, "dense_bias")            \
    X(kNormWeight, "norm_weight")          \
    X(kNormBias, "norm_bias")              \
    X(kFfn, "ffn")                         \
    X(kFfnBias, "ffn_bias")                \
    X(kFfnOutput, "ffn_output")            \
    X(kFfnOutputBias, "ffn_output_bias")   \
    X(kFullNormWeight, "full_norm_weight") \
    X(kFullNormBias, "full_norm_bias")
ALBERT_FAST_LIST(Weight, ALBERT_FAST_WEIGHTS)

// The vectors of a layer of integer matrices, at the beginning of a row of quantized_encoder_fwd_cpu's table.
#define ALBERT_FAST_VECTORS(X)             \
    X(kQkvBias, "qkv_bias")                \
    X(kDenseBias, "dense_bias")            \
    X(kNormWeight, "norm_weight")          \
    X(kNormBias, "norm_bias")              \
    X(kFfnBias, "ffn_bias")                \
    X(kFfnOutputBias, "ffn_output_bias")   \
    X(kFullNormWeight, "full_norm_weight") \
    X(kFullNormBias, "full_norm_bias")
ALBERT_FAST_LIST(Vector, ALBERT_FAST_VECTORS)

// The products of that layer; each has the tensors of ProductTensor, product after product behind the vectors.
#define ALBERT_FAST_PRODUCTS(X) X(kQkv, "qkv") X(kDense, "dense") X(kFfn, "ffn") X(kFfnOutput, "ffn_output")
ALBERT_FAST_LIST(Product, ALBERT_FAST_PRODUCTS)

#define ALBERT_FAST_PRODUCT_TENSORS(X) \
    X(kIntegers, "integers") X(kScales, "scales") X(kSums, "sums") X(kRescales, "rescales") X(kShifts, "shifts")
ALBERT_FAST_LIST(ProductTensor, ALBERT_FAST_PRODUCT_TENSORS)

// What a thread's time is counted under.
#define ALBERT_FAST_STAGES(X)            \
    X(kProject, "query, key, value")     \
    X(kAttention, "attention")           \
    X(kDense, "attention output")        \
    X(kNorm, "add, LayerNorm")           \
    X(kUp, "FFN up, activation")         \
    X(kDown, "FFN down")                 \
    X(kRounding, "rounding to integers") \
    X(kCopy, "copies")                   \
    X(kWait, "waiting")
ALBERT_FAST_LIST(Stage, ALBERT_FAST_STAGES)

// Activation functions, by the number that a call names them with.
#define ALBERT_FAST_ACTIVATIONS(X) X(kGeluTanh, "gelu_tanh") X(kGeluErf, "gelu_erf") X(kRelu, "relu")
ALBERT_FAST_LIST(ActivationCode, ALBERT_FAST_ACTIVATIONS)

// Element types, by the number that a call names them with. Only the CUDA functions take float16.
#define ALBERT_FAST_DTYPES(X) X(kFloat32, "float32") X(kBfloat16, "bfloat16") X(kFloat16, "float16")
ALBERT_FAST_LIST(DtypeCode, ALBERT_FAST_DTYPES)

#undef ALBERT_FAST_MEMBER
#undef ALBERT_FAST_NAME
#undef ALBERT_FAST_LIST

}  // namespace albert_fast
