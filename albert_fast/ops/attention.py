"""attention: softmax(Q K^T * scale) V over packed sequences, no S x S matrix in memory (Vaswani et al. 2017, equation 1).

Bidirectional, as in ALBERT: a query sees every key of its own sequence. Queries and keys have their own `cu_seqlens`, so
the last layer can compute some tokens only.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.operands import Operand, check, check_launch, head_size, hold, hold_rows, matrix
from ..runtime.registration import forbid_second_derivative, needs_dispatcher, register, register_autograd
from . import _torch
from ._columns import are_adjacent, empty_adjacent
from ._dropout import HEAD_STRIDE, keep_scale, seed_value


def _ranges(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise(cu_seqlens.tolist()))


def check_ranges(op: str, name: str, cu_seqlens: Tensor, tokens: int, longest: int | None = None) -> None:
    """ValueError where `cu_seqlens` does not run from 0 to `tokens`, or a range exceeds `longest`.

    The C++ functions check this themselves; on a GPU nothing checks it, and kernels read nothing outside the tensors.
    """
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    if ends[0] != 0 or ends[-1] != tokens or min(lengths, default=0) < 0:
        raise ValueError(f"{op}: {name} must run from 0 to {tokens} and never fall, got {ends}")
    if longest is not None and max(lengths, default=0) > longest:
        raise ValueError(f"{op}: {name} has a sequence of {max(lengths)} tokens, max_seqlen is {longest}")


class AttentionCall(NamedTuple):
    """The arguments of a call; _SCHEMA has the fields as the operators take them."""

    q: Tensor  # (Tq, H), rows may be strided
    k: Tensor  # (T, H), likewise
    v: Tensor  # (T, H), likewise
    cu_seqlens_q: Tensor  # (B + 1,) int32
    cu_seqlens_k: Tensor  # (B + 1,) int32
    sequence_order: Tensor | None  # (B,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    num_heads: int
    softmax_scale: float
    dropout_p: float
    seed: Tensor | None

    def sequences(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """The (begin, end) of the queries and of the keys of every sequence that has both."""
        pairs = zip(_ranges(self.cu_seqlens_q), _ranges(self.cu_seqlens_k), strict=True)
        return [(queries, keys) for queries, keys in pairs if queries[0] < queries[1] and keys[0] < keys[1]]

    def heads(self, x: Tensor) -> Tensor:
        """x (S, H) as (heads, S, head_dim) in float32."""
        return x.float().unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    def probabilities(
        self, queries: tuple[int, int], keys: tuple[int, int], seed: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One sequence's probabilities (heads, Sq, Sk), their logsumexp (heads, Sq) and the dropout factors (heads, Sq, Sk)."""
        scores = (
            self.heads(self.q[slice(*queries)]) @ self.heads(self.k[slice(*keys)]).transpose(1, 2) * self.softmax_scale
        )
        keep = None
        if self.dropout_p:
            row = torch.arange(self.num_heads)[:, None, None] * HEAD_STRIDE + torch.arange(*queries)[:, None]
            columns = torch.arange(keys[1] - keys[0])
            keep = keep_scale(seed, row, columns, self.dropout_p).to(self.q.device)
        return torch.softmax(scores, -1), torch.logsumexp(scores, -1), keep


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? sequence_order, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int num_heads, float softmax_scale, float dropout_p, Tensor? seed"
)


