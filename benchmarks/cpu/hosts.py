"""The hosts: libraries that run BERT's family, each as its users call it, on one set of weights; host.py says what a host is."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from shared import artifacts, lengths
from torch import Tensor

from albert_fast.checkpoints.weights import shipped_model
from albert_fast.testing import data_dir
from cpu import peer_sides
from cpu.host import Host, one_by_one
from cpu.texts import MINILM, Texts, minilm_folder
from cpu.trainer import TrainerSteps

BATCH_SIZE = 32  # sentence-transformers' own default
_CALIBRATION = 128
_SEED = 0


@dataclass
class Sentences(Host):
    """sentence-transformers' `SentenceTransformer.encode`.

    sizes: of a random encoder with the real one's tokenizer; None for the real all-MiniLM-L6-v2.
    """

    name: str
    texts: Texts
    sizes: Mapping[str, int] | None = None

    needs = ("transformers", "sentence_transformers", MINILM)
    engines = (*Host.engines, *peer_sides.EMBEDDERS)

    @cached_property
    def _drawn(self) -> tuple[list[str], list[str]]:
        return self.texts.measured(), self.texts.calibration()

    def folder(self) -> Path:
        if self.sizes is None:
            return minilm_folder()
        from transformers import BertConfig, BertModel

        config = BertConfig.from_pretrained(minilm_folder(), **self.sizes)

        def write(folder: Path) -> None:
            shutil.copytree(minilm_folder(), folder, dirs_exist_ok=True)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_SEED)
                BertModel(config).save_pretrained(folder)
            pooling = folder / "1_Pooling/config.json"
            sizes = {"word_embedding_dimension": config.hidden_size}
            pooling.write_text(json.dumps(json.loads(pooling.read_text()) | sizes))

        return artifacts.made_once(f"{self.name.partition('-')[0]}-{torch.__version__}", write)

    def inputs(self) -> list[str]:
        return self._drawn[0]

    def make(self) -> Any:
        from sentence_transformers import SentenceTransformer

        return SentenceTransformer(str(self.folder()), device="cpu")

    def module(self, model: Any) -> torch.nn.Module:
        return model

    def encoder(self, model: Any) -> Any:
        return model[0].auto_model

    def calibration(self) -> list[str]:
        return self._drawn[1]

    def call(self, model: Any) -> Callable[[], Any]:
        texts = self._drawn[0]
        return lambda: model.encode(texts, batch_size=BATCH_SIZE, show_progress_bar=False)

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(minilm_folder())

    def tokens(self) -> list[int]:
        rows = self._tokenizer(self._drawn[0], truncation=True, max_length=256)["input_ids"]
        return [len(row) for row in rows]

    def _batches(self) -> list[tuple[Tensor, ...]]:
        return one_by_one(self._tokenizer(self._drawn[1], truncation=True, max_length=256))


@dataclass
class Pairs(Host):
    """sentence-transformers' `CrossEncoder.predict`: the real encoder under a random head."""

    name: str
    count: int

    needs = ("transformers", "sentence_transformers", MINILM)
    engines = (*Host.engines, *peer_sides.BACKENDS)
    token_types = True

    @cached_property
    def _pairs(self) -> list[tuple[str, str]]:
        texts = Texts("stsb", 2 * self.count).measured()
        return list(zip(texts[::2], texts[1::2], strict=True))

    def folder(self) -> Path:
        from transformers import AutoTokenizer, BertForSequenceClassification

        def write(folder: Path) -> None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_SEED)
                model = BertForSequenceClassification.from_pretrained(minilm_folder(), num_labels=1)
            # Scores are logits, as of most cross-encoders: behind a sigmoid a random head's scores hardly differ.
            model.config.sentence_transformers = {"activation_fn": "torch.nn.modules.linear.Identity"}
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(minilm_folder()).save_pretrained(folder)

        return artifacts.made_once(f"cross_encoder-logits-{torch.__version__}", write)

    def inputs(self) -> list[tuple[str, str]]:
        return self._pairs

    def make(self) -> Any:
        from sentence_transformers import CrossEncoder

        return CrossEncoder(str(self.folder()), device="cpu")

    def module(self, model: Any) -> torch.nn.Module:
        return model.model

    def encoder(self, model: Any) -> Any:
        return model.model.bert

    def calibration(self) -> list[tuple[str, str]]:
        texts = Texts("stsb", 1).calibration()
        return list(zip(texts[::2], texts[1::2], strict=True))

    def call(self, model: Any) -> Callable[[], Any]:
        return lambda: model.predict(self._pairs, batch_size=BATCH_SIZE, show_progress_bar=False)

    def _encoded(self, pairs: Sequence[tuple[str, str]]) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(minilm_folder())([list(pair) for pair in pairs])

    def tokens(self) -> list[int]:
        return [len(row) for row in self._encoded(self._pairs)["input_ids"]]

    def _batches(self) -> list[tuple[Tensor, ...]]:
        return one_by_one(self._encoded(self.calibration()), token_types=True)


