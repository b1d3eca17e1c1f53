"""embedding_projection: three table look-ups, their sum, LayerNorm and the projection E -> H, as one operator.

The factorised embedding of Lan et al. 2019, section 3.1; in Hugging Face `AlbertEmbeddings` followed by
`embedding_hidden_mapping_in`. On a CPU the look-ups, the sum and LayerNorm are one C++ pass, and the product
is `gemm`'s; on a GPU all of it is one CUDA kernel. Backward, the products are torch's on both.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.linear import linear, weight_gradient
from ..runtime.operands import Operand, check, check_launch, hold, matrix
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
from .add_layer_norm import layer_norm_bwd_ref, layer_norm_stats_ref

TABLES = ("input_ids", "token_type_ids", "position_ids")
# What the CUDA functions count on (csrc/cuda/embedding_projection.h): columns are padded to so many, and partial sums are
# those of so many tokens, and of so many pairs of a token and a table.
PAD_COLUMNS, SUM_TOKENS, SUM_PAIRS = 8, 64, 32


class TokenIndexError(IndexError):
    """An id outside its table: which (`table`), of which packed token, its `value` and the table's `size`; `where` it is."""

    def __init__(self, table: str, token: int, value: int, size: int, where: str):
        self.table, self.token, self.value, self.size = table, token, value, size
        found = f"is {value}, outside its table of {size} rows (0 to {size - 1})"
        if 0 <= value < size:  # told late, from a GPU
            found = f"was outside its table of {size} rows (0 to {size - 1}), and has been written again since"
        super().__init__(f"{table}[{where}] {found}")


