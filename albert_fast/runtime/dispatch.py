"""Chooses the backend that runs an operator on a device, and gives the reason why another one cannot.

`TABLE` lists for each operator and device the backends in order of preference. `why_not` gives the reason against one. The
first time that an operator runs on less than its first choice, a warning says what is missing and how to get it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from types import ModuleType

import torch

from .registration import is_traced

TABLE: dict[str, dict[str, tuple[str, ...]]] = {
    "embedding_projection": {"cpu": ("cpp", "reference"), "cuda": ("cuda", "reference")},
    "embedding_layer_norm": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "attention": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "bias_gelu": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "linear_gelu": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "add_layer_norm": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "gelu_layer_norm": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "linear_cross_entropy": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    # All layers in one call, for inference; with a gradient a model runs them operator by operator.
    "encoder": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "quantized_encoder": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
}
# A model that cannot run these runs the other operators.
WHOLE_ENCODERS = ("encoder", "quantized_encoder")
BACKENDS = ("cpp", "triton", "cuda", "reference")

# The numbers by which the extension and the CUDA kernels know element types (csrc/layer_schema.h); Triton reads them from the
# tensors.
DTYPE_CODES = {dtype: code for code, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16))}
_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# Operators that take fewer dtypes.
_OP_DTYPES: dict[tuple[str, str], tuple[torch.dtype, ...]] = {(op, "cpp"): (torch.float32,) for op in WHOLE_ENCODERS}
# The dtype of the hidden states, which selects the arithmetic.
_OP_DTYPES["quantized_encoder", "triton"] = (torch.bfloat16,)
_OP_DTYPES["quantized_encoder", "reference"] = (torch.float32, torch.bfloat16)
# GPUs from this compute capability on multiply float8 numbers: Ada, Hopper and later.
_FLOAT8_CAPABILITY = (8, 9)


class BackendUnavailableError(RuntimeError):
    """A backend or precision that was named cannot run here; the message gives the reason and an alternative."""


def _one_thread() -> None:
    # A forked child has no OpenMP threads; a parallel region there would wait for them for ever.
    torch.set_num_threads(1)


# What the extension's schema() must report: orders of tensors, and numbers that Python and C++ both rely on.
_EXPECTED: dict[str, object] = {"dtypes": tuple(str(dtype).removeprefix("torch.") for dtype in DTYPE_CODES)}
# How reasons begin for which nothing falls back to another backend: the user's wish or the installation is wrong.
_WRONG_ISA = "ALBERT_FAST_ISA="
_STALE = "the C++ extension was built from other sources than this Python code"


def expect(**values: object) -> None:
    """Note what the extension's schema() must report. Modules call it when they are imported, before an operator runs."""
    _EXPECTED.update(values)
    _load_extension.cache_clear()


@functools.cache
def _import_extension() -> ModuleType:
    module = importlib.import_module("albert_fast._C")
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_one_thread)
    return module


@functools.cache
def _load_extension() -> tuple[ModuleType | None, str | None]:
    """The extension, or None and the reason why it cannot be used."""
    try:
        module = _import_extension()
    except ImportError as error:
        if str(error).startswith(_WRONG_ISA):
            return None, str(error)
        if importlib.util.find_spec("albert_fast._C") is None:
            return (
                None,
                "the C++ extension is not built: install a C++17 compiler, then `pip install -e .` (or `pip install .`) again",
            )
        return None, f"the C++ extension does not load ({error}): build it again with `pip install -e .`"
    found = module.schema() if hasattr(module, "schema") else {}
    differing = [name for name, value in _EXPECTED.items() if found.get(name) != value]
    if differing:
        return None, f"{_STALE} (they differ in: {', '.join(differing)}): build it again with `pip install -e .`"
    return module, None


def extension() -> ModuleType:
    """`albert_fast._C`. torch is loaded before it, so that both share one OpenMP thread pool.

    Raises:
        BackendUnavailableError: it is not built, does not load, or was built from other sources.
    """
    module, reason = _load_extension()
    if module is None:
        raise BackendUnavailableError(str(reason))
    return module


def has_extension() -> bool:
    """Whether `extension` returns one."""
    return _load_extension()[0] is not None


