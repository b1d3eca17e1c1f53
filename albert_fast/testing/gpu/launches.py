"""How the launchers in kernels/ start their Triton kernels: recorded on tensors without memory, for the compile check.

Each launcher runs with a recorder in the kernel's place, so tile sizes, warps, argument types and sizes, and with them what
a launch moves and computes (costs.py), are those of real calls.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .costs import Cost, launch_cost, product_cost
from .tf32 import tf32_asked_for

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# Of products: "tf32" is float32 where torch is asked for TF32.
NUMBERS = {**DTYPES, "tf32": torch.float32}
# Tensors of launches have no memory behind them: 64 sequences of 512 tokens would take gigabytes.
_empty = partial(torch.empty, device="meta")
_ROWS = 32768
# One of every tile that `row_tiles` gives, and one that is no multiple of 16 elements.
_ROW_WIDTHS = (128, 200, 256, 512, 1024, 2048, 4096, 8192, 16384)
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


# (label, a call of the launcher, whether the kernel should use tensor cores)
Case = tuple[str, Callable[[], Any], bool]


@dataclass(frozen=True)
class Launch:
    """One way in which a launcher starts a Triton kernel; everything in it can be sent to another process."""

    kernel: str  # the operator
    label: str  # the launcher's arguments, then which of the operator's kernels
    tiles: str  # "D64 M128 N64 warps8 stages3"
    module: str
    function: str
    signature: tuple[tuple[str, str], ...]  # argument -> Triton type
    constants: tuple[tuple[str, Any], ...]  # constexpr argument -> value
    divisible: tuple[int, ...]  # positions of arguments that are multiples of 16
    options: tuple[tuple[str, int], ...]  # num_warps, num_stages
    cost: Cost
    wants_tensor_cores: bool = False

    def is_for(self, capability: int) -> bool:
        """Whether chips of such a compute capability (89 is 8.9) have the numbers that it computes with."""
        return capability >= 89 or not any("fp8" in kind for _, kind in self.signature)


@dataclass(frozen=True)
class _Call:
    """One start of a kernel: its parameters' values by name, what is for the compiler, and what it takes."""

    values: dict[str, Any]
    options: dict[str, Any]
    cost: Cost


class _Recorder:
    """Stands in for a Triton kernel and writes down how it is started."""

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

    def launches(self, kernel: str, label: str, tensor_cores: bool) -> Iterator[Launch]:
        """The calls, specialised as Triton would for their arguments."""
        label += " " + self.function.removeprefix("_").removeprefix(f"{kernel}_").removesuffix("_kernel")
        parameters = {p.name: p for p in self.original.params}
        for call in self.calls:
            signature, constants, divisible = [], [], []
            for position, (name, value) in enumerate(call.values.items()):
                if isinstance(value, torch.Tensor):
                    kind, aligned = "*" + _TYPE_NAMES[value.dtype], value.data_ptr() % 16 == 0
                elif isinstance(value, float):
                    kind, aligned = "fp32", False
                elif (
                    value is None
                    or parameters[name].is_constexpr
                    or (value == 1 and not parameters[name].do_not_specialize)
                ):
                    kind, aligned = "constexpr", False
                    constants.append((name, value))
                else:
                    kind = "i32" if -(2**31) <= value < 2**31 else "i64"
                    aligned = value % 16 == 0 and not parameters[name].do_not_specialize
                signature.append((name, kind))
                if aligned:
                    divisible.append(position)
            sizes = [f"{name[-1]}{value}" for name, value in constants if name.startswith(("BLOCK_", "CHUNK_"))]
            sizes += [f"{name[4:]}{call.options[name]}" for name in ("num_warps", "num_stages") if name in call.options]
            yield Launch(
                kernel, label, " ".join(sizes), self.module, self.function, tuple(signature), tuple(constants), tuple(divisible),
                tuple(call.options.items()), call.cost, tensor_cores,
            )  # fmt: skip