def _fwd_ref(call: AttentionCall) -> tuple[Tensor, Tensor]:
    q, seed = call.q, seed_value(call.seed, call.dropout_p)
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full((call.num_heads, q.shape[0]), float("-inf"), dtype=torch.float32, device=q.device)
    for queries, keys in call.sequences():
        p, lse[:, slice(*queries)], keep = call.probabilities(queries, keys, seed)
        values = call.heads(call.v[slice(*keys)])
        out[slice(*queries)] = ((p if keep is None else p * keep) @ values).transpose(0, 1).flatten(1)
    return out.to(q.dtype), lse


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    num_heads: int,
    softmax_scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Eager reference, one sequence after another, float32 inside."""
    ends = cu_seqlens_q, cu_seqlens_k
    return _fwd_ref(AttentionCall(q, k, v, *ends, None, 0, 0, num_heads, softmax_scale, dropout_p, seed))[0]


def _bwd_ref(grad: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, heads = call.q, call.k, call.v, call.heads
    seed = seed_value(call.seed, call.dropout_p)
    dq, dk, dv = (torch.zeros(t.shape, dtype=torch.float32, device=q.device) for t in (q, k, v))
    tokens = lambda t: t.transpose(0, 1).flatten(1)  # noqa: E731
    for queries, keys in call.sequences():
        p, _, keep = call.probabilities(queries, keys, seed)
        rows, columns = slice(*queries), slice(*keys)
        kept = p if keep is None else p * keep
        g = heads(grad[rows])
        dp = g @ heads(v[columns]).transpose(1, 2)
        ds = (p * (dp if keep is None else dp * keep) - p * (dp * kept).sum(-1, keepdim=True)) * call.softmax_scale
        dv[columns] = tokens(kept.transpose(1, 2) @ g)
        dq[rows] = tokens(ds @ heads(k[columns]))
        dk[columns] = tokens(ds.transpose(1, 2) @ heads(q[rows]))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _operands(call: AttentionCall) -> tuple[list[Operand], list[Operand]]:
    """The operands of both kernels: q, k and v, whose rows may be strided; and those that are read dense."""
    (queries, width), (tokens, _) = matrix("attention", "q", call.q), matrix("attention", "k", call.k)
    head_size("attention", width, call.num_heads)
    cu_seqlens_k = call.cu_seqlens_k
    if cu_seqlens_k.dim() != 1 or len(cu_seqlens_k) == 0:
        raise ValueError(f"attention: cu_seqlens_k must have the shape (B + 1,), got {tuple(cu_seqlens_k.shape)}")
    ends, dtype = cu_seqlens_k.shape[0], call.q.dtype
    dense: list[Operand] = [
        ("cu_seqlens_q", call.cu_seqlens_q, (ends,), torch.int32),
        ("cu_seqlens_k", cu_seqlens_k, (ends,), torch.int32),
        ("sequence_order", call.sequence_order, (ends - 1,), torch.int32),
    ]
    shape = tokens, width
    return [("q", call.q, (queries, width), dtype), ("k", call.k, shape, dtype), ("v", call.v, shape, dtype)], dense


def _rows(x: Tensor) -> Tensor:
    """(T, N) with adjacent columns; rows may be strided."""
    return x if x.stride(1) == 1 else x.contiguous()


def _check_order(order: Tensor | None) -> None:
    """ValueError for a sequence_order on a CPU that does not name every sequence once. A GPU is not waited for."""
    if order is not None and order.device.type == "cpu" and order.sort().values.tolist() != list(range(len(order))):
        raise ValueError(f"attention: sequence_order must name every sequence once, got {order.tolist()}")


def _check_both_ranges(call: AttentionCall) -> None:
    if call.cu_seqlens_q.device.type == "cpu":
        check_ranges("attention", "cu_seqlens_q", call.cu_seqlens_q, len(call.q), call.max_seqlen_q)
        check_ranges("attention", "cu_seqlens_k", call.cu_seqlens_k, len(call.k), call.max_seqlen_k)


def _raise_ranges(call: AttentionCall) -> NoReturn:
    """Raise the error for what the C++ function refused."""
    _check_both_ranges(call)
    raise ValueError("attention: another thread wrote to cu_seqlens during the call")


def _cpp_sizes(call: AttentionCall, strided: list[Operand], dense: list[Operand]) -> tuple[int, ...]:
    """The sizes that both C++ functions take; from the operands, which were checked, not from the tensors."""
    (_, _, (queries, width), _), (_, _, (tokens, _), _), _ = strided
    head_dim = width // call.num_heads
    return dense[1][2][0] - 1, queries, tokens, call.max_seqlen_q, call.max_seqlen_k, call.num_heads, head_dim


def _cpp_numbers(call: AttentionCall) -> tuple[float, ...]:
    """The numbers that both C++ functions take last."""
    seed, dtype = seed_value(call.seed, call.dropout_p), dispatch.DTYPE_CODES[call.q.dtype]
    return call.softmax_scale, call.dropout_p, seed, dtype, torch.get_num_threads()


def _triton_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """The fields as the Triton kernels read them: rows of adjacent columns, dense cu_seqlens, the seed's number."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers, seed = call
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return _rows(q), _rows(k), _rows(v), *ends, *numbers, seed_value(seed, call.dropout_p)


