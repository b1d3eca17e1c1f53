"""linear_cross_entropy: the loss of masked language modelling, without logits in memory.

The mean of cross_entropy(x @ weight^T + bias, labels) over the rows whose label is not ignored (Lan et al. 2019, section 3.1;
Hugging Face's `AlbertForMaskedLM`). At V = 30,000 the logits, their softmax and its gradient are the largest tensors of a
training step, each 234 times the size of x. The kernels hold one block of logits at a time, save each row's maximum and sum
of exponentials, and compute the products again for the gradient.

Label smoothing s (Szegedy et al. 2016, section 7; `torch.nn.functional.cross_entropy`) moves the weight s of each label to all
V words alike, s / V to each. The loss of a row is then logsumexp - (1 - s) logit[label] - s mean(logits).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.operands import Operand, check, check_launch, hold, matrix
from ..runtime.registration import as_dtype, forbid_second_derivative, needs_dispatcher, register, register_autograd
from ._dtypes import widened

# The label of rows that have none, in every cross-entropy.
IGNORED = -100

dispatch.expect(ignored=IGNORED)


def _raise_bad(labels: Tensor, row: int, size: int) -> None:
    raise IndexError(
        f"labels[{row}] is {int(labels[row])}, outside the vocabulary of {size} (0 to {size - 1}, or {IGNORED})"
    )


def _labelled_ref(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The labelled rows' numbers (n,), their logits (n, V), and their labels (n,) within the vocabulary.

    A label outside the vocabulary is an IndexError on a CPU. A GPU is not waited for: there its row's logits are NaN.
    """
    size = len(weight)
    outside = (labels != IGNORED) & ((labels < 0) | (labels >= size))
    if labels.device.type == "cpu" and outside.any():
        _raise_bad(labels, int(outside.nonzero()[0]), size)
    (labelled,) = torch.where(labels != IGNORED)
    logits = torch.nn.functional.linear(widened(x[labelled]), widened(weight), widened(bias))
    return labelled, logits.masked_fill(outside[labelled, None], torch.nan), labels[labelled].clamp(0, size - 1)


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Eager reference, float32 inside (float64 for float64). It holds all logits in memory."""
    return _fwd_ref(x, weight, bias, labels, label_smoothing)[0]


def _mean_ref(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """The loss () of logits (n, V) and targets (n,), 0 without any."""
    total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum", label_smoothing=label_smoothing)
    return total / max(len(targets), 1)


def _fwd_ref(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    labelled, logits, targets = _labelled_ref(x, weight, bias, labels)
    largest = logits.amax(1)
    row_max, row_sum = (logits.new_zeros(len(labels)) for _ in range(2))
    row_max[labelled], row_sum[labelled] = largest, (logits - largest[:, None]).exp().sum(1)
    return _mean_ref(logits, targets, label_smoothing), row_max, row_sum


def _bwd_ref(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_smoothing: float
) -> tuple[Tensor, Tensor, Tensor]:
    labelled, logits, targets = _labelled_ref(x, weight, bias, labels)
    dlogits = logits.softmax(1)
    dlogits -= label_smoothing / len(weight)
    dlogits[torch.arange(len(targets), device=x.device), targets] -= 1.0 - label_smoothing
    dlogits *= grad / max(len(targets), 1)
    dx = dlogits.new_zeros(x.shape).index_copy(0, labelled, dlogits @ widened(weight))
    dweight = dlogits.t() @ widened(x[labelled])
    return dx.to(x.dtype), dweight.to(weight.dtype), dlogits.sum(0).to(bias.dtype)


def _operands(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> list[Operand]:
    """The operands of both kernels, in the order of the C++ functions."""
    op, dtype = "linear_cross_entropy", x.dtype
    (tokens, width), (size, _) = matrix(op, "x", x, "embedding size"), matrix(op, "weight", weight, "embedding size")
    if size == 0:
        raise ValueError(f"{op}: the vocabulary is empty")
    return [
        ("x", x, (tokens, width), dtype),
        ("weight", weight, (size, width), dtype),
        ("bias", bias, (size,), dtype),
        ("labels", labels, (tokens,), torch.int64),
    ]


def _check_smoothing(label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"linear_cross_entropy: label_smoothing must lie in [0, 1], got {label_smoothing}")


def _fwd(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, label_smoothing: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss (); row_max and row_sum (N,), the largest logit and the sum of exp(logit - row_max), 0 where ignored.

    They are not joined to a log-sum-exp: its rounding error would scale a whole row of probabilities.
    """
    operands = _operands(x, weight, bias, labels)
    _check_smoothing(label_smoothing)
    backend = dispatch.resolve("linear_cross_entropy", x.device.type, x.dtype, backend)
    if backend == "cpp":
        memory, size = hold("linear_cross_entropy", x.device, operands), len(weight)
        loss, row_max, row_sum = (torch.empty(shape, dtype=torch.float32) for shape in ((), len(x), len(x)))
        results = loss.data_ptr(), row_max.data_ptr(), row_sum.data_ptr()
        numbers = size, label_smoothing, dispatch.DTYPE_CODES[x.dtype], torch.get_num_threads()
        bad = dispatch.extension().linear_cross_entropy_fwd_cpu(*memory.addresses, *results, *x.shape, *numbers)
        if bad >= 0:
            _raise_bad(labels, bad, size)
        return loss, row_max, row_sum
    check_launch("linear_cross_entropy", backend, x.device, operands)
    if backend == "triton":
        from ..kernels.linear_cross_entropy import linear_cross_entropy_fwd

        return linear_cross_entropy_fwd(x, weight, bias, labels, label_smoothing)
    return _fwd_ref(x, weight, bias, labels, label_smoothing)


