"""`python benchmarks/report.py results/X.json`: tables (results/X.md) and plots (results/X-*.png) of one benchmark run.

Every figure comes from the JSON of pytest-benchmark; a side's ratio is the median over rounds of its neighbour's time
by its own, so it holds where the machine's speed drifted.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

_OURS, _OTHERS, _TEXT = "#d1495b", "#9aa5b1", "#333333"
_BAR_INCHES, _PANEL_INCHES = 0.24, 3.3


@dataclass(frozen=True)
class Record:
    """One row: the id's parts, and the figures stored beside its samples (see harness.py)."""

    op: str
    direction: str
    dtype: str
    shape: str
    side: str
    figures: Mapping[str, Any]

    @classmethod
    def of(cls, extra_info: Mapping[str, Any]) -> Record:
        op, direction, dtype, shape, side = extra_info["id"].split("/")
        return cls(op, direction, dtype, shape, side, extra_info)

    @property
    def group(self) -> tuple[str, str, str, str]:
        return self.op, self.direction, self.dtype, self.shape

    @property
    def milliseconds(self) -> float:
        return float(self.figures["milliseconds"])

    @property
    def ours(self) -> bool:
        return bool(self.figures["ours"])


def grouped(extra_infos: Iterable[Mapping[str, Any]]) -> list[list[Record]]:
    """The records of each question together, in the order in which they were asked."""
    groups: dict[tuple[str, ...], list[Record]] = {}
    for extra_info in extra_infos:
        record = Record.of(extra_info)
        groups.setdefault(record.group, []).append(record)
    return list(groups.values())


def row_table(extra_infos: Iterable[Mapping[str, Any]]) -> str:
    """Every row with all that was measured, as a markdown table."""
    head = ["id", "ms", "GFLOPS", "GB/s", "x best other", "best other", "relative error", "largest error"]
    body = []
    for figures in extra_infos:
        errors = [f"{figures[name]:.1e}" for name in ("relative_error", "max_abs_error")]
        ratio, best = figures.get("ratio_to_best_other"), figures.get("best_other", "")
        speeds = [figures["milliseconds"], figures["gflops"], figures.get("gbytes_per_second")]
        body.append([figures["id"], *map(_digits, speeds), _ratio(ratio), best, *errors])
    return _markdown(head, body)


def model_table(groups: Sequence[Sequence[Record]]) -> str:
    """One line a batch: milliseconds of every side; our GFLOPS on real tokens; how many times faster than the best."""
    sides = list(dict.fromkeys(record.side for group in groups for record in group))
    body = []
    for group in groups:
        times = {record.side: _digits(record.milliseconds) for record in group}
        ours = next((record for record in group if record.ours), None)
        figures = ours.figures if ours else {}
        ratio = _ratio(figures.get("ratio_to_best_other"))
        body.append([group[0].shape, *(times.get(side, "") for side in sides), _digits(figures.get("gflops")), ratio])
    return _markdown(["batch", *(f"{side}, ms" for side in sides), "our GFLOPS", "x best other"], body)


def operator_table(groups: Sequence[Sequence[Record]]) -> str:
    """One line an operator, direction, dtype and shape."""
    body = []
    for group in groups:
        ours = next((record for record in group if record.ours), None)
        if ours is None:
            continue
        others = {record.side: _digits(record.milliseconds) for record in group if not record.ours}
        speeds = [ours.milliseconds, ours.figures["gflops"], ours.figures.get("gbytes_per_second")]
        ratio = _ratio(ours.figures.get("ratio_to_best_other"))
        times = [others.get(side, "") for side in ("eager", "compile")]
        body.append([*ours.group, ours.side, *map(_digits, speeds), *times, ratio])
    head = ["operator", "direction", "dtype", "shape", "backend", "ms", "GFLOPS", "GB/s", "eager, ms", "compile, ms"]
    return _markdown([*head, "x best other"], body)


def machine_table(machine: Mapping[str, Any], threads: int) -> str:
    """What the figures were measured on."""
    about = machine["albert_fast"]
    cpu, libraries = about["cpu"], about["libraries"]
    lines = [
        ("CPU", f"{cpu['model']}, {cpu['usable_cpus']} usable CPUs, caches {_listed(cpu['caches'])}"),
        ("instructions", " ".join(cpu["flags"])),
        ("threads of every side", threads),
        ("GPU", ", ".join(gpu["name"] for gpu in about["gpus"]) or "none"),
        ("system", f"{about['system']}, Python {about['python']}, {about['memory_gib']} GiB"),
        ("libraries", _listed({name: version for name, version in libraries.items() if version})),
        ("extension", _listed(about["extension"] or {"built": False})),
    ]
    return _markdown(["machine", ""], lines)


