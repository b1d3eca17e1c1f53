"""On CPUs: how long a model with an encoder and a decoder takes to write texts, against transformers and CTranslate2.

Ids are `decoding/fwd/float32/multi30k-<sources>-<search>/<side>`. `hf` is `generate` of transformers' EncoderDecoderModel with
the same weights, whose texts ours must equal. `ctranslate2` has random weights of its own, so only its time counts.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import math
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from shared import sides
from shared.harness import CallGroup, Group, Options, Result, Row
from shared.workers import Worker
from torch import Tensor

from albert_fast.inspect.timing import Side
from albert_fast.testing import data_dir
from albert_fast.testing.seq2seq_pairs import seq2seq_pair
from cpu import peer_sides

pytestmark = [
    pytest.mark.decoding,
    pytest.mark.skipif(torch.cuda.is_available(), reason="measured on CPUs only: hide the GPU from torch"),
]

PEER = peer_sides.TRANSLATOR
SIZES: dict[str, int] = {
    "vocab_size": 8000,
    "embedding_size": 128,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_hidden_groups": 2,
    "num_decoder_layers": 4,
    "num_decoder_groups": 2,
    "max_position_embeddings": 128,
}
QUICK = SIZES | {"vocab_size": 300, "embedding_size": 32, "hidden_size": 64, "intermediate_size": 128}
_NEVER_ENDS = -1e4  # added to the score of the end token: texts of random weights would end anywhere
# Sums in another order may let another word win a near tie, after which the text is another one.
_SHARE_OF_OTHER_TEXTS = 0.1


def lengths(count: int) -> tuple[list[int], int]:
    """Tokens of `count` sources, [CLS] and [SEP] included, and the mean of their targets.

    A word or a mark of Multi30k's first test set is a token; where the texts are absent, the numbers are drawn.
    """
    draw = random.Random(0)
    files = [data_dir() / "Multi30k" / f"test_2016_flickr.{language}.gz" for language in ("en", "de")]
    if all(map(Path.exists, files)):
        pairs = draw.sample(list(zip(*map(_tokens, files), strict=True)), count)
    else:
        pairs = [(max(4, round(draw.gauss(13, 4))), max(4, round(draw.gauss(12, 4)))) for _ in range(count)]
    return [source + 2 for source, _ in pairs], round(sum(target for _, target in pairs) / count) + 1


def _tokens(file: Path) -> list[int]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [len(re.findall(r"\w+|[^\w\s]", line)) for line in lines]


@functools.cache
def _pair(quick: bool) -> tuple[Any, Any]:
    """Ours and transformers' with the same weights. Neither ends a text."""
    pair = seq2seq_pair(**(QUICK if quick else SIZES))
    for model in pair:
        with torch.no_grad():
            model.decoder.generator_lm_head.bias[model.config.eos_token_id] = _NEVER_ENDS
    return pair


