"""Loads a checkpoint's model and tokenizer for a task over texts: device, precision and length are chosen here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.saving import config_path, folder_of
from ..checkpoints.weights import resolve
from ..models.config import ALBERTConfig
from ..models.pretrained import PretrainedMixin, held_precision
from ..runtime.devices import choose_device
from ..text.batching import TextPair, for_plain_text, padded_batches, tokenize
from ..text.tokenizer import Tokenizer, load_tokenizer


class TextModel:
    """A model and its tokenizer; the base class of the tasks.

    Args:
        model_class: the class of the model, such as ALBERTForMaskedLM.
        checkpoint: a folder or a name on the Hugging Face hub.
        max_length: texts are cut to this many tokens; default: as many as the model takes.
        batch_size: texts that are computed at a time.
        backend, precision: as for `from_pretrained`.
        device: default: a GPU if there is one.

    Attributes:
        folder: the checkpoint's folder, or its single file of weights.
        max_length: the limit in tokens that is in force.

    Raises:
        ValueError: `max_length` is more than the model's positions. What `from_pretrained` and `load_tokenizer` raise.
    """

    def __init__(
        self,
        model_class: type[PretrainedMixin],
        checkpoint: str | Path,
        *,
        max_length: int | None = None,
        batch_size: int = 32,
        backend: str = "auto",
        precision: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.folder, self.batch_size, self.backend = resolve(checkpoint), batch_size, backend
        self.device = choose_device(device)
        self.tokenizer = for_plain_text(load_tokenizer(folder_of(self.folder)))
        self.model: Any = model_class.from_pretrained(
            self.folder,
            backend=backend,
            precision=precision,
            device=self.device,
            return_dict=True,  # whatever config.json says
            output_hidden_states=False,
            output_attentions=False,
        )
        self.precision: str = self.model.execution.quantized or precision or "fp32"
        self.max_length = token_limit(self.tokenizer, self.model.config, max_length)

    def batches(self, texts: Sequence[TextPair]) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """Padded batches of similar length on the model's device: (indices of the texts, tensors (B, S) by name)."""
        rows = tokenize(self.tokenizer, texts, self.max_length)
        for chosen, batch in padded_batches(self.tokenizer, rows, self.batch_size):
            yield chosen, {key: tensor.to(self.device) for key, tensor in batch.items()}


def token_limit(tokenizer: Tokenizer, config: ALBERTConfig, max_length: int | None) -> int:
    """Tokens that a text is cut to. ValueError where `max_length` is more than the model has positions."""
    positions = config.max_position_embeddings
    if max_length is not None and max_length > positions:
        raise ValueError(f"max_length {max_length} is more than the model's {positions} positions")
    return max_length or min(tokenizer.model_max_length, positions)


def stated_precision(path: Path, precision: str | None) -> str:
    """The precision that was asked for; by default the one that config.json states, else float32."""
    if precision is not None:
        return precision
    return held_precision(ALBERTConfig.from_pretrained(folder_of(path)), path) or "fp32"


def holds_floats(path: Path) -> bool:
    """Whether the weights of a checkpoint are floats. False where config.json cannot be read; loading reports that."""
    try:
        config = ALBERTConfig.from_json_file(config_path(path))
    except (OSError, ValueError):
        return False
    return config.extra.get("quantization_config") is None
