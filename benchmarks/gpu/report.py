"""Writes the suite's JSON as markdown tables: the targets first, then part by part. Standard library alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

OURS, GRAPHS = "albert_fast", "albert_fast-graphs"
# Targets, as factors of a peer's time or of the machine's own rate.
PRODUCT_SHARE, OVER_SDPA, OVER_COMPILE = 0.65, 2.0, 1.3
COPY_SHARE, ATTENTION, RAGGED_ATTENTION = 0.9, 1.0, 1.7
QUANTIZED = 1.5
LENGTHS_WITHIN, SMALL_MICROSECONDS, MEMORY_SHARE = 1.05, 100.0, 1 / 3
_LISTED = 40  # a broken kernel fails in every test after it
_OUTCOMES = ("passed", "failed", "skipped", "not run")  # of a test
_LATENCIES = (
    "returned",
    "answered",
    "device",
)  # of a call: until it returns, until its answer, and the GPU's work alone
MEMORY_BOUND = ("bias_gelu", "add_layer_norm", "gelu_layer_norm", "embedding_layer_norm", "embedding_projection")

Row = Mapping[str, Any]
Target = tuple[str, str, str, str, str, bool]  # what, ours, the best peer or limit, ratio, target, met


def markdown(content: Mapping[str, Any]) -> str:
    """The report of a suite's JSON, which may be of a suite that has not ended."""
    records = [(part["part"], record) for part in content["parts"] for record in part["records"]]
    lines = [f"# {content['name']}", ""]
    if content["rehearsal"]:
        lines += ["**A rehearsal on small shapes: its figures mean nothing.**", ""]
    lines += [f"`{' '.join(content['command'])}`, {content['began']}, {content['seconds']:.0f} s.", ""]
    lines += _machine([record for _, record in records])
    lines += ["## Targets", ""]
    marked = [[*target[:5], "yes" if target[5] else "no"] for target in targets([record for _, record in records])]
    lines += _table(["what", "ours", "best peer or limit", "ratio", "target", "met"], marked)
    lines += ["## Parts", ""]
    states = [[p["part"], p["status"], p["seconds"], p["limit"], p["why"]] for p in content["parts"]]
    states += [[part, "not run", "", "", ""] for part in content["not_run"]]
    lines += _table(["part", "status", "s", "limit, s", "why"], states)
    for kind, title in (("failure", "Failures"), ("peer failure", "Peers that failed"), ("skipped", "Skipped")):
        found = [(part, r) for part, r in records if r["kind"] == kind]
        if found:
            lines += [f"## {title}", "", *(f"- {part}: {r['what']}: {_first_line(r)}" for part, r in found[:_LISTED])]
            lines += [f"- and {len(found) - _LISTED} more: see the JSON"] if len(found) > _LISTED else []
            lines += [""]
    lines += _tests(record for _, record in records)
    for part in ("model", "operators", "training"):
        lines += _figures(part, [record for of, record in records if of == part], _rates([r for _, r in records]))
    lines += _tiles([record for _, record in records])
    return "\n".join(lines)


def _first_line(record: Row) -> str:
    said = [line for line in (record.get("error") or record.get("why") or "").splitlines() if line.strip()]
    chosen = next((line for line in said if line.startswith("E ")), said[0] if said else "")
    return chosen[:300]


def _machine(records: Iterable[Row]) -> list[str]:
    lines = []
    for record in records:
        if record["kind"] == "machine":
            gpus = (
                ", ".join(f"{g['name']} ({g['multiprocessors']} multiprocessors)" for g in record["gpus"]) or "no GPU"
            )
            libraries = {name: record["libraries"][name] for name in ("torch", "triton", "transformers")}
            named = ", ".join(f"{name} {version}" for name, version in libraries.items())
            lines.append(f"{gpus}, driver {record['driver']}, CUDA {record['cuda']}; {named}.")
        if record["kind"] == "ceiling":
            unit, scale = ("GB/s", 1e9) if record["what"] == "copy" else ("TFLOP/s", 1e12)
            lines.append(f"Measured {record['what']}: {_digits(record['per_second'] / scale)} {unit}.")
    return [*lines, ""]


# targets ------------------------------------------------------------------------------------------------------------------


