"""How the launchers in kernels/ start their Triton kernels: recorded on small CPU tensors, for the compile check.

Each launcher runs with a recorder in the kernel's place, so tile sizes, warps and argument types are those of real calls.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# One of every tile that `row_tiles` gives, and one that is no multiple of 16 elements.
_ROW_WIDTHS = (128, 200, 256, 512, 1024, 2048, 4096, 8192, 16384)
_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


# (label, a call of the launcher, whether the kernel should use tensor cores)
Case = tuple[str, Callable[[], Any], bool]


@dataclass(frozen=True)
class Launch:
    """One way in which a launcher starts a Triton kernel; everything in it can be sent to another process."""

    kernel: str  # the operator
    label: str
    tiles: str  # "D64 M128 N64 warps8"
    module: str
    function: str
    signature: tuple[tuple[str, str], ...]  # argument -> Triton type
    constants: tuple[tuple[str, Any], ...]  # constexpr argument -> value
    divisible: tuple[int, ...]  # positions of arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages
    wants_tensor_cores: bool = False


class _Recorder:
    """Stands in for a Triton kernel and writes down how it is started."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((args, kwargs))


def record(kernel: str, label: str, module: str, function: str, run: Callable[[], Any], tensor_cores: bool) -> Launch:
    """The one launch that `run()` makes of `module.function`, specialised as Triton would for these arguments."""
    (launch,) = _record(kernel, lambda _: label, [(module, function)], run, tensor_cores)
    return launch


def record_all(kernel: str, label: str, run: Callable[[], Any], tensor_cores: bool) -> list[Launch]:
    """Every launch that `run()` makes of the kernels of operator `kernel` and of those that all share.

    What a kernel does stands behind the label: "fwd", "bwd", "column_sums".
    """
    modules = [f"albert_fast.kernels.{name}" for name in (kernel, "_common")]
    kernels = [
        (module, name)
        for module in modules
        for name in vars(importlib.import_module(module))
        if name.startswith("_") and name.endswith("_kernel")
    ]
    launches = _record(
        kernel, lambda name: f"{label} {name[1:-7].removeprefix(kernel + '_')}", kernels, run, tensor_cores
    )
    # Among several kernels, those that multiply have a constant for how many columns at a time.
    return [
        replace(
            launch, wants_tensor_cores=tensor_cores and any(name.startswith("CHUNK_") for name, _ in launch.constants)
        )
        for launch in launches
    ]


def _record(
    kernel: str,
    label_of: Callable[[str], str],
    kernels: list[tuple[str, str]],
    run: Callable[[], Any],
    tensor_cores: bool,
) -> list[Launch]:
    """The launches of `kernels`, each (module, function), that `run()` makes, in the order of `kernels`."""
    recorders = {place: _Recorder() for place in kernels}
    with ExitStack() as stack:
        originals = {place: getattr(importlib.import_module(place[0]), place[1]) for place in kernels}
        for place, recorder in recorders.items():
            stack.enter_context(mock.patch.object(importlib.import_module(place[0]), place[1], recorder))
        run()
    return [
        _launch(kernel, label_of(place[1]), place, originals[place], args, kwargs, tensor_cores)
        for place, recorder in recorders.items()
        for args, kwargs in recorder.calls
    ]


def _launch(
    kernel: str,
    label: str,
    place: tuple[str, str],
    original: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    tensor_cores: bool,
) -> Launch:
    """One call of the Triton kernel `original`, which is `place`, (module, function)."""
    parameters = {p.name: p for p in original.params}
    options = {name: kwargs.pop(name) for name in list(kwargs) if name not in parameters}
    values = inspect.Signature(
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in parameters]
    ).bind(*args, **kwargs)
    signature, constants, divisible = [], [], []
    for position, (name, value) in enumerate(values.arguments.items()):
        if isinstance(value, torch.Tensor):
            kind, aligned = "*" + _TYPE_NAMES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind, aligned = "fp32", False
        elif parameters[name].is_constexpr or (value == 1 and not parameters[name].do_not_specialize):
            kind, aligned = "constexpr", False
            constants.append((name, value))
        else:
            kind = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0 and not parameters[name].do_not_specialize
        signature.append((name, kind))
        if aligned:
            divisible.append(position)
    sizes = [f"{name[-1]}{value}" for name, value in constants if name.startswith(("BLOCK_", "CHUNK_"))]
    tiles = " ".join([*sizes, f"warps{options['num_warps']}"])
    return Launch(
        kernel, label, tiles, *place, tuple(signature), tuple(constants), tuple(divisible),
        tuple(options.items()), tensor_cores,
    )  # fmt: skip


