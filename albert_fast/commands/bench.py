"""`albert-fast bench`: compares this library, the plain reference and transformers on the same weights and input."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _options as options
from ._compare import Row, check_floats, compare, plain_model, table, transformers_model
from ._errors import reports_errors

if TYPE_CHECKING:
    import torch

# hidden_size, num_attention_heads, num_hidden_layers, intermediate_size (Lan et al. 2019, table 1)
SIZES = {"tiny": (312, 12, 4, 1248), "base": (768, 12, 12, 3072), "large": (1024, 16, 24, 4096)}


class Size(str, Enum):
    tiny = "tiny"
    base = "base"
    large = "large"


@reports_errors
@options.expands_groups
def command(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Folder of a checkpoint, or its name on the hub.", show_default="random weights"
        ),
    ] = None,
    *,
    size: Annotated[
        Size, typer.Option(help="Size of the random model; tiny is that of the Chinese release.")
    ] = Size.base,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Texts in the batch.")] = 8,
    length: Annotated[int, typer.Option("--length", "-l", min=1, help="Tokens of the longest text.")] = 128,
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Lengths from an eighth of --length up, padded, as real text has them.")
    ] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds; every side has a turn in each.")] = 7,
    by_stage: Annotated[
        bool, typer.Option("--profile", help="Instead: where our forward's time goes, against this machine's limits.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Results and machine as JSON.")] = False,
    compute: options.Compute,
) -> None:
    """Measure speed and error on this machine: albert_fast, the eager reference and, where installed, transformers.

    All sides run the same weights and input in turns. The time is the median of the rounds; the speed-up is the median
    ratio to the eager reference; the error is the largest difference of last_hidden_state from the float32 reference. Run
    it on a machine that does nothing else.

    \b
    Examples:
      albert-fast bench
      albert-fast bench --batch-size 32 --length 512 --ragged
      albert-fast bench -m my-albert --batch-size 1 --length 16 --precision bf16 --json
      albert-fast bench --profile --batch-size 1 --length 16
    """
    import torch

    from ..runtime.devices import choose_device
    from ..tasks.loading import quiet_about_modules, stated_precision

    given = compute.as_keywords()
    device, backend = choose_device(given["device"]), given["backend"]
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode(), quiet_about_modules():
        folder = _random_model(SIZES[size.value], Path(scratch)) if model is None else _resolved(model)
        batch = _batch(folder, batch_size, length, ragged, device)
        precision = stated_precision(folder, given["precision"])
        if by_stage:
            stages = _stages(folder, batch, backend, precision, rounds)
        else:
            check_floats(folder)
            sides, exact = _sides(folder, batch, backend, precision)
            rows = compare(sides, exact(), rounds, device)
    case = {
        "model": model or f"random {size.value}",
        "batch_size": batch_size,
        "length": length,
        "tokens": int(batch["attention_mask"].sum()),
        "precision": precision,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }
    if as_json:
        from ..inspect.info import describe

        found = {"stages": stages} if by_stage else {"sides": [dataclasses.asdict(row) for row in rows]}
        sys.stdout.write(json.dumps({"case": case, **found, "machine": describe()}, indent=2) + "\n")
        return
    sys.stdout.write(f"{_head(case)}\n\n{_stage_table(stages) if by_stage else _side_table(case, rows)}\n")


def _resolved(model: str) -> Path:
    from ..checkpoints.weights import resolve

    return resolve(model)


def _random_model(sizes: tuple[int, int, int, int], folder: Path) -> Path:
    import torch

    from ..models import reference
    from ..models.config import ALBERTConfig

    hidden, heads, layers, intermediate = sizes
    config = ALBERTConfig(
        hidden_size=hidden, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=intermediate
    )
    torch.manual_seed(0)
    reference.ALBERTModel(config).save_pretrained(folder)
    return folder


def _batch(folder: Path, batch_size: int, length: int, ragged: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """Random ids (B, S) and their mask: all of length S, or lengths spread evenly from S / 8 to S."""
    import torch

    from ..models.auto import config_of

    config = config_of(folder)
    if length > config.longest:
        raise ValueError(f"--length {length} is more than the model's {config.longest} positions")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch_size, length), generator=generator)
    shortest = max(1, length // 8) if ragged else length
    spread = torch.linspace(shortest, length, batch_size, dtype=torch.float32).round().long()
    lengths = spread if batch_size > 1 else torch.tensor([length])
    mask = (torch.arange(length) < lengths[:, None]).long()
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _sides(
    folder: Path, batch: dict[str, torch.Tensor], backend: str, precision: str
) -> tuple[dict[str, Callable[[], torch.Tensor]], Callable[[], torch.Tensor]]:
    """The sides by name, the reference first, and the float32 reference. Each returns the real tokens' states (T, H)."""
    from ..models.auto import AutoModel
    from ..models.load_arguments import FLOAT_DTYPES

    device = batch["input_ids"].device
    real = batch["attention_mask"].bool()
    # The other sides have no integer formats and run in float32 instead.
    plain = precision if precision in FLOAT_DTYPES else "fp32"

    def side(network: Any) -> Callable[[], torch.Tensor]:
        return lambda: network(**batch).last_hidden_state[real]

    exact = plain_model(folder, "Model", device=device)
    eager = exact if plain == "fp32" else plain_model(folder, "Model", precision=plain, device=device)
    fast = AutoModel.from_pretrained(folder, backend=backend, precision=precision, device=device)
    sides = {f"eager reference, {plain}": side(eager), f"albert_fast, {precision}": side(fast)}
    if importlib.util.find_spec("transformers") is not None:
        theirs = transformers_model(exact, "Model").to(device, FLOAT_DTYPES[plain])
        sides[f"transformers sdpa, {plain}"] = side(theirs)
    return sides, side(exact)