def targets(records: Sequence[Row]) -> list[Target]:
    """Every target of the GPU for which there are figures."""
    groups: dict[str, dict[str, Row]] = {}
    for record in records:
        if record["kind"] == "row":
            group, _, side = record["id"].rpartition("/")
            groups.setdefault(group, {})[side] = record
    rates = _rates(records)
    found: list[Target] = []
    for group, sides in groups.items():
        op, direction, dtype, shape = group.split("/")
        ours = next((row for row in sides.values() if row["ours"]), None)
        if ours is None:
            continue
        peers = {side: row for side, row in sides.items() if not (row["ours"] or side.startswith(OURS))}
        for side in [side for side, row in sides.items() if row["ours"] and row is not ours]:
            found += _over(f"{op} {shape} {side} over {OURS}", sides[side], {OURS: ours}, "", QUANTIZED)
        if op == "model" and shape.startswith("base"):
            found += _model_targets(shape, ours, peers, rates)
            for side in [side for side in (OURS, GRAPHS) if side in sides and not _is_dense(shape)]:
                found += _real_lengths(f"model {shape}{side.removeprefix(OURS)}", sides[side], groups)
        elif op == "attention":
            target = ATTENTION if _is_dense(shape) else RAGGED_ATTENTION
            found += _over(f"{op} {direction} {dtype} {shape}", ours, peers, "", target)
        elif op in MEMORY_BOUND and "copy" in rates:
            rate, copy = ours["gbytes_per_second"] * 1e9, rates["copy"]
            found.append(_share(f"{op} {direction} {dtype}", rate, copy, 1e9, "GB/s", "copy", COPY_SHARE))
        elif op == "training":
            found += _over(f"training step {shape}", ours, peers, "hf-sdpa", OVER_SDPA)
            found += _over(f"training step {shape}", ours, peers, "hf-compile", OVER_COMPILE)
            found += _memory(shape, ours, peers)
    return found


def _is_dense(shape: str) -> bool:
    """Whether a shape's name says rows x columns, as base-64x512 does and base-mixed-32 does not."""
    return re.search(r"\d+x\d+$", shape) is not None


def _model_targets(shape: str, ours: Row, peers: Mapping[str, Row], rates: Mapping[str, float]) -> list[Target]:
    found: list[Target] = []
    rate = ours["gflops"] * 1e9
    if shape == "base-1x128":
        microseconds = ours["milliseconds"] * 1e3
        best = _best(peers)
        peer, ratio = (
            (f"{best[1]['milliseconds'] * 1e3:.0f} us ({best[0]})", _ratio(ours, best[1])) if best else ("", 0.0)
        )
        met = microseconds <= SMALL_MICROSECONDS
        target = f"{SMALL_MICROSECONDS:.0f} us at most"
        found.append((f"model {shape}", f"{microseconds:.1f} us", peer, f"{ratio:.2f}", target, met))
    elif _is_dense(shape):
        if "bf16 product" in rates:
            product = rates["bf16 product"]
            found.append(_share(f"model {shape}", rate, product, 1e12, "TFLOP/s", "product", PRODUCT_SHARE))
        found += _over(f"model {shape}", ours, peers, "hf-sdpa", OVER_SDPA)
        found += _over(f"model {shape}", ours, peers, "hf-compile", OVER_COMPILE)
    return found


def _real_lengths(what: str, ours: Row, groups: Mapping[str, Mapping[str, Row]]) -> list[Target]:
    """Our time over that of the same number of operations at the rate of a dense batch."""
    dense = [row for g, s in groups.items() if g.endswith("/base-64x512") for row in s.values() if row["ours"]]
    if not dense:
        return []
    longer = dense[0]["gflops"] / ours["gflops"]
    limit = f"{ours['milliseconds'] / longer:.3f} ms (at 64x512's rate)"
    target, own = f"{LENGTHS_WITHIN:.2f} x at most", f"{ours['milliseconds']:.3f} ms"
    return [(what, own, limit, f"{longer:.2f}", target, longer <= LENGTHS_WITHIN)]


def _over(what: str, ours: Row, peers: Mapping[str, Row], prefix: str, target: float) -> list[Target]:
    """Our time against that of the fastest peer whose name begins with `prefix`."""
    best = _best({side: row for side, row in peers.items() if side.startswith(prefix)})
    if best is None:
        return []
    ratio = _ratio(ours, best[1])
    times = f"{ours['milliseconds']:.3f} ms", f"{best[1]['milliseconds']:.3f} ms ({best[0]})"
    return [(what, *times, f"{ratio:.2f}", f"{target:.2f} x", ratio >= target)]


def _share(what: str, rate: float, limit: float, scale: float, unit: str, of: str, target: float) -> Target:
    ours, best = f"{_digits(rate / scale)} {unit}", f"{_digits(limit / scale)} {unit} ({of})"
    return what, ours, best, f"{rate / limit:.2f}", f"{target:.2f}", rate >= target * limit


