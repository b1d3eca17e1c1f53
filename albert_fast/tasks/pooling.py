"""Pools the states of a text's tokens to one vector, over packed states: no result depends on the other texts of a batch.

Source: `sentence_transformers.models.Pooling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.sentence_modules import SentenceModule

# In the order in which the old form of config.json, one flag for each, joins them.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODES = tuple(_FLAGS.values())


def modes_of(module: SentenceModule) -> tuple[tuple[str, ...], bool]:
    """The modes that a Pooling module joins, and whether the tokens of a prompt take part.

    Raises:
        ValueError: a mode that is not known; names the module.
    """
    given = module.settings
    flags = [name for name in given if name.startswith("pooling_mode_") and given[name] is True]
    stated: Any = given.get("pooling_mode")
    unknown: list[Any]
    if stated is None:
        unknown = [name for name in flags if name not in _FLAGS]
        modes = [mode for flag, mode in _FLAGS.items() if flag in flags] or ["mean"]
    else:
        modes = stated if isinstance(stated, list) and stated else [stated]
        unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ValueError(f"{module.name}: pooling mode {unknown[0]!r:.100}; known: {', '.join(MODES)}")
    include_prompt = given.get("include_prompt", True)
    if not isinstance(include_prompt, bool):
        raise ValueError(f"{module.name}: include_prompt is {include_prompt!r:.100}; expected true or false")
    return tuple(modes), include_prompt


def pool(states: Tensor, lengths: Sequence[int], modes: Sequence[str], skip: int = 0) -> Tensor:
    """Pools each text's tokens in every mode and joins the results.

    Args:
        states: (T, H), the tokens of the B texts one after another, without padding.
        lengths: B numbers of tokens, each at least 1.
        modes: some of MODES. "mean_sqrt_len_tokens" divides the sum by the root of the count; "weightedmean" weights a
            token by its position from 1.
        skip: tokens at each text's beginning that take no part, as those of a prompt. A text's last token always takes part.

    Returns:
        (B, H * modes), float32.
    """
    counts = torch.tensor(lengths, dtype=torch.int64)
    ends = counts.cumsum(0)
    skipped = (counts - 1).clamp(max=skip)
    firsts = ends - counts + skipped
    if skip:
        kept = torch.cat([torch.arange(first, end) for first, end in zip(firsts, ends, strict=True)])
        parts = states.index_select(0, kept.to(states.device)).float()
        counts = counts - skipped
    else:
        parts = states.float()
    device, shape = states.device, (-1, 1)
    sums = _reduced("sum", parts, counts) if {"mean", "mean_sqrt_len_tokens"}.intersection(modes) else parts
    pooled = []
    for mode in modes:
        if mode == "cls":
            one = states.index_select(0, firsts.to(device)).float()
        elif mode == "lasttoken":
            one = states.index_select(0, (ends - 1).to(device)).float()
        elif mode == "max":
            one = _reduced("max", parts, counts)
        elif mode == "weightedmean":
            before = zip(skipped.tolist(), counts.tolist(), strict=True)
            weights = torch.cat([torch.arange(skip + 1, skip + count + 1) for skip, count in before])
            totals = _reduced("sum", weights.float()[:, None], counts)
            one = _reduced("sum", parts * weights.to(device)[:, None], counts) / totals.to(device)
        else:
            divisor = counts.view(shape).to(device).float()
            one = sums / (divisor if mode == "mean" else divisor.sqrt())
        pooled.append(one)
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, 1)


def _reduced(how: str, parts: Tensor, counts: Tensor) -> Tensor:
    """(T, C) -> (B, C): the "sum" or the "max" of each text's rows, in an order that the text's length alone decides."""
    if parts.is_cuda:  # one kernel: a launch for each text would take longer than the encoder
        return torch.segment_reduce(parts, how, lengths=counts.to(parts.device), axis=0)
    rows = parts.split(counts.tolist())
    return torch.stack([row.sum(0) if how == "sum" else row.amax(0) for row in rows])
