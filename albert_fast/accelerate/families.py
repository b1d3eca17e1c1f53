"""The families of transformers models that `accelerate` knows: where each keeps the tensors of a layer, one row a family."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# The parts of a layer under the names of `layers.Layer` and `layers.Attention`.
PRODUCTS = ("query", "key", "value", "dense", "ffn", "ffn_output")
NORMS = ("LayerNorm", "full_layer_layer_norm")
DROPOUTS = ("probs_dropout", "hidden_dropout", "ffn_dropout")


@dataclass(frozen=True)
class Family:
    """Where one family keeps what a layer is made of. Paths start at the layer.

    module: the module of transformers that defines the classes. stack: the class that holds the layers.
    groups: the attribute of the stack that lists the layers, or ALBERT's groups; inner: the attribute of a group that lists
    its layers. first: a Linear that the stack applies to its input. parts: paths of the modules in PRODUCTS, NORMS and
    DROPOUTS; a dropout that a family does not have is left out. act: the path of the activation. heads: the path of the
    number of heads. ignored: modules of a layer that its forward does not use.
    """

    module: str
    stack: str
    groups: str
    parts: dict[str, str]
    act: str
    heads: str
    inner: str | None = None
    first: str | None = None
    ignored: tuple[str, ...] = ()
    output: str = "BaseModelOutputWithPastAndCrossAttentions"
    # The names that `forward` gives the hidden states and their mask, in any version.
    hidden_names: tuple[str, ...] = field(default=("hidden_states", "x"))
    mask_names: tuple[str, ...] = field(default=("attention_mask", "attn_mask"))


_BERT_PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "dense": "attention.output.dense",
    "LayerNorm": "attention.output.LayerNorm",
    "ffn": "intermediate.dense",
    "ffn_output": "output.dense",
    "full_layer_layer_norm": "output.LayerNorm",
    "probs_dropout": "attention.self.dropout",
    "hidden_dropout": "attention.output.dropout",
    "ffn_dropout": "output.dropout",
}


def _like_bert(module: str, prefix: str) -> Family:
    return Family(
        module=f"transformers.models.{module}.modeling_{module}",
        stack=f"{prefix}Encoder",
        groups="layer",
        parts=_BERT_PARTS,
        act="intermediate.intermediate_act_fn",
        heads="attention.self.num_attention_heads",
    )


_ALBERT = Family(
    module="transformers.models.albert.modeling_albert",
    stack="AlbertTransformer",
    groups="albert_layer_groups",
    inner="albert_layers",
    first="embedding_hidden_mapping_in",
    parts={
        "query": "attention.query",
        "key": "attention.key",
        "value": "attention.value",
        "dense": "attention.dense",
        "LayerNorm": "attention.LayerNorm",
        "ffn": "ffn",
        "ffn_output": "ffn_output",
        "full_layer_layer_norm": "full_layer_layer_norm",
        "probs_dropout": "attention.attention_dropout",
        "hidden_dropout": "attention.output_dropout",
    },
    act="activation",
    heads="attention.num_attention_heads",
    ignored=("dropout",),
    output="BaseModelOutput",
)

_DISTILBERT = Family(
    module="transformers.models.distilbert.modeling_distilbert",
    stack="Transformer",
    groups="layer",
    parts={
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "dense": "attention.out_lin",
        "LayerNorm": "sa_layer_norm",
        "ffn": "ffn.lin1",
        "ffn_output": "ffn.lin2",
        "full_layer_layer_norm": "output_layer_norm",
        "probs_dropout": "attention.dropout",
        "ffn_dropout": "ffn.dropout",
    },
    act="ffn.activation",
    heads="attention.n_heads",
    output="BaseModelOutput",
)

FAMILIES = {
    "albert": _ALBERT,
    "bert": _like_bert("bert", "Bert"),
    "camembert": _like_bert("camembert", "Camembert"),
    "distilbert": _DISTILBERT,
    "electra": _like_bert("electra", "Electra"),
    "roberta": _like_bert("roberta", "Roberta"),
    "xlm-roberta": _like_bert("xlm_roberta", "XLMRoberta"),
}
_BY_STACK = {(family.module, family.stack): family for family in FAMILIES.values()}

# Activations by the class of the module, as the kernels name them; a function has its own name.
_ACTS = {
    "GELUActivation": "gelu_erf",
    "GELU": "gelu_erf",
    "gelu": "gelu_erf",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "AccurateGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "relu": "relu",
}


def family_of(module: nn.Module) -> Family | None:
    """The family whose stack of layers `module` is, or a subclass of; None where it is none."""
    for cls in type(module).__mro__:
        if (family := _BY_STACK.get((cls.__module__, cls.__name__))) is not None:
            return family
    return None


def stack_class(family: Family) -> type[nn.Module]:
    """transformers' class of the family's stack; it is loaded, because an object of it exists."""
    found: type[nn.Module] = getattr(sys.modules[family.module], family.stack)
    return found


def at(module: nn.Module, path: str) -> Any:
    """The attribute at a dotted path.

    Raises:
        AttributeError: there is none.
    """
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def act_name(activation: object) -> str | None:
    """The kernels' name of an activation, a module or a function; None where no kernel computes it."""
    if isinstance(activation, nn.Module):
        name = _ACTS.get(type(activation).__name__)
        tanh = getattr(activation, "approximate", "none") == "tanh"
        return "gelu_tanh" if name == "gelu_erf" and tanh else name
    return _ACTS.get(getattr(activation, "__name__", ""))


def known() -> str:
    """The families, for messages."""
    return ", ".join(FAMILIES)