@contextmanager
def _recording(modules: list[str], choose: Callable[..., Any]) -> Iterator[list[_Recorder]]:
    """Recorders in the place of all kernels of these modules, `choose` in that of the tuner."""
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


def record(kernel: str, label: str, modules: list[str], run: Callable[[], Any], tensor_cores: bool) -> list[Launch]:
    """All launches that `run()` makes of kernels of these modules, with every candidate where the tuner has a choice."""
    with _recording(modules, _start_all_but_the_last) as recorders:
        run()
    return [launch for recorder in recorders for launch in recorder.launches(kernel, label, tensor_cores)]


def _start_all_but_the_last(_kernel: str, _key: Any, candidates: list[Any], start: Callable[[Any], Any]) -> Any:
    # In the tuner's place; its caller starts the last.
    for tiles in candidates[:-1]:
        start(tiles)
    return candidates[-1]


def _first_candidate(_kernel: str, _key: Any, candidates: list[Any], _start: Callable[[Any], Any]) -> Any:
    return candidates[0]


class _LibraryProducts(TorchDispatchMode):
    """Inside, what torch's own products take is written down."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.costs.append(product_cost(args, out))
        return out


def launch_costs(run: Callable[[], Any]) -> list[Cost]:
    """Of every kernel of ours and every library product that `run()` starts, with the tiles that run untuned.

    On tensors of the meta device, but for the ends of sequences: nothing is computed.
    """
    from ... import kernels

    modules = [f"{kernels.__name__}.{name}" for _, name, _ in pkgutil.iter_modules(kernels.__path__)]
    with _recording(modules, _first_candidate) as recorders, _LibraryProducts() as products:
        run()
    return [call.cost for recorder in recorders for call in recorder.calls] + products.costs


def _with(numbers: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, which multiplies as these NUMBERS say."""

    def asking() -> None:
        with tf32_asked_for():
            run()

    return asking if numbers == "tf32" else run


def _attention_launches() -> Iterator[Case]:
    from ...kernels.attention import attention_fwd
    from ...kernels.attention_bwd import attention_bwd

    sequences = 64
    order = _empty(sequences, dtype=torch.int32)

    def run(dtype: torch.dtype, head_dim: int, lengths: tuple[int, int], dropout_p: float) -> None:
        heads = 3 if head_dim % 2 else 12  # rows of an odd length: their slices begin anywhere
        q, k, v = _empty(sequences * max(lengths), 3 * heads * head_dim, dtype=dtype).chunk(3, dim=1)
        q, ends = q[: sequences * lengths[0]], torch.arange(sequences + 1, dtype=torch.int32)
        schedule = (ends * lengths[0], ends * lengths[1], order if dropout_p else None, *lengths)
        out, _ = attention_fwd(q, k, v, *schedule, heads, 0.125, dropout_p, 1)
        attention_bwd(out, q, k, v, q, k, v, *schedule, heads, 0.125, dropout_p, 1)

    # Few queries, short sequences, long ones. Dropout takes the most registers, so every tile is compiled with it.
    few, short, long = (16, 512), (64, 64), (512, 512)
    tiles = [(d, lengths, 0.1) for d in (16, 32, 64, 128, 256) for lengths in (few, short, long)]
    padded = [(d, long, 0.1) for d in (37, 80)]
    plain = [
        (64, long, 0.0),
        (128, long, 0.0),
    ]  # the released models'; and tiles that are too large beside dropout's mask
    # float16 takes the same tiles as bfloat16, and no more registers: one kernel of each kind.
    chosen = {"f32": [*tiles, *padded], "bf16": [*tiles, *padded, *plain], "f16": [(64, short, 0.1)]}
    chosen["tf32"] = [*tiles, padded[1], plain[1]]
    for name, dtype in NUMBERS.items():
        for head_dim, lengths, dropout_p in chosen[name]:
            label = f"{name} D{head_dim} Q{lengths[0]} K{lengths[1]}" + (" dropout" if dropout_p else "")
            yield label, _with(name, partial(run, dtype, head_dim, lengths, dropout_p)), name != "f32"


