"""Builds our model and Hugging Face's with the same weights, random configurations and inputs, for parity tests.

It needs transformers, which is imported on first use.
"""

from __future__ import annotations

import math
import random
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..models.config import ALBERTConfig

# Model -> its outputs -> whether an output is per token, (B, S, ...), or per row, (B, ...).
OUTPUTS: dict[str, dict[str, bool]] = {
    "Model": {"last_hidden_state": True, "pooler_output": False},
    "ForMaskedLM": {"logits": True},
    "ForPreTraining": {"prediction_logits": True, "sop_logits": False},
    "ForSequenceClassification": {"logits": False},
    "ForTokenClassification": {"logits": True},
    "ForQuestionAnswering": {"start_logits": True, "end_logits": True},
    "ForMultipleChoice": {"logits": False},
}
NAMES = list(OUTPUTS)
SMALL: dict[str, Any] = {
    "vocab_size": 40,
    "embedding_size": 16,
    "hidden_size": 48,
    "num_attention_heads": 2,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "max_position_embeddings": 24,
    "num_labels": 3,
}


def drawn_config(seed: int) -> dict[str, Any]:
    """Random values for all fields of AlbertConfig that change the model; sizes are small, head sizes 26 to 128."""
    draw = random.Random(seed)
    head_dim, heads = draw.choice([26, 32, 39, 48, 64, 80, 96, 128]), draw.randint(1, 3)
    hidden, layers = head_dim * heads, draw.randint(1, 5)
    return {
        "vocab_size": draw.randint(20, 90),
        "embedding_size": draw.choice([hidden, 16, 24, 33]),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": draw.choice([40, 72, 129]),
        "num_hidden_layers": layers,
        "num_hidden_groups": draw.randint(1, layers),
        "inner_group_num": draw.choice([1, 1, 2]),
        "hidden_act": draw.choice(["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu"]),
        "max_position_embeddings": draw.choice([20, 64]),
        "type_vocab_size": draw.randint(1, 3),
        "layer_norm_eps": draw.choice([1e-12, 1e-5]),
        "pad_token_id": draw.choice([0, 1, 3, None]),
        "tie_word_embeddings": draw.random() < 0.8,
        "num_labels": draw.choice([2, 3, 5]),
    }


def model_pair(module: ModuleType, name: str, fields: dict[str, Any], seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """`module`'s model and Hugging Face's with the same random weights, whose products have about the size of their inputs.

    So attention is far from uniform (scores deviate by 1), and float32 rounding stays below 1e-5: with larger weights
    either model would differ from its own result in float64 by more than that.

    Args:
        module: the module that has `ALBERT<name>`: albert_fast or albert_fast.models.reference.
        name: a key of OUTPUTS.
        fields: fields of AlbertConfig; num_labels is set to 2 for the two heads that need it.

    Returns:
        (ours, theirs), both in eval mode, theirs with eager attention.
    """
    import transformers

    if name in ("ForQuestionAnswering", "ForPreTraining"):
        fields = fields | {"num_labels": 2}
    config = transformers.AlbertConfig(**(fields | {"attn_implementation": "eager"}))
    theirs: nn.Module = getattr(transformers, f"Albert{name}")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key.lower():
                parameter.copy_(0.1 * noise + (1.0 if key.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (1 / math.sqrt(parameter.shape[-1]) if parameter.dim() == 2 else 0.1))
    ours: nn.Module = getattr(module, f"ALBERT{name}")(ALBERTConfig(**fields))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def drawn_mask(kind: str, rows: int, columns: int, seed: int) -> Tensor | None:
    """A random mask (rows, columns) int64, or None.

    kind: where the padding is: "none" (no mask), "right", "left", "holes", or "empty row" (holes, and row 0 is all padding). Every
    other row has at least one token.
    """
    if kind == "none":
        return None
    draw = random.Random(seed)
    mask = torch.ones(rows, columns, dtype=torch.int64)
    for row in mask:
        length = draw.randint(1, columns)
        if kind == "right":
            row[length:] = 0
        elif kind == "left":
            row[: columns - length] = 0
        else:
            row.copy_(torch.tensor([draw.random() < 0.6 for _ in range(columns)]))
            row[draw.randrange(columns)] = 1
    if kind == "empty row":
        mask[0] = 0
    return mask


def drawn_inputs(name: str, config: ALBERTConfig, mask_kind: str, seed: int) -> dict[str, Tensor]:
    """Random arguments of one forward, with labels: (B, S), or (B, 3, S) for multiple choice, with B <= 4 and S <= 17.

    Padding has labels, too, so that a loss that reads them is found.
    """
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, columns = draw.randint(2, 4), draw.randint(2, min(17, config.max_position_embeddings))
    shape = (rows, 3, columns) if name == "ForMultipleChoice" else (rows, columns)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    inputs = {"input_ids": integers(config.vocab_size, *shape)}
    mask = drawn_mask(mask_kind, math.prod(shape[:-1]), columns, seed)
    if mask is not None:
        inputs["attention_mask"] = mask.view(shape)
    if draw.random() < 0.7:
        inputs["token_type_ids"] = integers(config.type_vocab_size, *shape)
    if draw.random() < 0.3:
        inputs["position_ids"] = integers(config.max_position_embeddings, *shape)
    if name in ("ForMaskedLM", "ForPreTraining", "ForTokenClassification"):
        classes = config.num_labels if name == "ForTokenClassification" else config.vocab_size
        ignored = torch.rand(shape, generator=generator) < 0.3
        inputs["labels"] = integers(classes, *shape).masked_fill(ignored, -100)
        # At least one real token has a label: without one transformers gives NaN.
        inputs["labels"][-1, 0 if mask is None else int(mask[-1].argmax())] = 0
    if name == "ForPreTraining":
        inputs["sentence_order_label"] = integers(2, rows)
    if name == "ForSequenceClassification":
        inputs["labels"] = integers(config.num_labels, rows)
    if name == "ForMultipleChoice":
        inputs["labels"] = integers(3, rows)
    if name == "ForQuestionAnswering":
        inputs["start_positions"], inputs["end_positions"] = integers(columns, rows), integers(columns + 2, rows)
        inputs["end_positions"][0] = 0  # not all behind the last column: there too transformers gives NaN
    return inputs


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by its name in state_dict; these are Hugging Face's names, also for fused parameters."""
    parameters = list(model.parameters())
    values = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter in parameters:
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        named = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    return named


def assert_gradients_equal(ours: nn.Module, theirs: nn.Module) -> None:
    """Check that each parameter's gradient is within 1e-4 of that of `theirs`, in norm.

    Some gradients are zero, and their computed values are rounding noise: softmax ignores whatever shifts all of its scores, such
    as the bias of the keys, or that of a classifier for one answer among several. Hence the absolute term: 4 float32 roundings
    of the norm of all gradients together.
    """
    actual, expected = gradients(ours), gradients(theirs)
    total = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    assert total > 0, "no gradient at all"
    assert actual.keys() == expected.keys()
    for key, gradient in expected.items():
        error, size = float((actual[key] - gradient).norm()), float(gradient.norm())
        allowed = 1e-4 * size + 4 * torch.finfo(torch.float32).eps * total
        assert error <= allowed, f"{key}: error {error:.3g} exceeds {allowed:.3g} in a gradient of norm {size:.3g}"