def check_ids(ids: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> None:
    """Raise TokenIndexError for the first id that lies outside its table (ids may be None: inputs_embeds)."""
    for table, (values, size) in enumerate(zip(ids, sizes, strict=True)):
        bad = None if values is None else ((values < 0) | (values >= size)).nonzero()
        if bad is not None and len(bad):
            raise index_error(ids, sizes)(int(bad[0]) * len(TABLES) + table)


def index_error(ids: tuple[Tensor | None, ...], sizes: tuple[int, ...]) -> _reports.Describe:
    """What makes the error of this call from a kernel's code, token * 3 + table."""
    where = _reports.current_place()

    def describe(code: int) -> TokenIndexError:
        token, table = divmod(code, len(TABLES))
        value = int(ids[table][token])  # type: ignore[index]
        return TokenIndexError(TABLES[table], token, value, sizes[table], where(token))

    return describe


def _sum_ref(embeds: Tensor, token_type: Tensor, position: Tensor, type_ids: Tensor, position_ids: Tensor) -> Tensor:
    # (word + type) + position, the order of Hugging Face's sum.
    return embeds.float() + token_type.float()[type_ids] + position.float()[position_ids]


def embedding_projection_ref(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor, position_ids: Tensor, word: Tensor,
    token_type: Tensor, position: Tensor, ln_weight: Tensor, ln_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    eps: float, dropout_p: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Eager reference, float32 inside."""
    check_ids((input_ids, token_type_ids, position_ids), (len(word), len(token_type), len(position)))
    embeds = word[input_ids] if inputs_embeds is None else inputs_embeds
    z = _sum_ref(embeds, token_type, position, token_type_ids, position_ids)
    normed = torch.nn.functional.layer_norm(z, z.shape[1:], ln_weight.float(), ln_bias.float(), eps)
    if dropout_p:
        normed = normed * keep_scale_2d(seed_value(seed, dropout_p), z.shape, dropout_p, z.device)
    return torch.nn.functional.linear(normed, proj_weight.float(), proj_bias.float()).to(word.dtype)


def _operands(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor, position_ids: Tensor, word: Tensor,
    token_type: Tensor, position: Tensor, ln_weight: Tensor, ln_bias: Tensor,
) -> list[Operand]:  # fmt: skip
    """What LayerNorm of the summed embeddings reads, in the order of the C++ functions: rows of `word`, or given ones."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("embedding_projection: give exactly one of input_ids and inputs_embeds")
    sizes = [matrix("embedding_projection", name, t, "embedding size") for name, t in
             (("word", word), ("token_type", token_type), ("position", position))]  # fmt: skip
    first, (width, dtype) = token_type_ids if input_ids is None else input_ids, (sizes[0][1], word.dtype)
    if first.dim() != 1:
        raise ValueError(f"embedding_projection: ids must have the shape (T,), got {tuple(first.shape)}")
    tokens = first.shape[0]
    ids: list[Operand] = []
    for name, values in zip(TABLES, (input_ids, token_type_ids, position_ids), strict=True):
        if values is not None and values.dtype != torch.int64:
            raise TypeError(f"embedding_projection: {name} must be int64, got {values.dtype}")
        ids.append((name, values, (tokens,), torch.int64))
    return [
        *ids,
        ("word", word, sizes[0], dtype) if inputs_embeds is None else
        ("inputs_embeds", inputs_embeds, (tokens, width), dtype),
        ("token_type", token_type, (sizes[1][0], width), dtype),
        ("position", position, (sizes[2][0], width), dtype),
        ("ln_weight", ln_weight, (width,), dtype),
        ("ln_bias", ln_bias, (width,), dtype),
    ]  # fmt: skip


def _projection(word: Tensor, proj_weight: Tensor, proj_bias: Tensor | None = None) -> list[Operand]:
    """What the product reads beside the embeddings."""
    size, _ = matrix("embedding_projection", "proj_weight", proj_weight, "embedding size")
    shape = (size, word.shape[1])
    return [("proj_weight", proj_weight, shape, word.dtype), ("proj_bias", proj_bias, (size,), word.dtype)]


def _normed_cpu(
    operands: list[Operand], sizes: tuple[int, ...], eps: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of the summed embeddings (T, E), after dropout, and its statistics, by the C++ kernel; V, Y and P: sizes."""
    ids = tuple(tensor for _, tensor, _, _ in operands[: len(TABLES)])
    (tokens,), (_, _, (width,), dtype) = operands[1][2], operands[-1]
    memory = hold("embedding_projection", torch.device("cpu"), operands)
    out = torch.empty((tokens, width), dtype=dtype)
    mean, rstd = (torch.empty(tokens, dtype=torch.float32) for _ in range(2))
    bad = dispatch.extension().embedding_layer_norm_fwd_cpu(
        *memory.addresses, out.data_ptr(), mean.data_ptr(), rstd.data_ptr(), tokens, width, *sizes, eps, dropout_p, seed,
        dispatch.DTYPE_CODES[dtype], torch.get_num_threads(),
    )  # fmt: skip
    if bad >= 0:
        raise index_error(ids, sizes)(bad)
    return out, mean, rstd


def _launch(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call one of the extension's CUDA functions, with tensors as addresses, on the current stream."""
    values = [a.data_ptr() if isinstance(a, Tensor) else 0 if a is None else a for a in arguments]
    status = getattr(dispatch.extension(), function)(*values, torch.cuda.current_stream().cuda_stream)
    if status:
        raise RuntimeError(f"{function}: the CUDA kernel was not launched, cudaError {status}")


def _fwd_cuda(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor, position_ids: Tensor, word: Tensor,
    token_type: Tensor, position: Tensor, ln_weight: Tensor, ln_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    eps: float, dropout_p: float, seed: int,
) -> Tensor:  # fmt: skip
    """The whole operator in one CUDA kernel, on the current stream of the tensors' device; a bad id is told later."""
    sizes = len(word), len(token_type), len(position)
    with torch.cuda.device(word.device):
        _reports.raise_pending(word.device)
        out = word.new_empty((len(token_type_ids), len(proj_weight)))
        first_bad = token_type_ids.new_full((), _reports.NOTHING)
        _launch(
            "embedding_projection_fwd_cuda", input_ids, token_type_ids, position_ids,
            word if inputs_embeds is None else inputs_embeds, token_type, position, ln_weight, ln_bias, proj_weight,
            proj_bias, out, first_bad, len(out), word.shape[1], out.shape[1], *sizes, eps, dropout_p, seed,
            dispatch.DTYPE_CODES[word.dtype],
        )  # fmt: skip
        _reports.report(first_bad, index_error((input_ids, token_type_ids, position_ids), sizes))
    return out


def _bwd_cuda(
    dnormed: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor, position_ids: Tensor,
    word: Tensor, token_type: Tensor, position: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float, padding_idx: int,
    dropout_p: float, seed: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """normed (T, E), and the gradients of inputs_embeds (None where ids were given), word, token_type, position, ln_weight
    and ln_bias from that of normed. The forward has reported bad ids; their tokens add to no gradient."""
    tokens, width = dnormed.shape
    padded = -(-width // PAD_COLUMNS) * PAD_COLUMNS
    sizes = len(word), len(token_type), len(position)
    pairs = (3 if inputs_embeds is None else 2) * tokens
    # Keys count up to the sum of the sizes; the sort passes over every byte of them.
    key_dtype = torch.int16 if sum(sizes) <= torch.iinfo(torch.int16).max else torch.int32
    code = dispatch.DTYPE_CODES[word.dtype]
    scratch = partial(torch.empty, dtype=torch.float32, device=word.device)
    with torch.cuda.device(word.device):
        normed = torch.empty_like(dnormed)
        dembeds = None if inputs_embeds is None else torch.empty_like(inputs_embeds)
        dln_weight, dln_bias = torch.empty_like(ln_weight), torch.empty_like(ln_bias)
        dz = scratch((tokens, padded))
        keys = torch.empty(pairs, dtype=key_dtype, device=word.device)
        _launch(
            "embedding_projection_bwd_rows_cuda", dnormed, input_ids, token_type_ids, position_ids,
            word if inputs_embeds is None else inputs_embeds, token_type, position, ln_weight, ln_bias, normed, dembeds, dz,
            scratch((-(-tokens // SUM_TOKENS), 2, padded)), keys, dln_weight, dln_bias, tokens, width, *sizes, eps,
            dropout_p, seed, key_dtype.itemsize, code,
        )  # fmt: skip
        dword, dtype_table, dposition = (torch.zeros_like(t) for t in (word, token_type, position))
        keys, order = torch.sort(keys, stable=True)
        _launch(
            "embedding_projection_bwd_tables_cuda", keys, order, dz, scratch((-(-pairs // SUM_PAIRS), 2, padded)),
            dword if inputs_embeds is None else None, dtype_table, dposition, tokens, width, *sizes, padding_idx,
            key_dtype.itemsize, code,
        )  # fmt: skip
    return normed, dembeds, dword, dtype_table, dposition, dln_weight, dln_bias  # type: ignore[return-value]


def _fwd(
    input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor, position_ids: Tensor, word: Tensor,
    token_type: Tensor, position: Tensor, ln_weight: Tensor, ln_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor,
    eps: float, padding_idx: int, dropout_p: float, seed: Tensor | None, backend: str,
) -> Tensor:  # fmt: skip
    tensors = (input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, ln_weight, ln_bias)
    operands = _operands(*tensors)
    backend = dispatch.resolve("embedding_projection", word.device.type, word.dtype, backend)
    projection = _projection(word, proj_weight, proj_bias)
    if backend == "cpp":
        check_launch("embedding_projection", backend, word.device, projection)
        sizes = len(word), len(token_type), len(position)
        normed, _, _ = _normed_cpu(operands, sizes, eps, dropout_p, seed_value(seed, dropout_p))
        return linear(normed, proj_weight, proj_bias)
    check_launch("embedding_projection", backend, word.device, [*operands, *projection])
    if backend == "cuda":
        dense: Any = [None if t is None else t.contiguous() for t in (*tensors, proj_weight, proj_bias)]
        return _fwd_cuda(*dense, eps, dropout_p, seed_value(seed, dropout_p))  # type: ignore[call-arg]
    return embedding_projection_ref(
        input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, ln_weight, ln_bias,
        proj_weight, proj_bias, eps, dropout_p, seed,
    )  # fmt: skip


def _bwd(
    grad: Tensor, input_ids: Tensor | None, inputs_embeds: Tensor | None, token_type_ids: Tensor, position_ids: Tensor,
    word: Tensor, token_type: Tensor, position: Tensor, ln_weight: Tensor, ln_bias: Tensor, proj_weight: Tensor, eps: float,
    padding_idx: int, dropout_p: float, seed: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of inputs_embeds (empty where ids were given), word, token_type, position, ln_weight, ln_bias,
    proj_weight and proj_bias. The embeddings are computed again: T x E is little beside keeping it."""
    tensors = (input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, ln_weight, ln_bias)
    operands = _operands(*tensors)
    tokens, size = operands[1][2][0], proj_weight.shape[0]
    projection = [("grad", grad, (tokens, size), word.dtype), *_projection(word, proj_weight)]
    check_launch("embedding_projection", backend, word.device, projection)
    backend = dispatch.resolve("embedding_projection", word.device.type, word.dtype, backend)
    seed_number = seed_value(seed, dropout_p)
    f32 = torch.float32
    if backend != "cpp":
        check_launch("embedding_projection", backend, word.device, operands)
    if backend == "cuda":
        dnormed = linear(grad, proj_weight.t()).contiguous()
        dense: Any = [None if t is None else t.contiguous() for t in tensors]
        arguments: Any = (dnormed, *dense, eps, padding_idx, dropout_p, seed_number)
        normed, dembeds, *table_grads = _bwd_cuda(*arguments)
        dinputs = word.new_empty(0, word.shape[1]) if dembeds is None else dembeds
        dproj_bias = grad.sum(0, dtype=f32).to(word.dtype)
        return dinputs, *table_grads, weight_gradient(grad, normed), dproj_bias  # type: ignore[return-value]
    if backend == "cpp":
        sizes = len(word), len(token_type), len(position)
        normed, mean, rstd = _normed_cpu(operands, sizes, eps, dropout_p, seed_number)
        dnormed = linear(grad, proj_weight.t()).contiguous()
        memory = hold("embedding_projection", word.device, operands[:-1])
        dembeds = torch.zeros(word.shape if inputs_embeds is None else inputs_embeds.shape, dtype=f32)
        dtype_table, dposition, dln_weight, dln_bias = (
            torch.zeros(t.shape, dtype=f32) for t in (token_type, position, ln_weight, ln_bias)
        )
        dispatch.extension().embedding_layer_norm_bwd_cpu(
            dnormed.data_ptr(), *memory.addresses, mean.data_ptr(), rstd.data_ptr(), dembeds.data_ptr(),
            dtype_table.data_ptr(), dposition.data_ptr(), dln_weight.data_ptr(), dln_bias.data_ptr(), len(normed),
            word.shape[1], *sizes, dropout_p, seed_number,
            dispatch.DTYPE_CODES[word.dtype], torch.get_num_threads(),
        )  # fmt: skip
    else:
        embeds = word[input_ids] if inputs_embeds is None else inputs_embeds
        z = _sum_ref(embeds, token_type, position, token_type_ids, position_ids)
        keep = keep_scale_2d(seed_number, z.shape, dropout_p, z.device) if dropout_p else 1.0
        mean, rstd = layer_norm_stats_ref(z, eps)
        normed = ((z - mean[:, None]) * rstd[:, None] * ln_weight.float() + ln_bias.float()) * keep
        dnormed = (grad.float() @ proj_weight.float()) * keep
        dz, dln_weight, dln_bias = layer_norm_bwd_ref(dnormed, z, ln_weight.float(), mean, rstd)
        scatter = lambda table, ids: torch.zeros(table.shape, dtype=f32, device=z.device).index_add_(0, ids, dz)  # noqa: E731
        dembeds = dz if input_ids is None else scatter(word, input_ids)
        dtype_table, dposition = scatter(token_type, token_type_ids), scatter(position, position_ids)
    dword = torch.zeros(word.shape, dtype=f32, device=word.device) if input_ids is None else dembeds
    if 0 <= padding_idx < len(dword):
        dword[padding_idx] = 0.0  # torch.nn.Embedding's padding_idx, as in Hugging Face
    dproj_weight = weight_gradient(grad, normed.to(grad.dtype))
    dinputs = dembeds if input_ids is None else dembeds.new_empty(0, word.shape[1])
    grads = (dinputs, dword, dtype_table, dposition, dln_weight, dln_bias, dproj_weight, grad.sum(0, dtype=f32))
    return tuple(g.to(word.dtype) for g in grads)  # type: ignore[return-value]


def _fwd_fake(
    input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, ln_weight, ln_bias, proj_weight,
    proj_bias, eps, padding_idx, dropout_p, seed, backend,
):  # fmt: skip
    operands = _operands(
        input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, ln_weight, ln_bias
    )
    check("embedding_projection", word.device, [*operands, *_projection(word, proj_weight, proj_bias)])
    return word.new_empty((token_type_ids.shape[0], proj_weight.shape[0]))


def _bwd_fake(
    grad, input_ids, inputs_embeds, token_type_ids, position_ids, word, token_type, position, ln_weight, ln_bias,
    proj_weight, eps, padding_idx, dropout_p, seed, backend,
):  # fmt: skip
    dinputs = word.new_empty((0, word.shape[1]) if inputs_embeds is None else inputs_embeds.shape)
    shaped = (word, token_type, position, ln_weight, ln_bias, proj_weight)
    return dinputs, *(word.new_empty(t.shape) for t in shaped), word.new_empty(proj_weight.shape[0])


_IDS = "Tensor? input_ids, Tensor? inputs_embeds, Tensor token_type_ids, Tensor position_ids"
_TABLES = "Tensor word, Tensor token_type, Tensor position, Tensor ln_weight, Tensor ln_bias, Tensor proj_weight"
_ARGUMENTS = "float eps, int padding_idx, float dropout_p, Tensor? seed, str backend"
register(f"embedding_projection_fwd({_IDS}, {_TABLES}, Tensor proj_bias, {_ARGUMENTS}) -> Tensor", _fwd, _fwd_fake)
register(
    f"embedding_projection_bwd(Tensor grad, {_IDS}, {_TABLES}, {_ARGUMENTS})"
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
    input_ids: Tensor | None, token_type_ids: Tensor, position_ids: Tensor, word: Tensor, token_type: Tensor,
    position: Tensor, ln_weight: Tensor, ln_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor, eps: float,
    padding_idx: int = -1, dropout_p: float = 0.0, seed: Tensor | None = None, *, inputs_embeds: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
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
    parameters = token_type, position, ln_weight, ln_bias, proj_weight, proj_bias
    if inputs_embeds is not None:
        (inputs_embeds,) = as_dtype(word, inputs_embeds)
    tensors: Any = (inputs_embeds, word, *as_dtype(word, *parameters))
    if not dropout_p and dispatch.runs_on_torch("embedding_projection", word.device.type, word.dtype, backend):
        operands = _operands(input_ids, tensors[0], token_type_ids, position_ids, *tensors[1:6])
        check("embedding_projection", word.device, [*operands, *_projection(word, *tensors[6:])])
        check_ids((input_ids, token_type_ids, position_ids), (len(word), len(token_type), len(position)))
        arguments: Any = (input_ids, tensors[0], token_type_ids, position_ids, *tensors[1:], eps, padding_idx)
        return _torch.embedding_projection(*arguments)
    call: Any = torch.ops.albert_fast.embedding_projection_fwd if needs_dispatcher(*tensors) else _fwd
    device = word.device.type
    # Under autocast the product inside would change the dtype that the schema promises.
    autocast = torch.is_autocast_enabled(device) or is_traced()
    with torch.autocast(device, enabled=False) if autocast else contextlib.nullcontext():
        return call(
            input_ids,
            inputs_embeds,
            token_type_ids,
            position_ids,
            *tensors[1:],
            eps,
            padding_idx,
            dropout_p,
            seed,
            backend,
        )