def _add_layer_norm_launches() -> Iterator[Case]:
    from ...kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd

    cases = [(n, 0.1) for n in _ROW_WIDTHS] + [(n, 0.0) for n in (312, 768, 4096, 16384)]
    for name, dtype in DTYPES.items():
        for n, p in cases if name != "f16" else [(768, 0.0)]:
            x, vector, stats = _empty(_ROWS, n, dtype=dtype), _empty(n, dtype=dtype), _empty(_ROWS)
            label = f"{name} N{n}" + (" dropout" if p else "")
            yield label, partial(add_layer_norm_fwd, x, vector, x, vector, vector, 1e-12, p, 1), False
            yield label, partial(add_layer_norm_bwd, x, x, vector, x, vector, stats, stats, p, 1), False


def _gelu_layer_norm_launches() -> Iterator[Case]:
    from ...kernels.gelu_layer_norm import gelu_layer_norm_bwd, gelu_layer_norm_fwd

    cases = [(n, "gelu_erf") for n in _ROW_WIDTHS] + [(128, "gelu_tanh"), (128, "relu")]
    for name, dtype in DTYPES.items():
        for n, act in cases if name != "f16" else [(128, "gelu_tanh")]:
            x, vector, stats = _empty(_ROWS, n, dtype=dtype), _empty(n, dtype=dtype), _empty(_ROWS)
            yield f"{name} N{n} {act}", partial(gelu_layer_norm_fwd, x, vector, vector, vector, 1e-12, act), False
            yield f"{name} N{n} {act}", partial(gelu_layer_norm_bwd, x, x, vector, vector, stats, stats, act), False


def _bias_gelu_launches() -> Iterator[Case]:
    from ...kernels.bias_gelu import bias_gelu_bwd, bias_gelu_fwd

    plain = [(3072, "gelu_tanh", 0.0), (3072, "gelu_erf", 0.0), (3072, "relu", 0.0), (1250, "gelu_erf", 0.0)]
    # Dropout where registers are scarcest: bfloat16 has most elements in flight, and tanh's slope most terms.
    chosen = {"f32": plain, "bf16": [*plain, (3072, "gelu_tanh", 0.1)], "f16": [plain[0], plain[-1]]}
    for name, dtype in DTYPES.items():
        for n, act, p in chosen[name]:
            x, bias = _empty(_ROWS, n, dtype=dtype), _empty(n, dtype=dtype)
            label = f"{name} N{n} {act}" + (" dropout" if p else "")
            yield label, partial(bias_gelu_fwd, x, bias, act, p, 1), False
            yield label, partial(bias_gelu_bwd, x, x, bias, act, p, 1), False
    x = _empty(_ROWS, 3072, dtype=torch.bfloat16)  # behind linear_gelu's product, which has the bias
    yield "bf16 N3072 gelu_tanh no bias", partial(bias_gelu_fwd, x, None, "gelu_tanh"), False
    yield "bf16 N3072 gelu_tanh no bias", partial(bias_gelu_bwd, x, x, None, "gelu_tanh"), False


def _linear_gelu_launches() -> Iterator[Case]:
    from ...kernels._matmul import matmul_tiles
    from ...kernels.linear_gelu import start_route

    def start(numbers: str, width: int, act: str, keep_sums: bool, tiles: dict[str, int]) -> None:
        shapes = ((_ROWS, width), (3072, width), 3072)
        x, weight, bias = (_empty(shape, dtype=NUMBERS[numbers]) for shape in shapes)
        start_route(x, weight, bias, act, keep_sums, tiles, numbers == "tf32")

    # The sums beside the output and erf take the most registers, so every tile is compiled with them; then what runs by
    # default, and the tiny model's width, of which no step along K is a divisor.
    for name, dtype in NUMBERS.items():
        tiles = matmul_tiles(32768, 3072, dtype, name == "tf32")
        cases = [(768, "gelu_erf", True, tile) for tile in tiles] if name != "f16" else []
        cases += [(768, "gelu_tanh", False, tiles[0])]
        cases += [(312, "gelu_erf", True, tiles[0])] if name == "bf16" else []
        for width, act, keep_sums, tile in cases:
            label = f"{name} K{width} {act}" + (" sums" if keep_sums else "")
            yield label, partial(start, name, width, act, keep_sums, tile), name != "f32"


