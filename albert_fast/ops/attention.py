"""attention: softmax(Q K^T * scale) V over packed sequences, no S x S matrix in memory (Vaswani et al. 2017, equation 1).

Bidirectional, as in ALBERT: a query sees every key of its own sequence. Queries and keys have their own `cu_seqlens`, so
the last layer can ask for some tokens only.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .. import dispatch
from ..registration import check_devices, forbid_second_derivative, needs_dispatcher, register, register_autograd
from ..slices import beside, empty_beside
from ._dropout import HEAD_STRIDE, keep_scale, seed_value


def _ranges(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.tolist()))


def check_ranges(op: str, name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """ValueError where `cu_seqlens` is not int32 from 0 to `tokens`: the kernel would read and write wherever it points."""
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{op}: {name} must be int32, got {cu_seqlens.dtype}")
    ends = cu_seqlens.tolist()
    if not ends or ends[0] != 0 or ends[-1] != tokens or any(a > b for a, b in itertools.pairwise(ends)):
        raise ValueError(f"{op}: {name} must run from 0 to {tokens} and never fall, got {ends}")


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


def _fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, order: Tensor | None, max_seqlen_q: int,
    max_seqlen_k: int, num_heads: int, softmax_scale: float, dropout_p: float, seed: Tensor | None, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out (Tq, H) and the logsumexp of every row of scores, (heads, Tq) float32."""
    backend = dispatch.resolve("attention", q.device.type, q.dtype, backend)
    if backend == "cpp":
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = torch.empty((num_heads, q.shape[0]), dtype=torch.float32)
        dispatch.extension().attention_fwd_cpu(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), lse.data_ptr(), cu_seqlens_q.data_ptr(),
            cu_seqlens_k.data_ptr(), len(cu_seqlens_q) - 1, num_heads, q.shape[1] // num_heads, q.stride(0), k.stride(0),
            v.stride(0), out.stride(0), softmax_scale, dropout_p, seed_value(seed, dropout_p),
            dispatch.DTYPE_CODES[q.dtype], torch.get_num_threads(),
        )  # fmt: skip
        return out, lse
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
    backend = dispatch.resolve("attention", q.device.type, q.dtype, backend)
    if backend == "reference":
        return _bwd_ref(grad, q, k, v, cu_seqlens_q, cu_seqlens_k, num_heads, softmax_scale, dropout_p, seed_number)
    dq, dk, dv = into or (torch.empty(t.shape, dtype=q.dtype, device=q.device) for t in (q, k, v))
    if backend == "triton":
        from ..kernels.attention_bwd import attention_bwd

        attention_bwd(
            grad, q, k, v, lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads,
            softmax_scale, dropout_p, seed_number,
        )  # fmt: skip
        return dq, dk, dv
    grad = grad.contiguous()
    dispatch.extension().attention_bwd_cpu(
        grad.data_ptr(), q.data_ptr(), k.data_ptr(), v.data_ptr(), lse.data_ptr(), dq.data_ptr(), dk.data_ptr(),
        dv.data_ptr(), cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), len(cu_seqlens_q) - 1, num_heads,
        q.shape[1] // num_heads, *(t.stride(0) for t in (grad, q, k, v, dq, dk, dv)), softmax_scale, dropout_p, seed_number,
        dispatch.DTYPE_CODES[q.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def _fwd_fake(
    q, k, v, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads, softmax_scale, dropout_p, seed,
    backend,
):  # fmt: skip
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


def _setup(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, order, *ctx.numbers, seed, ctx.backend = inputs
    _, lse = output
    ctx.save_for_backward(q, k, v, lse, cu_seqlens_q, cu_seqlens_k, order, seed)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _grad_lse):
    q, k, v, *others, seed = ctx.saved_tensors
    arguments = [grad, q, k, v, *others, *ctx.numbers, seed, ctx.backend]
    if needs_dispatcher(grad, q, k, v) or not beside((k, v)):
        gradients = torch.ops.albert_fast.attention_bwd(*arguments)
    else:  # slices of one product, whose gradient is one buffer: see slices.py
        into = empty_beside(k, 3) if beside((q, k, v)) else (torch.empty_like(q), *empty_beside(k, 2))
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
            first (`albert_fast.packing.longest_first`) multiprocessors finish together; results are the same.
        backend: "auto", or the name of one.

    Returns:
        (Tq, H), in q's dtype; zeros for a query whose sequence has no key.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    if num_heads < 1 or q.dim() != 2 or k.shape != v.shape or q.shape[1:] != k.shape[1:] or q.shape[1] % num_heads:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {num_heads} heads"
        raise ValueError(f"attention: expected q (Tq, H), k and v (T, H) with H a multiple of num_heads, got {shapes}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q, k and v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if (
        cu_seqlens_q.dtype != torch.int32
        or cu_seqlens_k.dtype != torch.int32
        or cu_seqlens_q.shape != cu_seqlens_k.shape
    ):
        raise ValueError("attention: cu_seqlens_q and cu_seqlens_k must be int32 of one shape (B + 1,)")
    if order is not None and (order.dtype != torch.int32 or order.shape != (len(cu_seqlens_k) - 1,)):
        raise ValueError(f"attention: order must be (B,) int32, got {tuple(order.shape)} {order.dtype}")
    check_devices("attention", q, k, v, cu_seqlens_q, cu_seqlens_k, order)
    same = cu_seqlens_k is cu_seqlens_q
    cu_seqlens_q = cu_seqlens_q.contiguous()
    cu_seqlens_k = cu_seqlens_q if same else cu_seqlens_k.contiguous()
    if q.device.type == "cpu" and not torch.compiler.is_compiling():
        check_ranges("attention", "cu_seqlens_q", cu_seqlens_q, len(q))
        if not same or len(k) != len(q):
            check_ranges("attention", "cu_seqlens_k", cu_seqlens_k, len(k))
        if order is not None and order.sort().values.tolist() != list(range(len(order))):
            raise ValueError(f"attention: order must name every sequence once, got {order.tolist()}")
    if softmax_scale is None:
        softmax_scale = (q.shape[1] // num_heads) ** -0.5
    q, k, v = (t if t.stride(1) == 1 else t.contiguous() for t in (q, k, v))
    call = torch.ops.albert_fast.attention_fwd if needs_dispatcher(q, k, v) else _fwd
    return call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, order, max_seqlen_q, max_seqlen_k, num_heads, softmax_scale, dropout_p, seed,
        backend,
    )[0]  # fmt: skip
