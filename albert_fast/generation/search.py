"""Greedy search, sampling and beam search over a model that scores the next token of several texts at a time."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .options import GenerationOptions

_NEVER = -1.0e9  # transformers' score of what must not be chosen


class Writer(Protocol):
    """The texts so far, one for each row of the batch; at the start, one for each source."""

    def scores(self, tokens: Tensor) -> Tensor:
        """Append tokens (B,) int64 to the texts; returns the scores (B, V) of each text's next token."""

    def continue_from(self, parents: list[int]) -> None:
        """Go on with texts of which text i continues what was text parents[i]; those that nothing continues are dropped."""


def generate(
    writer: Writer, sources: int, start: int, end: int, options: GenerationOptions, device: torch.device
) -> list[list[int]]:
    """The tokens of the text that is written for each source, up to and with the token `end`, without `start`.

    Args:
        sources: how many there are. start, end: ids of the first and the last token of a text.

    Raises:
        ValueError: more beams than the vocabulary has words for.
    """
    if sources == 0:
        return []
    first = torch.full((sources,), start, dtype=torch.int64, device=device)
    if options.num_beams > 1:
        return _beam_search(writer, first, end, options)
    return _one_by_one(writer, first, end, options)


def _one_by_one(writer: Writer, tokens: Tensor, end: int, options: GenerationOptions) -> list[list[int]]:
    """Greedy search or sampling. A text leaves the batch when it ends."""
    texts: list[list[int]] = [[] for _ in range(len(tokens))]
    running = list(range(len(tokens)))  # the text of each row
    for _ in range(options.max_new_tokens):
        scores = writer.scores(tokens)
        tokens = drawn_tokens(scores, options) if options.do_sample else scores.argmax(-1)
        ids = tokens.tolist()
        for text, token in zip(running, ids, strict=True):
            texts[text].append(token)
        left = [row for row, token in enumerate(ids) if token != end]
        if not left:
            break
        if len(left) < len(running):
            writer.continue_from(left)
            running = [running[row] for row in left]
            tokens = tokens[torch.tensor(left, device=tokens.device)]
    return texts


def drawn_tokens(scores: Tensor, options: GenerationOptions) -> Tensor:
    """Scores (B, V) -> a token (B,) drawn for each text."""
    scores = scores.float() / options.temperature
    if options.top_k is not None and options.top_k < scores.shape[1]:
        scores = scores.masked_fill(scores < scores.topk(options.top_k).values[:, -1:], -torch.inf)
    if options.top_p < 1:
        ordered, order = scores.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # of the likelier ones; 0 for the likeliest
        scores = scores.masked_fill((before >= options.top_p).scatter(1, order, before >= options.top_p), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


def _beam_search(writer: Writer, tokens: Tensor, end: int, options: GenerationOptions) -> list[list[int]]:
    """transformers' beam search, except that a source leaves the batch when its result is certain.

    For each source, B of them still running, there are `beams` running hypotheses (one at the start), the likeliest first, and
    up to `beams` finished ones, the best first. Of a step's likeliest 2 x beams continuations, those among the first `beams`
    that end join the finished ones, and the likeliest that do not end go on.
    """
    beams, device, longest = options.num_beams, tokens.device, options.max_new_tokens
    results: list[list[int]] = [[] for _ in range(len(tokens))]
    sources = torch.arange(len(tokens), device=device)  # of each group of beams
    logs = torch.zeros(len(tokens), 1, device=device)  # log-probabilities of the running hypotheses
    texts = torch.zeros(len(tokens), 1, 0, dtype=torch.int64, device=device)
    best = torch.full((len(tokens), beams), _NEVER, device=device)  # scores of the finished ones
    finished = torch.zeros(
        len(tokens), beams, 0, dtype=torch.int64, device=device
    )  # after its end, a text is filled with `end`
    is_finished = torch.zeros(len(tokens), beams, dtype=torch.bool, device=device)
    among_first = torch.arange(2 * beams, device=device) < beams
    for length in range(1, longest + 1):
        scores = writer.scores(tokens)
        words, width = scores.shape[1], logs.shape[1]
        if words < 2 * beams:
            raise ValueError(f"num_beams {beams} needs a vocabulary of {2 * beams} words, this one has {words}")
        # A row's own likeliest are enough: more of one row are never chosen.
        top, words_of = scores.float().log_softmax(-1).topk(2 * beams)
        candidates = (top.unflatten(0, (-1, width)) + logs[:, :, None]).flatten(1)
        top, at = candidates.topk(2 * beams)
        parents, ids = at // (2 * beams), words_of.unflatten(0, (-1, width)).flatten(1).gather(1, at)
        longer = torch.cat([_rows(texts, parents), ids[:, :, None]], 2)
        ends = (ids == end) | (length == longest)

        value = top / length**options.length_penalty
        value = value.masked_fill(~(ends & among_first), _NEVER)
        best, order = torch.cat([best, value], 1).topk(beams)
        finished = _rows(torch.cat([F.pad(finished, (0, 1), value=end), longer], 1), order)
        is_finished = torch.cat([is_finished, ends & among_first], 1).gather(1, order)

        logs, order = top.masked_fill(ends, 2 * _NEVER).topk(beams)
        texts, parents, ids = _rows(longer, order), parents.gather(1, order), ids.gather(1, order)
        done = _is_done(logs, best, is_finished, length, options)
        _record(results, sources[done], finished[done, 0], end)
        left = (~done).nonzero()[:, 0]
        if len(left) == 0:
            break
        rows = left[:, None] * width + parents[left]
        writer.continue_from(rows.flatten().tolist())
        sources, logs, texts, best, finished, is_finished = (
            t[left] for t in (sources, logs, texts, best, finished, is_finished)
        )
        tokens = ids[left].flatten()
    return results


def _rows(texts: Tensor, chosen: Tensor) -> Tensor:
    """texts (B, N, L), chosen (B, M) -> (B, M, L)."""
    return texts.gather(1, chosen[:, :, None].expand(-1, -1, texts.shape[2]))


def _is_done(logs: Tensor, best: Tensor, is_finished: Tensor, length: int, options: GenerationOptions) -> Tensor:
    """(B,) bool: the sources whose result no running hypothesis changes any more."""
    full = is_finished.all(1)
    if length == options.max_new_tokens or options.early_stopping is True:
        return full | (length == options.max_new_tokens)
    could_be_longest = options.early_stopping == "never" and options.length_penalty > 0
    final = options.max_new_tokens if could_be_longest else length
    return full & (logs[:, 0] / final**options.length_penalty <= best[:, -1])


def _record(results: list[list[int]], sources: Tensor, texts: Tensor, end: int) -> None:
    """Store texts (N, L), which end with the first `end` or fill L, as the results of `sources` (N,)."""
    for source, ids in zip(sources.tolist(), texts.tolist(), strict=True):
        results[source] = ids[: ids.index(end) + 1] if end in ids else ids
