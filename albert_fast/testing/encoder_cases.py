"""Inputs and plain torch for attention and for the two operators that run whole layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops._dropout import HEAD_STRIDE, keep_scale
from ..ops._integers import FORMATS, lay_out, unpack, unpack_channels
from ..ops._schema import PRODUCTS, SLICE, VECTORS, WEIGHTS, matrix_sizes, sizes_of, split_layers
from ..ops.bias_gelu import act_ref
from ..ops.quantized_encoder import ProductTensors, QuantizedLayers
from ..quantization.rounding import rounded_linear
from .case import EPS, Inputs, drawn_seed, randn

# attention: shapes are (lengths of queries, lengths of keys or None for the same, heads, head_dim) --------------------------


def attention_inputs(
    shape, dtype, device="cpu", generator=None, dropout_p=0.0, sharpness=1.0, causal=False, cached=False
) -> Inputs:
    lengths_q, lengths_k, heads, head_dim = shape
    lengths_k = lengths_q if lengths_k is None else lengths_k
    width = heads * head_dim
    # Views into one fused projection, as the model has them.
    qkv = randn((max(sum(lengths_q), sum(lengths_k)), 3 * width), dtype, device, generator)
    q, k, v = qkv.split(width, dim=1)
    cu_q, cu_k = (
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        for lengths in (lengths_q, lengths_k)
    )
    inputs = {
        "q": q[: sum(lengths_q)],
        "k": k[: sum(lengths_k)],
        "v": v[: sum(lengths_k)],
        "cu_seqlens_q": cu_q,
        "cu_seqlens_k": cu_k,
        "max_seqlen_q": max(lengths_q, default=0),
        "max_seqlen_k": max(lengths_k, default=0),
        "num_heads": heads,
        "softmax_scale": sharpness * head_dim**-0.5,
        "dropout_p": dropout_p,
        "seed": drawn_seed(dropout_p, generator),
        "causal": causal,
        "key_lengths": None,
    }
    return {**inputs, **_cached(inputs, lengths_k)} if cached else inputs


def _cached(inputs: Inputs, lengths: Sequence[int]) -> Inputs:
    """The keys and values of `inputs` as caches hold them: last sequence first, each with room for three more rows, which are
    NaN. Neighbours of one length share the keys of the first."""
    begins, first, caches = [0] * len(lengths), 3, [torch.full_like(inputs["k"][:1], float("nan")).expand(3, -1)] * 2
    owners = [
        number - 1 if number and lengths[number - 1] == lengths[number] else number for number in range(len(lengths))
    ]
    for number in reversed(range(len(lengths))):
        begins[number] = first
        begin = int(inputs["cu_seqlens_k"][number])
        rows = slice(begin, begin + lengths[number])
        caches = [torch.cat([cache, inputs[name][rows], cache[:3]]) for cache, name in zip(caches, "kv", strict=True)]
        first = len(caches[0])
    begins, device = [begins[owner] for owner in owners], inputs["k"].device
    k, v = torch.cat(caches, dim=1).split(caches[0].shape[1], dim=1)
    starts, counts = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (begins, lengths))
    return {"k": k, "v": v, "cu_seqlens_k": starts, "key_lengths": counts}


def attention_slack(inputs: Inputs) -> float:
    """Rounding changes a score of size s by up to s * 2^-24, and its probability by the same factor, whatever torch's error is."""
    q, k = (inputs[name].float().unflatten(1, (inputs["num_heads"], -1)).transpose(0, 1) for name in ("q", "k"))
    k = k.nan_to_num()  # rows of a cache that are not written yet
    if not (q.numel() and k.numel()):
        return 0.0
    largest = max(float((some @ k.mT).abs().max()) for some in q.split(1024, dim=1))  # all at once may not fit a GPU
    return largest * inputs["softmax_scale"] * 2**-24


def attention_rounded(inputs: Inputs, generator: torch.Generator) -> Inputs | None:
    """For a sharp softmax, inputs whose queries are changed by sqrt(head_dim) roundings, those of a score's sum; otherwise None.

    torch computes the scores once for forward and backward. A kernel that computes them again, in another order, gives a dominant
    key another probability, in which torch happens to have no error.
    """
    head_dim = inputs["q"].shape[1] // inputs["num_heads"]
    if inputs["softmax_scale"] <= head_dim**-0.5:
        return None
    q = inputs["q"]
    change = (2 * torch.rand(q.shape, generator=generator, dtype=torch.float64) - 1) * head_dim**0.5 * 2**-24
    return {**inputs, "q": q.double() * (1 + change.to(q.device))}


