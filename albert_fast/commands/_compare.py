"""Compares models on the same input: how far apart their outputs are, and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Row:
    """One side of a comparison.

    Attributes:
        seconds: median of a call. speedup: how many times faster than the first side.
        error: largest difference from the float32 reference. relative_error: the same, divided by its largest output.
    """

    side: str
    seconds: float
    speedup: float
    error: float
    relative_error: float


def compare(
    sides: Mapping[str, Callable[[], torch.Tensor]], expected: torch.Tensor, rounds: int, device: torch.device
) -> list[Row]:
    """Times the sides in turns and compares their outputs with `expected`, which has the same shape."""
    import torch

    from ..inspect.timing import Side, interleaved, paired_ratio

    with torch.inference_mode():
        outputs = {name: side().float() for name, side in sides.items()}
        seconds = interleaved({name: Side(side) for name, side in sides.items()}, rounds, device=device)
    first = next(iter(sides))
    scale = expected.abs().max().item() or 1.0
    rows = []
    for name, output in outputs.items():
        error = (output - expected).abs().max().item()
        speedup = paired_ratio(seconds[name], seconds[first])
        rows.append(Row(name, median(seconds[name]), speedup, error, error / scale))
    return rows


def check_floats(folder: Path) -> None:
    """ValueError for a checkpoint of integers, whose float weights are gone."""
    from ..tasks.loading import holds_floats

    if not holds_floats(folder):
        raise ValueError(f"{folder}: holds integers; the comparison needs the floats that they were made from")


def plain_model(folder: Path, task: str, **loading: Any) -> Any:
    """The model of a checkpoint in plain PyTorch: ALBERT's reference model, any other family on the reference operators.

    Args:
        task: "Model", "ForSequenceClassification" and so on. loading: precision and device, as `from_pretrained` takes them.
    """
    from ..checkpoints.families import FAMILIES
    from ..models import reference
    from ..models.auto import class_of, config_of

    family = FAMILIES[config_of(folder).model_type]
    if family.model_type == "albert":
        return getattr(reference, f"ALBERT{task}").from_pretrained(folder, **loading)
    return class_of(family, task).from_pretrained(folder, backend="reference", **loading)


def transformers_model(plain: Any, task: str) -> Any:
    """transformers' model with scaled dot-product attention and the weights of `plain`, so that any checkpoint that this
    library reads can be compared.

    Raises:
        ImportError: transformers is not installed.
    """
    import transformers

    from ..checkpoints.families import FAMILIES

    family = FAMILIES[plain.config.model_type]
    config_class = getattr(transformers, f"{family.hf_class_name}Config")
    pooling = {"add_pooling_layer": plain.pooler is not None} if task == "Model" and family.pooler else {}
    config = config_class.from_dict(plain.config.to_dict(), attn_implementation="sdpa")
    model = getattr(transformers, f"{family.hf_class_name}{task}")(config, **pooling)
    model.load_state_dict(plain.state_dict())
    return model.eval()


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A text table; the first column is aligned to the left, the others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
