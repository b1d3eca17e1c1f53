"""`python benchmarks/report.py results/X.json`: tables (results/X.md) and plots (results/X-*.png) of one benchmark run.

Every figure comes from the JSON of pytest-benchmark; a side's ratio is the median over rounds of its neighbour's time
by its own, so it holds where the machine's speed drifted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from shared.plots import plot_model, plot_operators
from shared.records import Record, digits, grouped, of_precision, ratio_text
from tabulate import tabulate


def row_table(extra_infos: Iterable[Mapping[str, Any]]) -> str:
    """Every row with all that was measured, as a markdown table."""
    head = [
        "id",
        "ms",
        "GFLOPS",
        "GB/s",
        "x best other",
        "best other",
        "x own float",
        "relative error",
        "largest error",
    ]
    body = []
    for figures in extra_infos:
        errors = [f"{figures[name]:.1e}" for name in ("relative_error", "max_abs_error")]
        best = [ratio_text(figures.get("ratio_to_best_other")), figures.get("best_other", "")]
        if figures.get("wrong"):
            best[1] = "none: its answers are wrong"
        own = ratio_text(figures.get("ratio_to_own_float"))
        speeds = [figures["milliseconds"], figures.get("gflops"), figures.get("gbytes_per_second")]
        body.append([figures["id"], *map(digits, speeds), *best, own, *errors])
    return _markdown(head, body)


def model_table(groups: Sequence[Sequence[Record]]) -> str:
    """One line a batch: milliseconds of every side; our GFLOPS on real tokens; how many times faster than the best."""
    sides = list(dict.fromkeys(record.side for group in groups for record in group))
    body = []
    for group in groups:
        times = {r.side: digits(r.milliseconds) if r.right else "wrong answers" for r in group}
        ours = next((record for record in group if record.ours), None)
        figures = ours.figures if ours else {}
        ratio = ratio_text(figures.get("ratio_to_best_other"))
        body.append([group[0].shape, *(times.get(side, "") for side in sides), digits(figures.get("gflops")), ratio])
    return _markdown(["batch", *(f"{side}, ms" for side in sides), "our GFLOPS", "x best other"], body)


def peers_table(groups: Sequence[Sequence[Record]]) -> str:
    """What `model_table` shows, one table a precision; those of fewer bits with errors, and our time in float32 over theirs.

    The best other of int16 is the fastest side of floats that is not ours: no engine has int16.
    """
    text = []
    titles = (("float", "Float32"), ("bf16", "bfloat16"), ("int16", "int16"), ("int8", "int8"))
    for precision, title in titles:
        chosen = of_precision(groups, precision)
        if chosen:
            text += [f"### {title}", model_table(chosen)]
        if chosen and precision != "float":
            text.append(_error_table(chosen))
    return "\n\n".join(text)


def _error_table(groups: Sequence[Sequence[Record]]) -> str:
    sides = list(dict.fromkeys(record.side for group in groups for record in group))
    body = []
    for group in groups:
        errors = {record.side: f"{record.figures['relative_error']:.1e}" for record in group}
        own = next((record.figures.get("ratio_to_own_float") for record in group if record.ours), None)
        body.append([group[0].shape, *(errors.get(side, "") for side in sides), ratio_text(own)])
    return _markdown(["batch", *(f"{side}, relative error" for side in sides), "x albert_fast in float32"], body)


def hosts_table(groups: Sequence[Sequence[Record]]) -> str:
    """What the line gives, what `peers_table` shows, the memory of training, and the versions in other environments."""
    return "\n\n".join([_line_table(groups), peers_table(groups), *_memory(groups), *_versions(groups)])


def pretraining_table(groups: Sequence[Sequence[Record]]) -> str:
    """What `model_table` shows, and the memory of training."""
    return "\n\n".join([model_table(groups), *_memory(groups)])


def _memory(groups: Sequence[Sequence[Record]]) -> list[str]:
    """The memory that training took, as a heading, a line and a table; nothing where it was not measured."""
    body = []
    for record in (record for group in groups for record in group):
        if "peak_mib" in record.figures:
            before, peak = (record.figures[key] for key in ("model_mib", "peak_mib"))
            body.append([record.shape, record.side, *(f"{mib:,.0f}" for mib in (before, peak, peak - before))])
    head = ["batch", "side", "with the model, MiB", "peak, MiB", "peak beyond the model, MiB"]
    about = "Resident memory of a new process that trains a few steps."
    return ["### Memory of training", about, _markdown(head, body)] if body else []


def decoding_table(groups: Sequence[Sequence[Record]]) -> str:
    """What `model_table` shows, and the versions in other environments."""
    return "\n\n".join([model_table(groups), *_versions(groups)])


def _versions(groups: Sequence[Sequence[Record]]) -> list[str]:
    """The versions that sides in other environments ran with, as a heading and a table; nothing without such sides."""
    figures = {record.side: record.figures for group in groups for record in group}
    versions = [[side, each["environment"]] for side, each in figures.items() if "environment" in each]
    return ["### Other environments", _markdown(["side", "versions"], versions)] if versions else []


def _line_table(groups: Sequence[Sequence[Record]]) -> str:
    """The line that a user adds to each host, and what it changes in float32."""
    body = []
    for group in groups:
        by_side = {record.side: record for record in group}
        ours, own = (by_side.get(side) for side in ("albert_fast", "hf"))
        if ours is not None and own is not None:
            times = [digits(one.milliseconds) for one in (own, ours)]
            ratio = ratio_text(own.milliseconds / ours.milliseconds)
            errors = [f"{ours.figures[name]:.1e}" for name in ("max_abs_error", "relative_error")]
            body.append([ours.shape, f"`{ours.figures['line']}`", *times, ratio, *errors])
    head = ["host", "line", "as it was, ms", "accelerated, ms", "x", "largest difference", "relative"]
    return "### What one line changes\n\n" + _markdown(head, body)


def load_table(groups: Sequence[Sequence[Record]]) -> str:
    """One line an engine: seconds from the start of loading, and the process's resident memory in MiB."""
    body = []
    for record in (record for group in groups for record in group):
        figures = record.figures
        seconds = [figures[key] for key in ("load_seconds", "first_answer_seconds")]
        memory = [figures["import_mib"], figures["peak_mib"], figures["peak_mib"] - figures["import_mib"]]
        body.append([record.side, *map(digits, seconds), *(f"{mib:,.0f}" for mib in memory)])
    head = ["side", "loaded, s", "first answer, s", "after its imports, MiB", "peak, MiB", "peak beyond imports, MiB"]
    return f"Files to an answer on {groups[0][0].shape}, in a fresh process.\n\n" + _markdown(head, body)