def _attention_launches() -> Iterator[Case]:
    from ..kernels.attention import attention_fwd

    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)

    def run(dtype: torch.dtype, head_dim: int, max_seqlen: int, dropout_p: float) -> None:
        q, k, v = torch.empty(4, 3 * 12 * head_dim, dtype=dtype).chunk(3, dim=1)
        attention_fwd(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, 12, 0.125, dropout_p, 1)

    # Dropout takes the most registers, so every tile is compiled with it; 26 (the tiny model's), 80 and 200 are padded.
    sizes = [(d, s) for d in (16, 32, 64, 128, 256) for s in (16, 64, 512)]
    cases = [(d, s, 0.1) for d, s in [*sizes, (26, 512), (80, 512), (200, 512)]]
    plain = [(d, s, 0.0) for d, s in sizes if d in (32, 64, 128)]  # the released models' sizes
    # float16 takes the same tiles as bfloat16.
    chosen = {"f32": [*cases, (64, 512, 0.0)], "bf16": [*cases, *plain], "f16": [(d, 512, 0.0) for d in (32, 64, 128)]}
    for name, dtype in DTYPES.items():
        for head_dim, max_seqlen, dropout_p in chosen[name]:
            label = f"{name} D{head_dim} S{max_seqlen}" + (" dropout" if dropout_p else "")
            yield label, partial(run, dtype, head_dim, max_seqlen, dropout_p), dtype.itemsize == 2


def _add_layer_norm_launches() -> Iterator[Case]:
    from ..kernels.add_layer_norm import add_layer_norm_fwd

    cases = [(n, 0.1) for n in _ROW_WIDTHS] + [(n, 0.0) for n in (312, 768, 4096, 16384)]
    for name, dtype in DTYPES.items():
        for n, p in cases if name != "f16" else [(768, 0.0)]:
            x, vector = torch.empty(2, n, dtype=dtype), torch.empty(n, dtype=dtype)
            arguments = (x, vector, x, vector, vector, 1e-12, p, 1)
            label = f"{name} N{n}" + (" dropout" if p else "")
            yield label, partial(add_layer_norm_fwd, *arguments), False


def _gelu_layer_norm_launches() -> Iterator[Case]:
    from ..kernels.gelu_layer_norm import gelu_layer_norm_fwd

    cases = [(n, "gelu_erf") for n in _ROW_WIDTHS] + [(128, "gelu_tanh"), (128, "relu")]
    for name, dtype in DTYPES.items():
        for n, act in cases if name != "f16" else [(128, "gelu_tanh")]:
            x, vector = torch.empty(2, n, dtype=dtype), torch.empty(n, dtype=dtype)
            arguments = (x, vector, vector, vector, 1e-12, act)
            yield f"{name} N{n} {act}", partial(gelu_layer_norm_fwd, *arguments), False


def _bias_gelu_launches() -> Iterator[Case]:
    from ..kernels.bias_gelu import bias_gelu_fwd

    for name, dtype in DTYPES.items():
        for n, act in [(3072, "gelu_tanh"), (3072, "gelu_erf"), (3072, "relu"), (1250, "gelu_erf")]:
            arguments = (torch.empty(2, n, dtype=dtype), torch.empty(n, dtype=dtype), act)
            yield f"{name} N{n} {act}", partial(bias_gelu_fwd, *arguments), False


def _linear_cross_entropy_launches() -> Iterator[Case]:
    from ..kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd

    def run(dtype: torch.dtype, width: int) -> None:
        # The vocabulary of the released models.
        weight, bias = torch.empty(30000, width, dtype=dtype), torch.empty(30000, dtype=dtype)
        x, labels = torch.empty(77, width, dtype=dtype), torch.empty(77, dtype=torch.int64)
        loss, row_max, row_sum = linear_cross_entropy_fwd(x, weight, bias, labels)
        linear_cross_entropy_bwd(loss, x, weight, bias, labels, row_max, row_sum)

    # One of every tile, and one that is padded.
    widths = (16, 32, 64, 128, 200, 256, 512, 1024)
    for name, dtype in DTYPES.items():
        for width in widths if name != "f16" else [128]:
            yield f"{name} E{width}", partial(run, dtype, width), dtype.itemsize == 2


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": _attention_launches,
    "add_layer_norm": _add_layer_norm_launches,
    "gelu_layer_norm": _gelu_layer_norm_launches,
    "bias_gelu": _bias_gelu_launches,
    "linear_cross_entropy": _linear_cross_entropy_launches,
}


def recorded_launches(kernel: str) -> list[Launch]:
    """Every different launch of an operator's Triton kernels: all tile sizes, dtypes and flags of its launchers.

    Raises:
        RuntimeError: Triton runs as an interpreter in this process and compiles nothing.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets kernels in this process and compiles none")
    different: dict[tuple[Any, ...], Launch] = {}
    for label, run, tensor_cores in CASES[kernel]():
        for launch in record_all(kernel, label, run, tensor_cores):
            same = (launch.function, launch.signature, launch.constants, launch.divisible, launch.options)
            different.setdefault(same, launch)
    return list(different.values())
