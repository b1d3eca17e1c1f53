"""The operators, one file each: eager reference, schema, backends, gradient, public function.

All work on packed tokens: T rows without padding, sequences delimited by `cu_seqlens`.
"""

from ..kernels._capture import CAPTURE
from ..kernels._precision import tf32_asked_for
from ._columns import split_columns
from ._dropout import draw_seed
from ._encoder_call import EncoderCall
from ._graph_inputs import GraphInputs
from ._reports import CapturedReports, Describe, placing, raise_pending, synchronize
from ._schema import PRODUCTS, VECTORS, WEIGHTS, split_layers
from ._stages import STAGES, stage_seconds
from ._token_errors import TokenIndexError, index_error
from .add_layer_norm import add_layer_norm, add_layer_norm_ref
from .attention import attention, attention_ref
from .bias_gelu import bias_gelu, bias_gelu_ref
from .embedding_layer_norm import embedding_layer_norm, embedding_layer_norm_ref
from .embedding_projection import embedding_projection, embedding_projection_ref
from .encoder import (
    MAX_KERNEL_HEAD_DIM,
    MAX_KERNEL_TOKENS,
    EncoderWeights,
    encoder,
    encoder_ref,
    kernel_is_faster,
    kernels_are_compared,
    pack_matrices,
    packed_encoder,
    panel_columns,
    unpack_matrix,
)
from .gelu_layer_norm import gelu_layer_norm, gelu_layer_norm_ref
from .linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_ref
from .linear_gelu import linear_gelu, linear_gelu_ref
from .quantized_encoder import (
    QuantizedLayers,
    QuantizedOptions,
    QuantizedWeights,
    quantized_encoder,
    quantized_encoder_ref,
    run_quantized_encoder,
)

__all__ = [
    "CAPTURE",
    "MAX_KERNEL_HEAD_DIM",
    "MAX_KERNEL_TOKENS",
    "PRODUCTS",
    "STAGES",
    "VECTORS",
    "WEIGHTS",
    "CapturedReports",
    "Describe",
    "EncoderCall",
    "EncoderWeights",
    "GraphInputs",
    "QuantizedLayers",
    "QuantizedOptions",
    "QuantizedWeights",
    "TokenIndexError",
    "add_layer_norm",
    "add_layer_norm_ref",
    "attention",
    "attention_ref",
    "bias_gelu",
    "bias_gelu_ref",
    "draw_seed",
    "embedding_layer_norm",
    "embedding_layer_norm_ref",
    "embedding_projection",
    "embedding_projection_ref",
    "encoder",
    "encoder_ref",
    "gelu_layer_norm",
    "gelu_layer_norm_ref",
    "index_error",
    "kernel_is_faster",
    "kernels_are_compared",
    "linear_cross_entropy",
    "linear_cross_entropy_ref",
    "linear_gelu",
    "linear_gelu_ref",
    "pack_matrices",
    "packed_encoder",
    "panel_columns",
    "placing",
    "quantized_encoder",
    "quantized_encoder_ref",
    "raise_pending",
    "run_quantized_encoder",
    "split_columns",
    "split_layers",
    "stage_seconds",
    "synchronize",
    "tf32_asked_for",
    "unpack_matrix",
]
