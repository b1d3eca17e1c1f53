"""embedding_projection: three table look-ups, their sum, LayerNorm and the projection E -> H, as one operator.

The factorised embedding of Lan et al. 2019, section 3.1; in Hugging Face `AlbertEmbeddings` followed by
`embedding_hidden_mapping_in`. On a CPU the look-ups, the sum and LayerNorm are one C++ pass, and the product is
`runtime.linear`'s; on a GPU all of it is one CUDA kernel. In the backward pass torch computes the products on both.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.linear import linear, weight_gradient
from ..runtime.operands import Operand, check, check_launch, matrix
from ..runtime.registration import (
    as_dtype,
    forbid_second_derivative,
    is_traced,
    needs_dispatcher,
    register,
    register_autograd,
)
from . import _reports, _torch
from ._dropout import keep_scale_2d, seed_value
from ._lookup import COUNT, Lookup, finished, gradients_cpu, gradients_ref, lookup_operands, lookup_schema, normed_cpu
from ._token_errors import check_ids, index_error
from .add_layer_norm import layer_norm_stats_ref

# Sizes of the CUDA functions' buffers (csrc/layer_schema.h): columns are padded to a multiple of PAD_COLUMNS; a
# partial sum is over SUM_TOKENS tokens, or over SUM_PAIRS pairs of a token and a table.
PAD_COLUMNS, SUM_TOKENS, SUM_PAIRS = 8, 64, 32

dispatch.expect(cuda_buffers=(PAD_COLUMNS, SUM_TOKENS, SUM_PAIRS))


def embedding_projection_ref(
    lookup: Lookup,
    proj_weight: Tensor,
    proj_bias: Tensor,
    eps: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Eager reference, float32 inside."""
    check_ids(lookup.ids, lookup.sizes)
    z = lookup.sums_ref()
    normed = torch.nn.functional.layer_norm(z, z.shape[1:], lookup.ln_weight.float(), lookup.ln_bias.float(), eps)
    if dropout_p:
        normed = normed * keep_scale_2d(seed_value(seed, dropout_p), z.shape, dropout_p, z.device)
    return torch.nn.functional.linear(normed, proj_weight.float(), proj_bias.float()).to(lookup.word.dtype)


def _projection(word: Tensor, proj_weight: Tensor, proj_bias: Tensor | None = None) -> list[Operand]:
    """The product's operands beside the embeddings."""
    size, _ = matrix("embedding_projection", "proj_weight", proj_weight, "embedding size")
    shape = (size, word.shape[1])
    return [("proj_weight", proj_weight, shape, word.dtype), ("proj_bias", proj_bias, (size,), word.dtype)]


