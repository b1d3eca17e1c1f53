"""Records how the launchers in kernels/ start their Triton kernels, without running any kernel.

The launchers run on tensors without memory while a recorder replaces every kernel. So tile sizes, warps, argument types and
sizes, and the bytes and operations counted from them (costs.py), are those of real calls.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .costs import Cost, by_name, launch_cost, product_cost

# Where an argument is: its position, and for a member of a tuple the member's position too.
Path = tuple[int, ...]
_TYPE_NAMES = {
    torch.bool: "u1",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}


@dataclass(frozen=True)
class Launch:
    """One way in which a launcher starts a Triton kernel; it can be sent to another process."""

    kernel: str  # the operator
    label: str  # the launcher's arguments, then which of the operator's kernels
    tiles: str  # "D64 M128 N64 warps8 stages3"
    module: str
    function: str
    signature: tuple[tuple[str, Any], ...]  # argument -> Triton type, or a tuple of types
    constants: tuple[tuple[Path, Any], ...]  # constexpr argument -> value
    divisible: tuple[Path, ...]  # arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages
    cost: Cost
    flags: tuple[
        tuple[str, Any], ...
    ]  # what selects a branch of the kernel: constants other than sizes, absent operands
    multiplies: bool = False  # whether the kernel multiplies matrices
    wants_tensor_cores: bool = False
    every_chip: bool = False  # whether the short check compiles it for every chip

    def is_for(self, capability: int) -> bool:
        """Whether chips of this compute capability (89 is 8.9) have the number types of the kernel."""
        return capability >= 89 or "fp8" not in str(self.signature)

    @property
    def numbers(self) -> str:
        """The first word of the label: "f32", "tf32", "bf16", "int8" ..."""
        return self.label.split()[0]


@dataclass(frozen=True)
class _Call:
    """One start of a kernel: its arguments by name, the compiler's options, and what it moves and computes."""

    values: dict[str, Any]
    options: dict[str, Any]
    cost: Cost


