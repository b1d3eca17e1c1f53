"""Builds our model of any family and Hugging Face's with the same weights, with random inputs, for parity tests.

It needs transformers, which is imported on first use.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.families import FAMILIES
from ..models.auto import class_of
from .model_pairs import drawn_mask

TASKS = (
    "Model",
    "ForMaskedLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra")
# What each family has beside a common small configuration.
_OWN: dict[str, dict[str, Any]] = {
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "camembert": {"pad_token_id": 3},
    "electra": {"embedding_size": 24},
}
VOCABULARY, POSITIONS = 61, 40


def has_task(model_type: str, task: str) -> bool:
    """Whether the family has such a class; RoBERTa's kin are pre-trained as masked language models."""
    return task != "ForPreTraining" or model_type in ("bert", "electra")


def small_fields(model_type: str, task: str = "Model", **fields: Any) -> dict[str, Any]:
    """A small configuration of a family, as a dictionary of its own field names, without dropout."""
    middle = {"hidden_dim" if model_type == "distilbert" else "intermediate_size": 56}
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_hidden_layers": 3,
        "max_position_embeddings": POSITIONS,
        "num_labels": 2 if task == "ForQuestionAnswering" else 3,
        **middle,
        **_OWN.get(model_type, {}),
        **fields,
    }


def theirs_of(model_type: str, task: str, seed: int = 0, **fields: Any) -> nn.Module:
    """Hugging Face's model with random weights, whose products have about the size of their inputs, in eval mode."""
    import transformers

    name = FAMILIES[model_type].hf_class_name
    config = getattr(transformers, f"{name}Config")(
        **small_fields(model_type, task, **fields), attn_implementation="eager"
    )
    model: nn.Module = getattr(transformers, f"{name}{task}")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key.lower():
                parameter.copy_(0.1 * noise + (1.0 if key.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (1 / math.sqrt(parameter.shape[-1]) if parameter.dim() == 2 else 0.1))
    return model.eval()


def ours_of(theirs: Any, task: str, backend: str = "auto") -> Any:
    """Our model with the same weights, loaded by name from the state_dict, in eval mode."""
    kind = class_of(FAMILIES[theirs.config.model_type], task)
    ours = kind(kind.config_class.from_dict(theirs.config.to_dict()), backend=backend)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval()


def family_inputs(
    model_type: str, task: str, mask_kind: str, seed: int = 0, rows: int = 3, columns: int = 11
) -> dict[str, Tensor]:
    """Random keyword arguments of one forward of `rows` x `columns` tokens, with labels."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, columns) if task == "ForMultipleChoice" else (rows, columns)

    def integers(high: int, *size: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, size, generator=generator)

    inputs = {"input_ids": integers(VOCABULARY, *shape)}
    mask = drawn_mask(mask_kind, math.prod(shape[:-1]), columns, seed)
    if mask is not None:
        inputs["attention_mask"] = mask.view(shape)
    if model_type != "distilbert":
        inputs["token_type_ids"] = integers(2, *shape)
    if task == "ForMaskedLM" or (task == "ForPreTraining" and model_type == "bert"):
        inputs["labels"] = integers(VOCABULARY, *shape).masked_fill(torch.rand(shape, generator=generator) < 0.4, -100)
    elif task in ("ForTokenClassification", "ForPreTraining"):
        inputs["labels"] = integers(3 if task == "ForTokenClassification" else 2, *shape)
    elif task in ("ForSequenceClassification", "ForMultipleChoice"):
        inputs["labels"] = integers(2, rows)
    elif task == "ForQuestionAnswering":
        inputs["start_positions"], inputs["end_positions"] = integers(columns, rows), integers(columns, rows)
    if task == "ForPreTraining" and model_type == "bert":
        inputs["next_sentence_label"] = integers(2, rows)
    theirs_reads_padding = not (model_type == "electra" and task == "ForPreTraining")
    if mask is not None and theirs_reads_padding and "labels" in inputs and inputs["labels"].shape == shape:
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs
