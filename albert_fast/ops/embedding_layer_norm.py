"""embedding_layer_norm: table look-ups, their sum and LayerNorm in one pass, the embeddings of BERT's family.

Devlin et al. 2018, figure 2; in Hugging Face `BertEmbeddings`, and without token types DistilBERT's `Embeddings`. On a GPU torch
adds up the tables' gradients, in the order of the tokens.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.operands import Operand, check, check_launch
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

_OP = "embedding_layer_norm"


def embedding_layer_norm_ref(lookup: Lookup, eps: float, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
    """Eager reference, float32 inside."""
    check_ids(lookup.ids, lookup.sizes)
    z = lookup.sums_ref()
    normed = torch.nn.functional.layer_norm(z, z.shape[1:], lookup.ln_weight.float(), lookup.ln_bias.float(), eps)
    if dropout_p:
        normed = normed * keep_scale_2d(seed_value(seed, dropout_p), z.shape, dropout_p, z.device)
    return normed.to(lookup.word.dtype)


def _fwd_triton(lookup: Lookup, eps: float, dropout_p: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """On a GPU a bad id is reported later; in Triton's interpreter, on the CPU, at once."""
    from ..kernels.embedding_layer_norm import embedding_layer_norm_fwd

    device = lookup.word.device
    if device.type != "cuda":
        check_ids(lookup.ids, lookup.sizes)
        return embedding_layer_norm_fwd(*lookup, eps, dropout_p, seed)[:3]
    _reports.raise_pending(device)
    out, mean, rstd, first_bad = embedding_layer_norm_fwd(*lookup, eps, dropout_p, seed)
    with torch.cuda.device(device):
        _reports.report(first_bad, index_error(lookup.ids, lookup.sizes))
    return out, mean, rstd


