"""attention: softmax(Q K^T * scale) V over packed sequences, no S x S matrix in memory (Vaswani et al. 2017, equation 1).

A query sees every key of its own sequence, or with `causal` those up to its own position, as a decoder needs. Queries and
keys have their own `cu_seqlens`, so the last layer can compute some tokens only; with `key_lengths` the keys of a sequence
lie anywhere in k and v, as in the cache of a decoder.
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


def check_key_ranges(begins: Tensor, lengths: Tensor, tokens: int, longest: int) -> None:
    """ValueError where a sequence's keys do not lie in [0, tokens), or are more than `longest`.

    begins, lengths: (B,) int32. The C++ function checks this itself; on a GPU nothing checks it, and the kernel reads nothing
    outside the tensors.
    """
    for sequence, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
        if begin < 0 or length < 0 or begin + length > tokens:
            raise ValueError(
                f"attention: the keys of sequence {sequence} begin at {begin} (cu_seqlens_k) and are {length} (key_lengths); "
                f"they must lie in the {tokens} tokens of k"
            )
        if length > longest:
            raise ValueError(f"attention: sequence {sequence} has {length} keys (key_lengths), max_seqlen is {longest}")


def unseen_keys(queries: int, keys: int, device: torch.device) -> Tensor:
    """(Sq, Sk) bool: the keys that a query of causal attention does not see, those beyond i + Sk - Sq for query i."""
    return torch.ones((queries, keys), dtype=torch.bool, device=device).triu(keys - queries + 1)


class AttentionCall(NamedTuple):
    """The arguments of a call; _SCHEMA has the fields as the operators take them."""

    q: Tensor  # (Tq, H), rows may be strided
    k: Tensor  # (T, H), likewise
    v: Tensor  # (T, H), likewise
    cu_seqlens_q: Tensor  # (B + 1,) int32
    cu_seqlens_k: Tensor  # (B + 1,) int32, or (B,) with key_lengths
    sequence_order: Tensor | None  # (B,) int32
    max_seqlen_q: int
    max_seqlen_k: int
    num_heads: int
    softmax_scale: float
    dropout_p: float
    seed: Tensor | None
    causal: bool = False
    key_lengths: Tensor | None = None  # (B,) int32

    def key_ranges(self) -> list[tuple[int, int]]:
        """The (begin, end) of every sequence's keys."""
        if self.key_lengths is None:
            return _ranges(self.cu_seqlens_k)
        return [(b, b + n) for b, n in zip(self.cu_seqlens_k.tolist(), self.key_lengths.tolist(), strict=True)]

    def sequences(self) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """The (begin, end) of the queries and of the keys of every sequence that has both."""
        pairs = zip(_ranges(self.cu_seqlens_q), self.key_ranges(), strict=True)
        return [(queries, keys) for queries, keys in pairs if queries[0] < queries[1] and keys[0] < keys[1]]

    def heads(self, x: Tensor) -> Tensor:
        """x (S, H) as (heads, S, head_dim) in float32."""
        return x.float().unflatten(1, (self.num_heads, -1)).transpose(0, 1)

    def probabilities(
        self, queries: tuple[int, int], keys: tuple[int, int], seed: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """One sequence's probabilities (heads, Sq, Sk), their logsumexp (heads, Sq) and the dropout factors (heads, Sq, Sk).

        A query that sees no key has probabilities of 0, and a logsumexp of -inf.
        """
        scores = (
            self.heads(self.q[slice(*queries)]) @ self.heads(self.k[slice(*keys)]).transpose(1, 2) * self.softmax_scale
        )
        if self.causal:
            unseen = unseen_keys(queries[1] - queries[0], keys[1] - keys[0], self.q.device)
            scores = scores.masked_fill(unseen, float("-inf"))
        p, lse, keep = torch.softmax(scores, -1), torch.logsumexp(scores, -1), None
        if self.causal:
            p = p.masked_fill(unseen, 0.0)  # a softmax over no key is NaN
        if self.dropout_p:
            row = torch.arange(self.num_heads)[:, None, None] * HEAD_STRIDE + torch.arange(*queries)[:, None]
            columns = torch.arange(keys[1] - keys[0])
            keep = keep_scale(seed, row, columns, self.dropout_p).to(self.q.device)
        return p, lse, keep


_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? sequence_order, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, int num_heads, float softmax_scale, float dropout_p, Tensor? seed, "
    "bool causal, Tensor? key_lengths"
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
    *,
    causal: bool = False,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Eager reference, one sequence after another, float32 inside."""
    ends, dropout, keys = (cu_seqlens_q, cu_seqlens_k), (dropout_p, seed), (causal, key_lengths)
    return _fwd_ref(AttentionCall(q, k, v, *ends, None, 0, 0, num_heads, softmax_scale, *dropout, *keys))[0]


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
    cu_seqlens_k, key_lengths, dtype = call.cu_seqlens_k, call.key_lengths, call.q.dtype
    if key_lengths is not None:
        if cu_seqlens_k.dim() != 1:
            raise ValueError(
                f"attention: with key_lengths, cu_seqlens_k must have the shape (B,), got {tuple(cu_seqlens_k.shape)}"
            )
        begins = sequences = cu_seqlens_k.shape[0]
    elif cu_seqlens_k.dim() != 1 or len(cu_seqlens_k) == 0:
        raise ValueError(f"attention: cu_seqlens_k must have the shape (B + 1,), got {tuple(cu_seqlens_k.shape)}")
    else:
        begins, sequences = cu_seqlens_k.shape[0], cu_seqlens_k.shape[0] - 1
    dense: list[Operand] = [
        ("cu_seqlens_q", call.cu_seqlens_q, (sequences + 1,), torch.int32),
        ("cu_seqlens_k", cu_seqlens_k, (begins,), torch.int32),
        ("key_lengths", key_lengths, (sequences,), torch.int32),
        ("sequence_order", call.sequence_order, (sequences,), torch.int32),
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
        if call.key_lengths is not None:
            check_key_ranges(call.cu_seqlens_k, call.key_lengths, len(call.k), call.max_seqlen_k)
        else:
            check_ranges("attention", "cu_seqlens_k", call.cu_seqlens_k, len(call.k), call.max_seqlen_k)


def _raise_ranges(call: AttentionCall) -> NoReturn:
    """Raise the error for what the C++ function refused."""
    _check_both_ranges(call)
    raise ValueError("attention: another thread wrote to cu_seqlens during the call")


def _cpp_sizes(call: AttentionCall, strided: list[Operand], dense: list[Operand]) -> tuple[int, ...]:
    """The sizes that both C++ functions take; from the operands, which were checked, not from the tensors."""
    (_, _, (queries, width), _), (_, _, (tokens, _), _), _ = strided
    head_dim = width // call.num_heads
    return dense[0][2][0] - 1, queries, tokens, call.max_seqlen_q, call.max_seqlen_k, call.num_heads, head_dim


def _cpp_numbers(call: AttentionCall) -> tuple[float, ...]:
    """The numbers that both C++ functions take last."""
    seed, dtype = seed_value(call.seed, call.dropout_p), dispatch.DTYPE_CODES[call.q.dtype]
    return call.softmax_scale, call.dropout_p, seed, dtype, torch.get_num_threads()


def _triton_arguments(call: AttentionCall) -> tuple[Any, ...]:
    """The fields as the Triton kernels read them: rows of adjacent columns, dense cu_seqlens, the seed's number."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, *numbers, seed, causal, _ = call
    ends = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    return _rows(q), _rows(k), _rows(v), *ends, *numbers, seed_value(seed, call.dropout_p), causal


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
        results, ranges = (out.data_ptr(), lse.data_ptr()), (*ends.addresses[:3], call.causal)
        sizes, numbers = _cpp_sizes(call, strided, dense), _cpp_numbers(call)
        function = dispatch.extension().attention_fwd_cpu
        if not function(*memory.addresses, *results, *ranges, *sizes, *strides, width, *numbers):
            _raise_ranges(call)
        return out, lse
    check_launch("attention", backend, device, [*strided, *dense])
    _check_order(call.sequence_order)
    _check_both_ranges(call)
    if backend == "triton":
        from ..kernels.attention import attention_fwd

        key_lengths = None if call.key_lengths is None else call.key_lengths.contiguous()
        arguments: list[Any] = [*_triton_arguments(call), key_lengths]
        return attention_fwd(*arguments)
    return _fwd_ref(call)


def _run_bwd(
    grad: Tensor, lse: Tensor, call: AttentionCall, backend: str, into: tuple[Tensor, ...] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. A kernel writes them to `into`: results of a registered operator may not share memory, these may."""
    _refuse_key_lengths(call.key_lengths)
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
    cu_q, cu_k, _, _, lse_address = held.addresses
    results, result_strides = [t.data_ptr() for t in (dq, dk, dv)], [t.stride(0) for t in (dq, dk, dv)]
    addresses, numbers = (*memory.addresses, lse_address, *results, cu_q, cu_k, call.causal), _cpp_numbers(call)
    if not dispatch.extension().attention_bwd_cpu(*addresses, *sizes, *strides, *result_strides, *numbers):
        _raise_ranges(call)
    return dq, dk, dv


def _refuse_key_lengths(key_lengths: Tensor | None) -> None:
    if key_lengths is not None:
        raise ValueError(
            "attention: key_lengths has no gradient, since sequences may share keys; call it under torch.no_grad(), or with "
            "cu_seqlens_k of shape (B + 1,) and without key_lengths"
        )


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
    q, k, v, cu_seqlens_q, cu_seqlens_k, sequence_order, *ctx.numbers, seed, ctx.causal, key_lengths, ctx.backend = (
        inputs
    )
    _refuse_key_lengths(key_lengths)
    _, lse = output
    ctx.save_for_backward(lse, q, k, v, cu_seqlens_q, cu_seqlens_k, sequence_order, seed)
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad, _grad_lse):
    lse, *tensors, seed = ctx.saved_tensors
    call, (q, k, v, *_) = AttentionCall._make((*tensors, *ctx.numbers, seed, ctx.causal, None)), tensors
    if needs_dispatcher(grad, q, k, v) or not are_adjacent((k, v)):
        gradients = torch.ops.albert_fast.attention_bwd(grad, lse, *call, ctx.backend)
    else:  # columns of one product, whose gradient `split_columns` takes as one array
        joined = are_adjacent((q, k, v))
        into = empty_adjacent(k, 3) if joined else (torch.empty_like(q), *empty_adjacent(k, 2))
        gradients = _run_bwd(grad, lse, call, ctx.backend, into)
    return *gradients, *[None] * 12


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
    causal: bool = False,
    key_lengths: Tensor | None = None,
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
        causal: whether query i of a sequence with Sq queries and Sk keys sees only the keys 0 to i + Sk - Sq, so that the last
            query sees all (as in flash-attn 2.1 and later).
        key_lengths: (B,) int32, how many keys each sequence has. With it cu_seqlens_k is (B,) int32: where each sequence's
            keys begin, anywhere in k and v and in any order; sequences may share keys. There is no gradient then.
        dropout_p, seed: replayable dropout of the probabilities; `seed` from `albert_fast.ops.draw_seed()`.
        sequence_order: (B,) int32, every sequence once: the order in which a GPU starts them; None: 0 to B - 1. With the
            longest first (`albert_fast.layers.packing.longest_first`) its multiprocessors finish together. Results do not
            depend on it.
        backend: "auto", or the name of one.

    Returns:
        (Tq, H), in q's dtype; zeros for a query that sees no key.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; key_lengths where a gradient is asked for; on a CPU also
            cu_seqlens that do not run from 0 to the end of their tokens, keys outside k, or a sequence above its max_seqlen.
            A GPU is not waited for: there the kernels read nothing outside the tensors.
        TypeError: an argument that is no dense tensor, q not floating-point.
    """
    if softmax_scale is None:
        softmax_scale = head_size("attention", matrix("attention", "q", q)[1], num_heads) ** -0.5
    if softmax_scale < 0:  # kernels look for the largest score before they scale it
        q, softmax_scale = -q, -softmax_scale
    ends, lengths, dropout = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), (dropout_p, seed)
    keys = causal, key_lengths
    call = AttentionCall(q, k, v, *ends, sequence_order, *lengths, num_heads, softmax_scale, *dropout, *keys)
    if not dropout_p and dispatch.runs_on_torch("attention", q.device.type, q.dtype, backend):
        strided, dense = _operands(call)
        check("attention", q.device, [*strided, *dense])
        _check_order(sequence_order)
        _check_both_ranges(call)
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            _refuse_key_lengths(key_lengths)
        sequences = zip(_ranges(cu_seqlens_q), call.key_ranges(), strict=True)
        return _torch.attention(q, k, v, sequences, num_heads, softmax_scale, causal)
    if needs_dispatcher(q, k, v):
        out: Tensor = torch.ops.albert_fast.attention_fwd(*call, backend)[0]
        return out
    return _run(call, backend)[0]
