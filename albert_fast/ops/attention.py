"""attention: softmax(Q K^T * scale) V over packed sequences, no S x S matrix in memory (Vaswani et al. 2017, equation 1).

Bidirectional, as in ALBERT: a query sees every key of its own sequence. Queries and keys have their own `cu_seqlens`, so
the last layer can ask for some tokens only.
"""

from __future__ import annotations

import itertools
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Parameter

from ..runtime import dispatch
from ..runtime.operands import Operand, check, check_launch, head_size, hold, hold_rows, matrix
from ..runtime.registration import forbid_second_derivative, is_traced, needs_dispatcher, register, register_autograd
from . import _torch
from ._dropout import HEAD_STRIDE, keep_scale, seed_value


def _ranges(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.tolist()))


def check_ranges(op: str, name: str, cu_seqlens: Tensor, tokens: int, longest: int | None = None) -> None:
    """ValueError where `cu_seqlens` does not run from 0 to `tokens`, or a range exceeds `longest`.

    For backends other than C++, whose functions look for themselves; on a GPU kernels stay within the tensors.
    """
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"{op}: {name} must run from 0 to {tokens} and never fall, got {ends}")
    if longest is not None and max(lengths, default=0) > longest:
        raise ValueError(f"{op}: {name} has a sequence of {max(lengths)} tokens, max_seqlen is {longest}")


def _probabilities(
    q: Tensor, k: Tensor, first_query: int, num_heads: int, softmax_scale: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One sequence: probabilities (heads, Sq, Sk), logsumexp (heads, Sq) and the dropout factors (heads, Sq, Sk)."""
    heads = lambda t: t.float().unflatten(1, (num_heads, -1)).transpose(0, 1)  # noqa: E731
    scores = heads(q) @ heads(k).transpose(1, 2) * softmax_scale
    keep = None
    if dropout_p:
        row = (
            torch.arange(num_heads)[:, None, None] * HEAD_STRIDE
            + torch.arange(first_query, first_query + len(q))[:, None]
        )
        keep = keep_scale(seed, row, torch.arange(len(k)), dropout_p).to(q.device)
    return torch.softmax(scores, -1), torch.logsumexp(scores, -1), keep


def _fwd_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_heads: int, softmax_scale: float,
    dropout_p: float, seed: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full((num_heads, q.shape[0]), float("-inf"), dtype=torch.float32, device=q.device)
    for (q0, q1), (k0, k1) in zip(_ranges(cu_seqlens_q), _ranges(cu_seqlens_k), strict=True):
        if q0 == q1 or k0 == k1:
            continue
        p, lse[:, q0:q1], keep = _probabilities(q[q0:q1], k[k0:k1], q0, num_heads, softmax_scale, dropout_p, seed)
        values = v[k0:k1].float().unflatten(1, (num_heads, -1)).transpose(0, 1)
        out[q0:q1] = ((p if keep is None else p * keep) @ values).transpose(0, 1).flatten(1)
    return out.to(q.dtype), lse


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_heads: int, softmax_scale: float,
    dropout_p: float = 0.0, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Eager reference, one sequence after another, float32 inside."""
    return _fwd_ref(
        q, k, v, cu_seqlens_q, cu_seqlens_k, num_heads, softmax_scale, dropout_p, seed_value(seed, dropout_p)
    )[0]


def _bwd_ref(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_heads: int,
    softmax_scale: float, dropout_p: float, seed: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=q.device) for t in (q, k, v))
    heads = lambda t: t.float().unflatten(1, (num_heads, -1)).transpose(0, 1)  # noqa: E731
    tokens = lambda t: t.transpose(0, 1).flatten(1)  # noqa: E731
    for (q0, q1), (k0, k1) in zip(_ranges(cu_seqlens_q), _ranges(cu_seqlens_k), strict=True):
        if q0 == q1 or k0 == k1:
            continue
        p, _, keep = _probabilities(q[q0:q1], k[k0:k1], q0, num_heads, softmax_scale, dropout_p, seed)
        kept = p if keep is None else p * keep
        g = heads(grad[q0:q1])
        dp = g @ heads(v[k0:k1]).transpose(1, 2)
        ds = (p * (dp if keep is None else dp * keep) - p * (dp * kept).sum(-1, keepdim=True)) * softmax_scale
        dv[k0:k1] = tokens(kept.transpose(1, 2) @ g)
        dq[q0:q1] = tokens(ds @ heads(k[k0:k1]))
        dk[k0:k1] = tokens(ds.transpose(1, 2) @ heads(q[q0:q1]))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _operands(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, order: Tensor | None, num_heads: int
) -> tuple[list[Operand], list[Operand]]:  # fmt: skip
    """What both kernels read: q, k and v, whose rows may be strided; and what is read dense."""
    (queries, width), (tokens, _) = matrix("attention", "q", q), matrix("attention", "k", k)
    head_size("attention", width, num_heads)
    if cu_seqlens_k.dim() != 1 or len(cu_seqlens_k) == 0:
        raise ValueError(f"attention: cu_seqlens_k must have the shape (B + 1,), got {tuple(cu_seqlens_k.shape)}")
    ends, dtype = cu_seqlens_k.shape[0], q.dtype
    dense: list[Operand] = [
        ("cu_seqlens_q", cu_seqlens_q, (ends,), torch.int32),
        ("cu_seqlens_k", cu_seqlens_k, (ends,), torch.int32),
        ("order", order, (ends - 1,), torch.int32),
    ]
    shape = tokens, width
    return [("q", q, (queries, width), dtype), ("k", k, shape, dtype), ("v", v, shape, dtype)], dense