def _fwd(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    lookup, (eps, _, _, dropout_p, seed, backend) = Lookup(*arguments[:COUNT]), arguments[COUNT:]
    operands, device = lookup_operands(_OP, lookup), lookup.word.device
    backend = dispatch.resolve(_OP, device.type, lookup.word.dtype, backend)
    number = seed_value(seed, dropout_p)
    if backend == "cpp":
        return normed_cpu(_OP, lookup, operands, eps, dropout_p, number)
    check_launch(_OP, backend, device, operands)
    if backend == "triton":
        return _fwd_triton(lookup, eps, dropout_p, number)
    return embedding_layer_norm_ref(lookup, eps, dropout_p, seed), *layer_norm_stats_ref(lookup.sums_ref(), eps)


def _bwd(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of inputs_embeds (empty where ids were given), word, token_type (empty without types), position, ln_weight
    and ln_bias."""
    lookup, (mean, rstd, *padding, dropout_p, seed, backend) = Lookup(*arguments[:COUNT]), arguments[COUNT:]
    operands, word = lookup_operands(_OP, lookup), lookup.word
    (tokens,), width = operands[2][2], word.shape[1]
    backend = dispatch.resolve(_OP, word.device.type, word.dtype, backend)
    number = seed_value(seed, dropout_p)
    if backend == "cpp":
        check_launch(_OP, backend, word.device, operands[-1:])  # ln_bias, which no gradient depends on
        gradients = gradients_cpu(_OP, grad, lookup, operands, mean, rstd, dropout_p, number)
        return finished(gradients, lookup, *padding)
    more: list[Operand] = [("grad", grad, (tokens, width), word.dtype)]
    more += [(name, t, (tokens,), torch.float32) for name, t in (("mean", mean), ("rstd", rstd))]
    check_launch(_OP, backend, word.device, [*operands, *more])
    if backend == "reference" or word.device.type != "cuda":
        check_ids(lookup.ids, lookup.sizes)
    if backend == "reference":
        return finished(gradients_ref(grad.float(), lookup, mean, rstd, dropout_p, number), lookup, *padding)
    from ..kernels.embedding_layer_norm import embedding_layer_norm_bwd

    dz, rows, dln_weight, dln_bias = embedding_layer_norm_bwd(grad, *lookup[:-1], mean, rstd, dropout_p, number)
    tables = zip(lookup.ids, rows, lookup.sizes, (padding[0], -1, padding[1]), strict=True)
    # torch adds in an order that depends on the ids alone, without atomics and without waiting for the GPU.
    sums = [
        dz.new_zeros((size, width)) if ids is None else _table_gradient(dz, own, size, row)
        for ids, own, size, row in tables
    ]
    dinputs = dz if lookup.inputs_embeds is not None else dz.new_empty((0, width))
    return dinputs.to(word.dtype), *(t.to(word.dtype) for t in sums), dln_weight, dln_bias


def _table_gradient(dz: Tensor, rows: Tensor, size: int, padding_idx: int) -> Tensor:
    """(size, E): the sum of the rows of dz (T, E) for each row of a table; rows (T,) are inside it."""
    return torch.ops.aten.embedding_dense_backward(dz, rows, size, padding_idx, False)


def _fwd_fake(*arguments):
    lookup = Lookup(*arguments[:COUNT])
    word, tokens = lookup.word, lookup.position_ids.shape[0]
    check(_OP, word.device, lookup_operands(_OP, lookup))
    stats = word.new_empty(tokens, dtype=torch.float32)
    return word.new_empty((tokens, word.shape[1])), stats, torch.empty_like(stats)


def _bwd_fake(grad, *arguments):
    lookup = Lookup(*arguments[:COUNT])
    word, embeds, types = lookup.word, lookup.inputs_embeds, lookup.token_type
    dinputs, dtypes = (word.new_empty((0, word.shape[1]) if t is None else t.shape) for t in (embeds, types))
    dword, dposition, *norm = (word.new_empty(t.shape) for t in (word, lookup.position, *lookup[-2:]))
    return dinputs, dword, dtypes, dposition, *norm


_NUMBERS = "int padding_idx, int position_padding_idx, float dropout_p, Tensor? seed, str backend"
register(
    f"embedding_layer_norm_fwd({lookup_schema('Tensor?')}, float eps, {_NUMBERS}) -> (Tensor, Tensor, Tensor)",
    _fwd,
    _fwd_fake,
)
register(
    f"embedding_layer_norm_bwd(Tensor grad, {lookup_schema('Tensor?')}, Tensor mean, Tensor rstd, {_NUMBERS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    *tensors, _, ctx.padding_idx, ctx.position_padding_idx, ctx.dropout_p, seed, ctx.backend = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd, seed)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(ctx, grad, _grad_mean, _grad_rstd):
    *tensors, mean, rstd, seed = ctx.saved_tensors
    dinputs, dword, dtypes, *others = torch.ops.albert_fast.embedding_layer_norm_bwd(
        grad,
        *tensors,
        mean,
        rstd,
        ctx.padding_idx,
        ctx.position_padding_idx,
        ctx.dropout_p,
        seed,
        ctx.backend,
    )
    dinputs = None if tensors[1] is None else dinputs
    dtypes = None if tensors[2] is None else dtypes
    return None, dinputs, None, None, dword, dtypes, *others, None, None, None, None, None, None


register_autograd("embedding_layer_norm_fwd", _backward, _setup)
forbid_second_derivative("embedding_layer_norm_bwd")


def embedding_layer_norm(
    input_ids: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor | None,
    position: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    padding_idx: int = -1,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    inputs_embeds: Tensor | None = None,
    position_padding_idx: int = -1,
    backend: str = "auto",
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + token_type[token_type_ids] + position[position_ids])).

    Args:
        input_ids, position_ids: (T,) int64.
        token_type_ids: (T,) int64; None together with token_type for a model without token types.
        word: (V, H); token_type: (Y, H) or None; position: (P, H).
        ln_weight, ln_bias: (H,).
        eps: added to the variance.
        padding_idx: the row of `word` that gets no gradient, -1 for none.
        dropout_p, seed: replayable dropout; `seed` from `albert_fast.ops.draw_seed()`.
        position_padding_idx: the same for `position`, RoBERTa's.
        inputs_embeds: (T, H), instead of looking up input_ids (then None).
        backend: "auto", or the name of one.

    Returns:
        (T, H), in the tables' dtype.

    Raises:
        TokenIndexError (an IndexError): an id outside its table; names table, token, value and size. A GPU is not waited
            for: there a later call or `albert_fast.synchronize` raises it.
        ValueError, TypeError: shapes or dtypes that do not fit.
    """
    if inputs_embeds is not None:
        (inputs_embeds,) = as_dtype(word, inputs_embeds)
    if token_type is not None:
        (token_type,) = as_dtype(word, token_type)
    position, ln_weight, ln_bias = as_dtype(word, position, ln_weight, ln_bias)
    ids, norm = (token_type_ids, position_ids), (ln_weight, ln_bias)
    lookup, device = Lookup(input_ids, inputs_embeds, *ids, word, token_type, position, *norm), word.device.type
    if not dropout_p and dispatch.runs_on_torch(_OP, device, word.dtype, backend):
        check(_OP, word.device, lookup_operands(_OP, lookup))
        check_ids(lookup.ids, lookup.sizes)
        return _torch.embedding_layer_norm(*lookup, eps, padding_idx, position_padding_idx)
    call: Any = _fwd
    if needs_dispatcher(inputs_embeds, word, token_type, position, *norm):
        call = torch.ops.albert_fast.embedding_layer_norm_fwd
    # A gradient that autocast rounded would not have the dtype that the schema promises.
    autocast = torch.is_autocast_enabled(device) or is_traced()
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        out: Tensor = call(*lookup, eps, padding_idx, position_padding_idx, dropout_p, seed, backend)[0]
    return out
