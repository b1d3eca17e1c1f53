"""The class of an accelerated stack of layers: a subclass of the stack's own class, with a forward on our kernels."""

from __future__ import annotations

from functools import cache
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..layers.packing import Packing
from ..runtime.registration import is_traced
from .forward import fast_forward, prepared, say_traced, warn_of_original, why_not_reduced
from .plans import Row, at_the_stack, caller_of, described
from .samples import call_arguments
from .state import STATE, Acceleration
from .view import StackView

OWN_FORWARD = "another forward was set on the object, which runs in place of its class's"


class Accelerated(nn.Module):
    """Mixed into the class of a stack."""

    _original_class: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the original forward; zeros at padding unless it is kept."""
        if is_traced():
            say_traced()
            return super().forward(*args, **kwargs)
        answer = fast_forward(self, self._given(args, kwargs))
        if isinstance(answer, str):
            warn_of_original(answer)
            return super().forward(*args, **kwargs)
        return answer

    def explained(self, name: str, module: nn.Module, arguments: dict[str, Any]) -> Row:
        """How a call of `module`, which holds this stack as `name`, would run its layers: a row for `inspect.explain`."""

        def look(*args: Any, **kwargs: Any) -> Row:
            if "forward" in self.__dict__:
                return described(name, OWN_FORWARD, self, layers)
            return described(name, prepared(self, acceleration, self._given(args, kwargs)), self, layers)

        acceleration: Acceleration = self.__dict__[STATE]

        def layers(view: StackView, packing: Packing, hidden: Tensor) -> StackView | str | None:
            if acceleration.reduced is None:
                return None
            return why_not_reduced(acceleration, self, view, packing, hidden) or acceleration.reduced.layers

        row: Row = at_the_stack(caller_of(module, self), self, arguments, look)
        return row

    def call_arguments(self, module: nn.Module, tokenizer: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call of `module`, which holds this stack: texts become what `tokenizer` makes of them."""
        owner = next(inner for inner in module.modules() if self in inner.children())
        return call_arguments(owner, tokenizer, given)

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a call by the names that the original forward gives them."""
        return dict(zip(_parameters(self._original_class), args, strict=False), **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: a pickle names the class that it is made from.
        reduced: Any = super().__reduce_ex__(protocol)
        _, arguments, *rest = reduced
        return _blank, (arguments[0]._original_class, *arguments[1:]), *rest


@cache
def accelerated_class(original: Any) -> type[Accelerated]:
    """The subclass of `original`, under its name, whose forward runs on our kernels."""
    names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(original.__name__, (Accelerated, original), {**names, "_original_class": original})


def _blank(original: Any, *arguments: Any) -> Any:
    """An accelerated stack without state, for pickle and copy."""
    cls = accelerated_class(original)
    return cls.__new__(cls, *arguments)


@cache
def _parameters(original: Any) -> tuple[str, ...]:
    """The names of the arguments of `original`'s forward, in order."""
    return tuple(signature(original.forward).parameters)[1:]


def accelerate_stack(stack: nn.Module, acceleration: Acceleration) -> None:
    """Give `stack` the accelerated class."""
    original: Any = type(stack)
    stack.__dict__[STATE] = acceleration
    stack.__class__ = accelerated_class(original)


def restore_stack(stack: Accelerated) -> None:
    """Give `stack` its own class back."""
    del stack.__dict__[STATE]
    stack.__class__ = stack._original_class
