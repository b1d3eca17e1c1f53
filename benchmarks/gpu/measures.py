"""The parts of the suite that measure: the machine, every operator, the whole model, a step of training, tuned tiles.

Each part asks its most important questions first, and notes as skipped those that it has no time for.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from shared import lengths, peers, sides
from shared.harness import CallGroup, Options, comparison
from shared.model_group import ModelGroup
from shared.models import BASE, LARGE, QUICK, RandomModel
from shared.operators import GPU_SHAPES, OperatorGroup
from shared.shapes import Shape
from shared.sides import FAST

from albert_fast import ALBERTModel, explain
from albert_fast.inspect import info
from albert_fast.inspect.timing import Side, interleaved
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES
from gpu.part import Part
from gpu.peers import AttentionGroup, EncoderGroup, LinearGeluGroup, Training, allowed, masked_lm

_MASKED = 0.15  # share of the tokens that have a label in training
_LOSS_TOLERANCE = 2e-2  # largest relative difference of two first losses in bfloat16
# Upper bounds in seconds for a question, the compilation of its peers included.
_OPERATOR, _ATTENTION, _COMPILED, _TUNED, _EAGER, _ALONE, _TUNING = 12, 6, 30, 75, 8, 4, 25
_CALLS = 200  # one at a time
# Calls queued at once (fewer than the queue of reports about bad ids holds), and how long the GPU is kept busy before them.
_QUEUED, _BUSY_CYCLES = 32, 40_000_000


def _options(part: Part) -> Options:
    return Options(part.quick, False, 2 if part.quick else 7, torch.get_num_threads(), torch.device(part.device))


def _measure(
    part: Part, group: CallGroup, names: Sequence[str] | None = None, measured: str | None = None, **more: object
) -> None:
    """Add a row for every side of the group that can take part. A failure of ours fails the part, one of a peer does not.

    Args:
        names: the sides to measure (default: all). measured: our side, where an earlier measurement already gave its row.
    """
    able = []
    for name in group.sides() if names is None else names:
        if reason := group.why_not(name):
            part.add("skipped", what=f"{group.key}/{name}", why=reason)
        else:
            able.append(name)
    for name, result in group.measure(able, _options(part)).items():
        what, ours = f"{group.key}/{name}", name == group.ours(name) or sides.engine(name) == FAST
        if isinstance(result, Exception):
            part.fail(what, result, "failure" if ours else "peer failure")
        elif name != measured:
            # A row that is measured again, with more sides, replaces the earlier one.
            part.add("row", key=what, **result.extra_info, **more, seconds_by_round=result.seconds)


def _uncompiled(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for name in names if "compile" not in name)


# machine ------------------------------------------------------------------------------------------------------------------


def machine(part: Part) -> None:
    """Describe the machine, and measure the rates that other figures are compared with."""
    part.add("machine", **info.describe())
    if shutil.which("nvidia-smi"):
        fields = (
            "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,memory.total,memory.used,power.limit"
        )
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        part.add("nvidia-smi", output=(done.stdout + done.stderr).splitlines())
    device, size = torch.device(part.device), 256 if part.quick else 8192
    source = torch.randn((2**18 if part.quick else 2**28), device=device)
    target = torch.empty_like(source)
    _ceiling(part, "copy", lambda: target.copy_(source), 2.0 * source.numel() * source.element_size())
    for name, dtype in (("bf16 product", torch.bfloat16), ("fp32 product", torch.float32)):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        part.attempt(name, partial(_ceiling, part, name, partial(torch.matmul, a, b), 2.0 * size**3))
    if device.type == "cuda":
        for precision in (sides.INT8, sides.FP8):
            if reason := dispatch.why_not_quantized(precision, device, "auto"):
                part.add("skipped", what=f"{precision} product", why=reason)
                continue
            for name, call in _quantized_products(precision, device):
                what = f"{precision} product, FFN up, {name}"
                part.attempt(what, partial(_ceiling, part, what, call, 2.0 * 32768 * 768 * 3072))


def _quantized_products(precision: str, device: torch.device) -> Iterator[tuple[str, Callable[[], object]]]:
    """The FFN's first product for 32,768 tokens of ALBERT-base on 8-bit operands: torch's (its int8 one without scales of rows)
    and ours (with scales, offsets and the conversion to bfloat16)."""
    from albert_fast.kernels._rounding import round_rows
    from albert_fast.kernels.quantized_encoder import Matrix, quantized_product

    dtype = {sides.INT8: torch.int8, sides.FP8: torch.float8_e4m3fn}[precision]
    ones, zeros = torch.ones(768, device=device), torch.zeros(768, device=device)
    x, weight = (round_rows(torch.randn(n, 768, device=device), ones, zeros, dtype, 768) for n in (32768, 3072))
    sums = weight.values.float().sum(1)
    yield "ours", partial(quantized_product, x, Matrix(weight.values, weight.steps, sums, ones, zeros))
    if precision == sides.INT8:
        yield "torch._int_mm", partial(torch._int_mm, x.values, weight.values.t())
    else:
        scales = {"scale_a": x.steps[:, None], "scale_b": weight.steps[None, :]}
        operands = x.values, weight.values.t()
        yield "torch._scaled_mm", partial(torch._scaled_mm, *operands, **scales, out_dtype=torch.bfloat16)


def _ceiling(part: Part, name: str, call: object, amount: float) -> None:
    """A row of `amount` (bytes or operations) per second, the median of the rounds."""
    rounds = _options(part).rounds
    seconds = interleaved({name: Side(call)}, rounds, pause=0.0, device=part.device)[name]  # type: ignore[arg-type]
    part.add("ceiling", what=name, per_second=amount / statistics.median(seconds), best=amount / min(seconds))


# operators ----------------------------------------------------------------------------------------------------------------


def operators(part: Part) -> None:
    """Measure the operators on 32,768 tokens of ALBERT-base, in bfloat16, then float32; and `encoder` on few tokens.

    Ours alone first, so that a peer's failure cannot lose our figures; then with eager peers; then with compiled ones.
    """
    groups = [(needs, _kept(group)) for needs, group in _operator_groups(part)]
    for _, group in groups:
        part.attempt(f"{group.key} alone", partial(_measure, part, group, (group.backend,)), needs=_least(part, _ALONE))
    for _, group in groups:
        part.attempt(group.key, partial(_measure, part, group, _uncompiled(group.sides())), _least(part, _ATTENTION))
    for needs, group in groups:
        if compiled := sorted(set(group.sides()) - set(_uncompiled(group.sides()))):
            names = (group.backend, *compiled)
            what = f"{group.key} compiled"
            part.attempt(what, partial(_measure, part, group, names, measured=group.backend), _least(part, needs))


def _least(part: Part, needs: float) -> float:
    return 0.0 if part.quick else needs


def _kept(group: OperatorGroup) -> OperatorGroup:
    """The group, with its inputs and expected answer made once for all passes: they take longer than the calls."""
    group.expected = cache(group.expected)  # type: ignore[method-assign]
    group.close = torch.compiler.reset  # type: ignore[method-assign]
    return group


def _operator_groups(part: Part) -> Iterator[tuple[float, OperatorGroup]]:
    device, quick = torch.device(part.device), part.quick
    real = tuple(json.loads(lengths.COMMITTED.read_text())["batches"]["imdb-32"]) * 4
    batches = {"64x512": (512,) * 64, "imdb-128": real, "256x128": (128,) * 256, "64x128": (128,) * 64}
    if quick:
        batches = {"2x16": (16,) * 2, "real-4": (5, 31, 2, 17)}
    heads, head_dim = (2, 16) if quick else (12, 64)
    apart = {"attention", *dispatch.WHOLE_ENCODERS}  # the part `model` measures whole layers, except on few tokens
    fused = [op for op, devices in dispatch.TABLE.items() if set(devices["cuda"]) - {"reference"} and op not in apart]
    fused.sort(key="embedding_projection".__eq__)  # last, since tuning its product takes the compiler longest
    few = ((2, 5),) if quick else ((1, 16), (1, 128), (4, 128))
    sizes = (32, 2, 64, 2) if quick else (768, 12, 3072, 12)
    for rows, columns in few:
        yield _OPERATOR, EncoderGroup((columns,) * rows, sizes, device)
    shapes = GPU_SHAPES | {"gelu_layer_norm": (32768, 768)}  # the width that the target is for
    for dtype in (torch.bfloat16,) if quick else (torch.bfloat16, torch.float32):
        for name, tokens in batches.items():
            for backward in (False, True):
                yield _ATTENTION, AttentionGroup(name, tokens, heads, head_dim, backward, dtype, device)
        for op in fused:
            case = ALL_CASES[op]
            shape = case.small_shapes[-1] if quick else shapes[op]
            for backward in (False, True):
                kind = LinearGeluGroup if op == "linear_gelu" else OperatorGroup
                group = kind(case, case.eager, _shape_name(shape), shape, backward, dtype, device)
                yield _OPERATOR, group


def _shape_name(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# model --------------------------------------------------------------------------------------------------------------------


class _ModelGroup(ModelGroup):
    """A batch that torch.nn's encoder may take part in."""

    def allowed(self, side: str) -> float:
        return allowed(side, self.dtype)