def _run(call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """out (Tq, H) and the logsumexp of every row of scores, (heads, Tq) float32."""
    strided, dense = _operands(call)
    device, dtype = call.q.device, call.q.dtype
    backend = dispatch.resolve("attention", device.type, dtype, backend)
    if backend == "cpp":
        (memory, strides), ends = hold_rows("attention", device, strided), hold("attention", device, dense)
        shape = queries, width = strided[0][2]
        out, lse = torch.empty(shape, dtype=dtype), torch.empty((call.num_heads, queries), dtype=torch.float32)
        _check_order(call.sequence_order)
        results, cu_seqlens = (out.data_ptr(), lse.data_ptr()), ends.addresses[:2]
        sizes, numbers = _cpp_sizes(call, strided, dense), _cpp_numbers(call)
        function = dispatch.extension().attention_fwd_cpu
        if not function(*memory.addresses, *results, *cu_seqlens, *sizes, *strides, width, *numbers):
            _raise_ranges(call)
        return out, lse
    check_launch("attention", backend, device, [*strided, *dense])
    _check_order(call.sequence_order)
    _check_both_ranges(call)
    if backend == "triton":
        from ..kernels.attention import attention_fwd

        return attention_fwd(*_triton_arguments(call))
    return _fwd_ref(call)


def _run_bwd(
    grad: Tensor, lse: Tensor, call: AttentionCall, backend: str, into: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. A kernel writes them to `into`: results of a registered operator may not share memory, these may."""
    strided, dense = _operands(call)
    device, dtype, shape = call.q.device, call.q.dtype, strided[0][2]
    sizes = _cpp_sizes(call, strided, dense)
    strided.insert(0, ("grad", grad, shape, dtype))
    dense.append(("lse", lse, (call.num_heads, shape[0]), torch.float32))
    backend = dispatch.resolve("attention", device.type, dtype, backend)
    if backend != "cpp":
        check_launch("attention", backend, device, [*strided, *dense])
        _check_both_ranges(call)
    _check_order(call.sequence_order)
    if backend == "reference":
        return _bwd_ref(grad, call)
    dq, dk, dv = into or (torch.empty(t.shape, dtype=dtype, device=device) for t in call[:3])
    if backend == "triton":
        from ..kernels.attention_bwd import attention_bwd

        q, k, v, *others = _triton_arguments(call)
        attention_bwd(grad, q, k, v, dq, dk, dv, *others)
        return dq, dk, dv
    (memory, strides), held = hold_rows("attention", device, strided), hold("attention", device, dense)
    cu_q, cu_k, _, lse_address = held.addresses
    results, result_strides = [t.data_ptr() for t in (dq, dk, dv)], [t.stride(0) for t in (dq, dk, dv)]
    addresses, numbers = (*memory.addresses, lse_address, *results, cu_q, cu_k), _cpp_numbers(call)
    if not dispatch.extension().attention_bwd_cpu(*addresses, *sizes, *strides, *result_strides, *numbers):
        _raise_ranges(call)
    return dq, dk, dv


def _fwd(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, backend = arguments
    return _run(AttentionCall(*fields), backend)


def _bwd(grad: Tensor, lse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *fields, backend = arguments
    return _run_bwd(grad, lse, AttentionCall(*fields), backend)


def _fwd_fake(*arguments):
    *fields, _ = arguments
    call = AttentionCall(*fields)
    strided, dense = _operands(call)
    check("attention", call.q.device, [*strided, *dense])
    return call.q.new_empty(call.q.shape), call.q.new_empty((call.num_heads, call.q.shape[0]), dtype=torch.float32)


def _bwd_fake(grad, lse, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register(f"attention_fwd({_SCHEMA}, str backend) -> (Tensor, Tensor)", _fwd, _fwd_fake)
register(
    f"attention_bwd(Tensor grad, Tensor lse, {_SCHEMA}, str backend) -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    q, k, v, cu_seqlens_q, cu_seqlens_k, sequence_order, *ctx.numbers, seed, ctx.backend = inputs
    _, lse = output
    ctx.save_for_backward(lse, q, k, v, cu_seqlens_q, cu_seqlens_k, sequence_order, seed)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _grad_lse):
    lse, *tensors, seed = ctx.saved_tensors
    call, (q, k, v, *_) = AttentionCall._make((*tensors, *ctx.numbers, seed)), tensors
    if needs_dispatcher(grad, q, k, v) or not are_adjacent((k, v)):
        gradients = torch.ops.albert_fast.attention_bwd(grad, lse, *call, ctx.backend)
    else:  # columns of one product, whose gradient `split_columns` takes as one array
        joined = are_adjacent((q, k, v))
        into = empty_adjacent(k, 3) if joined else (torch.empty_like(q), *empty_adjacent(k, 2))
        gradients = _run_bwd(grad, lse, call, ctx.backend, into)
    return *gradients, *[None] * 10


register_autograd("attention_fwd", _backward, _setup)
forbid_second_derivative("attention_bwd")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads: int,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    *,
    sequence_order: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention of packed sequences.

    Args:
        q: (Tq, H); k, v: (T, H). Views into a fused (T, 3H) projection are read in place: rows may be strided, the last
            dimension is contiguous. H = num_heads * head_dim, head_dim 1 to 256.
        cu_seqlens_q, cu_seqlens_k: (B + 1,) int32, where each sequence's queries and keys begin, and the end.
        max_seqlen_q, max_seqlen_k: at least the longest sequence's tokens (a bound is enough).
        num_heads: heads, each of H / num_heads adjacent columns.
        softmax_scale: factor on the scores, by default 1 / sqrt(head_dim).
        dropout_p, seed: replayable dropout of the probabilities; `seed` from `albert_fast.ops.draw_seed()`.
        sequence_order: (B,) int32, every sequence once: the order in which a GPU starts them; None: 0 to B - 1. With the
            longest first (`albert_fast.layers.packing.longest_first`) its multiprocessors finish together. Results do not
            depend on it.
        backend: "auto", or the name of one.

    Returns:
        (Tq, H), in q's dtype; zeros for a query whose sequence has no key.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; on a CPU also cu_seqlens that do not run from 0 to the end
            of their tokens, or a sequence above its max_seqlen. A GPU is not waited for: there the kernels read nothing
            outside the tensors.
        TypeError: an argument that is no dense tensor, q not floating-point.
    """
    if softmax_scale is None:
        softmax_scale = head_size("attention", matrix("attention", "q", q)[1], num_heads) ** -0.5
    if softmax_scale < 0:  # kernels look for the largest score before they scale it
        q, softmax_scale = -q, -softmax_scale
    ends, lengths, dropout = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), (dropout_p, seed)
    call = AttentionCall(q, k, v, *ends, sequence_order, *lengths, num_heads, softmax_scale, *dropout)
    if not dropout_p and dispatch.runs_on_torch("attention", q.device.type, q.dtype, backend):
        strided, dense = _operands(call)
        check("attention", q.device, [*strided, *dense])
        _check_order(sequence_order)
        _check_both_ranges(call)
        return _torch.attention(q, k, v, *ends, num_heads, softmax_scale)
    if needs_dispatcher(q, k, v):
        out: Tensor = torch.ops.albert_fast.attention_fwd(*call, backend)[0]
        return out
    return _run(call, backend)[0]
