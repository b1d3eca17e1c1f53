"""One OpCase per operator: shapes, inputs, plain torch, bytes and operations, for parity tests and benchmarks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .. import ops
from ..models import losses
from ..ops.bias_gelu import act_ref
from ..ops.linear_cross_entropy import IGNORED
from .case import EPS, Inputs, OpCase, drawn_seed, dropped, norm_weights, randn
from .encoder_cases import (
    attention_eager,
    attention_inputs,
    attention_operations,
    attention_rounded,
    attention_saved_bytes,
    attention_slack,
    encoder_eager,
    encoder_inputs,
    encoder_operations,
    quantized_encoder_eager,
    quantized_encoder_inputs,
    quantized_encoder_operations,
    quantized_encoder_takes,
)

# bias_gelu ----------------------------------------------------------------------------------------------------------------


def _bias_gelu_inputs(shape, dtype, device="cpu", generator=None, act="gelu_tanh", dropout_p=0.0) -> Inputs:
    return {
        "x": randn(shape, dtype, device, generator) * 2,
        "bias": randn(shape[1:], dtype, device, generator),
        "act": act,
        "dropout_p": dropout_p,
        "seed": drawn_seed(dropout_p, generator),
    }


def _bias_gelu_eager(x, bias, act, dropout_p, seed):
    return dropped(act_ref(x + bias, act), dropout_p, seed)


# linear_gelu: shapes are (tokens, K, N) -------------------------------------------------------------------------------------


def _linear_gelu_inputs(shape, dtype, device="cpu", generator=None, act="gelu_tanh") -> Inputs:
    tokens, width, middle = shape
    return {
        "x": randn((tokens, width), dtype, device, generator),
        "weight": randn((middle, width), dtype, device, generator) * 2 * width**-0.5,
        "bias": randn((middle,), dtype, device, generator),
        "act": act,
    }


def _linear_gelu_eager(x, weight, bias, act):
    return act_ref(F.linear(x, weight, bias), act)


def _linear_gelu_saved_bytes(inputs: Inputs) -> int:
    """Bytes of the sums before the activation, which the forward keeps."""
    return len(inputs["x"]) * len(inputs["weight"]) * inputs["x"].element_size()


# add_layer_norm -----------------------------------------------------------------------------------------------------------


def _add_layer_norm_inputs(shape, dtype, device="cpu", generator=None, dropout_p=0.0) -> Inputs:
    weight, ln_bias = norm_weights(shape[1], dtype, device, generator)
    x, residual = (randn(shape, dtype, device, generator) for _ in range(2))
    bias = randn(shape[1:], dtype, device, generator)
    return {
        "x": x,
        "bias": bias,
        "residual": residual,
        "weight": weight,
        "ln_bias": ln_bias,
        "eps": EPS,
        "dropout_p": dropout_p,
        "seed": drawn_seed(dropout_p, generator),
    }


def _add_layer_norm_eager(x, bias, residual, weight, ln_bias, eps, dropout_p, seed):
    return F.layer_norm(dropped(x + bias, dropout_p, seed) + residual, x.shape[1:], weight, ln_bias, eps)


# gelu_layer_norm ----------------------------------------------------------------------------------------------------------


def _gelu_layer_norm_inputs(shape, dtype, device="cpu", generator=None, act="gelu_tanh") -> Inputs:
    weight, ln_bias = norm_weights(shape[1], dtype, device, generator)
    x, bias = randn(shape, dtype, device, generator) * 2, randn(shape[1:], dtype, device, generator)
    return {"x": x, "bias": bias, "act": act, "weight": weight, "ln_bias": ln_bias, "eps": EPS}


def _gelu_layer_norm_eager(x, bias, weight, ln_bias, eps, act):
    return F.layer_norm(act_ref(x + bias, act), x.shape[1:], weight, ln_bias, eps)


# embedding_layer_norm: shapes are (tokens, H, vocabulary, positions, types) ---------------------------------------------------


def _embedding_layer_norm_inputs(
    shape, dtype, device="cpu", generator=None, dropout_p=0.0, padding=(-1, -1), from_embeds=False, typed=True
) -> Inputs:
    tokens, embedding, vocabulary, positions, types = shape
    weight, ln_bias = norm_weights(embedding, dtype, device, generator)
    ids = [torch.randint(0, size, (tokens,), generator=generator).to(device) for size in (vocabulary, types, positions)]
    word, token_type, position = (
        randn((n, embedding), dtype, device, generator) for n in (vocabulary, types, positions)
    )
    inputs = {
        "input_ids": None if from_embeds else ids[0],
        "token_type_ids": ids[1] if typed else None,
        "position_ids": ids[2],
        "word": word,
        "token_type": token_type if typed else None,
        "position": position,
        "ln_weight": weight,
        "ln_bias": ln_bias,
        "eps": EPS,
        "padding_idx": padding[0],
        "position_padding_idx": padding[1],
        "dropout_p": dropout_p,
        "seed": drawn_seed(dropout_p, generator),
    }
    if from_embeds:
        inputs["inputs_embeds"] = randn((tokens, embedding), dtype, device, generator)
    return inputs


def _embedding_layer_norm_eager(
    input_ids,
    token_type_ids,
    position_ids,
    word,
    token_type,
    position,
    ln_weight,
    ln_bias,
    eps,
    padding_idx,
    dropout_p,
    seed,
    position_padding_idx=-1,
    inputs_embeds=None,
):
    if inputs_embeds is None:
        inputs_embeds = F.embedding(input_ids, word, None if padding_idx < 0 else padding_idx)
    z = inputs_embeds if token_type is None else inputs_embeds + token_type[token_type_ids]
    z = z + F.embedding(position_ids, position, None if position_padding_idx < 0 else position_padding_idx)
    return dropped(F.layer_norm(z, z.shape[1:], ln_weight, ln_bias, eps), dropout_p, seed)


def _embedding_layer_norm_extra(inputs: Inputs) -> int:
    """The gradient of the sums in float32, written and read again, and the statistics that the forward keeps."""
    return len(inputs["position_ids"]) * (8 * inputs["word"].shape[1] + 8)


# embedding_projection: shapes are (tokens, E, H, vocabulary, positions, types) ----------------------------------------------


def _embedding_projection_inputs(shape, dtype, device="cpu", generator=None, padding_idx=-1, **options) -> Inputs:
    tokens, embedding, hidden, *tables = shape
    options["padding"] = (padding_idx, -1)
    inputs = _embedding_layer_norm_inputs((tokens, embedding, *tables), dtype, device, generator, **options)
    del inputs["position_padding_idx"]
    return {
        **inputs,
        "proj_weight": randn((hidden, embedding), dtype, device, generator) * embedding**-0.5,
        "proj_bias": randn((hidden,), dtype, device, generator),
    }


def _embedding_projection_eager(proj_weight, proj_bias, **inputs):
    return F.linear(_embedding_layer_norm_eager(**inputs), proj_weight, proj_bias)


def _statistics(inputs: Inputs) -> int:
    """Bytes of the two float32 numbers that a forward keeps for every row."""
    return 8 * len(inputs["x"])


def _add_layer_norm_extra(inputs: Inputs) -> int:
    """Without dropout the gradients of x and residual are one tensor."""
    x = inputs["x"]
    return _statistics(inputs) - (0 if inputs["dropout_p"] else x.numel() * x.element_size())


# linear_cross_entropy: shapes are (rows, E, V) ------------------------------------------------------------------------------


def _linear_cross_entropy_inputs(
    shape, dtype, device="cpu", generator=None, labelled=1.0, label_smoothing=0.0
) -> Inputs:
    rows, width, vocabulary = shape
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels = labels.masked_fill(torch.rand(rows, generator=generator) >= labelled, IGNORED)
    return {
        "x": randn((rows, width), dtype, device, generator),
        "weight": randn((vocabulary, width), dtype, device, generator) * width**-0.5,
        "bias": randn((vocabulary,), dtype, device, generator),
        "labels": labels.to(device),
        "label_smoothing": label_smoothing,
    }


def _linear_cross_entropy_eager(x, weight, bias, labels, label_smoothing):
    logits = F.linear(x, weight, bias)
    if not label_smoothing:
        return losses.cross_entropy(logits, labels)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum", label_smoothing=label_smoothing)
    return total / (labels != IGNORED).sum().clamp(min=1)


_ROWS = ((1, 1), (1, 128), (3, 7), (2, 31), (13, 768), (5, 1023), (67, 312), (512, 64), (2, 4096))
_SMALL_ROWS = ((1, 1), (3, 7), (37, 31), (5, 312), (2, 1023))
_ACTS = ({"act": "gelu_tanh"}, {"act": "gelu_erf"}, {"act": "relu"})
_DROPOUT: tuple[dict[str, Any], ...] = ({}, {"dropout_p": 0.2})

ALL_CASES: dict[str, OpCase] = {
    case.name: case
    for case in (
        OpCase(
            name="embedding_projection",
            function=ops.embedding_projection,
            eager=_embedding_projection_eager,
            make_inputs=_embedding_projection_inputs,
            shapes=((1, 1, 1, 1, 1, 1), (1, 128, 768, 100, 512, 2), (7, 13, 29, 11, 17, 3), (513, 64, 96, 300, 128, 2)),
            small_shapes=((5, 16, 24, 11, 7, 2),),
            bench_shapes=((128, 128, 768, 30000, 512, 2), (1024, 128, 768, 30000, 512, 2)),
            options=({}, {"dropout_p": 0.2}, {"padding_idx": 0}, {"from_embeds": True}),
            gradients=(
                "word",
                "token_type",
                "position",
                "ln_weight",
                "ln_bias",
                "proj_weight",
                "proj_bias",
                "inputs_embeds",
            ),
            operations=lambda i: 2.0 * len(i["token_type_ids"]) * i["proj_weight"].numel(),
        ),
        OpCase(
            name="embedding_layer_norm",
            function=ops.embedding_layer_norm,
            eager=_embedding_layer_norm_eager,
            make_inputs=_embedding_layer_norm_inputs,
            shapes=(
                (1, 1, 1, 1, 1),
                (0, 16, 5, 7, 2),
                (1, 768, 100, 512, 2),
                (7, 13, 11, 17, 3),
                (513, 64, 300, 128, 2),
            ),
            small_shapes=((1, 1, 1, 1, 1), (0, 16, 5, 7, 2), (37, 31, 11, 7, 2), (5, 312, 17, 9, 3)),
            bench_shapes=((128, 768, 30522, 512, 2), (1024, 768, 30522, 512, 2)),
            options=({}, {"dropout_p": 0.2}, {"padding": (0, 0)}, {"from_embeds": True}, {"typed": False}),
            gradients=("word", "token_type", "position", "ln_weight", "ln_bias", "inputs_embeds"),
            operations=lambda i: 10.0 * len(i["position_ids"]) * i["word"].shape[1],
            backward_extra=_embedding_layer_norm_extra,
        ),
        OpCase(
            name="attention",
            function=ops.attention,
            eager=attention_eager,
            make_inputs=attention_inputs,
            shapes=(
                ((1,), None, 1, 1),
                ((1,), None, 12, 64),
                ((7, 1, 13), None, 3, 26),
                ((128,), None, 2, 64),
                ((31, 0, 5), None, 4, 80),
                ((512, 3), None, 1, 128),
                ((1, 1, 0, 2), (17, 5, 3, 0), 2, 37),
                ((257,), None, 1, 100),
            ),
            small_shapes=(
                ((1,), None, 1, 16),
                ((7, 0, 13), None, 2, 26),
                ((1, 1), (5, 33), 1, 80),
                ((3,), (0,), 1, 64),
            ),
            bench_shapes=(((128,) * 8, None, 12, 64), ((512,) * 4, None, 12, 64)),
            # Sharp: softmax is saturated, and gradients are what remains after cancellation.
            options=(*_DROPOUT, {"sharpness": 40.0}, {"causal": True}),
            gradients=("q", "k", "v"),
            operations=attention_operations,
            slack=attention_slack,
            rounded=attention_rounded,
            backward_ratio=2.5,  # five products of the size of the scores; the forward has two
            backward_extra=attention_saved_bytes,
        ),
        OpCase(
            name="bias_gelu",
            function=ops.bias_gelu,
            eager=_bias_gelu_eager,
            make_inputs=_bias_gelu_inputs,
            shapes=_ROWS,
            small_shapes=_SMALL_ROWS,
            bench_shapes=((128, 3072), (1024, 3072)),
            options=tuple({**act, **dropout} for dropout in _DROPOUT for act in _ACTS),
            gradients=("x", "bias"),
            operations=lambda i: 10.0 * i["x"].numel(),
        ),
        OpCase(
            name="linear_gelu",
            function=ops.linear_gelu,
            eager=_linear_gelu_eager,
            make_inputs=_linear_gelu_inputs,
            shapes=((1, 1, 1), (0, 16, 11), (3, 7, 2), (67, 13, 131), (5, 312, 1248), (300, 96, 517), (257, 768, 3072)),
            small_shapes=((1, 1, 1), (0, 16, 11), (3, 7, 2), (37, 53, 131), (70, 128, 96)),
            bench_shapes=((128, 768, 3072), (1024, 768, 3072)),
            options=_ACTS,
            gradients=("x", "weight", "bias"),
            operations=lambda i: 2.0 * len(i["x"]) * i["weight"].numel(),
            backward_extra=_linear_gelu_saved_bytes,
        ),
        OpCase(
            name="add_layer_norm",
            function=ops.add_layer_norm,
            eager=_add_layer_norm_eager,
            make_inputs=_add_layer_norm_inputs,
            shapes=_ROWS,
            small_shapes=_SMALL_ROWS,
            bench_shapes=((128, 768), (1024, 768)),
            options=_DROPOUT,
            gradients=("x", "bias", "residual", "weight", "ln_bias"),
            operations=lambda i: 10.0 * i["x"].numel(),
            backward_extra=_add_layer_norm_extra,
        ),
        OpCase(
            name="gelu_layer_norm",
            function=ops.gelu_layer_norm,
            eager=_gelu_layer_norm_eager,
            make_inputs=_gelu_layer_norm_inputs,
            shapes=_ROWS,
            small_shapes=_SMALL_ROWS,
            bench_shapes=((128, 128), (1024, 128)),
            options=_ACTS,
            gradients=("x", "bias", "weight", "ln_bias"),
            operations=lambda i: 18.0 * i["x"].numel(),
            backward_extra=_statistics,
        ),
        OpCase(
            name="linear_cross_entropy",
            function=ops.linear_cross_entropy,
            eager=_linear_cross_entropy_eager,
            make_inputs=_linear_cross_entropy_inputs,
            shapes=(
                (1, 1, 1),
                (3, 7, 2),
                (0, 16, 11),
                (17, 128, 1009),
                (67, 13, 131),
                (300, 128, 517),
                (29, 312, 4099),
            ),
            small_shapes=((1, 1, 1), (3, 7, 2), (0, 16, 11), (37, 128, 307), (5, 200, 131), (3, 16, 2053)),
            bench_shapes=((77, 128, 30000), (614, 128, 30000)),  # 15 % of 4 and of 32 sequences of 128
            options=({}, {"labelled": 0.3}, {"labelled": 0.0}, {"label_smoothing": 0.1, "labelled": 0.7}),
            gradients=("x", "weight", "bias"),
            operations=lambda i: 2.0 * len(i["x"]) * i["weight"].numel(),
            backward_ratio=3.0,  # scores are computed again
            backward_extra=_statistics,
        ),
        OpCase(
            name="encoder",
            function=ops.encoder,
            eager=encoder_eager,
            make_inputs=encoder_inputs,
            shapes=(
                ((1,), 26, 1, 40, 1, 1),
                ((7, 0, 13), 78, 3, 129, 1, 3),
                ((5,) * 40, 64, 2, 96, 2, 2),
                ((131, 17, 1), 80, 1, 72, 2, 4),
                ((37, 2), 256, 4, 1600, 1, 2),
            ),
            small_shapes=(((9, 0, 11), 80, 5, 72, 1, 2), ((3, 0, 2), 26, 1, 40, 2, 2)),
            bench_shapes=(((16,), 768, 12, 3072, 1, 12), ((128,) * 8, 768, 12, 3072, 1, 12)),
            options=({}, {"wanted": True}, {"act": "gelu_erf"}, {"act": "relu"}),
            gradients=(),  # inference only: training runs the other operators
            operations=encoder_operations,
        ),
        OpCase(
            name="quantized_encoder",
            function=ops.quantized_encoder,
            eager=quantized_encoder_eager,
            make_inputs=quantized_encoder_inputs,
            shapes=(
                ((1,), 26, 1, 40, 1, 1),
                ((7, 0, 13), 78, 3, 129, 1, 3),
                ((5,) * 40, 64, 2, 96, 2, 2),
                ((131, 17, 1), 80, 1, 72, 2, 4),
                ((37, 2), 256, 4, 1600, 1, 2),
            ),
            small_shapes=(((3, 0, 2), 26, 1, 40, 2, 2),),
            bench_shapes=(((16,), 768, 12, 3072, 1, 12), ((128,) * 8, 768, 12, 3072, 1, 12)),
            options=tuple(
                {"precision": precision, **more}
                for precision in ("int8", "int16", "fp8")
                for more in ({}, {"wanted": True}, {"act": "relu"})
            ),
            takes=quantized_encoder_takes,
            gradients=(),  # inference only
            operations=quantized_encoder_operations,
            # An activation between two integers may be rounded either way: the slack is what one step changes in a row.
            slack=lambda i: {"int8": 1e-2, "int16": 3e-4, "fp8": 1e-2}[i["precision"]],
        ),
    )
}
