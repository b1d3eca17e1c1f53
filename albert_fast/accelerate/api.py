"""`accelerate` and `restore`: the stacks of layers in a model, whatever holds it, get another class, or their own back."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from ..quantization.rounding import ROUNDED
from ..runtime import dispatch
from ..runtime.user_warnings import warn_user
from . import families
from .families import Family
from .forward import no_kernel
from .reduced import FLOATS, PRECISIONS, ReducedLayers, float_layers
from .samples import rounded_layers
from .stacks import OWN_FORWARD, Accelerated, accelerate_stack, restore_stack
from .state import Acceleration
from .view import StackView, Unsupported

Model = TypeVar("Model")
PADDING = ("zeros", "keep")

# Unsupported architectures, and why our layers do not compute them.
_OTHERS = {
    "mpnet": "a bias is added to the attention scores",
    "deberta": "positions are added to the attention scores",
    "deberta-v2": "positions are added to the attention scores",
    "t5": "a bias is added to the attention scores",
    "modernbert": "positions rotate queries and keys",
    "nomic_bert": "positions rotate queries and keys",
    "xlm-roberta-xl": "the norms come before the products",
    "roberta-prelayernorm": "the norms come before the products",
    "mobilebert": "layers have bottlenecks",
    "squeezebert": "products are convolutions",
}


def accelerate(model: Model, precision: str = "fp32", calibration: Any = None, *, padding: str = "zeros") -> Model:
    """Run the encoder layers of `model` on fused kernels, in place.

    The model keeps its classes, parameters, state_dict and methods; `restore` undoes it.

    Args:
        model: a model of transformers (Albert, Bert, Roberta, XLMRoberta, Camembert, DistilBert or Electra, with any head), or
            whatever holds one: a SentenceTransformer, a CrossEncoder, a peft model, a pipeline.
        precision: of inference. "fp32": the model's own parameters, whatever their dtype. "bf16" or "fp16": a copy of the
            layers. "int16", "int8" or "fp8": a rounded copy. Training, and calls that may ask for a gradient, take the
            model's own.
        calibration: texts or pairs of texts, if `model` has a tokenizer, or batches as its tokenizer returns them, to fit
            the rounding to.
            Without any, int8 is fitted to random ids.
        padding: what stands in the last hidden states at padding: "zeros", or "keep" for what transformers computes there.
            It is kept where a part of `model` is known to read it.

    Returns:
        `model`.

    Raises:
        TypeError: no model. ValueError: no encoder that is known, or one that our layers do not compute; names what is
        known and why. Or layers without their model, to be rounded. BackendUnavailableError: a precision that this machine
        does not run. The model is as it was.
    """
    check_arguments(precision, padding)
    if calibration is not None and precision not in ROUNDED:
        raise ValueError(f"calibration is for {', '.join(ROUNDED)}; precision={precision!r} takes none")
    module = module_of(model)
    found = stacks_in(module)
    if not found and any(hasattr(inner, "execution_state") for inner in module.modules()):
        raise ValueError(f"{type(model).__name__} is a model of albert_fast: it runs on kernels as it is")
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no encoder that is known{_reason(module)}. Known: {families.known()}"
        )
    refused = {name: reason for name, stack, family in found if (reason := _why_not(stack, family)) is not None}
    if len(refused) == len(found):
        raise ValueError("; ".join(f"{type(model).__name__}: {name}: {reason}" for name, reason in refused.items()))
    for name, reason in refused.items():
        warn_user(f"albert_fast: {name} is left as it is: {reason}")
    readers, tokenizer = _readers_of_padding(module), getattr(model, "tokenizer", None)
    made = []
    for name, stack, family in found:
        if name not in refused:
            reduced = _reduced(module, stack, family, precision, calibration, tokenizer)
            made.append((stack, Acceleration(family, "keep" if stack in readers else padding, reduced)))
    for stack, acceleration in made:  # only now, so that an error changes nothing
        if isinstance(stack, Accelerated):
            restore_stack(stack)
        accelerate_stack(stack, acceleration)
    return model


def _reduced(
    module: nn.Module, stack: nn.Module, family: Family, precision: str, calibration: Any, tokenizer: Any
) -> ReducedLayers | None:
    """The layers of `stack` in `precision`; None for the model's own."""
    if precision == "fp32":
        return None
    try:
        if precision in FLOATS:
            if (reason := no_kernel(next(stack.parameters()).device.type, FLOATS[precision])) is not None:
                raise dispatch.BackendUnavailableError(f"precision={precision!r} cannot run here: {reason}")
            return float_layers(stack, family, precision)
        owner = next((inner for inner in module.modules() if stack in inner.children()), None)
        return rounded_layers(owner, stack, family, precision, calibration, tokenizer)
    except Unsupported as error:
        raise ValueError(f"precision={precision!r}: {error}") from None