class DecodingGroup(CallGroup):
    """Texts of one length for some sources, by every side. All texts are equally long, so no side gains from early ends."""

    bytes_moved = None
    pause = True
    flushes = 1
    warmup = 1
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, count: int, beams: int, options: Options) -> None:
        self.count, self.beams, self.options = count, beams, options
        self.sizes = QUICK if options.quick else SIZES
        self.key = f"decoding/fwd/float32/multi30k-{count}-{'greedy' if beams == 1 else f'beams{beams}'}"
        self.source_lengths, self.length = lengths(count)
        self._workers: list[Worker] = []

    @property
    def operations(self) -> float:
        """Of the products with weights, which are nearly all."""
        width, middle, words = (self.sizes[name] for name in ("hidden_size", "intermediate_size", "vocab_size"))
        embedding, sources = self.sizes["embedding_size"], sum(self.source_lengths)
        encoder = self.sizes["num_hidden_layers"] * (4 * width**2 + 2 * width * middle)
        source_rows = self.sizes["num_decoder_groups"] * 2 * width**2
        decoder = self.sizes["num_decoder_layers"] * (6 * width**2 + 2 * width * middle)
        head = embedding * (width + words)
        written = self.count * self.beams * self.length
        return 2.0 * (sources * (encoder + source_rows) + written * (decoder + head))

    def sides(self) -> tuple[str, ...]:
        return sides.FAST, "hf", PEER

    def why_not(self, side: str) -> str | None:
        if importlib.util.find_spec("transformers") is None:
            return "transformers not installed: pip install 'albert-fast[bench]'"
        return peer_sides.why_not(side, self.options.peer_pythons)

    def ours(self, side: str) -> str:
        return sides.FAST

    def allowed(self, side: str) -> float:
        """As `comparable`: the root of the share of texts that differ."""
        return math.sqrt(_SHARE_OF_OTHER_TEXTS)

    def sources(self) -> list[list[int]]:
        """Random ids of each source."""
        draw = random.Random(1)
        return [[draw.randrange(5, self.sizes["vocab_size"]) for _ in range(n)] for n in self.source_lengths]

    def build(self, side: str) -> Side:
        if side == PEER:
            return Side(self._peer())
        ours, theirs = _pair(self.options.quick)
        rows = [torch.tensor(row) for row in self.sources()]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        how: dict[str, Any] = {"max_new_tokens": self.length, "num_beams": self.beams}
        if side == sides.FAST:
            return Side(lambda: ours.generate(**inputs, **how))
        config = ours.config
        marks = {"decoder_start_token_id": config.decoder_start_token_id, "eos_token_id": config.eos_token_id}
        how |= marks | {"pad_token_id": config.pad_token_id, "do_sample": False}
        return Side(lambda: theirs.generate(**inputs, **how))

    def _peer(self) -> Any:
        found = peer_sides.environment(PEER, self.options.peer_pythons)
        if isinstance(found, str):
            raise RuntimeError(found)
        worker = Worker(found[0], Path(__file__).with_name("ctranslate2_worker.py"))
        self._workers.append(worker)
        names = {"hidden_size": "hidden_size", "intermediate_size": "intermediate_size", "vocab_size": "vocab_size"}
        names |= {"num_heads": "num_attention_heads", "positions": "max_position_embeddings"}
        names |= {"encoder_layers": "num_hidden_layers", "decoder_layers": "num_decoder_layers"}
        request = {"sources": self.sources(), "beams": self.beams, "length": self.length}
        sizes = {name: self.sizes[own] for name, own in names.items()}
        worker.ask(do="load", sizes=sizes, threads=self.options.threads, **request)

        def call() -> Worker:
            worker.ask(do="call")
            return worker

        return call

    def expected(self) -> tuple[Tensor, ...]:
        return (torch.ones(self.count),)

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        """1 for each text that is as it should be, else 0: that of `hf`, or of CTranslate2 any text of the right length."""
        if isinstance(output, Worker):
            return (torch.tensor([float(length == self.length) for length in output.ask(do="lengths")]),)
        return ((output == self._texts).all(1).float(),)

    @functools.cached_property
    def _texts(self) -> Tensor:
        texts: Tensor = self.build("hf").call()
        return texts

    def close(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def measure(self, names: Sequence[str], options: Options) -> dict[str, Result | Exception]:
        """Beside the times: the version that the peer ran with, whose texts no other side's can be compared with."""
        results = super().measure(names, options)
        result = results.get(PEER)
        if isinstance(result, Result):
            result.extra_info["environment"] = peer_sides.version_text(PEER, options.peer_pythons)
            result.extra_info.update(relative_error=math.nan, max_abs_error=math.nan)
        return results


def groups(options: Options) -> Iterator[Group]:
    for count, beams in ((4, 1), (4, 3)) if options.quick else ((1, 1), (32, 1), (1, 4), (32, 4)):
        yield DecodingGroup(count, beams, options)


def test_decoding(row: Row, record: Any) -> None:
    record(row)
