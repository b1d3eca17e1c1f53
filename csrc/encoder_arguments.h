// What a call of encoder_fwd_cpu or quantized_encoder_fwd_cpu is given. bindings.cpp fills the fields from Python's
// arguments, which come in this order.
#pragma once

#include "common.h"

namespace albert_fast {

// T tokens of B sequences, H columns; I columns in the feed-forward block's middle. All numbers are float32.
struct EncoderArguments {
    Address hidden;         // (T,H): the states before the first layer
    Address out;            // (T,H), or (wanted_count,H): the states after the last one
    Address table;          // (distinct layers, columns) int64: addresses of a layer's tensors, see layer_schema.h
    Address layer_indices;  // (steps) int64: the row of the table for each step
    std::int64_t steps;
    Address cu_seqlens;  // (B+1) int32: where each sequence begins, and T
    std::int64_t B, T;
    // The rows of `hidden` that the last layer is computed for, sequence by sequence; cu_wanted = 0: all rows. A row
    // that is wanted of a sequence without tokens is computed from zeros.
    Address wanted_rows;  // (wanted_count) int64
    Address cu_wanted;    // (B+1) int32: where each sequence's rows begin among the wanted ones, and wanted_count
    std::int64_t wanted_count, H, I, num_heads;
    double softmax_scale, eps;
    int act;          // an ActivationCode
    Address profile;  // (num_threads, Stage::kCount) f64: seconds of each thread and stage are added; 0: not timed
    int num_threads;
};

}  // namespace albert_fast