def _linear_cross_entropy_launches() -> Iterator[Case]:
    from ...kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd

    def run(dtype: torch.dtype, width: int) -> None:
        # The vocabulary of the released models, and 15 % of the tokens.
        weight, bias = _empty(30000, width, dtype=dtype), _empty(30000, dtype=dtype)
        x, labels = _empty(4915, width, dtype=dtype), _empty(4915, dtype=torch.int64)
        loss, row_max, row_sum = linear_cross_entropy_fwd(x, weight, bias, labels)
        linear_cross_entropy_bwd(loss, x, weight, bias, labels, row_max, row_sum)

    # One of every tile, and one that is padded.
    widths = (16, 32, 64, 128, 200, 256, 512, 1024)
    for name, dtype in NUMBERS.items():
        for width in widths if name != "f16" else [128]:
            yield f"{name} E{width}", _with(name, partial(run, dtype, width)), name != "f32"


def _graph_inputs_launches() -> Iterator[Case]:
    from ...kernels._graph_inputs import graph_inputs

    batch, length = 64, 512
    static = _empty(3, batch * length, dtype=torch.int64)
    ends, lengths = _empty(batch + 1, dtype=torch.int32), _empty(batch, dtype=torch.int64)

    def run(ids_dtype: torch.dtype, mask_dtype: torch.dtype | None, packed: bool) -> None:
        ids, indices = _empty(batch, length, dtype=ids_dtype), _empty(batch * length, dtype=torch.int64)
        rows, sizes = (ids, length, 1), ((batch, length), (batch * length, batch))
        if mask_dtype is not None:
            flags = (_empty(batch, length, dtype=mask_dtype), length, 1)
            graph_inputs(rows, rows, rows, flags, lengths, None, indices, ends, static, ends, *sizes)
        else:
            given, written = (ends, None) if packed else (None, ends)
            graph_inputs(rows, rows, rows, None, None, given, None, written, static, ends, *sizes)

    long, short = torch.int64, torch.int32
    yield "i64 dense", partial(run, long, None, False), False
    yield "i64 masked", partial(run, long, long, False), False
    yield "i64 packed", partial(run, long, None, True), False
    yield "i32 masked by bool", partial(run, short, torch.bool, False), False