def plot_model(groups: Sequence[Sequence[Record]], path: Path) -> None:
    """A panel a batch; a bar a side, as long as the side takes relative to ours."""
    columns = min(4, len(groups))
    cells: list[Sequence[Record] | None] = [*groups, *[None] * (-len(groups) % columns)]
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    _plot(rows, lambda record: record.shape, "ALBERT", path)


def plot_operators(groups: Sequence[Sequence[Record]], path: Path) -> None:
    """A line an operator, a column a direction and dtype; each panel shows the largest shape."""
    largest: dict[tuple[str, str, str], Sequence[Record]] = {}
    for group in groups:
        key = group[0].group[:3]
        size = group[0].figures["operations"]
        if key not in largest or size >= largest[key][0].figures["operations"]:
            largest[key] = group
    kinds = list(dict.fromkeys(key[1:] for key in largest))
    rows = [[largest.get((op, *kind)) for kind in kinds] for op in dict.fromkeys(key[0] for key in largest)]
    _plot(rows, lambda record: f"{record.op}\n{record.direction} {record.dtype} {record.shape}", "Operators", path)


def _plot(rows: Sequence[Sequence[Sequence[Record] | None]], title_of: Any, heading: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [max(len(group) for group in row if group is not None) for row in rows]
    columns = max(map(len, rows))
    size = (columns * _PANEL_INCHES, sum(_BAR_INCHES * height + 0.6 for height in heights) + 0.45)
    figure, axes = pyplot.subplots(
        len(rows), columns, figsize=size, squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axis, group in zip(axes.flat, (group for row in rows for group in row), strict=True):
        axis.axis("off")
        if group is not None:
            _panel(axis, group, title_of(group[0]))
    heading += ": shorter is faster; the factor is a side's time over ours"
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, color=_TEXT)
    figure.savefig(path, dpi=160)
    pyplot.close(figure)


def _panel(axis: Any, group: Sequence[Record], title: str) -> None:
    """Horizontal bars, labelled where they stand: side, time and how many times ours."""
    unit = next((record.milliseconds for record in group if record.ours), group[0].milliseconds)
    longest = max(record.milliseconds for record in group) / unit
    for place, record in enumerate(group):
        length = record.milliseconds / unit
        axis.barh(place, length, height=0.8, color=_OURS if record.ours else _OTHERS)
        factor = None if record.ours else record.figures.get("times_ours")
        text = _time(record.milliseconds) + ("" if factor is None else f"  {factor:.2f}x")
        side = "albert_fast" if record.ours else record.side
        axis.text(-0.03 * longest, place, side, ha="right", va="center", fontsize=8, color=_TEXT)
        axis.text(length + 0.03 * longest, place, text, ha="left", va="center", fontsize=8, color=_TEXT)
    axis.set_xlim(-0.75 * longest, 1.9 * longest)
    axis.set_ylim(len(group) - 0.4, -0.6)
    axis.set_title(title, fontsize=9, fontweight="bold", color=_TEXT)


def _markdown(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    return str(tabulate(body, head, tablefmt="github", disable_numparse=True))


def _digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    decimals = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:,.{decimals}f}"


def _time(milliseconds: float) -> str:
    return f"{_digits(milliseconds)} ms" if milliseconds >= 1 else f"{_digits(milliseconds * 1e3)} \N{MICRO SIGN}s"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in values.items()
    )


def write(source: Path) -> list[Path]:
    """Write X.md, X-model.png and X-operators.png beside X.json; the plots where there is something to show."""
    content = json.loads(source.read_text())
    extra_infos = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    groups = grouped(extra_infos)
    model = [group for group in groups if group[0].op == "model"]
    operators = [group for group in groups if group[0].op != "model"]
    text = [f"# Benchmark of {content['datetime'][:10]}"]
    if content["quick"]:
        text.append("A quick run on a small model: it shows that everything runs, not how fast.")
    text.append(machine_table(content["machine_info"], extra_infos[0]["threads"]))
    written = []
    for name, chosen, table, plot in (
        ("model", model, model_table, plot_model),
        ("operators", operators, operator_table, plot_operators),
    ):
        if chosen:
            image = source.with_name(f"{source.stem}-{name}.png")
            plot(chosen, image)
            written.append(image)
            text += [f"## {name.capitalize()}", table(chosen), f"![{name}]({image.name})"]
    text += ["## Every row", row_table(extra_infos)]
    page = source.with_suffix(".md")
    page.write_text("\n\n".join(text) + "\n")
    return [page, *written]


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables and plots of a benchmark run.")
    parser.add_argument(
        "json", type=Path, help="what `pytest benchmarks/ --benchmark-only --benchmark-json=FILE` wrote"
    )
    for path in write(parser.parse_args().json):
        print(path)


if __name__ == "__main__":
    main()