def operator_table(groups: Sequence[Sequence[Record]]) -> str:
    """One line an operator, direction, dtype and shape."""
    body = []
    for group in groups:
        ours = next((record for record in group if record.ours), None)
        if ours is None:
            continue
        others = {record.side: digits(record.milliseconds) for record in group if not record.ours}
        speeds = [ours.milliseconds, ours.figures["gflops"], ours.figures.get("gbytes_per_second")]
        ratio = ratio_text(ours.figures.get("ratio_to_best_other"))
        times = [others.get(side, "") for side in ("eager", "compile")]
        body.append([*ours.group, ours.side, *map(digits, speeds), *times, ratio])
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


def machine_line(machine: Mapping[str, Any], threads: int, date: str) -> str:
    """The machine, threads, versions and day of a run in one line, for a plot."""
    about = machine["albert_fast"]
    place = ", ".join(gpu["name"] for gpu in about["gpus"]) or about["cpu"]["model"]
    isa = (about["extension"] or {}).get("isa", "no extension")
    versions = [f"{name} {version}" for name, version in about["libraries"].items() if version and name in _COMPARED]
    return f"{place} ({isa}), {threads} threads for every side; {', '.join(versions)}; {date[:10]}"


def _markdown(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    return str(tabulate(body, head, tablefmt="github", disable_numparse=True))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in values.items()
    )


# The libraries whose versions decide a comparison.
_COMPARED = ("torch", "transformers", "sentence_transformers", "triton", "onnxruntime", "openvino", "nncf")
# op -> heading and suffix of the plot's file, table, plot; every other op is an operator
_MODELS: dict[str, tuple[str, Callable[..., str], Callable[..., None] | None]] = {
    "model": ("model", model_table, plot_model),
    "cpu_peers": ("peers", peers_table, plot_model),
    "hosts": ("hosts", hosts_table, partial(plot_model, heading="Libraries on real text")),
    "decoding": ("decoding", decoding_table, partial(plot_model, heading="Writing texts")),
    "pretraining": ("pretraining", pretraining_table, partial(plot_model, heading="A step of pre-training")),
    "load": ("loading", load_table, None),
}
_OPERATORS = ("operators", operator_table, plot_operators)


def write(source: Path) -> list[Path]:
    """Write X.md and the plots X-<what>.png beside X.json; of what was measured alone."""
    content = json.loads(source.read_text())
    extra_infos = [benchmark["extra_info"] for benchmark in content["benchmarks"]]
    text = [f"# Benchmark of {content['datetime'][:10]}"]
    if content["quick"]:
        text.append("A quick run on small models: it shows that everything runs, not how fast.")
    text.append(machine_table(content["machine_info"], extra_infos[0]["threads"]))
    groups = grouped(extra_infos)
    written = []
    for op in (*_MODELS, None):
        chosen = [group for group in groups if (group[0].op if group[0].op in _MODELS else None) == op]
        if not chosen:
            continue
        name, table, plot = _OPERATORS if op is None else _MODELS[op]
        text += [f"## {name.capitalize()}", table(chosen)]
        if plot is not None:
            image = source.with_name(f"{source.stem}-{name}.png")
            plot(chosen, image, machine_line(content["machine_info"], extra_infos[0]["threads"], content["datetime"]))
            written.append(image)
            text.append(f"![{name}]({image.name})")
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
