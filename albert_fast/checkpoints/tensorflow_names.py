"""Lists the variables of Google's ALBERT and BERT checkpoints, and the tensors that they become in Hugging Face's layout."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .families import ALBERT, BERT, Family

# In the tables below a name on the left is a scope: it holds `kernel` and `bias`, or, named LayerNorm, `gamma` and `beta`.
# The sources are modeling.py and run_pretraining.py of google-research/albert and google-research/bert.
_ALBERT_LAYER = {
    "attention_1/self/query": "attention.query",
    "attention_1/self/key": "attention.key",
    "attention_1/self/value": "attention.value",
    "attention_1/output/dense": "attention.dense",
    "LayerNorm": "attention.LayerNorm",
    "ffn_1/intermediate/dense": "ffn",
    "ffn_1/intermediate/output/dense": "ffn_output",
    "LayerNorm_1": "full_layer_layer_norm",
}
_BERT_LAYER = {
    scope: scope.replace("/", ".")
    for scope in (
        *("attention/self/query", "attention/self/key", "attention/self/value"),
        *("attention/output/dense", "attention/output/LayerNorm"),
        *("intermediate/dense", "output/dense", "output/LayerNorm"),
    )
}
_POOLER = {ALBERT.model_type: "pooler", BERT.model_type: "pooler.dense"}
# How the names of an encoder's layers begin, and the family that it belongs to.
_ENCODERS = {re.compile(r"bert/encoder/transformer/group_\d+/"): ALBERT, re.compile(r"bert/encoder/layer_\d+/"): BERT}
# Variables of a training run that belong to no tensor of the model.
_COUNTERS = frozenset({"global_step", "beta1_power", "beta2_power"})


def family_of(names: Iterable[str]) -> Family | None:
    """The family whose encoder has variables of these names; None for neither."""
    names = tuple(names)
    return next((family for layer, family in _ENCODERS.items() if any(map(layer.match, names))), None)


def encoder_variables(family: Family, config: Any, pooler: bool) -> dict[str, str]:
    """Variable -> tensor, under the names of an encoder without a head.

    Google's ALBERT has no `embedding_hidden_mapping_in` where embedding_size is hidden_size.

    Args:
        config: the family's configuration; the numbers of layers and groups matter.
        pooler: whether the checkpoint has one.
    """
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    found = {f"bert/embeddings/{table}": f"embeddings.{table}.weight" for table in tables}
    scopes = {"bert/embeddings/LayerNorm": "embeddings.LayerNorm"}
    if family is ALBERT:
        if config.embedding_size != config.hidden_size:
            scopes["bert/encoder/embedding_hidden_mapping_in"] = "encoder.embedding_hidden_mapping_in"
        for group in range(config.num_hidden_groups):
            for layer in range(config.inner_group_num):
                scope = f"bert/encoder/transformer/group_{group}/inner_group_{layer}"
                module = f"encoder.albert_layer_groups.{group}.albert_layers.{layer}"
                scopes |= {f"{scope}/{old}": f"{module}.{new}" for old, new in _ALBERT_LAYER.items()}
    else:
        for layer in range(config.num_hidden_layers):
            scopes |= {
                f"bert/encoder/layer_{layer}/{old}": f"encoder.layer.{layer}.{new}" for old, new in _BERT_LAYER.items()
            }
    if pooler:
        scopes["bert/pooler/dense"] = _POOLER[family.model_type]
    return found | _expanded(scopes)


def head_variables(family: Family) -> dict[str, dict[str, str]]:
    """Head -> variable -> tensor, for every head that Google's programs train.

    The heads: "predictions" (masked language), "order" (of two sentences), "classifier" (run_classifier.py) and "answers"
    (run_squad.py, and run_squad_v1.py of ALBERT).
    """
    albert = family is ALBERT
    words = "predictions" if albert else "cls.predictions"
    transform = words if albert else f"{words}.transform"
    order = "sop_classifier.classifier" if albert else "cls.seq_relationship"
    scopes = {f"cls/predictions/transform/{name}": f"{transform}.{name}" for name in ("dense", "LayerNorm")}
    return {
        "predictions": _expanded(scopes) | {"cls/predictions/output_bias": f"{words}.bias"},
        "order": _output("cls/seq_relationship/", order),
        "classifier": _output("", "classifier"),
        "answers": _output("cls/squad/", "qa_outputs"),
    }


def is_transposed(variable: str) -> bool:
    """Whether a variable is stored as (in, out), and its tensor as (out, in)."""
    return variable.endswith("/kernel")


def belongs_to_training(variable: str, known: Mapping[str, Any]) -> bool:
    """Whether a variable is a counter, or an optimizer's slot for one of the variables `known`, such as kernel/adam_m."""
    return variable in _COUNTERS or variable.rpartition("/")[0] in known


def _expanded(scopes: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for scope, module in scopes.items():
        norm = scope.rpartition("/")[2].startswith("LayerNorm")
        for variable, parameter in (("gamma" if norm else "kernel", "weight"), ("beta" if norm else "bias", "bias")):
            found[f"{scope}/{variable}"] = f"{module}.{parameter}"
    return found


def _output(scope: str, module: str) -> dict[str, str]:
    """A head of one product, whose weights Google stores as (out, in)."""
    return {f"{scope}output_weights": f"{module}.weight", f"{scope}output_bias": f"{module}.bias"}