def check_arguments(precision: str, padding: str) -> None:
    """ValueError for an argument of `accelerate` that is none of its choices."""
    for name, value, choices in (("padding", padding, PADDING), ("precision", precision, PRECISIONS)):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def restore(model: Model) -> Model:
    """Give the encoder layers of `model` their own forward back. Parameters were never changed.

    Returns:
        `model`. One that was not accelerated stays as it is.

    Raises:
        TypeError: no model.
    """
    for stack in module_of(model).modules():
        if isinstance(stack, Accelerated):
            restore_stack(stack)
    return model


def module_of(model: object) -> nn.Module:
    """The module that `model` is, or holds as `model`, as pipelines and cross-encoders do.

    Raises:
        TypeError: neither.
    """
    held = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    if not isinstance(held, nn.Module):
        raise TypeError(f"expected a model, or an object that holds one as `model`, got {type(model).__name__}")
    return held


def stacks_in(module: nn.Module) -> list[tuple[str, nn.Module, Family]]:
    """(name, stack, family) of every known stack."""
    found = ((name, inner, families.family_of(inner)) for name, inner in module.named_modules())
    return [(name, inner, family) for name, inner, family in found if family is not None]


def _why_not(stack: nn.Module, family: Family) -> str | None:
    """Why our layers do not compute what `stack` does; None where they do."""
    own: Any = stack._original_class if isinstance(stack, Accelerated) else type(stack)
    if own.forward is not families.stack_class(family).forward:
        return f"{own.__name__} has a forward of its own"
    if "forward" in stack.__dict__:
        return OWN_FORWARD
    parameters = list(stack.parameters())
    if any(parameter.is_meta for parameter in parameters):
        return "its parameters are on the meta device: load the model first"
    if len({parameter.device for parameter in parameters}) > 1:
        return "its parameters are on several devices"
    try:
        StackView(stack, family)
    except Unsupported as error:
        return str(error)
    return None


def _readers_of_padding(module: nn.Module) -> set[nn.Module]:
    """The stacks around which something reads every column, padding too."""
    return {part for inner in module.modules() if _reads_padding(inner) for part in inner.modules()}


def _reads_padding(holder: nn.Module) -> bool:
    """Whether `holder` reads columns of padding in the last hidden states of the layers inside it."""
    if type(holder).__name__.endswith("ForQuestionAnswering"):
        return True  # its softmax runs over every column
    if getattr(holder, "query_expansion", None) is not None:
        return True  # sentence-transformers' ColBERT: vectors of padding are a part of the query
    for child in holder.children():
        # The expansion of queries can be switched on later, so that a MultiVectorEncoder always counts.
        if type(child).__name__ == "MultiVectorMask":
            return True
        # ELECTRA's summary: the last column, the mean of all columns, or a chosen one.
        if getattr(child, "summary_type", "first") != "first":
            return True
    return False


def _reason(module: nn.Module) -> str:
    """Why a model of another architecture is not known, in parentheses."""
    for inner in module.modules():
        kind = getattr(getattr(inner, "config", None), "model_type", None)
        if kind in _OTHERS:
            return f" ({kind}: {_OTHERS[kind]})"
    for inner in module.modules():  # the outermost list of equal modules is the one of layers
        if isinstance(inner, nn.ModuleList) and len({type(layer) for layer in inner}) == 1:
            return f" (its layers are of the class {type(inner[0]).__name__}, which is not known)"
    return " (it has no list of layers)"
