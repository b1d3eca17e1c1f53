"""Which backend runs which operator where, and why not another.

`TABLE` is the whole truth: for each operator and device, the backends in order of preference. Each backend has a `why not`
function; nothing falls back in silence: the first time an operator runs on less than its first choice, a warning says what
is missing and how to get it.
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
    "attention": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "bias_gelu": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "linear_gelu": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "add_layer_norm": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "gelu_layer_norm": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "linear_cross_entropy": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    # All layers in one call, where no gradient is wanted; elsewhere a model runs them operator by operator.
    "encoder": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
    "quantized_encoder": {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")},
}
# Models that cannot have these run the others.
WHOLE_ENCODERS = ("encoder", "quantized_encoder")
BACKENDS = ("cpp", "triton", "cuda", "reference")

# The extension and the CUDA kernels know element types by number; Triton reads them off the tensors.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_DTYPES = {
    "cpp": (torch.float32, torch.bfloat16),
    "triton": (torch.float32, torch.bfloat16, torch.float16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# Operators that know fewer.
_OP_DTYPES: dict[tuple[str, str], tuple[torch.dtype, ...]] = {(op, "cpp"): (torch.float32,) for op in WHOLE_ENCODERS}
# Of its hidden states: they tell whose arithmetic it is.
_OP_DTYPES["quantized_encoder", "triton"] = (torch.bfloat16,)
_OP_DTYPES["quantized_encoder", "reference"] = (torch.float32, torch.bfloat16)
# What multiplies float8 numbers: Ada, Hopper and later.
_FLOAT8_CAPABILITY = (8, 9)


class BackendUnavailableError(RuntimeError):
    """A backend or precision was asked for by name that cannot run here; the message gives the reason and the alternative."""


def _one_thread() -> None:
    # OpenMP's threads do not exist in a forked child, and a parallel region there waits for them for ever.
    torch.set_num_threads(1)


@functools.cache
def _load_extension() -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module("albert_fast._C")
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_one_thread)
        return module, None
    except ImportError as error:
        if str(error).startswith("ALBERT_FAST_ISA="):
            return None, str(error)
        if importlib.util.find_spec("albert_fast._C") is None:
            return (
                None,
                "the C++ extension is not built: install a C++17 compiler, then `pip install -e .` (or `pip install .`) again",
            )
        return None, f"the C++ extension does not load ({error}): build it again with `pip install -e .`"


def extension() -> ModuleType:
    """`albert_fast._C`, loaded after torch so that both share one OpenMP thread pool.

    Raises:
        BackendUnavailableError: it is not built, or does not load.
    """
    module, reason = _load_extension()
    if module is None:
        raise BackendUnavailableError(str(reason))
    return module


def has_extension() -> bool:
    """Whether `extension` finds one."""
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
    """The backend that runs `op`: the first of the table that can, or the one asked for by name.

    An operator that has no kernel of the name asked for anywhere (embedding_projection has none in Triton) takes its best.

    Raises:
        BackendUnavailableError: the backend asked for cannot run here; says why, and what can. ALBERT_FAST_ISA names no
            instruction set of this machine.
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
    if device_type == "cpu" and (_load_extension()[1] or "").startswith("ALBERT_FAST_ISA="):
        raise BackendUnavailableError(str(_load_extension()[1]))
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
    """The same reason holds for every operator on a CPU: it is said once a process."""
    warnings.warn(
        f"albert_fast: models on a CPU run on torch's own operators, which is slower: {reason}. "
        "`python -m albert_fast.info` shows all.",
        stacklevel=4,
    )


def runs_on_torch(op: str, device_type: str, dtype: torch.dtype, backend: str) -> bool:
    """Whether an operator without kernels here runs on torch's fused ones (`ops._torch`), not on its eager reference.

    So it is on a CPU in float32 without the extension, where no backend is asked for by name, nothing is traced and
    autocast is off.
    """
    return (
        backend == "auto" and device_type == "cpu" and dtype == torch.float32 and not is_traced()
        and not has_extension() and not torch.is_autocast_enabled("cpu")
        and resolve(op, device_type, dtype) == "reference"
    )  # fmt: skip


def check_backend(backend: str, device_type: str, dtype: torch.dtype) -> None:
    """Raise BackendUnavailableError where a model cannot run as `backend` on such a device."""
    for op in TABLE:
        if op not in WHOLE_ENCODERS:
            resolve(op, device_type, dtype, backend)


def quantized_dtype(precision: str, device_type: str) -> torch.dtype:
    """The dtype of everything but the rounded weights and their scales in an "int8", "int16" or "fp8" model."""
    return torch.float32 if device_type == "cpu" and precision != "fp8" else torch.bfloat16


def why_not_quantized(precision: str, device: torch.device, backend: str) -> str | None:
    """Why a model cannot run in "int8", "int16" or "fp8" there; None where it can."""
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
    """Raise BackendUnavailableError where a model cannot run in "int8", "int16" or "fp8" there; says what it can."""
    reason = why_not_quantized(precision, device, backend)
    if reason is not None:
        raise BackendUnavailableError(f"precision={precision!r} cannot run here: {reason}")


def quantized_kernels(precision: str, device_type: str, backend: str) -> tuple[bool, str]:
    """Whether instructions for such products are used, and which, or what instead, in a few words."""
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
    """BackendUnavailableError for a GPU that is not there; torch's own words come after the weights have been read."""
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        built = "finds no CUDA device" if torch.version.cuda else "is built without CUDA"
        raise BackendUnavailableError(f"device={str(device)!r}: torch {torch.__version__} {built}; take device='cpu'")
