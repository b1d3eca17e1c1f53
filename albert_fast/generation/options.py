"""How text is generated, as one checked record."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# Most tokens of a translation where the caller does not say; a sentence has fewer.
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class GenerationOptions:
    """The options of a search; names and meanings are those of transformers' `generate`.

    max_new_tokens: most tokens of a result, the end token counted.
    num_beams: hypotheses that beam search keeps for each source; 1: greedy search, or sampling.
    length_penalty: a hypothesis's score is its log-probability / tokens ** length_penalty; above 0 it favours long ones.
    early_stopping: when beam search ends a source, once num_beams hypotheses are finished. True: at once. False: when no
        unfinished one scores better. "never": when no unfinished one could score better, however long it became.
    do_sample: draw each token, from its probabilities at `temperature`, among the `top_k` likeliest (None: all) and the
        fewest whose probabilities sum to `top_p`.

    Raises:
        ValueError: a value out of its range, or options that contradict each other. TypeError: a value of another type.
    """

    max_new_tokens: int = 128
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "num_beams"):
            _check_count(name, getattr(self, name))
        if self.top_k is not None:
            _check_count("top_k", self.top_k)
        for name in ("length_penalty", "temperature", "top_p"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; do_sample=False takes the likeliest"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(f'early_stopping must be True, False or "never", got {self.early_stopping!r}')
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"do_sample draws one text for each source: num_beams must be 1, got {self.num_beams}")
        if not self.do_sample and (self.temperature, self.top_k, self.top_p) != (1.0, None, 1.0):
            raise ValueError("temperature, top_k and top_p are for sampling: add do_sample=True")
        if self.num_beams == 1 and (self.length_penalty, self.early_stopping) != (1.0, False):
            raise ValueError(
                "length_penalty and early_stopping are for beam search: num_beams must be at least 2, got 1"
            )


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
