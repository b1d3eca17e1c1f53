"""Tiny random checkpoints with a vocabulary, for tests of whatever reads texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..models.config import ALBERTConfig
from ..text.tokenizer import Tokenizer


def small_text_config(tokenizer: Tokenizer, *labels: str) -> ALBERTConfig:
    """A configuration of two narrow layers for texts of up to 48 tokens; the labels are those of the classes."""
    return ALBERTConfig(
        vocab_size=tokenizer.vocab_size,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=48,
        initializer_range=0.4,
        id2label=dict(enumerate(labels)),
    )


def save_small_model(kind: Any, config: ALBERTConfig, tokenizer: Tokenizer, folder: Path) -> Path:
    """Save a model of class `kind` with random weights, the same every time, and its tokenizer; returns the folder."""
    torch.manual_seed(1)
    kind(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder
