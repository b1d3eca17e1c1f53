"""Trains or tests a model for one epoch: `train` and `test`, for ALBERT's heads and any nn.Module that returns a tensor.

A batch is a dict with the model's inputs by name and its labels: `labels`, or `start_positions` and `end_positions`; for
pre-training also `sentence_order_label`. With `criterion=None` the model gets the labels too, and its own `.loss` is used;
a model that can leave out its logits does so if no metric needs them. Otherwise the model does not get the labels, and
`criterion(outputs, labels)` is called with:

| the model returns | outputs | labels |
|---|---|---|
| a tensor | that tensor | as in the batch |
| logits (B, C) and labels (B,) | the logits; (B,) where C = 1 | (B,); floats where C = 1 |
| logits (B, S, C) and labels (B, S) | the logits of the real tokens (N, C) | (N,), -100 kept |
| logits (N, C) of the batch's `wanted_tokens` | these logits | (N,), the labels there |
| start_logits and end_logits | a call for each, with the rows whose answer is in the sequence; the mean of both | (N,) |
| prediction_logits and sop_logits | a call for each, as above; the sum of both | (N,) |
| anything else | what the model returned | as in the batch |
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.linear_cross_entropy import IGNORED
from ..runtime.dispatch import check_device
from ..runtime.modes import mode
from .metrics import Metric, check_metrics, compute_metrics, predictions_of
from .progress import epoch_progress

LABEL_KEYS = ("labels", "start_positions", "end_positions", "sentence_order_label")
Criterion = Callable[[Any, Any], Tensor]


def train(
    model: nn.Module,
    data_loader: Iterable[Mapping[str, Any]],
    criterion: Criterion | None,
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    *,
    scheduler: Any = None,
    max_grad_norm: float | None = None,
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    after_step: Callable[[float, int], None] | None = None,
    progress: bool | str = True,
) -> float:
    """Trains for one pass over `data_loader`; the table above says what `criterion` gets.

    Args:
        scheduler: its `step()` is called after every optimizer step.
        max_grad_norm: gradients with a larger L2 norm are scaled down to this one.
        accumulation: batches whose mean gradient makes one optimizer step; the last step of a pass may have fewer.
        autocast: compute forwards in this dtype where torch.autocast does, such as torch.bfloat16.
        after_step: called with (loss, number of examples) after every optimizer step.
        progress: on standard error, a bar on a terminal, elsewhere a line now and then; a str is its label.

    Returns:
        The mean loss over all examples (over all labelled tokens for token labels), measured before each step.

    Raises:
        TypeError: a batch that is not a dict, a criterion that cannot be called or returns no tensor.
        ValueError: no batch, no labels, a loss that is not a scalar or is a sum, `criterion=None` with a model that
            returns no loss, an optimizer with parameters of another model, accumulation below 1.
        IndexError: a label outside the classes.
        BackendUnavailableError: a device that does not exist.

    The model is moved to `device` and trained in training mode. Afterwards, also after an error, it has its old mode.
    """
    _check(model, criterion, device)
    if accumulation < 1:
        raise ValueError(f"accumulation must be at least 1, got {accumulation}")
    model.to(device)
    _check_optimizer(model, optimizer)
    device_type, total, count = torch.device(device).type, 0.0, 0
    with mode(model, training=True), epoch_progress(data_loader, "train", progress) as (batches, show):
        source = iter(batches)
        while group := list(islice(source, accumulation)):
            optimizer.zero_grad(set_to_none=True)
            value, examples = 0.0, 0
            for left, batch in enumerate(group, 1 - len(group)):
                with _sends_gradients(model, last=left == 0):
                    with torch.autocast(device_type, autocast, enabled=autocast is not None):
                        loss, number, _ = _step(model, batch, criterion, device, predictions=False)
                    (loss / len(group)).backward()
                value, examples = value + float(loss.detach()) / len(group), examples + number
            if max_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            total, count = total + value * examples, count + examples
            show(total, count)
            if after_step is not None:
                after_step(value, examples)
    return _mean(total, count)


def test(
    model: nn.Module,
    data_loader: Iterable[Mapping[str, Any]],
    criterion: Criterion | None,
    device: torch.device | str,
    *,
    metrics: Sequence[str | Metric] | None = None,  # noqa: PT028
    after_batch: Callable[[Any], None] | None = None,  # noqa: PT028
    progress: bool | str = True,  # noqa: PT028
) -> Any:
    """Evaluates without gradients; the table above says what `criterion` gets.

    Args:
        metrics: names ("accuracy", "f1", "precision", "recall", "matthews", "mse", "pearson", "spearman") or functions
            (labels, predictions) -> float, on arrays over the whole data set: see `predictions_of`.
        after_batch: called with what the model returned for each batch.
        progress: on standard error, a bar on a terminal, elsewhere a line now and then; a str is its label.

    Returns:
        The mean loss over all examples (labelled tokens for token labels); with `metrics`, (mean loss, {name: value}).

    Raises:
        TypeError, ValueError, IndexError, BackendUnavailableError: as `train`; also an unknown metric, or metrics for
            outputs that are not predictions. ImportError: a metric's library is missing.

    The model is moved to `device` and runs in eval mode. Afterwards, also after an error, it has its old mode.
    """
    check_metrics(metrics or ())
    _check(model, criterion, device)
    model.to(device)
    total, count = 0.0, 0
    labels_seen: list[Tensor] = []
    predictions: list[Tensor] = []
    # no_grad, not inference_mode: what a model caches during evaluation must be usable in training.
    with (
        torch.no_grad(),
        mode(model, training=False),
        epoch_progress(data_loader, "test", progress) as (batches, show),
    ):
        for batch in batches:
            predicts = metrics is not None or after_batch is not None
            loss, examples, pairs = _step(model, batch, criterion, device, predicts, after_batch)
            total, count = total + float(loss) * examples, count + examples
            show(total, count)
            if metrics is not None:
                truth, guess = predictions_of(pairs)
                labels_seen.append(truth.cpu())
                predictions.append(guess.cpu())
    mean = _mean(total, count)
    if metrics is None:
        return mean
    return mean, compute_metrics(metrics, torch.cat(labels_seen).numpy(), torch.cat(predictions).numpy())


test.__test__ = False  # type: ignore[attr-defined]  # pytest would collect a function of this name wherever it is imported


@contextmanager
def _sends_gradients(model: nn.Module, last: bool) -> Iterator[None]:
    """Lets distributed modules exchange gradients in the last backward before an optimizer step, and in no other."""
    set_sync = getattr(model, "set_requires_gradient_sync", None)  # FSDP2
    if set_sync is not None:
        set_sync(last)
    waits = model.no_sync() if not last and isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
    with waits:
        yield


def _check(model: nn.Module, criterion: Criterion | None, device: torch.device | str) -> None:
    """Refuses what can be refused before the first batch."""
    check_device(device)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if criterion is not None and not callable(criterion):
        raise TypeError(f"criterion must be a function of (outputs, labels) or None, got {type(criterion).__name__}")
    reduction = getattr(criterion, "reduction", "mean")
    if reduction not in ("mean", "batchmean"):
        raise ValueError(f"the criterion has reduction={reduction!r}; its loss must be a scalar, the mean of a batch")


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError("the optimizer holds none of the model's parameters; make it from this model's parameters()")


def _step(
    model: nn.Module,
    batch: Mapping[str, Any],
    criterion: Criterion | None,
    device: torch.device | str,
    predictions: bool,
    after_batch: Callable[[Any], None] | None = None,
) -> tuple[Tensor, int, list[tuple[Any, Any]]]:
    """Returns the loss of a batch (a scalar), its number of examples, and its (outputs, labels) pairs.

    If `predictions` is False, the outputs in the pairs may be None.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(f"a batch must be a dict of the model's inputs and labels, got {type(batch).__name__}")
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    labels = {key: moved[key] for key in LABEL_KEYS if moved.get(key) is not None}
    if not labels:
        raise ValueError(f"a batch needs labels ({', '.join(LABEL_KEYS)}), got the keys {sorted(batch)}")
    inputs = {key: value for key, value in moved.items() if key not in LABEL_KEYS}
    if criterion is None and not predictions and "output_logits" in _arguments(model)[0]:
        inputs["output_logits"] = False
    try:
        outputs = _call(model, inputs, labels if criterion is None else {})
    except IndexError as error:
        raise IndexError(f"{error} (the batch has {_ranges(inputs | labels)})") from error
    pairs = _pairs(outputs, labels, inputs)
    if criterion is None:
        loss = getattr(outputs, "loss", None)
        if loss is None:
            raise ValueError(f"criterion=None needs a model that returns a loss; {type(model).__name__} returned none")
    else:
        for prediction, truth in pairs:
            _check_classes(criterion, prediction, truth)
        losses = [criterion(prediction, truth) for prediction, truth in pairs if _count(truth)]
        # Without any label (all -100): a loss of zero that still has a graph.
        loss = sum(losses) if losses else sum(prediction.sum() * 0 for prediction, _ in pairs)
        if "start_positions" in labels and losses:
            loss = loss / len(losses)
    if not isinstance(loss, Tensor):
        raise TypeError(f"the criterion must return a tensor, got {type(loss).__name__}")
    if loss.dim():
        raise ValueError(f"the loss must be a scalar, got shape {tuple(loss.shape)}: the criterion must take the mean")
    if after_batch is not None:
        after_batch(outputs)
    return loss, _count(pairs[0][1]), pairs


