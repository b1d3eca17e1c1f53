"""Calls every registered operator with one wrong argument: each call must raise a named error or give the right result.

tests/test_hostile_calls.py runs them, and .ci/sanitize runs them under sanitizers. A call goes to torch.ops.albert_fast.<name>,
without the checks of the public functions. The right result is that of the reference backend for the same arguments.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layers import packing, wanted  # noqa: F401  (they register operators too)
from ..runtime.dispatch import BackendUnavailableError
from .case import Inputs
from .cases import ALL_CASES

# Errors that a wrong call may raise. torch raises NotImplementedError for kinds of tensors that an operator has no kernel for.
ERRORS = (ValueError, TypeError, IndexError, NotImplementedError, BackendUnavailableError)

# Small shapes in the form of the cases, and options other than the case's first ones.
_SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bias_gelu": ((5, 19), {"dropout_p": 0.2}),
    "linear_gelu": ((5, 12, 19), {}),
    "add_layer_norm": ((6, 19), {"dropout_p": 0.2}),
    "gelu_layer_norm": ((6, 19), {}),
    "linear_cross_entropy": ((6, 12, 150), {"labelled": 0.7}),
    "embedding_layer_norm": ((7, 19, 30, 9, 2), {"dropout_p": 0.1}),
    "embedding_projection": ((7, 12, 19, 30, 9, 2), {"dropout_p": 0.1}),
    "attention": (((3, 0, 5, 2), (3, 4, 5, 0), 2, 12), {}),
    "encoder": (((3, 5, 0, 2), 24, 2, 40, 2, 3), {"wanted": True}),
    "quantized_encoder": (((3, 5, 0, 2), 24, 2, 40, 2, 3), {"wanted": True}),
}
# Arguments of a backward that its forward returned -> their index in the result.
_SAVED = {
    "add_layer_norm": {"mean": 1, "rstd": 2},
    "gelu_layer_norm": {"mean": 1, "rstd": 2},
    "embedding_layer_norm": {"mean": 1, "rstd": 2},
    "attention": {"lse": 1},
    "linear_cross_entropy": {"row_max": 1, "row_sum": 2},
    "linear_gelu": {"sums": 1},
}
_DEFAULTS = {
    "backend": "auto",
    "dropout_p": 0.0,
    "seed": None,
    "sequence_order": None,
    "inputs_embeds": None,
    "padding_idx": -1,
    "position_padding_idx": -1,
    "wanted_rows": None,
    "cu_wanted": None,
    "max_seqlen": 64,
    "max_wanted": 64,
    "need_x": True,
    "need_weight": True,
}


def _arguments(operator: Any, inputs: Inputs) -> Inputs:
    return {
        a.name: inputs[a.name] if a.name in inputs else _DEFAULTS[a.name] for a in operator.default._schema.arguments
    }


def valid_calls(dtype: torch.dtype = torch.float32) -> dict[str, Inputs]:
    """The arguments by name of one valid call of each registered operator that has a kernel."""
    generator, calls = torch.Generator().manual_seed(5), {}
    operators = torch.ops.albert_fast
    for name, (shape, options) in _SHAPES.items():
        inputs = ALL_CASES[name].make_inputs(shape, dtype, "cpu", generator, **options)
        forward = getattr(operators, f"{name}_fwd")
        calls[f"{name}_fwd"] = _arguments(forward, inputs)
        results = forward(**calls[f"{name}_fwd"])
        results = results if isinstance(results, tuple) else (results,)
        if hasattr(operators, f"{name}_bwd"):
            out = results[0]
            saved = {key: results[index] for key, index in _SAVED.get(name, {}).items()}
            grad = torch.randn(out.shape, generator=generator).to(out.dtype)
            calls[f"{name}_bwd"] = _arguments(getattr(operators, f"{name}_bwd"), {**inputs, **saved, "grad": grad})
    calls["linear_gelu_inference"] = {
        key: calls["linear_gelu_fwd"][key] for key in ("x", "weight", "bias", "act", "backend")
    }
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        calls["linear"] = {key: calls["linear_gelu_fwd"][key] for key in ("x", "weight", "bias")}
        calls["linear_weight_gradient"] = {key: calls["linear_gelu_bwd"][key] for key in ("grad", "x")}
    calls["pack_indices"] = {"mask": torch.rand((3, 7), generator=generator) < 0.6}
    ends = calls["encoder_fwd"]["cu_seqlens"]
    calls["select_rows"] = {"flags": torch.rand(int(ends[-1]), generator=generator) < 0.5, "cu_seqlens": ends}
    return calls


# Ways to damage a tensor -----------------------------------------------------------------------------------------------------


def _strided(x: Tensor) -> Tensor:
    """The same numbers, with a gap after each in memory."""
    return torch.stack([x, torch.full_like(x, 7)], dim=-1)[..., 0]


def _negated(x: Tensor) -> Tensor:
    """The same numbers, as a tensor whose negation torch has not carried out yet."""
    return torch._neg_view(-x) if x.is_floating_point() else x


def _released(x: Tensor, kept_bytes: int = 0) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(kept_bytes)
    return x


def _other_numbers(x: Tensor, rng: random.Random) -> Tensor:
    if x.is_floating_point():
        return x * rng.choice([0.0, float("nan"), float("inf"), 1e25, -1e38])
    if x.dtype == torch.bool or not x.numel():
        return ~x if x.dtype == torch.bool else x
    kinds = (
        lambda: x.flip(0),
        lambda: x - 1,
        lambda: x + 1,
        lambda: -x,
        lambda: torch.full_like(x, rng.choice([-(2**31), 2**31 - 1, 1000, -1])),
        lambda: (
            x[torch.randint(0, len(x), (len(x),), generator=torch.Generator().manual_seed(rng.randrange(99)))]
            if x.dim()
            else x
        ),
        lambda: x * 100,
        lambda: torch.zeros_like(x),
    )
    return rng.choice(kinds)()


def _first_dim(x: Tensor, change: int) -> Tensor:
    if x.dim() == 0:
        return x.expand(2)
    return x[: max(0, len(x) + change)] if change < 0 else torch.cat([x, x[:change]])


_DTYPES = (
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.int8,
    torch.bool,
    torch.complex64,
)
TENSORS: dict[str, Callable[[Tensor, random.Random], Any]] = {
    "strided": lambda x, rng: _strided(x),
    "lazily negated": lambda x, rng: _negated(x),
    "one element, expanded": lambda x, rng: x.flatten()[:1].reshape([1] * x.dim()).expand(x.shape) if x.numel() else x,
    "transposed": lambda x, rng: x.t() if x.dim() == 2 else x,
    "shorter": lambda x, rng: _first_dim(x, -1),
    "longer": lambda x, rng: _first_dim(x, 1),
    "empty": lambda x, rng: x[:0] if x.dim() else x.new_empty(0),
    "narrower": lambda x, rng: x[..., :-1] if x.dim() else x,
    "flat": lambda x, rng: x.flatten(),
    "of one dimension more": lambda x, rng: x[None],
    "of no dimension": lambda x, rng: x.flatten()[0] if x.numel() else x.new_zeros(()),
    "of another dtype": lambda x, rng: x.to(rng.choice(_DTYPES)),
    "of other numbers": _other_numbers,
    "on meta": lambda x, rng: x.to("meta"),
    "sparse": lambda x, rng: x.to_sparse() if x.dim() else x,
    "of released memory": lambda x, rng: _released(x),
    "of shrunk memory": lambda x, rng: _released(x, x.nbytes // 2),
    "nested": lambda x, rng: torch.nested.nested_tensor([x, x]) if x.dim() and x.is_floating_point() else x,
    "oneDNN's": lambda x, rng: x.to_mkldnn() if x.dtype == torch.float32 and x.dim() and x.numel() else x,
}
_NUMBERS = {
    int: (0, -1, 1, 5, 7, 2**31, -(2**62), 2**40),
    float: (float("nan"), float("inf"), 0.0, -1.0, 1.0, 0.5, 1e300),
    str: ("", "relu", "swish", "int16", "fp8", "reference", "é"),
    bool: (True, False),
}


def _damage(value: Any, rng: random.Random) -> tuple[str, Any]:
    """What was done to the argument, and the wrong argument."""
    if isinstance(value, Tensor):
        kind = rng.choice(list(TENSORS))
        return kind, TENSORS[kind](value, rng)
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        if rng.random() < 0.2:
            return "list of another length", rng.choice([[], value[:-1], value + value[:1], value[1:], value * 2])
        at = rng.randrange(len(value))
        kind, damaged = _damage(value[at], rng)
        return f"[{at}] {kind}", [*value[:at], damaged, *value[at + 1 :]]
    if isinstance(value, list):
        return "order", rng.choice([[], [len(value)], [-1], [2**40], [0] * 5, value[::-1]])
    if value is None:
        return "given", torch.zeros(3, dtype=rng.choice([torch.int32, torch.int64, torch.float32]))
    return "value", rng.choice(_NUMBERS[type(value)])


def hostile_calls(seed: int, count: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, str, Inputs]]:
    """(operator, what is wrong, arguments) of `count` calls of each operator, the same for the same seed."""
    rng, calls = random.Random(seed), []
    for name, arguments in valid_calls(dtype).items():
        for _ in range(count):
            key = rng.choice(list(arguments))
            kind, damaged = _damage(arguments[key], rng)
            calls.append((name, f"{key}: {kind}", {**arguments, key: damaged}))
    return calls


def run(name: str, arguments: Inputs) -> tuple[Tensor, ...] | Exception:
    """The results of a call, or the error that it raised among those that it may."""
    try:
        results = getattr(torch.ops.albert_fast, name)(**arguments)
    except ERRORS as error:
        return error
    except RuntimeError as error:
        if "with meta Tensors" not in str(error):  # torch's message if the size of a result depends on numbers
            raise
        return error
    return results if isinstance(results, tuple) else (results,)