@functools.cache
def _why_not(op: str, device_type: str, backend: str) -> str | None:
    if backend == "reference":
        return None
    if backend == "cpp":
        return _load_extension()[1] if device_type == "cpu" else f"C++ kernels run on CPU tensors, not on {device_type}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed: `pip install triton` (Linux only)"
        if device_type == "cpu" and os.environ.get("TRITON_INTERPRET", "0") != "1":
            return "Triton kernels need a GPU; on CPU tensors they run only in Triton's interpreter (TRITON_INTERPRET=1), for tests"
        return None
    module, reason = _load_extension()
    if device_type != "cuda":
        return f"CUDA kernels need a GPU, the tensors are on {device_type}"
    if module is None:
        return reason
    if not module.build_info()["cuda"]:
        return "the extension was built without CUDA: put nvcc on the PATH and run `pip install -e .` again"
    return None


def runnable_on(op: str, device_type: str) -> tuple[str, ...]:
    """Every backend that `op` has on `device_type`, best first, Triton's interpreter included on CPU tensors."""
    backends = TABLE[op].get(device_type, ("reference",))
    interpreted = device_type == "cpu" and "triton" in TABLE[op].get("cuda", ())
    return (*backends, "triton") if interpreted else backends


def why_not(op: str, device_type: str, backend: str, dtype: torch.dtype | None = None) -> str | None:
    """Why `backend` cannot run `op` on `device_type` (for activations of `dtype`); None where it can."""
    if backend not in runnable_on(op, device_type):
        return f"{op} has no {backend} kernel for {device_type} tensors"
    dtypes = _OP_DTYPES.get((op, backend), _DTYPES.get(backend))
    if dtype is not None and dtypes is not None and dtype not in dtypes:
        known = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"the {backend} kernel of {op} takes {known}, not {str(dtype).removeprefix('torch.')}"
    return _why_not(op, device_type, backend)


@functools.cache
def resolve(op: str, device_type: str, dtype: torch.dtype, backend: str = "auto") -> str:
    """The backend that runs `op`: the first of the table that can, or the one that `backend` names.

    An operator that has no kernel of that name on any device (embedding_projection has none in Triton) takes its best.

    Raises:
        BackendUnavailableError: the backend asked for cannot run here; the message says why, and what can. On a CPU also:
            ALBERT_FAST_ISA names no instruction set of this machine, or the extension was built from other sources.
    """
    if backend not in ("auto", *BACKENDS):
        raise BackendUnavailableError(f"unknown backend {backend!r}; known: auto, {', '.join(BACKENDS)}")
    named_somewhere = any(backend in backends for backends in TABLE[op].values()) or backend == "reference"
    if backend != "auto" and named_somewhere:
        reason = why_not(op, device_type, backend, dtype)
        if reason is not None:
            raise BackendUnavailableError(
                f"backend={backend!r} cannot run here: {reason}. backend='auto' takes the best that can"
            )
        return backend
    reason = _load_extension()[1]
    if device_type == "cpu" and reason is not None and reason.startswith((_WRONG_ISA, _STALE)):
        raise BackendUnavailableError(reason)
    missing: list[str] = []
    for candidate in TABLE[op].get(device_type, ("reference",)):
        reason = why_not(op, device_type, candidate, dtype)
        if reason is None:
            if missing:
                _say_fall_back(op, device_type, candidate, missing[0])
            return candidate
        missing.append(reason)
    raise AssertionError("the reference runs everywhere")


def _say_fall_back(op: str, device_type: str, chosen: str, reason: str) -> None:
    if device_type == "cpu" and not has_extension():
        _say_no_extension(reason)
        return
    # `resolve` is cached, so each operator says this once a process.
    warnings.warn(
        f"albert_fast: {op} runs on backend '{chosen}': {reason}. `python -m albert_fast.info` shows all.", stacklevel=3
    )


@functools.cache
def _say_no_extension(reason: str) -> None:
    """Warn once a process: the same reason holds for every operator on a CPU."""
    warnings.warn(
        f"albert_fast: models on a CPU run on torch's own operators, which is slower: {reason}. "
        "`python -m albert_fast.info` shows all.",
        stacklevel=4,
    )