def _check_classes(criterion: Criterion, outputs: Any, labels: Any) -> None:
    """IndexError for a label without a logit in a cross-entropy; on a GPU torch's own check would end the CUDA context."""
    if not isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)) or not isinstance(outputs, Tensor):
        return
    if not isinstance(labels, Tensor) or labels.is_floating_point() or outputs.dim() < 2:
        return
    classes, ignored = outputs.shape[1], criterion.ignore_index
    wrong = (labels != ignored) & ((labels < 0) | (labels >= classes))
    if bool(wrong.any()):
        raise IndexError(f"label {int(labels[wrong][0])} is outside the {classes} classes 0 to {classes - 1}")


def _ranges(tensors: Mapping[str, Any]) -> str:
    """The smallest and largest value of every integer tensor, for an error message."""
    found = {
        key: value
        for key, value in tensors.items()
        if isinstance(value, Tensor) and value.numel() and value.dtype in (torch.int64, torch.int32)
    }
    return ", ".join(f"{key} from {int(value.min())} to {int(value.max())}" for key, value in found.items())


def _call(model: nn.Module, inputs: dict[str, Any], labels: dict[str, Any]) -> Any:
    """Calls the model with the inputs that its forward takes by name; input_ids by position if it has another name for them."""
    names, takes_all = _arguments(model)
    if takes_all:
        return model(**inputs, **labels)
    if "input_ids" in inputs and "input_ids" not in names and "inputs_embeds" not in inputs:
        return model(inputs["input_ids"], **{key: value for key, value in inputs.items() if key in names})
    _warn_once(type(model).__name__, tuple(sorted(set(inputs) - names)))
    if "return_dict" in names:  # whatever its config.json says
        inputs = inputs | {"return_dict": True}
    return model(**{key: value for key, value in (inputs | labels).items() if key in names or key in labels})