def model(part: Part) -> None:
    """Measure ALBERT-base in bfloat16 on dense batches and real lengths, then ALBERT-large; and peak memory.

    Ours alone on every batch first, so that a peer's failure cannot lose our figures; then with eager peers; then with
    compiled peers, one at a time, those of a target first.
    """
    device = torch.device(part.device)
    dtype = torch.float32 if part.device == "cpu" else torch.bfloat16
    configs = {
        "base": QUICK if part.quick else BASE,
        "large": replace(QUICK, num_hidden_layers=3) if part.quick else LARGE,
    }
    models = {
        name: peers.Peers(RandomModel(name, config), device, dtype, torch.get_num_threads(), part.quick)
        for name, config in configs.items()
    }
    few, all_eager = (FAST, "hf-sdpa", "torch-nested"), (FAST, "hf-eager", "hf-sdpa", "torch-nested")
    questions = [
        ("base", "64x512", all_eager),
        ("base", "64x128", all_eager),
        ("base", "imdb-32", few),
        ("base", "1x128", all_eager),
        ("base", "sst2-32", all_eager),
        ("base", "mixed-32", all_eager),
        ("large", "16x512", few),
    ]
    graphed = "sst2-32" if part.quick else "mixed-32"  # with CUDA graphs too: time must follow tokens
    default, tuned = "hf-compile-default", "hf-compile"
    compiled = [
        ("base", "64x512", default),
        ("base", "64x512", tuned),
        ("base", "64x128", default),
        ("base", "1x128", default),
        ("base", "imdb-32", default),
        ("base", "64x128", tuned),
        ("base", "1x128", tuned),
        ("large", "16x512", default),
    ]
    if part.quick:
        questions = [("base", "2x16", all_eager), ("large", "sst2-32", all_eager)]
        compiled = [("base", "2x16", default), ("base", "2x16", tuned)]

    answer = cache(lambda name, batch: models[name].expected(models[name].batch(batch)))

    def ask(what: str, name: str, batch: str, names: Sequence[str], needs: float, measured: str | None = None) -> None:
        group = _ModelGroup("model", f"{name}-{batch}", Shape(batch, tuple(names)), models[name])
        group.expected = lambda: (answer(name, batch),)  # type: ignore[method-assign]
        tokens = sum(group.batch.lengths)
        measure = partial(_measure, part, group, measured=measured, tokens=tokens)
        part.attempt(f"{group.key} {what}", measure, _least(part, needs))

    for name, batch, _ in questions:
        ask("alone", name, batch, (FAST, f"{FAST}-{sides.GRAPHS}") if batch == graphed else (FAST,), _ALONE)
    for name, batch, names in questions:
        ask("uncompiled", name, batch, names, _EAGER)
    if part.device == "cuda":
        part.attempt("latency of 1x128", partial(_latency, part, models["base"], "1x128"), needs=_ALONE)
    for precision in (sides.INT8, sides.FP8):
        if reason := dispatch.why_not_quantized(precision, device, "auto"):
            part.add("skipped", what=f"model in {precision}", why=reason)
            continue
        for name, batch, _ in questions[:2]:
            ask(precision, name, batch, (FAST, f"{FAST}-{precision}"), _EAGER, measured=FAST)
    dense = questions[0][1]
    for side in all_eager if part.device == "cuda" else ():
        part.attempt(f"memory of {side}", partial(_memory, part, models["base"], dense, side), needs=_EAGER)
    for name, batch, side in compiled:
        ask(side, name, batch, (FAST, side), _TUNED if side == tuned else _COMPILED, measured=FAST)


