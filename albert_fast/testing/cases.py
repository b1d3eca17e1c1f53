"""One OpCase per operator: shapes, inputs, plain torch, bytes and operations. Drives parity tests and benchmarks alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..ops._dropout import HEAD_STRIDE, keep_scale, keep_scale_2d
from ..ops.bias_gelu import act_ref

Inputs = dict[str, Any]
EPS = 1e-12


@dataclass(frozen=True)
class OpCase:
    """One operator, for every test and benchmark of it.

    name: the operator's. function: its public function.
    eager: the same in plain torch, in the dtype of its inputs, as a user would write it.
    make_inputs(shape, dtype, device, generator, **options): random keyword arguments of `function`.
    shapes: odd, prime, tiny and real sizes; small_shapes: a few for Triton's interpreter; bench_shapes: ALBERT-base's.
    options: keyword sets for make_inputs that tests go through (activations, dropout, ...).
    gradients: names of the inputs that are differentiated.
    bytes_moved(inputs): each input read once and each output written once. operations(inputs): floating-point operations.
    """

    name: str
    function: Callable[..., Tensor]
    eager: Callable[..., Tensor]
    make_inputs: Callable[..., Inputs]
    shapes: tuple[Any, ...]
    small_shapes: tuple[Any, ...]
    bench_shapes: tuple[Any, ...]
    options: tuple[dict[str, Any], ...]
    gradients: tuple[str, ...]
    operations: Callable[[Inputs], float]

    def run(self, inputs: Inputs, backend: str = "auto") -> Tensor:
        """The operator on `backend`."""
        return self.function(**inputs, backend=backend)

    def exact(self, inputs: Inputs) -> Tensor:
        """Plain torch in float64 on the same numbers."""
        return self.eager(**{name: _double(value) for name, value in inputs.items()})

    def bytes_moved(self, inputs: Inputs) -> int:
        listed = [item for value in inputs.values() if isinstance(value, list) for item in value]
        tensors = [value for value in (*inputs.values(), *listed) if isinstance(value, Tensor)]
        gathered = inputs.get("input_ids")
        read = sum(t.numel() * t.element_size() for t in tensors)
        if gathered is not None:  # of a table, only the rows that are looked up
            tables = [inputs[name] for name in ("word", "token_type", "position")]
            read += sum((len(gathered) - len(t)) * t.shape[1] * t.element_size() for t in tables)
        return read + self.output_like(inputs).numel() * self.output_like(inputs).element_size()

    def output_like(self, inputs: Inputs) -> Tensor:
        """An empty tensor of the output's shape and dtype, on the meta device."""
        if self.name == "embedding_projection":
            return torch.empty(
                (len(inputs["token_type_ids"]), len(inputs["proj_weight"])), dtype=inputs["word"].dtype, device="meta"
            )
        if self.name == "encoder" and inputs["rows"] is not None:
            return torch.empty((len(inputs["rows"]), inputs["hidden"].shape[1]), device="meta")
        return torch.empty_like(inputs[{"attention": "q", "encoder": "hidden"}.get(self.name, "x")], device="meta")


def _double(value: Any) -> Any:
    if isinstance(value, list):
        return [_double(item) for item in value]
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _randn(shape: tuple[int, ...], dtype: torch.dtype, device: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)