def _arguments(model: nn.Module) -> tuple[frozenset[str], bool]:
    """The names that the model's forward takes, and whether it takes any keyword."""
    parameters = inspect.signature(model.forward).parameters.values()
    return frozenset(p.name for p in parameters), any(p.kind is p.VAR_KEYWORD for p in parameters)


@cache
def _warn_once(model: str, unused: tuple[str, ...]) -> None:
    if unused:
        warnings.warn(
            f"{model}.forward does not take {', '.join(unused)}; they are left out of every batch", stacklevel=4
        )


def _pairs(outputs: Any, labels: dict[str, Any], inputs: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The (outputs, labels) pairs of the table at the top."""
    if hasattr(outputs, "start_logits"):
        starts, ends = labels["start_positions"].reshape(-1), labels["end_positions"].reshape(-1)
        length = outputs.start_logits.shape[1]
        inside = (starts >= 0) & (starts < length) & (ends >= 0) & (ends < length)
        return [(outputs.start_logits[inside], starts[inside]), (outputs.end_logits[inside], ends[inside])]
    if hasattr(outputs, "prediction_logits"):
        pairs = [_arrange(outputs.prediction_logits, labels["labels"], inputs)] if "labels" in labels else []
        if "sentence_order_label" in labels:
            pairs.append((outputs.sop_logits, labels["sentence_order_label"].reshape(-1)))
        return pairs
    if "labels" not in labels:
        raise ValueError(f"{type(outputs).__name__} needs 'labels' in the batch, got {sorted(labels)}")
    if hasattr(outputs, "logits"):
        return [_arrange(outputs.logits, labels["labels"], inputs)]
    return [(outputs, labels["labels"])]


def _arrange(logits: Tensor | None, labels: Tensor, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
    """Arranges logits and labels for a criterion.

    | logits | labels | result |
    |---|---|---|
    | (B, S, C), (N, C) of `wanted_tokens`, or None | (B, S) | (N, C) or None, and (N,) |
    | (B, 1) | (B,) | (B,) and (B,) |
    | others | | unchanged |
    """
    mask, wanted = inputs.get("decoder_attention_mask", inputs.get("attention_mask")), inputs.get("wanted_tokens")
    real = torch.ones_like(labels, dtype=torch.bool) if mask is None or mask.shape != labels.shape else mask.bool()
    if logits is None:
        return None, labels[real if wanted is None else real & wanted]
    if logits.dim() == 3 and labels.shape == logits.shape[:2]:
        return logits[real], labels[real]
    if logits.dim() == 2 and labels.dim() == 2 and wanted is not None:
        return logits, labels[real & wanted]
    if logits.dim() == 2 and logits.shape[1] == 1 and labels.dim() == 1:
        # nn.MSELoss would broadcast the two to (B, B), and has no gradient for integer labels.
        return logits[:, 0], labels.to(logits.dtype)
    return logits, labels


def _count(labels: Any) -> int:
    """Counts the examples of a batch: its rows without those labelled -100."""
    if not isinstance(labels, Tensor):
        return len(labels)
    if labels.dim() == 1 and not labels.is_floating_point():
        return int((labels != IGNORED).sum())
    return labels.shape[0] if labels.dim() else 1


def _mean(total: float, count: int) -> float:
    if not count:
        raise ValueError(
            "data_loader gave no examples with a label: it is empty, an iterator that was used up before, or all its "
            "labels are -100"
        )
    return total / count


__all__ = ["Criterion", "test", "train"]
