"""Draws the figures of a run: TensorBoard files while it runs, and a PNG of its curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..runtime.files import replacing

FOLDER_NAME = "tensorboard"
PNG_NAME = "curves.png"
# What a panel of the PNG shows: its title, and the figures in it.
PANELS = (
    ("loss", ("masked_loss", "held_out_masked_loss")),
    ("sentence order loss", ("order_loss",)),
    ("held-out accuracy", ("masked_accuracy", "order_accuracy")),
)


class Curves:
    """The figures of a run in its folder. Without tensorboard or matplotlib that part is left out, and `say` gets a line.

    Args:
        step: the steps that are done; TensorBoard forgets later ones, which a killed run may have written.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            say("no TensorBoard files: tensorboard is not installed (pip install 'albert-fast[pretrain]')")
            return
        self._writer = SummaryWriter(str(folder / FOLDER_NAME), purge_step=step + 1 if step else None)

    def add(self, record: dict[str, Any]) -> None:
        """Adds the figures of a record at its step."""
        if self._writer is not None:
            for name, value in record.items():
                if name != "step":
                    self._writer.add_scalar(name, value, record["step"])

    def draw(self, history: Sequence[dict[str, Any]]) -> None:
        """Writes curves.png of all records."""
        if self._writer is not None:
            self._writer.flush()
        try:
            from matplotlib.figure import Figure
        except ImportError:
            self.say(f"no {PNG_NAME}: matplotlib is not installed (pip install 'albert-fast[pretrain]')")
            return
        figure = Figure(figsize=(12, 3.5), layout="constrained")
        for axes, (title, names) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for name in names:
                points = [(record["step"], record[name]) for record in history if name in record]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1.2)
            axes.set(title=title, xlabel="step")
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
        with replacing(self.folder / PNG_NAME) as file:
            figure.savefig(file, format="png", dpi=110)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


__all__ = ["Curves"]