def runs_on_torch(op: str, device_type: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether an operator without kernels here runs on torch's fused ones (`ops._torch`), not on its eager reference.

    It does on a CPU in float32 without the extension, with backend "auto", untraced and without autocast.
    """
    if backend != "auto" or device_type != "cpu" or dtype != torch.float32 or is_traced() or has_extension():
        return False
    return not torch.is_autocast_enabled("cpu") and resolve(op, device_type, dtype) == "reference"


def check_backend(backend: str, device_type: str, dtype: torch.dtype) -> None:
    """Raise BackendUnavailableError if a model cannot run on such a device with this `backend`."""
    for op in TABLE:
        if op not in WHOLE_ENCODERS:
            resolve(op, device_type, dtype, backend)


def check_dtype(precision: str, device_type: str, dtype: torch.dtype) -> None:
    """Raise BackendUnavailableError if no kernel on such a device takes `dtype`, in which a model was asked to run."""
    backends = [name for name in TABLE["attention"].get(device_type, ()) if name in _DTYPES]
    if backends and not any(dtype in _DTYPES[name] for name in backends):
        known = ", ".join(str(one).removeprefix("torch.") for one in _DTYPES[backends[0]])
        raise BackendUnavailableError(
            f"precision={precision!r} cannot run here: the kernels for {device_type} tensors take {known}, not "
            f"{str(dtype).removeprefix('torch.')}; take precision='bf16', a GPU (device='cuda'), or backend='reference', "
            "which is slow"
        )


def quantized_dtype(precision: str, device_type: str) -> torch.dtype:
    """The dtype of everything but the rounded weights and their scales in an "int8", "int16" or "fp8" model."""
    return torch.float32 if device_type == "cpu" and precision != "fp8" else torch.bfloat16


def why_not_quantized(precision: str, device: torch.device, backend: str) -> str | None:
    """Why a model cannot run in "int8", "int16" or "fp8" on this device; None where it can."""
    if device.type == "cpu" and precision == "fp8":
        if backend == "reference":  # emulates it
            return None
        if backend == "triton":
            return _why_not("quantized_encoder", "cpu", "triton")
        return "no CPU multiplies float8 numbers; take 'int8', or backend='reference' for what a GPU would compute"
    if device.type == "cpu":
        if backend in ("cuda", "triton"):
            return f"integer kernels for CPUs are in C++, not in {backend}; take backend='auto'"
        return None
    if device.type != "cuda":
        return f"there are kernels for CPUs and for GPUs of NVIDIA, not for {device.type}; take 'bf16' or 'fp32'"
    if precision == "int16":
        return "no GPU multiplies integers of 16 bits, CPUs do; take 'bf16', 'int8' or 'fp8'"
    if precision == "fp8" and backend != "reference":
        capability = torch.cuda.get_device_capability(device)
        if capability < _FLOAT8_CAPABILITY:
            found, least = (".".join(map(str, c)) for c in (capability, _FLOAT8_CAPABILITY))
            return f"float8 products need compute capability {least}, this GPU has {found}; take 'int8' or 'bf16'"
    return None


def check_quantized(precision: str, device: torch.device, backend: str) -> None:
    """Raise BackendUnavailableError if a model cannot run in "int8", "int16" or "fp8" on this device."""
    reason = why_not_quantized(precision, device, backend)
    if reason is not None:
        raise BackendUnavailableError(f"precision={precision!r} cannot run here: {reason}")


def quantized_kernels(precision: str, device_type: str, backend: str) -> tuple[bool, str]:
    """Whether the products of this precision use special instructions; and in a few words which, or what runs instead."""
    if device_type == "cuda" and backend != "reference":
        return True, "tensor cores"
    if precision == "fp8":
        return False, "emulated in float64: slow, for the numbers that a GPU would give"
    module, reason = _load_extension()
    if device_type != "cpu" or module is None:
        return False, f"no integer kernels: {reason or 'the reference was asked for'}"
    isa = module.build_info()["isa"]
    if isa == "avx512_vnni":
        return True, "AVX512-VNNI"
    return False, f"without AVX512-VNNI ({isa}): the kernels are written for it, and gain little or nothing without"


def check_device(device: str | torch.device | None) -> None:
    """Raise BackendUnavailableError for a GPU that does not exist. torch would raise only after the weights were read."""
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        built = "finds no CUDA device" if torch.version.cuda else "is built without CUDA"
        raise BackendUnavailableError(f"device={str(device)!r}: torch {torch.__version__} {built}; take device='cpu'")