def _rows(x: Tensor) -> Tensor:
    """(T, N) with adjacent columns; rows may be strided."""
    return x if x.stride(1) == 1 else x.contiguous()


def _check_order(order: Tensor | None) -> None:
    """ValueError for an order on a CPU that is none; a GPU is not waited for."""
    if order is not None and order.device.type == "cpu" and order.sort().values.tolist() != list(range(len(order))):
        raise ValueError(f"attention: order must name every sequence once, got {order.tolist()}")


def _check_both_ranges(
    queries: int, tokens: int, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    if cu_seqlens_q.device.type == "cpu":
        check_ranges("attention", "cu_seqlens_q", cu_seqlens_q, queries, max_seqlen_q)
        check_ranges("attention", "cu_seqlens_k", cu_seqlens_k, tokens, max_seqlen_k)


def _raise_ranges(*ranges: Any) -> NoReturn:
    """What the C++ function found wrong."""
    _check_both_ranges(*ranges)
    raise ValueError("attention: cu_seqlens was written while it was read")


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, order: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, num_heads: int, softmax_scale: float, dropout_p: float, seed: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (Tq, H) and the logsumexp of every row of scores, (heads, Tq) float32."""
    strided, dense = _operands(q, k, v, cu_seqlens_q, cu_seqlens_k, order, num_heads)
    (queries, width), (tokens, _) = strided[0][2], strided[1][2]
    ranges = queries, tokens, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    backend = dispatch.resolve("attention", q.device.type, q.dtype, backend)
    if backend == "cpp":
        (memory, strides), ends = hold_rows("attention", q.device, strided), hold("attention", q.device, dense)
        out = torch.empty((queries, width), dtype=q.dtype)
        lse = torch.empty((num_heads, queries), dtype=torch.float32)
        _check_order(order)
        fits = dispatch.extension().attention_fwd_cpu(
            *memory.addresses, out.data_ptr(), lse.data_ptr(), *ends.addresses[:2], dense[1][2][0] - 1, queries, tokens,
            max_seqlen_q, max_seqlen_k, num_heads, width // num_heads, *strides, width, softmax_scale, dropout_p,
            seed_value(seed, dropout_p), dispatch.DTYPE_CODES[q.dtype], torch.get_num_threads(),
        )  # fmt: skip
        if not fits:
            _raise_ranges(*ranges)
        return out, lse
    check_launch("attention", backend, q.device, [*strided, *dense])
    _check_order(order)
    _check_both_ranges(*ranges)
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    q, k, v = map(_rows, (q, k, v))
    if backend == "triton":
        from ..kernels.attention import attention_fwd

        return attention_fwd(
            q, k, v, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads, softmax_scale, dropout_p,
            seed_value(seed, dropout_p),
        )  # fmt: skip
    seed_number = seed_value(seed, dropout_p)
    return _fwd_ref(q, k, v, cu_seqlens_q, cu_seqlens_k, num_heads, softmax_scale, dropout_p, seed_number)


def _bwd(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    order: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, num_heads: int, softmax_scale: float, dropout_p: float,
    seed: Tensor | None, backend: str, into: tuple[Tensor, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, where a kernel writes them in `into`: an operator's results share no memory, those of a plain call may."""
    seed_number = seed_value(seed, dropout_p)
    strided, dense = _operands(q, k, v, cu_seqlens_q, cu_seqlens_k, order, num_heads)
    (queries, width), (tokens, _) = strided[0][2], strided[1][2]
    ranges = queries, tokens, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    strided.insert(0, ("grad", grad, (queries, width), q.dtype))
    dense.append(("lse", lse, (num_heads, queries), torch.float32))
    backend = dispatch.resolve("attention", q.device.type, q.dtype, backend)
    if backend != "cpp":
        check_launch("attention", backend, q.device, [*strided, *dense])
        _check_both_ranges(*ranges)
        cu_seqlens_q, cu_seqlens_k, lse = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), lse.contiguous()
        q, k, v = map(_rows, (q, k, v))
    _check_order(order)
    if backend == "reference":
        return _bwd_ref(grad, q, k, v, cu_seqlens_q, cu_seqlens_k, num_heads, softmax_scale, dropout_p, seed_number)
    dq, dk, dv = into or (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    if backend == "triton":
        from ..kernels.attention_bwd import attention_bwd

        attention_bwd(
            grad, q, k, v, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads,
            softmax_scale, dropout_p, seed_number,
        )  # fmt: skip
        return dq, dk, dv
    (memory, strides), others = hold_rows("attention", q.device, strided), hold("attention", q.device, dense)
    cu_q, cu_k, _, lse_address = others.addresses
    fits = dispatch.extension().attention_bwd_cpu(
        *memory.addresses, lse_address, dq.data_ptr(), dk.data_ptr(), dv.data_ptr(), cu_q, cu_k, dense[1][2][0] - 1,
        queries, tokens, max_seqlen_q, max_seqlen_k, num_heads, width // num_heads, *strides,
        *(t.stride(0) for t in (dq, dk, dv)), softmax_scale, dropout_p, seed_number, dispatch.DTYPE_CODES[q.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    if not fits:
        _raise_ranges(*ranges)
    return dq, dk, dv


def _fwd_fake(
    q, k, v, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads, softmax_scale, dropout_p, seed,
    backend,
):  # fmt: skip
    strided, dense = _operands(q, k, v, cu_seqlens_q, cu_seqlens_k, order, num_heads)
    check("attention", q.device, [*strided, *dense])
    return q.new_empty(q.shape), q.new_empty((num_heads, q.shape[0]), dtype=torch.float32)


def _bwd_fake(
    grad, q, k, v, lse, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads, softmax_scale,
    dropout_p, seed, backend,
):  # fmt: skip
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(v.shape)


_ARGUMENTS = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? order, SymInt max_seqlen_q, SymInt max_seqlen_k, int num_heads, "
    "float softmax_scale, float dropout_p, Tensor? seed, str backend"
)
register(f"attention_fwd(Tensor q, Tensor k, Tensor v, {_ARGUMENTS}) -> (Tensor, Tensor)", _fwd, _fwd_fake)
register(
    f"attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _beside(tensors: tuple[Tensor, ...]) -> bool:
    """Whether (T, N) tensors are neighbouring columns of one buffer, in this order."""
    first = tensors[0]
    return (
        first.stride(1) == 1
        and first.stride(0) >= len(tensors) * first.shape[1]
        and all(
            t.shape == first.shape
            and t.dtype == first.dtype
            and t.stride() == first.stride()
            and t.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
            and t.storage_offset() == first.storage_offset() + number * first.shape[1]
            for number, t in enumerate(tensors)
        )
    )


def _empty_beside(like: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` uninitialised tensors of the shape (T, N) of `like`, neighbouring columns of one buffer."""
    rows, width = like.shape
    return torch.empty((rows, count * width), dtype=like.dtype, device=like.device).split(width, dim=1)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, width: int) -> tuple[Tensor, ...]:
        return x.split(width, dim=1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        first = grads[0]
        if not _beside(grads):
            return torch.cat(grads, dim=1), None
        return first.as_strided((len(first), len(grads) * first.shape[1]), first.stride()), None


def split_columns(x: Tensor, width: int) -> tuple[Tensor, ...]:
    """x (T, n * width) as n views (T, width), like `x.split(width, dim=1)`.

    torch's split concatenates the gradients of its parts, which reads and writes (T, n * width) once more in every layer.
    Here nothing is copied where they are neighbouring columns of one buffer already, as `attention` writes them.
    """
    # A compiler plans buffers itself; and a tensor subclass may have no address.
    if is_traced() or type(x) not in (Tensor, Parameter) or not (torch.is_grad_enabled() and x.requires_grad):
        return x.split(width, dim=1)
    parts: tuple[Tensor, ...] = _Split.apply(x, width)
    return parts


def _setup(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, order, *ctx.numbers, seed, ctx.backend = inputs
    _, lse = output
    ctx.save_for_backward(q, k, v, lse, cu_seqlens_q, cu_seqlens_k, order, seed)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _grad_lse):
    q, k, v, *others, seed = ctx.saved_tensors
    arguments = [grad, q, k, v, *others, *ctx.numbers, seed, ctx.backend]
    if needs_dispatcher(grad, q, k, v) or not _beside((k, v)):
        gradients = torch.ops.albert_fast.attention_bwd(*arguments)
    else:  # columns of one product, whose gradient `split_columns` takes as one array
        into = _empty_beside(k, 3) if _beside((q, k, v)) else (torch.empty_like(q), *_empty_beside(k, 2))
        gradients = _bwd(*[*arguments, into])
    return *gradients, *[None] * 10


register_autograd("attention_fwd", _backward, _setup)
forbid_second_derivative("attention_bwd")


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    num_heads: int, softmax_scale: float | None = None, dropout_p: float = 0.0, seed: Tensor | None = None,
    *, order: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Multi-head attention of packed sequences.

    Args:
        q: (Tq, H); k, v: (T, H). Views into a fused (T, 3H) projection are read in place: rows may be strided, the last
            dimension is contiguous. H = num_heads * head_dim, head_dim 1 to 256.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each sequence's queries and keys begin, and the end.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's tokens (a bound is enough).
        num_heads: heads, each of H / num_heads adjacent columns.
        softmax_scale: factor on the scores, by default 1 / sqrt(head_dim).
        dropout_p, seed: replayable dropout of the probabilities; `seed` from `albert_fast.ops.draw_seed()`.
        order: (B,) int32, every sequence once, in which they start on a GPU, or None for 0 to B - 1. With the longest
            first (`albert_fast.layers.packing.longest_first`) multiprocessors finish together; results are the same.
        backend: "auto", or the name of one.

    Returns:
        (Tq, H), in q's dtype; zeros for a query whose sequence has no key.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU also cu_seqlens that do not run from 0 to the end
            of their tokens, or a sequence above its max_seqlen: a GPU, which is not waited for, stays within the tensors.
        TypeError: an argument that is no dense tensor, q not floating-point.
    """
    if softmax_scale is None:
        softmax_scale = head_size("attention", matrix("attention", "q", q)[1], num_heads) ** -0.5
    if softmax_scale < 0:  # kernels look for the largest score before they scale it
        q, softmax_scale = -q, -softmax_scale
    if not dropout_p and dispatch.runs_on_torch("attention", q.device.type, q.dtype, backend):
        strided, dense = _operands(q, k, v, cu_seqlens_q, cu_seqlens_k, order, num_heads)
        check("attention", q.device, [*strided, *dense])
        _check_order(order)
        _check_both_ranges(len(q), len(k), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return _torch.attention(q, k, v, cu_seqlens_q, cu_seqlens_k, num_heads, softmax_scale)
    call = torch.ops.albert_fast.attention_fwd if needs_dispatcher(q, k, v) else _fwd
    return call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads, softmax_scale, dropout_p, seed,
        backend,
    )[0]  # fmt: skip