def attention_eager(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    num_heads,
    softmax_scale,
    dropout_p,
    seed,
    causal=False,
    key_lengths=None,
):
    outputs = [q[:0]]
    ends = cu_seqlens_k[1:] if key_lengths is None else cu_seqlens_k + key_lengths
    key_ranges = zip(cu_seqlens_k.tolist(), ends.tolist(), strict=key_lengths is not None)
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(cu_seqlens_q.tolist()), key_ranges, strict=True):
        query, key, value = (t.unflatten(1, (num_heads, -1)).transpose(0, 1) for t in (q[q0:q1], k[k0:k1], v[k0:k1]))
        if k0 == k1:
            outputs.append(torch.zeros_like(q[q0:q1]))
            continue
        scores = query @ key.transpose(1, 2) * softmax_scale
        if causal:
            seen = torch.arange(k1 - k0) <= torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
            scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
        p = torch.softmax(scores, dim=-1)
        if causal:
            p = torch.where(seen.any(1, keepdim=True).to(q.device), p, 0.0)
        if dropout_p:
            rows = torch.arange(num_heads)[:, None, None] * HEAD_STRIDE + torch.arange(q0, q1)[:, None]
            p = p * keep_scale(int(seed), rows, torch.arange(k1 - k0), dropout_p).to(q)
        outputs.append((p @ value).transpose(0, 1).flatten(1))
    return torch.cat(outputs)


def attention_operations(inputs: Inputs) -> float:
    key_lengths, causal = inputs["key_lengths"], inputs["causal"]
    lengths_k = inputs["cu_seqlens_k"].diff() if key_lengths is None else key_lengths
    lengths = zip(inputs["cu_seqlens_q"].diff().tolist(), lengths_k.tolist(), strict=True)
    pairs = (sum(range(max(b - a, 0) + 1, b + 1)) if causal else a * b for a, b in lengths)
    return 4.0 * inputs["q"].shape[1] * sum(pairs)


def attention_saved_bytes(inputs: Inputs) -> float:
    """Bytes that the backward reads: the output, and for every row and head the float32 logarithm of its sum."""
    q = inputs["q"]
    return float(q.numel() * q.element_size() + 4 * inputs["num_heads"] * len(q))


# encoder: shapes are (lengths, hidden size, heads, intermediate size, distinct layers, steps) -------------------------------