class _Specialised:
    """The types, constants and divisible arguments of a call, found by the rules of Triton's own launcher."""

    def __init__(self, parameters: list[Any], values: dict[str, Any]) -> None:
        places = {parameter.name: (parameter, position) for position, parameter in enumerate(parameters)}
        self.constants: dict[Path, Any] = {}
        self.divisible: list[Path] = []
        self.signature = [(name, self._type(value, *places[name])) for name, value in values.items()]

    def _type(self, value: Any, parameter: Any, *path: int) -> Any:
        if isinstance(value, tuple):  # the rules for numbers hold in it whatever the kernel's decorator says
            members = [self._type(member, None, *path, place) for place, member in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        fixed_type = parameter is not None and parameter.do_not_specialize
        is_constant = value is None or (parameter is not None and parameter.is_constexpr)
        if is_constant or (type(value) is int and value == 1 and not fixed_type):
            self.constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            kind, aligned = "*" + _TYPE_NAMES[value.dtype], value.data_ptr() % 16 == 0
        elif isinstance(value, float):
            kind, aligned = "fp32", False
        else:
            kind, aligned = "i32" if -(2**31) <= value < 2**31 else "i64", value % 16 == 0 and not fixed_type
        if aligned:
            self.divisible.append(path)
        return kind


class _Recorder:
    """Replaces a Triton kernel and records its calls."""

    def __init__(self, module: str, function: str, original: Any) -> None:
        self.module, self.function, self.original = module, function, original
        self.signature = inspect.signature(original.fn)
        self.calls: list[_Call] = []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self._start

    def _start(self, *args: Any, **kwargs: Any) -> None:
        parameters = self.signature.parameters
        options = {name: value for name, value in kwargs.items() if name not in parameters}
        own = {name: value for name, value in kwargs.items() if name in parameters}
        values = dict(self.signature.bind(*args, **own).arguments)
        self.calls.append(_Call(values, options, launch_cost(self.function, values)))

    def launches(self, kernel: str, label: str, tensor_cores: bool, every_chip: bool) -> Iterator[Launch]:
        label += " " + self.function.removeprefix("_").removeprefix(f"{kernel}_").removesuffix("_kernel")
        # Kernels that multiply matrices have a constant for how many columns they multiply at a time.
        multiplies = any(name.startswith(("CHUNK_", "BLOCK_K")) for name in self.signature.parameters)
        for call in self.calls:
            found = _Specialised(self.original.params, call.values)
            constexprs = [(p.name, call.values[p.name]) for p in self.original.params if p.is_constexpr]
            sizes = [f"{name[-1]}{value}" for name, value in constexprs if name.startswith(("BLOCK_", "CHUNK_"))]
            sizes += [f"{name[4:]}{call.options[name]}" for name in ("num_warps", "num_stages") if name in call.options]
            yield Launch(
                kernel=kernel,
                label=label,
                tiles=" ".join(sizes),
                module=self.module,
                function=self.function,
                signature=tuple(found.signature),
                constants=tuple(found.constants.items()),
                divisible=tuple(found.divisible),
                options=tuple(call.options.items()),
                cost=call.cost,
                flags=_flags(call.values, dict(constexprs)),
                multiplies=multiplies,
                wants_tensor_cores=tensor_cores,
                every_chip=every_chip,
            )


def _flags(values: dict[str, Any], constexprs: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    flags: dict[str, Any] = {f"{name} is absent": value is None for name, value in by_name(values).items()}
    sizes = ("BLOCK", "CHUNK", "COUNT", "CAPACITY", "TF32", "HEAD_DIM", "WIDTH", "STAGES")
    flags |= {name: value for name, value in constexprs.items() if not name.startswith(sizes)}
    for own, padded in (("HEAD_DIM", "BLOCK_D"), ("WIDTH", "BLOCK_E")):
        if own in constexprs:
            flags[f"{own} is padded"] = constexprs[own] != constexprs[padded]
    if "CHUNK_D" in constexprs:
        flags["in chunks"] = constexprs["CHUNK_D"] != constexprs["BLOCK_D"]
    return tuple(flags.items())


@contextmanager
def _recording(modules: list[str], choose: Callable[..., Any]) -> Iterator[list[_Recorder]]:
    """Inside, recorders replace all kernels of these modules, and `choose` replaces the tuner."""
    from ...kernels import _tuning

    recorders = []
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(_tuning, "choose", choose))
        for module in modules:
            owner = importlib.import_module(module)
            for name in [name for name in vars(owner) if name.endswith("_kernel")]:
                recorders.append(_Recorder(module, name, getattr(owner, name)))
                patches.enter_context(mock.patch.object(owner, name, recorders[-1]))
        yield recorders


def record(
    kernel: str,
    label: str,
    modules: list[str],
    run: Callable[[], Any],
    tensor_cores: bool,
    every_chip: bool = False,
) -> list[Launch]:
    """All launches that `run()` makes of kernels of these modules, with every candidate if the tuner has a choice."""
    with _recording(modules, _start_all_but_the_last) as recorders:
        run()
    return [launch for recorder in recorders for launch in recorder.launches(kernel, label, tensor_cores, every_chip)]


def _start_all_but_the_last(_kernel: str, _key: Any, candidates: list[Any], start: Callable[[Any], Any]) -> Any:
    """Replaces the tuner, whose caller starts the candidate that it gets."""
    for tiles in candidates[:-1]:
        start(tiles)
    return candidates[-1]


def _first_candidate(_kernel: str, _key: Any, candidates: list[Any], _start: Callable[[Any], Any]) -> Any:
    return candidates[0]


class _LibraryProducts(TorchDispatchMode):
    """Inside, the costs of torch's own matrix products are recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.costs.append(product_cost(args, out))
        return out


def launch_costs(run: Callable[[], Any]) -> list[Cost]:
    """The cost of every kernel of ours and every library product that `run()` starts, with the tiles used without tuning.

    All tensors may be on the meta device, except the ends of sequences: nothing is computed.
    """
    from ... import kernels

    modules = [f"{kernels.__name__}.{name}" for _, name, _ in pkgutil.iter_modules(kernels.__path__)]
    with _recording(modules, _first_candidate) as recorders, _LibraryProducts() as products:
        run()
    return [call.cost for recorder in recorders for call in recorder.calls] + products.costs
