"""What a sentence-transformers folder does to a pooled vector: Dense, LayerNorm and Normalize, in float32.

Sources: the classes of these names in `sentence_transformers.models`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.sentence_modules import SentenceModule
from ..checkpoints.weights import load_checkpoint

# The only classes of torch.nn that a config.json may name. Each is made without arguments.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: kind
    for kind in (
        nn.Identity,
        nn.Tanh,
        nn.Sigmoid,
        nn.ReLU,
        nn.ReLU6,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.ELU,
        nn.SELU,
        nn.CELU,
        nn.LeakyReLU,
        nn.Hardtanh,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Softplus,
        nn.Softsign,
        nn.LogSigmoid,
    )
}


def activation(name: Any, where: str) -> nn.Module:
    """The activation that a file names, such as "torch.nn.modules.activation.Tanh"; None means the identity.

    Raises:
        ValueError: a name that is not in ACTIVATIONS; begins with `where`.
    """
    if name is None:
        return nn.Identity()
    package, _, kind = str(name).rpartition(".")
    if kind not in ACTIVATIONS or package not in ("torch.nn", "torch.nn.modules.activation", "torch.nn.modules.linear"):
        raise ValueError(f"{where}: activation {name!r:.100}; known in torch.nn: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[kind]()


class Normalize(nn.Module):
    """Divides each vector by its length."""

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, C) -> (B, C)."""
        return nn.functional.normalize(vectors, dim=-1)


class Dense(nn.Module):
    """A Linear and an activation; with `residual` its input is added, by way of a second Linear where the width changes."""

    def __init__(self, width: int, out: int, bias: bool, act: nn.Module, residual: bool) -> None:
        super().__init__()
        self.linear, self.activation = nn.Linear(width, out, bias=bias), act
        self.residual: nn.Module | None = None
        if residual:
            self.residual = nn.Identity() if width == out else nn.Linear(width, out, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, width) -> (B, out)."""
        result: Tensor = self.activation(self.linear(vectors))
        return result if self.residual is None else result + self.residual(vectors)


class LayerNorm(nn.Module):
    """A LayerNorm over the vector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, vectors: Tensor) -> Tensor:
        """(B, width) -> (B, width)."""
        normal: Tensor = self.norm(vectors)
        return normal


def build(module: SentenceModule, width: int) -> tuple[nn.Module, int]:
    """A step for vectors of `width` numbers, with its weights, and the width of its results.

    Raises:
        ValueError: a module, an option or an activation that is not known, or weights that do not fit; names the module.
        FileNotFoundError: no weights in the module's folder.
    """
    for key in ("module_input_name", "module_output_name"):
        if module.settings.get(key) not in (None, "sentence_embedding"):
            raise ValueError(f"{module.name}: {key} is {module.settings[key]!r:.100}; known: 'sentence_embedding'")
    if module.kind == "Normalize":
        return Normalize(), width
    if module.kind == "Dropout":  # nothing outside of training
        return nn.Identity(), width
    if module.kind == "LayerNorm":
        return _filled(LayerNorm(_size(module, "dimension", width)), module), width
    if module.kind == "Dense":
        _size(module, "in_features", width)
        out = _size(module, "out_features")
        act = activation(module.settings.get("activation_function", "torch.nn.Tanh"), module.name)
        bias, residual = (_flag(module, *option) for option in (("bias", True), ("use_residual", False)))
        return _filled(Dense(width, out, bias, act, residual), module), out
    raise ValueError(
        f"{module.name}: {module.kind} is not applied here; known: Pooling, Dense, LayerNorm, Normalize, Dropout; "
        "pooling= leaves out what follows the encoder"
    )


def _size(module: SentenceModule, key: str, expected: int | None = None) -> int:
    size = module.settings.get(key)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"{module.name}: {key} is {size!r:.100}; expected a number of columns")
    if expected is not None and size != expected:
        raise ValueError(f"{module.name}: {key} is {size}; the vectors before it have {expected} columns")
    return size


def _flag(module: SentenceModule, key: str, default: bool) -> bool:
    value = module.settings.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{module.name}: {key} is {value!r:.100}; expected true or false")
    return value


def _filled(step: nn.Module, module: SentenceModule) -> nn.Module:
    """`step` with the weights of the module's folder, in float32."""
    tensors = load_checkpoint(module.folder, ("model.safetensors", "pytorch_model.bin"))
    wanted = step.state_dict()
    wrong = sorted(wanted.keys() ^ tensors.keys())
    if wrong:
        missing = wrong[0] in wanted
        raise ValueError(
            f"{module.name}: {'lacks' if missing else 'holds'} {wrong[0]!r}{'' if missing else ' besides'}"
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape or not tensor.is_floating_point():
            shape = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"{module.name}: {name!r} is {shape}; expected floats {tuple(wanted[name].shape)}")
    with torch.no_grad():
        for name, parameter in step.named_parameters():
            parameter.copy_(tensors[name])
    return step.eval().requires_grad_(False)