def encoder_inputs(shape, dtype, device="cpu", generator=None, act="gelu_tanh", wanted=False) -> Inputs:
    lengths, hidden, heads, intermediate_size, distinct, steps = shape
    weights = []
    for name, letters in list(WEIGHTS.items()) * distinct:
        size = sizes_of(letters, hidden, intermediate_size)
        scale = size[-1] ** -0.5 if len(size) == 2 else 0.2
        drawn = randn(size, dtype, device, generator) * scale
        weights.append(drawn + 1 if name.endswith("norm_weight") else drawn)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    rows = cu_wanted = None
    if wanted:  # about a third of the tokens
        flags = torch.rand(sum(lengths), generator=generator) < 0.3
        before = torch.cat([flags.new_zeros(1, dtype=torch.int32), flags.cumsum(0).int()])
        rows, cu_wanted = flags.nonzero().squeeze(1).to(device), before[cu_seqlens.long().cpu()].to(device)
    return {
        "hidden": randn((sum(lengths), hidden), dtype, device, generator),
        "weights": weights,
        "layer_indices": [step * distinct // steps for step in range(steps)],
        "cu_seqlens": cu_seqlens,
        "wanted_rows": rows,
        "cu_wanted": cu_wanted,
        "num_heads": heads,
        "softmax_scale": (hidden // heads) ** -0.5,
        "eps": EPS,
        "act": act,
    }


def encoder_eager(
    hidden, weights, layer_indices, cu_seqlens, wanted_rows, cu_wanted, num_heads, softmax_scale, eps, act
):
    layers = split_layers(weights)
    for step, layer_index in enumerate(layer_indices):
        w = layers[layer_index]
        q, k, v = (F.linear(hidden, w[name], w[f"{name}_bias"]) for name in ("query", "key", "value"))
        cu_q = cu_seqlens
        if step + 1 == len(layer_indices) and wanted_rows is not None:
            q, hidden, cu_q = q[wanted_rows], hidden[wanted_rows], cu_wanted
        context = attention_eager(q, k, v, cu_q, cu_seqlens, 0, 0, num_heads, softmax_scale, 0.0, None)
        x = F.linear(context, w["dense"], w["dense_bias"]) + hidden
        x = F.layer_norm(x, x.shape[1:], w["norm_weight"], w["norm_bias"], eps)
        y = F.linear(act_ref(F.linear(x, w["ffn"], w["ffn_bias"]), act), w["ffn_output"], w["ffn_output_bias"]) + x
        hidden = F.layer_norm(y, y.shape[1:], w["full_norm_weight"], w["full_norm_bias"], eps)
    return hidden


def encoder_operations(inputs: Inputs) -> float:
    lengths, matrices = inputs["cu_seqlens"].diff().double(), inputs["weights"][: len(WEIGHTS)]
    tokens, width = len(inputs["hidden"]), inputs["hidden"].shape[1]
    products = 2.0 * tokens * sum(m.numel() for m in matrices if m.dim() == 2)
    return len(inputs["layer_indices"]) * (products + 4.0 * float((lengths * lengths).sum()) * width)


# quantized_encoder: shapes as of encoder -------------------------------------------------------------------------------------


def quantized_encoder_takes(options, dtype) -> bool:
    """Whether a precision goes with the dtype of the hidden states: the C++ kernel takes float32, the Triton kernels bfloat16."""
    return dtype in FORMATS[options.get("precision", "int8")].hidden


def quantized_encoder_inputs(
    shape, dtype, device="cpu", generator=None, precision="int8", act="gelu_tanh", wanted=False
) -> Inputs:
    inputs = encoder_inputs(shape, dtype, device, generator, act, wanted)
    lists: dict[str, list[Tensor]] = {name: [] for name in ProductTensors._fields}
    vectors: list[Tensor] = []
    for named in split_layers(inputs.pop("weights")):
        for kind in ("", "_bias"):
            named[f"qkv{kind}"] = torch.cat([named[f"{name}{kind}"] for name in ("query", "key", "value")])
        for name in PRODUCTS:
            weight = named[name]
            rescale = torch.rand(weight.shape[1], generator=generator) * 1.5 + 0.5
            linear = torch.nn.Linear(weight.shape[1], weight.shape[0])
            linear.weight.data = weight.float().cpu() / rescale
            state = rounded_linear(name, linear, precision).state_dict()
            laid = lay_out(name, state["weight"], state["weight_scale"], panels=dtype == torch.float32)
            shift = torch.randn(weight.shape[1], generator=generator)
            for key, tensor in zip(lists, (*laid, rescale, shift), strict=True):
                lists[key].append(tensor.to(device))
        vectors += [named[name] if "norm" in name else named[name].float() for name in VECTORS]
    return {"vectors": vectors, **lists, **inputs, "precision": precision}


def _rounded(x: Tensor, precision: str) -> Tensor:
    """x (T, K) with every row rounded: to 256 steps between its ends (int8), to 8191 steps on either side of zero (int16), or to
    float8 numbers times a step."""
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    if precision == "int16":
        return _symmetric(x, 8191)
    if precision == "fp8":
        step = torch.maximum(high, -low) / 448
        return torch.where(step > 0, (x / step).to(torch.float8_e4m3fn).to(x.dtype) * step, 0.0)
    step = (high - low) / 255
    zero = (-low / step).round()
    return torch.where(step > 0, ((x / step + zero).round().clamp(0, 255) - zero) * step, 0.0)


def _symmetric(x: Tensor, levels: int) -> Tensor:
    """x with every row of the last dimension rounded to `levels` steps on either side of zero."""
    step = x.abs().amax(-1, keepdim=True) / levels
    return torch.where(step > 0, (x / step).round() * step, 0.0)


def _rounded_attention(q, k, v, cu_q, cu_k, num_heads, softmax_scale):
    out, d = torch.zeros_like(q), q.shape[1] // num_heads
    for (a, b), (s, t) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        for h in [slice(i, i + d) for i in range(0, num_heads * d, d)]:
            if s == t:
                continue
            queries = _symmetric(q[a:b, h], min(8191, (2**31 - 1) // (8191 * d)))
            scores = queries @ _symmetric(k[s:t, h], 8191).t() * softmax_scale
            p = (scores - scores.amax(1, keepdim=True)).exp()
            out[a:b, h] = (p * 8191).round() / 8191 @ _symmetric(v[s:t, h].t(), 4095).t() / p.sum(1, keepdim=True)
    return out


def _attention(q, k, v, cu_q, cu_k, num_heads, softmax_scale):
    return attention_eager(q, k, v, torch.tensor(cu_q), torch.tensor(cu_k), 0, 0, num_heads, softmax_scale, 0.0, None)


def quantized_encoder_eager(
    hidden,
    vectors,
    integers,
    scales,
    sums,
    rescales,
    shifts,
    layer_indices,
    cu_seqlens,
    wanted_rows,
    cu_wanted,
    num_heads,
    softmax_scale,
    eps,
    act,
    precision,
):
    """Weights in panels belong to the C++ kernel, which rounds in slices and multiplies integers in attention; weights in rows
    belong to the Triton kernels."""
    dtype, sizes = hidden.dtype, (hidden.shape[1], _intermediate_size(vectors))
    panels, wide = integers[0].dim() == 1, torch.promote_types(dtype, torch.float32)
    attend = _rounded_attention if panels else _attention
    layers = list(QuantizedLayers(vectors, integers, scales, sums, rescales, shifts).layers())

    def matrix(name: str, own: ProductTensors) -> Tensor:
        shape = matrix_sizes(name, *sizes)
        return unpack(name, own.integers, shape).to(wide) * unpack_channels(name, own.scales, shape[0])[:, None]

    matrices = [{name: matrix(name, own) for name, own in products.items()} for _, products in layers]

    def product(x: Tensor, layer: int, name: str) -> Tensor:
        own = layers[layer][1][name]
        x = x * own.rescales + own.shifts
        parts = x.split(SLICE, dim=1) if name == "ffn_output" and panels else [x]
        return torch.cat([_rounded(part, precision) for part in parts], dim=1) @ matrices[layer][name].t()

    def kept(x: Tensor) -> Tensor:
        return x.to(dtype).to(wide)

    hidden = hidden.to(wide)
    for step, number in enumerate(layer_indices):
        w = {name: vector.to(wide) for name, vector in layers[number][0].items()}
        q, k, v = kept(product(hidden, number, "qkv") + w["qkv_bias"]).chunk(3, dim=1)
        hidden = kept(hidden)
        cu_q = cu_seqlens
        if step + 1 == len(layer_indices) and wanted_rows is not None:
            q, hidden, cu_q = q[wanted_rows], hidden[wanted_rows], cu_wanted
        context = kept(attend(q, k, v, cu_q.tolist(), cu_seqlens.tolist(), num_heads, softmax_scale))
        x = kept(product(context, number, "dense")) + w["dense_bias"] + hidden
        x = F.layer_norm(x, x.shape[1:], w["norm_weight"], w["norm_bias"], eps)
        activated = act_ref(kept(product(x, number, "ffn")) + w["ffn_bias"], act)
        y = kept(product(activated, number, "ffn_output")) + w["ffn_output_bias"] + kept(x)
        hidden = F.layer_norm(y, y.shape[1:], w["full_norm_weight"], w["full_norm_bias"], eps)
    return hidden.to(dtype)


def _intermediate_size(vectors: Sequence[Tensor]) -> int:
    return len(vectors[list(VECTORS).index("ffn_bias")])


def quantized_encoder_operations(inputs: Inputs) -> float:
    (tokens, width), intermediate_size = inputs["hidden"].shape, _intermediate_size(inputs["vectors"])
    pairs = float(inputs["cu_seqlens"].diff().double().square().sum())
    matrices = [matrix_sizes(name, width, intermediate_size) for name in PRODUCTS]
    products = 2.0 * tokens * sum(n * k for n, k in matrices)
    return len(inputs["layer_indices"]) * (products + 4.0 * pairs * width)