@dataclass
class Pipeline(Host):
    """transformers' `pipeline("text-classification")` on the classifier that this package ships, a trained ALBERT."""

    name: str
    texts: Texts

    line = "albert_fast.accelerate(classify)"

    def make(self) -> Any:
        from transformers import pipeline

        folder = str(shipped_model())
        return pipeline("text-classification", model=folder, tokenizer=folder, device="cpu", top_k=None)

    def encoder(self, model: Any) -> Any:
        return model.model.albert

    def module(self, model: Any) -> torch.nn.Module:
        return model.model

    def calibration(self) -> list[str]:
        return self.texts.calibration()

    def call(self, model: Any) -> Callable[[], Any]:
        texts = self.texts.measured()
        return lambda: model(texts, batch_size=BATCH_SIZE, truncation=True)

    def answer(self, output: Any) -> tuple[Tensor, ...]:
        rows = [[one["score"] for one in sorted(row, key=lambda one: str(one["label"]))] for row in output]
        return (torch.tensor(rows),)

    def _encoded(self, texts: Sequence[str]) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(shipped_model())(list(texts), truncation=True)

    def tokens(self) -> list[int]:
        return [len(row) for row in self._encoded(self.texts.measured())["input_ids"]]

    def _batches(self) -> list[tuple[Tensor, ...]]:
        return one_by_one(self._encoded(self.calibration()))


@dataclass
class Kokoro(Host):
    """Kokoro's text encoder, a subclass of AlbertModel that returns its hidden states, with the real weights; one
    sequence at a time, as it speaks."""

    name: str
    count: int

    needs = ("transformers",)

    def missing(self) -> str | None:
        folder = data_dir() / "plbert"
        return super().missing() or (None if folder.exists() else f"{folder} is absent: set ALBERT_FAST_DATA")

    @cached_property
    def _rows(self) -> list[Tensor]:
        return [torch.tensor([row]) for row in lengths.phonemes(0, self.count)]

    def make(self) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)  # the pooler, which the weights lack and whose output is not used
            return _custom_albert().from_pretrained(data_dir() / "plbert", attn_implementation="sdpa").eval()

    def module(self, model: Any) -> torch.nn.Module:
        return model

    def output(self, encoder: Any, hidden: Tensor) -> Tensor:
        return hidden

    def encoder(self, model: Any) -> Any:
        return model

    def calibration(self) -> list[dict[str, Tensor]]:
        return [{"input_ids": torch.tensor([row])} for row in lengths.phonemes(64, _CALIBRATION)]

    def call(self, model: Any) -> Callable[[], Any]:
        @torch.no_grad()
        def speak() -> list[Tensor]:
            return [model(ids, attention_mask=torch.ones_like(ids)) for ids in self._rows]

        return speak

    def answer(self, output: Any) -> tuple[Tensor, ...]:
        return tuple(output)

    def tokens(self) -> list[int]:
        return [row.shape[1] for row in self._rows]

    def _batches(self) -> list[tuple[Tensor, ...]]:
        return one_by_one({"input_ids": lengths.phonemes(64, _CALIBRATION)})


def _custom_albert() -> Any:
    """The encoder's class in the package kokoro; the same three lines where that is not installed.

    Only its module is imported: the package's own imports want spaCy and fifty other packages, for text to phonemes.
    """
    spec = importlib.util.find_spec("kokoro")
    if spec is not None:
        sys.modules.setdefault("kokoro", importlib.util.module_from_spec(spec))
        from kokoro.modules import CustomAlbert

        return CustomAlbert
    from transformers import AlbertModel

    class OwnCustomAlbert(AlbertModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs).last_hidden_state

    return OwnCustomAlbert


BGE_BASE = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072}
E5_SMALL = {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 1536}


def all_hosts(quick: bool) -> list[Host]:
    """Every host that is measured; small ones for a quick run."""
    if quick:
        return [Sentences("minilm-stsb-8", Texts("stsb", 8)), Pipeline("pipeline-8", Texts("stsb", 8))]
    return [
        Sentences("minilm-stsb-256", Texts("stsb", 256)),
        Sentences("minilm-imdb-32", Texts("imdb", 32)),
        Sentences("minilm-mixed-64", Texts("mixed", 64)),
        Sentences("e5_small-stsb-128", Texts("stsb", 128), E5_SMALL),
        Sentences("bge_base-stsb-64", Texts("stsb", 64), BGE_BASE),
        Pairs("cross_encoder-128", 128),
        Pipeline("pipeline-128", Texts("stsb", 128)),
        Kokoro("kokoro-8", 8),
        TrainerSteps("trainer-16", Texts("mixed", 16)),
    ]


def sizes_of(config: Any) -> SimpleNamespace:
    """The sizes that `model_operations` counts with, of any family's configuration."""
    return SimpleNamespace(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        inner_group_num=getattr(config, "inner_group_num", 1),
        embedding_size=getattr(config, "embedding_size", 0),
    )
