"""The models that are measured: ALBERT's sizes with random weights, and the real encoder in the folder of data.

A model gives its configuration, its weights, the token ids of a batch by name, and other ids of the same kind to
calibrate on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from albert_fast import ALBERTConfig
from albert_fast.models import reference
from albert_fast.testing import data_dir
from shared import lengths

BASE = ALBERTConfig(hidden_size=768, num_attention_heads=12, intermediate_size=3072)
LARGE = ALBERTConfig(hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=24)
QUICK = replace(BASE, hidden_size=128, num_attention_heads=2, intermediate_size=512, num_hidden_layers=2)

Rows = list[list[int]]


class Model(Protocol):
    """Weights under a name, and text for them."""

    @property
    def name(self) -> str:
        """The name in ids."""

    @property
    def config(self) -> ALBERTConfig:
        """The model's sizes."""

    @property
    def state(self) -> dict[str, Tensor]:
        """The encoder's float32 state_dict, without a pooler."""

    def why_not(self) -> str | None:
        """Why the model is missing here; None where it is present."""

    def rows(self, batch: str) -> Rows:
        """Token ids of every sequence of a batch."""

    def calibration(self, count: int) -> Rows:
        """Token ids of `count` sequences, none of which is in a batch."""


@dataclass(frozen=True)
class RandomModel:
    """A model whose every parameter is random, biases and LayerNorms too: an engine that drops one is found out."""

    name: str
    config: ALBERTConfig

    @cached_property
    def state(self) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same weights in every run: files are kept under their digest
            state = reference.ALBERTModel(self.config, add_pooling_layer=False).state_dict()
            return {key: t + 0.02 * torch.randn(t.shape) for key, t in state.items()}

    def why_not(self) -> str | None:
        return None

    def rows(self, batch: str) -> Rows:
        """`batch` is a key of lengths.BATCHES, or `<rows>x<length>` of random ids."""
        if batch in lengths.BATCHES:
            return lengths.batch(batch, self.config.vocab_size)
        shape = tuple(map(int, batch.split("x")))
        generator = torch.Generator().manual_seed(0)
        first = lengths.FIRST_ORDINARY_ID
        ids: Rows = torch.randint(first, self.config.vocab_size, shape, generator=generator).tolist()
        return ids

    def calibration(self, count: int) -> Rows:
        return lengths.calibration(count, self.config.vocab_size)


@dataclass(frozen=True)
class PLBERT:
    """The trained phoneme encoder in the folder of data; `layers` limits its depth, since its layers share their weights."""

    name: str = "plbert"
    layers: int | None = None

    @property
    def _folder(self) -> Path:
        return data_dir() / "plbert"

    @cached_property
    def config(self) -> ALBERTConfig:
        config = ALBERTConfig.from_json_file(self._folder / "config.json")
        return config if self.layers is None else replace(config, num_hidden_layers=self.layers)

    @cached_property
    def state(self) -> dict[str, Tensor]:
        return reference.ALBERTModel.from_pretrained(self._folder).state_dict()

    def why_not(self) -> str | None:
        if (self._folder / "model.safetensors").exists():
            return None
        return f"{self._folder} is absent: set ALBERT_FAST_DATA to the folder of real data"

    def rows(self, batch: str) -> Rows:
        """`batch` is the number of sequences."""
        return lengths.phonemes(0, int(batch))

    def calibration(self, count: int) -> Rows:
        return lengths.phonemes(_MEASURED, count)


_MEASURED = 64  # the first of the shuffled phoneme sequences, which batches are made of; later ones calibrate
