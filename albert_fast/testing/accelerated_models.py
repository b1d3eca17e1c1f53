"""Tiny models of transformers, of every family and head that `accelerate` knows, with random weights, for its tests.

It needs transformers, which is imported on first use.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..accelerate.api import restore
from ..accelerate.families import family_of
from .tolerances import assert_close_calibrated

# Family -> the prefix of its classes in transformers.
PREFIXES = {
    "albert": "Albert",
    "bert": "Bert",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "embedding_size": 16,
    "num_labels": 3,
    "pad_token_id": 1,
}
_DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
_DISTILBERT |= {"intermediate_size": "hidden_dim", "hidden_act": "activation"}


def tiny_config(family: str, **fields: Any) -> Any:
    """A configuration of the family, with SIZES and `fields` under BERT's names."""
    import transformers

    fields = SIZES | fields
    if family == "distilbert":
        renamed = {_DISTILBERT.get(name, name): value for name, value in fields.items()}
        dropouts = {"hidden_dropout_prob": "dropout", "attention_probs_dropout_prob": "attention_dropout"}
        fields = {dropouts.get(name, name): value for name, value in renamed.items()}
    return getattr(transformers, f"{PREFIXES[family]}Config")(**fields)


def tiny_model(family: str, head: str = "Model", seed: int = 0, **fields: Any) -> Any:
    """A model in eval mode with random weights, whose products have about the size of their inputs, so that attention is far
    from uniform."""
    import transformers

    if head == "ForQuestionAnswering":
        fields = fields | {"num_labels": 2}
    model = getattr(transformers, f"{PREFIXES[family]}{head}")(tiny_config(family, **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key.lower():
                parameter.copy_(0.1 * noise + (1.0 if key.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (1 / math.sqrt(parameter.shape[-1]) if parameter.dim() == 2 else 0.1))
    return model.eval()


def tiny_batch(head: str = "Model", rows: int = 4, columns: int = 11, seed: int = 0) -> dict[str, Tensor]:
    """input_ids (B, S), or (B, 2, S) for multiple choice, without pad tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 2, columns) if head == "ForMultipleChoice" else (rows, columns)
    return {"input_ids": torch.randint(5, SIZES["vocab_size"], shape, generator=generator)}


def first_outputs(output: Any) -> dict[str, Tensor]:
    """The tensors of a model's output by name."""
    return {name: value for name, value in output.items() if isinstance(value, Tensor)}


def stack_of(model: nn.Module) -> nn.Module:
    """The module inside `model` that holds the layers."""
    for module in model.modules():
        if family_of(module) is not None:
            return module
    raise LookupError(f"{type(model).__name__} holds no stack of layers")


# Beside the rule's own slack: a stack of layers adds up the rounding of many products.
STACK_SLACK = 2e-6


def assert_like_original(actual: Tensor, model: Any, call: Callable[[Any], Tensor], what: str = "output") -> None:
    """Check `actual`, the result of an accelerated model, against `call` of the original forward in its dtype and in float64.

    Args:
        model: accelerated or not; it stays as it is. call: computes the result with a model that it is given; tensors of floats
            among the inputs take its dtype.
    """
    original = restore(copy.deepcopy(model))
    with torch.no_grad():
        same, exact = call(original), call(original.double())
    assert_close_calibrated(actual.detach(), same, exact, what, slack=STACK_SLACK)


def like(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """`batch` with its tensors of floats in the dtype of the model's parameters."""
    dtype = next(model.parameters()).dtype
    floats = {name: t.to(dtype) for name, t in batch.items() if isinstance(t, Tensor) and t.is_floating_point()}
    return batch | floats