def _stages(
    folder: Path,
    batch: dict[str, torch.Tensor],
    backend: str,
    precision: str,
    rounds: int,
) -> list[dict[str, Any]]:
    """The rows of --profile: name, seconds, rate, unit, limit and of_limit of each stage."""
    from ..inspect.profiling import profile
    from ..models.auto import AutoModel

    device = batch["input_ids"].device
    fast = AutoModel.from_pretrained(folder, backend=backend, precision=precision, device=device)
    return [
        {
            "name": stage.name,
            "seconds": stage.seconds,
            "rate": stage.rate,
            "unit": stage.unit,
            "limit": stage.limit,
            "of_limit": stage.of_limit,
        }
        for stage in profile(fast, **batch, rounds=rounds)
    ]


def _head(case: dict[str, Any]) -> str:
    dense = case["batch_size"] * case["length"]
    return (
        f"{case['model']}, batch {case['batch_size']} x {case['length']} ({case['tokens']} of {dense} tokens are real),"
        f" {case['device']}, {case['threads']} threads, {case['rounds']} rounds"
    )


def _stage_table(stages: list[dict[str, Any]]) -> str:
    whole = sum(stage["seconds"] for stage in stages) or 1.0
    body = [
        (
            stage["name"],
            f"{stage['seconds'] * 1e3:.2f}",
            f"{stage['seconds'] / whole:.0%}",
            f"{stage['rate']:,.0f} {stage['unit']}" if stage["unit"] else "",
            f"{stage['limit']:,.0f}" if stage["unit"] else "",
            f"{stage['of_limit']:.0%}" if stage["unit"] else "",
        )
        for stage in stages
    ]
    body.append(("all layers", f"{whole * 1e3:.2f}", "100%", "", "", ""))
    return table(("stage", "ms", "share", "rate", "limit", "of limit"), body)


def _side_table(case: dict[str, Any], rows: list[Row]) -> str:
    body = [
        (
            row.side,
            f"{row.seconds * 1e3:.2f}",
            f"{case['tokens'] / row.seconds:,.0f}",
            f"{row.speedup:.2f}x",
            f"{row.error:.1e}",
        )
        for row in rows
    ]
    return table(("", "ms", "tokens/s", "speed-up", "largest error"), body)