def _norm_weights(width: int, dtype: torch.dtype, device: Any, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    weight = 1 + 0.2 * torch.randn(width, generator=generator)
    return weight.to(device=device, dtype=dtype), _randn((width,), dtype, device, generator)


def _seed(p: float, generator: torch.Generator) -> Tensor | None:
    return torch.randint(0, 2**63 - 1, (), generator=generator) if p else None


def _dropped(u: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return u * keep_scale_2d(int(seed), u.shape, p, u.device).to(u.dtype) if p and seed is not None else u


# bias_gelu ----------------------------------------------------------------------------------------------------------------


def _bias_gelu_inputs(shape, dtype, device="cpu", generator=None, act="gelu_tanh") -> Inputs:
    return {
        "x": _randn(shape, dtype, device, generator) * 2,
        "bias": _randn(shape[1:], dtype, device, generator),
        "act": act,
    }


def _bias_gelu_eager(x, bias, act):
    return act_ref(x + bias, act)


# add_layer_norm -----------------------------------------------------------------------------------------------------------


def _add_layer_norm_inputs(shape, dtype, device="cpu", generator=None, dropout_p=0.0) -> Inputs:
    weight, ln_bias = _norm_weights(shape[1], dtype, device, generator)
    x, residual = (_randn(shape, dtype, device, generator) for _ in range(2))
    bias = _randn(shape[1:], dtype, device, generator)
    return {
        "x": x, "bias": bias, "residual": residual, "weight": weight, "ln_bias": ln_bias, "eps": EPS,
        "dropout_p": dropout_p, "seed": _seed(dropout_p, generator),
    }  # fmt: skip


def _add_layer_norm_eager(x, bias, residual, weight, ln_bias, eps, dropout_p, seed):
    return F.layer_norm(_dropped(x + bias, dropout_p, seed) + residual, x.shape[1:], weight, ln_bias, eps)


# gelu_layer_norm ----------------------------------------------------------------------------------------------------------


def _gelu_layer_norm_inputs(shape, dtype, device="cpu", generator=None, act="gelu_tanh") -> Inputs:
    weight, ln_bias = _norm_weights(shape[1], dtype, device, generator)
    inputs = _bias_gelu_inputs(shape, dtype, device, generator, act)
    return {**inputs, "weight": weight, "ln_bias": ln_bias, "eps": EPS}


def _gelu_layer_norm_eager(x, bias, weight, ln_bias, eps, act):
    return F.layer_norm(act_ref(x + bias, act), x.shape[1:], weight, ln_bias, eps)


# attention: shapes are (lengths of queries, lengths of keys or None for the same, heads, head_dim) --------------------------


def _attention_inputs(shape, dtype, device="cpu", generator=None, dropout_p=0.0, sharpness=1.0) -> Inputs:
    lengths_q, lengths_k, heads, head_dim = shape
    lengths_k = lengths_q if lengths_k is None else lengths_k
    width = heads * head_dim
    # Views into one fused projection, as the model has them.
    qkv = _randn((max(sum(lengths_q), sum(lengths_k)), 3 * width), dtype, device, generator)
    q, k, v = qkv.split(width, dim=1)
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (lengths_q, lengths_k)
    )
    return {
        "q": q[: sum(lengths_q)], "k": k[: sum(lengths_k)], "v": v[: sum(lengths_k)], "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k, "max_seqlen_q": max(lengths_q, default=0), "max_seqlen_k": max(lengths_k, default=0),
        "num_heads": heads, "softmax_scale": sharpness * head_dim**-0.5, "dropout_p": dropout_p,
        "seed": _seed(dropout_p, generator),
    }  # fmt: skip


def _attention_eager(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, num_heads, softmax_scale, dropout_p, seed
):
    outputs = [q[:0]]
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True
    ):
        query, key, value = (t.unflatten(1, (num_heads, -1)).transpose(0, 1) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        if k0 == k1:
            outputs.append(torch.zeros_like(q[q0:q1]))
            continue
        p = torch.softmax(query @ key.transpose(1, 2) * softmax_scale, dim=-1)
        if dropout_p:
            rows = torch.arange(num_heads)[:, None, None] * HEAD_STRIDE + torch.arange(q0, q1)[:, None]
            p = p * keep_scale(int(seed), rows, torch.arange(k1 - k0), dropout_p).to(q)
        outputs.append((p @ value).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def _attention_operations(inputs: Inputs) -> float:
    lengths = zip(inputs["cu_seqlens_q"].diff().tolist(), inputs["cu_seqlens_k"].diff().tolist(), strict=True)
    return 4.0 * inputs["q"].shape[1] * sum(a * b for a, b in lengths)


# encoder: shapes are (lengths, hidden size, heads, intermediate size, distinct layers, steps) -------------------------------


def _encoder_inputs(shape, dtype, device="cpu", generator=None, act="gelu_tanh", wanted=False) -> Inputs:
    lengths, hidden, heads, middle, distinct, steps = shape
    sizes = {"H": hidden, "3H": 3 * hidden, "I": middle}
    weights = []
    for name, spelt in list(ops.WEIGHTS.items()) * distinct:
        size = tuple(sizes[letter] for letter in spelt.split())
        scale = size[-1] ** -0.5 if len(size) == 2 else 0.2
        drawn = _randn(size, dtype, device, generator) * scale
        weights.append(drawn + 1 if name.endswith("norm_weight") else drawn)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    rows = cu_rows = None
    if wanted:  # about a third of the tokens
        flags = torch.rand(sum(lengths), generator=generator) < 0.3
        before = torch.cat([flags.new_zeros(1, dtype=torch.int32), flags.cumsum(0).int()])
        rows, cu_rows = flags.nonzero().squeeze(1).to(device), before[cu_seqlens.long().cpu()].to(device)
    return {
        "hidden": _randn((sum(lengths), hidden), dtype, device, generator), "weights": weights,
        "order": [step * distinct // steps for step in range(steps)], "cu_seqlens": cu_seqlens, "rows": rows,
        "cu_rows": cu_rows, "num_heads": heads, "softmax_scale": (hidden // heads) ** -0.5, "eps": EPS, "act": act,
    }  # fmt: skip


def _encoder_eager(hidden, weights, order, cu_seqlens, rows, cu_rows, num_heads, softmax_scale, eps, act):
    per_layer = len(ops.WEIGHTS)
    for step, number in enumerate(order):
        w = dict(zip(ops.WEIGHTS, weights[number * per_layer : (number + 1) * per_layer], strict=True))
        q, k, v = F.linear(hidden, w["qkv"], w["qkv_bias"]).chunk(3, dim=1)
        cu_q = cu_seqlens
        if step + 1 == len(order) and rows is not None:
            q, hidden, cu_q = q[rows], hidden[rows], cu_rows
        context = _attention_eager(q, k, v, cu_q, cu_seqlens, 0, 0, num_heads, softmax_scale, 0.0, None)
        x = F.linear(context, w["dense"], w["dense_bias"]) + hidden
        x = F.layer_norm(x, x.shape[1:], w["norm_weight"], w["norm_bias"], eps)
        y = F.linear(act_ref(F.linear(x, w["ffn"], w["ffn_bias"]), act), w["ffn_output"], w["ffn_output_bias"]) + x
        hidden = F.layer_norm(y, y.shape[1:], w["full_norm_weight"], w["full_norm_bias"], eps)
    return hidden


def _encoder_operations(inputs: Inputs) -> float:
    lengths, matrices = inputs["cu_seqlens"].diff().double(), inputs["weights"][: len(ops.WEIGHTS)]
    tokens, width = len(inputs["hidden"]), inputs["hidden"].shape[1]
    products = 2.0 * tokens * sum(m.numel() for m in matrices if m.dim() == 2)
    return len(inputs["order"]) * (products + 4.0 * float((lengths * lengths).sum()) * width)


# embedding_projection: shapes are (tokens, E, H, vocabulary, positions, types) ----------------------------------------------


def _embedding_projection_inputs(
    shape, dtype, device="cpu", generator=None, dropout_p=0.0, padding_idx=-1, from_embeds=False
) -> Inputs:
    tokens, embedding, hidden, vocabulary, positions, types = shape
    weight, ln_bias = _norm_weights(embedding, dtype, device, generator)
    ids = [torch.randint(0, size, (tokens,), generator=generator).to(device) for size in (vocabulary, types, positions)]
    word, token_type, position = (
        _randn((n, embedding), dtype, device, generator) for n in (vocabulary, types, positions)
    )
    inputs = {
        "input_ids": None if from_embeds else ids[0], "token_type_ids": ids[1], "position_ids": ids[2], "word": word,
        "token_type": token_type, "position": position, "ln_weight": weight, "ln_bias": ln_bias,
        "proj_weight": _randn((hidden, embedding), dtype, device, generator) * embedding**-0.5,
        "proj_bias": _randn((hidden,), dtype, device, generator), "eps": EPS, "padding_idx": padding_idx,
        "dropout_p": dropout_p, "seed": _seed(dropout_p, generator),
    }  # fmt: skip
    if from_embeds:
        inputs["inputs_embeds"] = _randn((tokens, embedding), dtype, device, generator)
    return inputs


def _embedding_projection_eager(
    input_ids, token_type_ids, position_ids, word, token_type, position, ln_weight, ln_bias, proj_weight, proj_bias, eps,
    padding_idx, dropout_p, seed, inputs_embeds=None,
):  # fmt: skip
    if inputs_embeds is None:
        inputs_embeds = F.embedding(input_ids, word, None if padding_idx < 0 else padding_idx)
    z = inputs_embeds + token_type[token_type_ids] + position[position_ids]
    return F.linear(
        _dropped(F.layer_norm(z, z.shape[1:], ln_weight, ln_bias, eps), dropout_p, seed), proj_weight, proj_bias
    )


_ROWS = ((1, 1), (1, 128), (3, 7), (2, 31), (13, 768), (5, 1023), (67, 312), (512, 64), (2, 4096))
_SMALL_ROWS = ((1, 1), (3, 7), (5, 312), (2, 1023))
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
            name="attention",
            function=ops.attention,
            eager=_attention_eager,
            make_inputs=_attention_inputs,
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
            options=(*_DROPOUT, {"sharpness": 40.0}),  # softmax saturated, where gradients are what cancellation leaves
            gradients=("q", "k", "v"),
            operations=_attention_operations,
        ),
        OpCase(
            name="bias_gelu",
            function=ops.bias_gelu,
            eager=_bias_gelu_eager,
            make_inputs=_bias_gelu_inputs,
            shapes=_ROWS,
            small_shapes=_SMALL_ROWS,
            bench_shapes=((128, 3072), (1024, 3072)),
            options=_ACTS,
            gradients=("x", "bias"),
            operations=lambda i: 10.0 * i["x"].numel(),
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
        ),
        OpCase(
            name="encoder",
            function=ops.encoder,
            eager=_encoder_eager,
            make_inputs=_encoder_inputs,
            shapes=(
                ((1,), 26, 1, 40, 1, 1),
                ((7, 0, 13), 78, 3, 129, 1, 3),
                ((5,) * 40, 64, 2, 96, 2, 2),
                ((131, 17, 1), 80, 1, 72, 2, 4),
                ((37, 2), 256, 4, 1600, 1, 2),
            ),
            small_shapes=(((3, 0, 2), 26, 1, 40, 2, 2),),
            bench_shapes=(((16,), 768, 12, 3072, 1, 12), ((128,) * 8, 768, 12, 3072, 1, 12)),
            options=({}, {"wanted": True}, {"act": "gelu_erf"}, {"act": "relu"}),
            gradients=(),  # inference only: training runs the other operators
            operations=_encoder_operations,
        ),
    )
}