def _latency(part: Part, model: peers.Peers, name: str) -> None:
    """Time replays of our CUDA graph one at a time, with the weights in the L2 cache: until the call returns, until the GPU is
    done, and the GPU's work alone. With a mask the host first waits for the GPU."""
    batch = model.batch(name)
    fast = ALBERTModel.from_pretrained(model.files(FAST)[0], precision="bf16", device=part.device)
    fast.execution.warmup([(batch.ids.shape[0], batch.ids.shape[1])])
    with torch.inference_mode():
        for what, given in (("no mask", None), ("mask", batch.mask)):
            call = partial(fast, batch.ids, given)
            returned, answered = zip(*(_one_at_a_time(call) for _ in range(_CALLS)), strict=True)
            part.add(
                "latency",
                key=f"latency {name} {what}",
                batch=name,
                what=what,
                plan=explain(fast, batch.ids, given).summary,
                returned=statistics.median(returned),
                answered=statistics.median(answered),
                device=_device_seconds(call) if given is None else None,
            )


def _one_at_a_time(call: Callable[[], object]) -> tuple[float, float]:
    """Seconds until `call` returns, and until the GPU is done."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    returned = time.perf_counter()
    torch.cuda.synchronize()
    return returned - begin, time.perf_counter() - begin


def _device_seconds(call: Callable[[], object]) -> float | None:
    """Seconds of the GPU's work in one call, from calls queued behind other work; None where the GPU was idle before the last."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_BUSY_CYCLES)
    start.record()
    for _ in range(_QUEUED):
        call()
    end.record()
    late = start.query()
    torch.cuda.synchronize()
    return None if late else start.elapsed_time(end) / _QUEUED / 1e3


def _memory(part: Part, model: peers.Peers, name: str, side: str) -> None:
    """Peak memory of one side alone: weights, activations, workspaces."""
    batch = model.batch(name)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    call = model.bind(side, batch)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    part.add("memory", batch=name, side=side, peak_mib=(torch.cuda.max_memory_allocated() - before) / 2**20)


# training -----------------------------------------------------------------------------------------------------------------


def training(part: Part) -> None:
    """Measure a step of masked language modelling under bfloat16 autocast: each side's memory, then times, interleaved."""
    rows, columns = (2, 16) if part.quick else (32, 512)
    config = QUICK if part.quick else BASE
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(lengths.FIRST_ORDINARY_ID, config.vocab_size, (rows, columns), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) >= _MASKED, -100)
    labels[0, 0] = ids[0, 0]
    ids, labels = ids.to(part.device), labels.to(part.device)
    shape = f"base-{rows}x{columns}"
    built: dict[str, Training] = {}
    first: dict[str, float] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = masked_lm(config, Path(folder))
        # Add one side at a time, ours first and the compiled one last, and write rows at once: a kill loses none.
        for name in (FAST, "hf-sdpa", "hf-compile"):
            if name == "hf-compile" and part.left() < _least(part, _COMPILED):
                part.add("skipped", what=name, why=f"{part.left():.0f} s were left")
                continue
            if not part.begin(name):
                continue
            try:
                built[name], peaks[name] = _first_steps(name, checkpoint, ids, labels)
            except Exception as error:  # a peer's failure fails nothing else
                part.fail(name, error, "failure" if name == FAST else "peer failure")
                part.check_gpu(name)
                continue
            sides = {side: Side(training.step) for side, training in built.items()}
            samples = interleaved(sides, _options(part).rounds, pause=0.0, device=part.device)
            for side, seconds in samples.items():
                _training_row(part, side, samples, peaks[side], ids.numel(), shape, seconds)
            first = {side: float(training.losses[0]) for side, training in built.items()}
            last = {side: float(training.losses[-1]) for side, training in built.items()}
            part.add("losses", key="losses", first=first, last=last)
    reference = first.get("hf-sdpa", first.get(FAST, 0.0))
    for name, loss in first.items():
        if not abs(loss - reference) <= _LOSS_TOLERANCE * abs(reference):
            part.fail(name, f"its first loss is {loss}, that of hf-sdpa {reference}")


def _first_steps(name: str, checkpoint: Path, ids: torch.Tensor, labels: torch.Tensor) -> tuple[Training, float]:
    """The side after three steps, and its peak of memory in MiB: weights, optimizer, activations; 0 on a CPU."""
    on_gpu = ids.device.type == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    side = Training(name, checkpoint, ids, labels)
    for _ in range(3):  # the first ones compile, tune, and make the optimizer's state
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        side.step()
    return side, (torch.cuda.max_memory_allocated() - before) / 2**20 if on_gpu else 0.0


def _training_row(
    part: Part,
    name: str,
    samples: Mapping[str, list[float]],
    peak_mib: float,
    tokens: int,
    shape: str,
    seconds: list[float],
) -> None:
    median, row = statistics.median(seconds), f"training/step/bfloat16/{shape}/{name}"
    part.add(
        "row",
        key=row,
        id=row,
        milliseconds=median * 1e3,
        tokens_per_second=tokens / median,
        peak_mib=peak_mib,
        **comparison(name, samples, FAST),
        seconds_by_round=seconds,
    )


# tiles --------------------------------------------------------------------------------------------------------------------


def tiles(part: Part) -> None:
    """Record which tiles the tuner chooses over the default ones, and our time with them, in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        # The kernels read these variables when the first of them starts.
        os.environ |= {"ALBERT_FAST_TUNE": "1", "XDG_CACHE_HOME": folder}
        found = Path(folder, "albert_fast", "tiles.json")
        for _, group in _operator_groups(part):
            if group.dtype == torch.bfloat16:
                part.attempt(group.key, partial(_tuned_row, part, _kept(group)), _least(part, _TUNING))
                chosen = json.loads(found.read_text()) if found.exists() else {}
                part.add("tiles", key="tiles", chosen=chosen)


def _tuned_row(part: Part, group: OperatorGroup) -> None:
    for name, result in group.measure((group.backend,), _options(part)).items():
        if isinstance(result, Exception):
            part.fail(f"{group.key}/{name}, tuned", result)
        else:
            part.add("tuned", id=f"{group.key}/{name}", milliseconds=result.extra_info["milliseconds"])