def _bwd(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    label_smoothing: float,
    row_max: Tensor,
    row_sum: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    _check_smoothing(label_smoothing)
    # The dtype of the loss.
    sums = torch.promote_types(x.dtype, torch.float32)
    operands: list[Operand] = [("grad", grad, (), sums), *_operands(x, weight, bias, labels)]
    operands += [(name, t, x.shape[:1], sums) for name, t in (("row_max", row_max), ("row_sum", row_sum))]
    backend = dispatch.resolve("linear_cross_entropy", x.device.type, x.dtype, backend)
    if backend == "cpp":
        memory = hold("linear_cross_entropy", x.device, operands)
        dx = torch.empty(x.shape, dtype=x.dtype)
        dweight, dbias = (torch.empty(t.shape, dtype=torch.float32) for t in (weight, bias))
        results = dx.data_ptr(), dweight.data_ptr(), dbias.data_ptr()
        numbers = len(dbias), label_smoothing, dispatch.DTYPE_CODES[dx.dtype], torch.get_num_threads()
        dispatch.extension().linear_cross_entropy_bwd_cpu(*memory.addresses, *results, *dx.shape, *numbers)
        return dx, dweight.to(dx.dtype), dbias.to(dx.dtype)
    check_launch("linear_cross_entropy", backend, x.device, operands)
    if backend == "triton":
        from ..kernels.linear_cross_entropy import linear_cross_entropy_bwd

        return linear_cross_entropy_bwd(grad, x, weight, bias, labels, row_max, row_sum, label_smoothing)
    return _bwd_ref(grad, x, weight, bias, labels, label_smoothing)


def _fwd_fake(x, weight, bias, labels, label_smoothing, backend):
    check("linear_cross_entropy", x.device, _operands(x, weight, bias, labels))
    dtype = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(shape, dtype=dtype) for shape in ((), x.shape[:1], x.shape[:1]))


def _bwd_fake(grad, x, weight, bias, labels, label_smoothing, row_max, row_sum, backend):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, Tensor labels, float label_smoothing"
register(f"linear_cross_entropy_fwd({_ARGUMENTS}, str backend) -> (Tensor, Tensor, Tensor)", _fwd, _fwd_fake)
register(
    f"linear_cross_entropy_bwd(Tensor grad, {_ARGUMENTS}, Tensor row_max, Tensor row_sum, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _bwd,
    _bwd_fake,
)


def _setup(ctx, inputs, output):
    *tensors, ctx.label_smoothing, ctx.backend = inputs
    _, *statistics = output
    ctx.save_for_backward(*tensors, *statistics)
    ctx.mark_non_differentiable(*statistics)


def _backward(ctx, grad, *_):
    *tensors, row_max, row_sum = ctx.saved_tensors
    arguments = (*tensors, ctx.label_smoothing, row_max, row_sum, ctx.backend)
    return *torch.ops.albert_fast.linear_cross_entropy_bwd(grad, *arguments), None, None, None


register_autograd("linear_cross_entropy_fwd", _backward, _setup)
forbid_second_derivative("linear_cross_entropy_bwd")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    *,
    backend: str = "auto",
) -> Tensor:
    """The mean over labelled rows of -log softmax(x @ weight^T + bias)[label], and 0 without any.

    Args:
        x: (N, E), the MLM head's transformed tokens.
        weight: (V, E), the decoder's, tied to the word embeddings. bias: (V,).
        labels: (N,) integers in [0, V); rows with -100 are ignored: not computed, and without gradient.
        label_smoothing: in [0, 1], the weight that each label gives to all V words alike, as in
            `torch.nn.functional.cross_entropy`.
        backend: "auto", or the name of one.

    Returns:
        (), float32 (float64 for x in float64).

    Raises:
        IndexError: a label outside the vocabulary, on a CPU; the message names row, value and size. A GPU is not waited
            for: there such a label makes the loss NaN, and nothing is read outside the tensors.
        ValueError, TypeError: shapes or dtypes that do not fit, label_smoothing outside [0, 1].
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"linear_cross_entropy: labels must be a tensor, got {type(labels).__name__}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"linear_cross_entropy: labels must be integers, got {labels.dtype}")
    weight, bias = as_dtype(x, weight, bias)
    call = torch.ops.albert_fast.linear_cross_entropy_fwd if needs_dispatcher(x, weight, bias) else _fwd
    # Under autocast the reference's product would run in the lower dtype.
    with torch.autocast(x.device.type, enabled=False):
        loss: Tensor = call(x, weight, bias, labels.long(), label_smoothing, backend)[0]
    return loss
