"""Writes texts with CTranslate2 in that library's own environment; bench_decoding.py starts it and asks.

The model is a transformer of the sizes that are asked for, with random weights. Nothing of this environment but
shared/workers.py is imported. Requests are the methods of `Peer`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as shared.<name>

from shared.workers import serve

_MARKS = ("<unk>", "<s>", "</s>")  # the ids 0 to 2 of CTranslate2's vocabulary


class Peer:
    """A model, and the call that is timed."""

    def __init__(self) -> None:
        self._call: Callable[[], Any] | None = None
        self._answer: Any = None

    def load(self, sizes: dict[str, int], sources: list[list[int]], beams: int, length: int, threads: int) -> None:
        """Calls then write `length` tokens for each of `sources`, ids of the vocabulary."""
        import ctranslate2

        words = [*_MARKS, *(str(number) for number in range(len(_MARKS), sizes["vocab_size"]))]
        with tempfile.TemporaryDirectory() as folder:
            _random_model(sizes, words, folder)
            model = ctranslate2.Translator(folder, device="cpu", compute_type="float32", intra_threads=threads)
        texts = [[words[number] for number in source] for source in sources]
        options = {"beam_size": beams, "min_decoding_length": length, "max_decoding_length": length}
        self._call = lambda: model.translate_batch(texts, **options)

    def call(self) -> None:
        """What is timed."""
        assert self._call is not None
        self._answer = self._call()

    def lengths(self) -> list[int]:
        """Tokens of each text of the last call."""
        return [len(result.hypotheses[0]) for result in self._answer]


def _random_model(sizes: dict[str, int], words: list[str], folder: str) -> None:
    """A post-norm transformer with GELU and learned positions, as files in `folder`."""
    import numpy as np
    from ctranslate2.specs import TransformerSpec, common_spec

    generator, width, middle = np.random.default_rng(0), sizes["hidden_size"], sizes["intermediate_size"]

    def matrix(rows: int, columns: int) -> Any:
        return (generator.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    def linear(spec: Any, rows: int, columns: int) -> None:
        spec.weight, spec.bias = matrix(rows, columns), np.zeros(rows, np.float32)

    def norm(spec: Any) -> None:
        spec.gamma, spec.beta = np.ones(width, np.float32), np.zeros(width, np.float32)

    layers = sizes["encoder_layers"], sizes["decoder_layers"]
    gelu = common_spec.Activation.GELU
    model = TransformerSpec.from_config(
        layers, sizes["num_heads"], pre_norm=False, activation=gelu, layernorm_embedding=True
    )
    for part in (model.encoder, model.decoder):
        tables = part.embeddings if isinstance(part.embeddings, list) else [part.embeddings]
        for table in tables:
            table.weight = matrix(len(words), width)
        part.scale_embeddings = False
        part.position_encodings.encodings = matrix(sizes["positions"], width)
        norm(part.layernorm_embedding)
        for layer in part.layer:
            linear(layer.self_attention.linear[0], 3 * width, width)
            linear(layer.self_attention.linear[1], width, width)
            norm(layer.self_attention.layer_norm)
            linear(layer.ffn.linear_0, middle, width)
            linear(layer.ffn.linear_1, width, middle)
            norm(layer.ffn.layer_norm)
            if part is model.decoder:
                for place, rows in enumerate((width, 2 * width, width)):
                    linear(layer.attention.linear[place], rows, width)
                norm(layer.attention.layer_norm)
    linear(model.decoder.projection, len(words), width)
    model.register_source_vocabulary(words)
    model.register_target_vocabulary(words)
    model.validate()
    model.optimize()
    model.save(folder)


if __name__ == "__main__":
    peer = Peer()
    serve(lambda do, **arguments: getattr(peer, do)(**arguments))