def _encoder_launches() -> Iterator[Case]:
    from ...kernels.encoder import encoder_fwd
    from ...ops.schema import WEIGHTS, sizes_of

    def run(dtype: torch.dtype, tokens: int, heads: int, head_dim: int, asked: bool) -> None:
        width = heads * head_dim
        weights = [_empty(*sizes_of(letters, width, 4 * width), dtype=dtype) for letters in WEIGHTS.values()]
        cu_seqlens, rows = torch.tensor([0, tokens], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        wanted = (rows, cu_seqlens) if asked else (None, None)
        hidden = _empty(tokens, width, dtype=dtype)
        encoder_fwd(hidden, weights, [0], cu_seqlens, *wanted, heads, 0.125, 1e-12, "gelu_tanh")

    # Every tile of products, with the released models' heads and with the largest, whole and padded; rows asked for.
    chosen = {"f32": [(16, 64, False), (128, 128, True)], "bf16": [(16, 128, True), (128, 64, False), (128, 80, True)]}
    chosen["tf32"] = chosen["f32"]
    for name, cases in chosen.items():
        for tokens, head_dim, asked in cases:
            label = f"{name} T{tokens} D{head_dim}" + (" rows" if asked else "")
            start = partial(run, NUMBERS[name], tokens, 12 if head_dim == 64 else 8, head_dim, asked)
            yield label, _with(name, start), name != "f32"


def _quantized_encoder_launches() -> Iterator[Case]:
    from ...kernels._rounding import Rounded, add_layer_norm_rounded, bias_gelu_rounded, round_rows
    from ...kernels.quantized_encoder import Matrix, quantized_product

    def product(dtype: torch.dtype, n: int, k: int, biased: bool) -> None:
        x = Rounded.empty(_ROWS, k, dtype, torch.device("meta"))
        matrix = Matrix(_empty(n, k, dtype=dtype), _empty(n), _empty(n), _empty(k), _empty(k))
        quantized_product(x, matrix, _empty(n) if biased else None)

    def rows(dtype: torch.dtype, n: int, rounding: bool = True) -> None:
        x, norm = _empty(_ROWS, n, dtype=torch.bfloat16), _empty(n, dtype=torch.bfloat16)
        vector = _empty(n)
        rounded = vector if rounding else None
        add_layer_norm_rounded(x, vector, x, norm, norm, 1e-12, rounded, rounded, dtype, n)
        if rounding:
            round_rows(x, vector, vector, dtype, n)

    for name, dtype in {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.items():
        yield f"{name} N2304 K768 bias", partial(product, dtype, 2304, 768, True), True
        yield f"{name} N768", partial(rows, dtype, 768), False
        for n in (3072, 8192):
            x, vector = _empty(_ROWS, n, dtype=torch.bfloat16), _empty(n)
            yield f"{name} N{n}", partial(bias_gelu_rounded, x, vector, "gelu_tanh", vector, vector, dtype, n), False
    yield "int8 N768 K3072", partial(product, torch.int8, 768, 3072, False), True
    yield "int8 N4096", partial(rows, torch.int8, 4096), False
    x, vector = _empty(_ROWS, 16384, dtype=torch.bfloat16), _empty(16384)
    yield "int8 N16384", partial(round_rows, x, vector, vector, torch.int8, 16384), False
    yield "last layer N768", partial(rows, torch.int8, 768, False), False


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": _attention_launches,
    "add_layer_norm": _add_layer_norm_launches,
    "gelu_layer_norm": _gelu_layer_norm_launches,
    "bias_gelu": _bias_gelu_launches,
    "linear_gelu": _linear_gelu_launches,
    "linear_cross_entropy": _linear_cross_entropy_launches,
    "graph_inputs": _graph_inputs_launches,
    "encoder": _encoder_launches,
    "quantized_encoder": _quantized_encoder_launches,
}


def recorded_launches(kernel: str) -> list[Launch]:
    """Every different launch of an operator's Triton kernels: all tile sizes, dtypes and flags of its launchers.

    Raises:
        RuntimeError: Triton runs as an interpreter in this process and compiles nothing.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets kernels in this process and compiles none")
    from ... import kernels

    own = (kernel, f"{kernel}_bwd")
    names = [name for _, name, _ in pkgutil.iter_modules(kernels.__path__) if name in own or name.startswith("_")]
    modules = [f"{kernels.__name__}.{name}" for name in names]
    different: dict[tuple[Any, ...], Launch] = {}
    for label, run, tensor_cores in CASES[kernel]():
        for launch in record(kernel, label, modules, run, tensor_cores):
            # Kernels that multiply have a constant for how many columns at a time; others of the same operator do not.
            if not any(name.startswith(("CHUNK_", "BLOCK_K")) for name, _ in launch.constants):
                launch = replace(launch, wants_tensor_cores=False)
            key = (launch.function, launch.signature, launch.constants, launch.divisible, launch.options)
            different.setdefault(key, launch)
    return list(different.values())