def _launch(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call one of the extension's CUDA functions, with tensors as addresses, on the current stream."""
    values = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
    status = getattr(dispatch.extension(), function)(*values, torch.cuda.current_stream().cuda_stream)
    if status:
        raise RuntimeError(f"{function}: the CUDA kernel was not launched, cudaError {status}")


def _fwd_cuda(
    lookup: Lookup, proj_weight: Tensor, proj_bias: Tensor, eps: float, dropout_p: float, seed: int
) -> Tensor:
    """The whole operator in one CUDA kernel, on the current stream of the tensors' device; a bad id is reported later."""
    word, code = lookup.word, dispatch.DTYPE_CODES[lookup.word.dtype]
    with torch.cuda.device(word.device):
        _reports.raise_pending(word.device)
        out = word.new_empty((len(lookup.position_ids), len(proj_weight)))
        first_bad = lookup.position_ids.new_full((), _reports.NOTHING)
        tensors = *lookup.kernel_tensors(), proj_weight, proj_bias, out, first_bad
        shape = len(out), word.shape[1], out.shape[1], *lookup.sizes
        _launch("embedding_projection_fwd_cuda", *tensors, *shape, eps, dropout_p, seed, code)
        _reports.report(first_bad, index_error(lookup.ids, lookup.sizes))
    return out


def _bwd_cuda(
    dnormed: Tensor, lookup: Lookup, eps: float, padding_idx: int, dropout_p: float, seed: int
) -> tuple[Tensor, ...]:
    """normed (T, E), and the gradients of inputs_embeds (None where ids were given), word, token_type, position, ln_weight
    and ln_bias from that of normed. The forward has reported bad ids; their tokens add to no gradient."""
    tokens, width = dnormed.shape
    padded, sizes, word = -(-width // PAD_COLUMNS) * PAD_COLUMNS, lookup.sizes, lookup.word
    has_ids = lookup.inputs_embeds is None
    pairs = (3 if has_ids else 2) * tokens
    # Keys count up to the sum of the sizes; the sort passes over every byte of them.
    key_dtype = torch.int16 if sum(sizes) <= torch.iinfo(torch.int16).max else torch.int32
    codes = key_dtype.itemsize, dispatch.DTYPE_CODES[word.dtype]
    scratch = partial(torch.empty, dtype=torch.float32, device=word.device)
    with torch.cuda.device(word.device):
        normed = torch.empty_like(dnormed)
        dembeds = None if lookup.inputs_embeds is None else torch.empty_like(lookup.inputs_embeds)
        dln_weight, dln_bias = torch.empty_like(lookup.ln_weight), torch.empty_like(lookup.ln_bias)
        dz, sums = scratch((tokens, padded)), scratch((-(-tokens // SUM_TOKENS), 2, padded))
        keys = torch.empty(pairs, dtype=key_dtype, device=word.device)
        written = normed, dembeds, dz, sums, keys, dln_weight, dln_bias
        numbers = tokens, width, *sizes, eps, dropout_p, seed, *codes
        _launch("embedding_projection_bwd_rows_cuda", dnormed, *lookup.kernel_tensors(), *written, *numbers)
        assert lookup.token_type is not None  # the schema asks for types
        dword, dtype_table, dposition = (torch.zeros_like(t) for t in (word, lookup.token_type, lookup.position))
        keys, places = torch.sort(keys, stable=True)
        sums = scratch((-(-pairs // SUM_PAIRS), 2, padded))
        tables = dword if has_ids else None, dtype_table, dposition
        shape = tokens, width, *sizes
        _launch("embedding_projection_bwd_tables_cuda", keys, places, dz, sums, *tables, *shape, padding_idx, *codes)
    return normed, dembeds, dword, dtype_table, dposition, dln_weight, dln_bias  # type: ignore[return-value]


def _fwd(*arguments: Any) -> Tensor:
    lookup, (proj_weight, proj_bias, eps, _, dropout_p, seed, backend) = Lookup(*arguments[:COUNT]), arguments[COUNT:]
    operands, device = lookup_operands("embedding_projection", lookup), lookup.word.device
    backend = dispatch.resolve("embedding_projection", device.type, lookup.word.dtype, backend)
    projection = _projection(lookup.word, proj_weight, proj_bias)
    if backend == "cpp":
        check_launch("embedding_projection", backend, device, projection)
        normed, _, _ = normed_cpu("embedding_projection", lookup, operands, eps, dropout_p, seed_value(seed, dropout_p))
        return linear(normed, proj_weight, proj_bias)
    check_launch("embedding_projection", backend, device, [*operands, *projection])
    if backend == "cuda":
        dense, number = (proj_weight.contiguous(), proj_bias.contiguous()), seed_value(seed, dropout_p)
        return _fwd_cuda(lookup.dense(), *dense, eps, dropout_p, number)
    return embedding_projection_ref(lookup, proj_weight, proj_bias, eps, dropout_p, seed)


def _bwd_cpp(
    grad: Tensor, lookup: Lookup, operands: list[Operand], proj_weight: Tensor, eps: float, dropout_p: float, seed: int
) -> list[Tensor]:
    """normed (T, E), and in float32 the gradients of `word` or inputs_embeds, token_type, position, ln_weight, ln_bias."""
    normed, mean, rstd = normed_cpu("embedding_projection", lookup, operands, eps, dropout_p, seed)
    dnormed = linear(grad, proj_weight.t()).contiguous()
    return [normed, *gradients_cpu("embedding_projection", dnormed, lookup, operands, mean, rstd, dropout_p, seed)]


def _bwd_ref(
    grad: Tensor, lookup: Lookup, _: list[Operand], proj_weight: Tensor, eps: float, dropout_p: float, seed: int
) -> list[Tensor]:
    """As `_bwd_cpp`."""
    z = lookup.sums_ref()
    keep = keep_scale_2d(seed, z.shape, dropout_p, z.device) if dropout_p else 1.0
    mean, rstd = layer_norm_stats_ref(z, eps)
    normed = ((z - mean[:, None]) * rstd[:, None] * lookup.ln_weight.float() + lookup.ln_bias.float()) * keep
    dnormed = grad.float() @ proj_weight.float()
    return [normed, *gradients_ref(dnormed, lookup, mean, rstd, dropout_p, seed)]


def _bwd(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of inputs_embeds (empty where ids were given), word, token_type, position, ln_weight, ln_bias,
    proj_weight and proj_bias. The embeddings are computed again: that costs little beside keeping T x E numbers."""
    lookup, (proj_weight, eps, padding_idx, dropout_p, seed, backend) = Lookup(*arguments[:COUNT]), arguments[COUNT:]
    operands, word = lookup_operands("embedding_projection", lookup), lookup.word
    tokens, size = operands[1][2][0], proj_weight.shape[0]
    projection = [("grad", grad, (tokens, size), word.dtype), *_projection(word, proj_weight)]
    check_launch("embedding_projection", backend, word.device, projection)
    backend = dispatch.resolve("embedding_projection", word.device.type, word.dtype, backend)
    number, f32 = seed_value(seed, dropout_p), torch.float32
    if backend != "cpp":
        check_launch("embedding_projection", backend, word.device, operands)
    if backend == "cuda":
        dnormed = linear(grad, proj_weight.t()).contiguous()
        normed, dembeds, *tables = _bwd_cuda(dnormed, lookup.dense(), eps, padding_idx, dropout_p, number)
        dinputs = word.new_empty(0, word.shape[1]) if dembeds is None else dembeds
        dproj_bias = grad.sum(0, dtype=f32).to(word.dtype)
        return dinputs, *tables, weight_gradient(grad, normed), dproj_bias
    compute = _bwd_cpp if backend == "cpp" else _bwd_ref
    normed, *gradients = compute(grad, lookup, operands, proj_weight, eps, dropout_p, number)
    dproj_weight, dproj_bias = weight_gradient(grad, normed.to(grad.dtype)), grad.sum(0, dtype=f32)
    return *finished(gradients, lookup, padding_idx), dproj_weight.to(word.dtype), dproj_bias.to(word.dtype)


def _fwd_fake(*arguments):
    lookup, (proj_weight, proj_bias, *_) = Lookup(*arguments[:COUNT]), arguments[COUNT:]
    word = lookup.word
    operands = [*lookup_operands("embedding_projection", lookup), *_projection(word, proj_weight, proj_bias)]
    check("embedding_projection", word.device, operands)
    return word.new_empty((lookup.position_ids.shape[0], proj_weight.shape[0]))


def _bwd_fake(grad, *arguments):
    lookup, proj_weight = Lookup(*arguments[:COUNT]), arguments[COUNT]
    word, embeds = lookup.word, lookup.inputs_embeds
    dinputs = word.new_empty((0, word.shape[1]) if embeds is None else embeds.shape)
    shaped = [t for t in (*lookup[4:], proj_weight) if t is not None]
    return dinputs, *(word.new_empty(t.shape) for t in shaped), word.new_empty(proj_weight.shape[0])


_NUMBERS = "float eps, int padding_idx, float dropout_p, Tensor? seed, str backend"
register(
    f"embedding_projection_fwd({lookup_schema()}, Tensor proj_weight, Tensor proj_bias, {_NUMBERS}) -> Tensor",
    _fwd,
    _fwd_fake,
)
register(
    f"embedding_projection_bwd(Tensor grad, {lookup_schema()}, Tensor proj_weight, {_NUMBERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    *tensors, _, ctx.eps, ctx.padding_idx, ctx.dropout_p, seed, ctx.backend = inputs
    ctx.save_for_backward(*tensors, seed)


def _backward(ctx, grad):
    *tensors, seed = ctx.saved_tensors
    with torch.autocast(grad.device.type, enabled=False):
        dinputs, *grads = torch.ops.albert_fast.embedding_projection_bwd(
            grad, *tensors, ctx.eps, ctx.padding_idx, ctx.dropout_p, seed, ctx.backend
        )
    return None, dinputs if tensors[1] is not None else None, None, None, *grads, None, None, None, None, None


register_autograd("embedding_projection_fwd", _backward, _setup)
forbid_second_derivative("embedding_projection_bwd")


def embedding_projection(
    input_ids: Tensor | None,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    eps: float,
    padding_idx: int = -1,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])) @ proj_weight.T + proj_bias.

    Args:
        input_ids, token_type_ids, position_ids: (T,) int64.
        word: (V, E); token_type: (Y, E); position: (P, E).
        ln_weight, ln_bias: (E,). proj_weight: (H, E). proj_bias: (H,).
        eps: added to the variance.
        padding_idx: the row of `word` that gets no gradient, -1 for none.
        dropout_p, seed: replayable dropout; `seed` from `albert_fast.ops.draw_seed()`.
        inputs_embeds: (T, E), instead of looking up input_ids (then None).
        backend: "auto", or the name of one.

    Returns:
        (T, H), in the tables' dtype.

    Raises:
        TokenIndexError (an IndexError): an id outside its table; names table, token, value and size.
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    if inputs_embeds is not None:
        (inputs_embeds,) = as_dtype(word, inputs_embeds)
    token_type, position, ln_weight, ln_bias = as_dtype(word, token_type, position, ln_weight, ln_bias)
    proj_weight, proj_bias = projection = as_dtype(word, proj_weight, proj_bias)
    ids, norm = (token_type_ids, position_ids), (ln_weight, ln_bias)
    lookup, device = Lookup(input_ids, inputs_embeds, *ids, word, token_type, position, *norm), word.device.type
    if not dropout_p and dispatch.runs_on_torch("embedding_projection", device, word.dtype, backend):
        check(
            "embedding_projection",
            word.device,
            [*lookup_operands("embedding_projection", lookup), *_projection(word, *projection)],
        )
        check_ids(lookup.ids, lookup.sizes)
        return _torch.embedding_projection(lookup, proj_weight, proj_bias, eps, padding_idx)
    tensors = inputs_embeds, word, token_type, position, *norm, *projection
    call: Any = torch.ops.albert_fast.embedding_projection_fwd if needs_dispatcher(*tensors) else _fwd
    # Under autocast the product inside would change the dtype that the schema promises.
    autocast = torch.is_autocast_enabled(device) or is_traced()
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        return call(*lookup, *projection, eps, padding_idx, dropout_p, seed, backend)