def _memory(shape: str, ours: Row, peers: Mapping[str, Row]) -> list[Target]:
    theirs = {side: row["peak_mib"] for side, row in peers.items() if row["peak_mib"]}
    if not theirs:
        return []
    side = min(theirs, key=lambda name: theirs[name])
    share = ours["peak_mib"] / theirs[side]
    sizes = f"{ours['peak_mib']:.0f} MiB", f"{theirs[side]:.0f} MiB ({side})"
    target = f"{MEMORY_SHARE:.2f} at most"
    return [(f"memory of a training step {shape}", *sizes, f"{share:.2f}", target, share <= MEMORY_SHARE)]


def _best(peers: Mapping[str, Row]) -> tuple[str, Row] | None:
    return min(peers.items(), key=lambda item: item[1]["milliseconds"], default=None)


def _ratio(ours: Row, peer: Row) -> float:
    """How many times longer the peer took; where the round is known, the median over rounds of neighbours in time."""
    return float(peer.get("times_ours", peer["milliseconds"] / ours["milliseconds"]))


# parts --------------------------------------------------------------------------------------------------------------------


def _tests(records: Iterable[Row]) -> list[str]:
    rows: list[list[Any]] = []
    for record in records:
        if record["kind"] == "tests":
            counts = dict(record["counts"])
            kernels = counts.pop("by kernel", {})
            rows += [[file, *(c.get(name, 0) for name in _OUTCOMES)] for file, c in counts.items()]
            rows += [[f"{kernel} (of these)", passed, "", "", ""] for kernel, passed in sorted(kernels.items())]
        if record["kind"] == "sanitizer":
            rows.append([f"compute-sanitizer {record['check']}: {record['summary']}", record["tests"], "", "", ""])
    return ["## Tests", "", *_table(["what", *_OUTCOMES], rows)] if rows else []


def _rates(records: Iterable[Row]) -> dict[str, float]:
    """The machine's measured rates, bytes or operations per second."""
    return {record["what"]: record["per_second"] for record in records if record["kind"] == "ceiling"}


def _figures(part: str, records: Sequence[Row], limits: Mapping[str, float]) -> list[str]:
    """The rows of a part; `limits` are the machine's rates, which rates in bfloat16 are shown as shares of."""
    body = []
    for row in records:
        if row["kind"] == "row":
            rates = [_digits(row["gflops"] / 1e3) if "gflops" in row else "", _digits(row.get("gbytes_per_second"))]
            for name, limit in (("gflops", "bf16 product"), ("gbytes_per_second", "copy")):
                known = name in row and limit in limits and "bfloat16" in row["id"]
                rates.append(f"{100e9 * row[name] / limits[limit]:.0f} %" if known else "")
            more = [_digits(row.get("times_ours")), _digits(row.get("peak_mib")), _digits(row.get("tokens_per_second"))]
            error = f"{row['relative_error']:.1e}" if "relative_error" in row else ""
            body.append([row["id"], _digits(row["milliseconds"]), *rates, *more, error])
    head = [
        "id",
        "ms",
        "TFLOP/s",
        "GB/s",
        "of product",
        "of copy",
        "x our time",
        "peak MiB",
        "tokens/s",
        "relative error",
    ]
    lines = [f"## {part.capitalize()}", "", *_table(head, body)] if body else []
    sizes = [[f"{r['batch']} {r['side']}", f"{r['peak_mib']:.0f}"] for r in records if r["kind"] == "memory"]
    lines += _table(["peak memory", "MiB"], sizes) if sizes else []
    times = [
        [f"{r['batch']} {r['what']}", *(_digits(None if r[n] is None else r[n] * 1e6) for n in _LATENCIES)]
        for r in records
        if r["kind"] == "latency"
    ]
    return lines + (_table(["ours, one call at a time", *(f"{n}, us" for n in _LATENCIES)], times) if times else [])


def _tiles(records: Sequence[Row]) -> list[str]:
    """Times with tuned tiles and with the default ones, and the tuned tiles."""
    default = {r["id"]: r["milliseconds"] for r in records if r["kind"] == "row"}
    tuned = [(r["id"], r["milliseconds"]) for r in records if r["kind"] == "tuned"]
    gains = [[name, _digits(default.get(name)), _digits(ms)] for name, ms in tuned]
    chosen = [
        [launch, ", ".join(f"{name} {size}" for name, size in tiles.items())]
        for record in records
        if record["kind"] == "tiles"
        for launches in record["chosen"].values()
        for launch, tiles in launches.items()
    ]
    lines = ["## Tiles", "", *_table(["id", "default, ms", "tuned, ms"], gains)] if gains else []
    return lines + (_table(["launch", "tiles"], chosen) if chosen else [])


def _digits(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return ""
    decimals = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{decimals}f}"


def _table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> list[str]:
    rows = [[f"{cell:.0f}" if isinstance(cell, float) else str(cell).replace("|", "/") for cell in row] for row in body]
    return [f"| {' | '.join(row)} |" for row in (list(head), ["---"] * len(head), *rows)] + [""]
