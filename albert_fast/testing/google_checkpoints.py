"""Google's ALBERT and BERT checkpoints for tests: random variables under its names, and what its code computes from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Variables = dict[str, Any]
SHARED = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 40,
    "hidden_act": "gelu", "max_position_embeddings": 20, "type_vocab_size": 2, "initializer_range": 0.02,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
UNUSED = {"net_structure_type": 0, "gap_size": 0, "num_memory_blocks": 0, "down_scale_factor": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
V1 = SHARED | UNUSED | {"embedding_size": 8, "num_hidden_groups": 1, "inner_group_num": 1}
V2 = V1 | NO_DROPOUT
CONFIGS: dict[str, dict[str, Any]] = {
    "albert-v1": V1,
    "albert-v2": V2,
    "albert-groups": V2 | {"num_hidden_groups": 2, "inner_group_num": 2},
    "albert-square": V2 | {"embedding_size": 24},
    "albert-relu": V2 | {"hidden_act": "relu"},
    "bert": SHARED,
}
PRETRAINING = ("predictions", "order")


def drawn_variables(config: Mapping[str, Any], heads: tuple[str, ...] = PRETRAINING) -> Variables:
    """Random variables under the names and in the shapes that Google's code gives them."""
    random, found = np.random.default_rng(5), Variables()
    hidden, middle, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    width = config.get("embedding_size", hidden)

    def draw(name: str, *shape: int, near: float = 0.0, scale: float = 0.3) -> None:
        found[name] = (near + scale * random.standard_normal(shape)).astype(np.float32)

    def dense(scope: str, inputs: int, outputs: int) -> None:
        draw(f"{scope}/kernel", inputs, outputs)
        draw(f"{scope}/bias", outputs)

    def norm(scope: str, size: int) -> None:
        draw(f"{scope}/gamma", size, near=1.0)
        draw(f"{scope}/beta", size)

    draw("bert/embeddings/word_embeddings", words, width)
    draw("bert/embeddings/token_type_embeddings", config["type_vocab_size"], width)
    draw("bert/embeddings/position_embeddings", config["max_position_embeddings"], width)
    norm("bert/embeddings/LayerNorm", width)
    if "embedding_size" in config:
        if width != hidden:
            dense("bert/encoder/embedding_hidden_mapping_in", width, hidden)
        for group in range(config["num_hidden_groups"]):
            for inner in range(config["inner_group_num"]):
                scope = f"bert/encoder/transformer/group_{group}/inner_group_{inner}"
                for name in ("query", "key", "value"):
                    dense(f"{scope}/attention_1/self/{name}", hidden, hidden)
                dense(f"{scope}/attention_1/output/dense", hidden, hidden)
                norm(f"{scope}/LayerNorm", hidden)
                dense(f"{scope}/ffn_1/intermediate/dense", hidden, middle)
                dense(f"{scope}/ffn_1/intermediate/output/dense", middle, hidden)
                norm(f"{scope}/LayerNorm_1", hidden)
    else:
        for layer in range(config["num_hidden_layers"]):
            scope = f"bert/encoder/layer_{layer}"
            for name in ("query", "key", "value"):
                dense(f"{scope}/attention/self/{name}", hidden, hidden)
            dense(f"{scope}/attention/output/dense", hidden, hidden)
            norm(f"{scope}/attention/output/LayerNorm", hidden)
            dense(f"{scope}/intermediate/dense", hidden, middle)
            dense(f"{scope}/output/dense", middle, hidden)
            norm(f"{scope}/output/LayerNorm", hidden)
    dense("bert/pooler/dense", hidden, hidden)
    if "predictions" in heads:
        dense("cls/predictions/transform/dense", hidden, width)
        norm("cls/predictions/transform/LayerNorm", width)
        draw("cls/predictions/output_bias", words)
    for head, scope, outputs in (
        ("order", "cls/seq_relationship/", 2),
        ("classifier", "", 5),
        ("answers", "cls/squad/", 2),
    ):
        if head in heads:
            draw(f"{scope}output_weights", outputs, hidden)
            draw(f"{scope}output_bias", outputs)
    return found


def with_training(variables: Variables) -> Variables:
    """The variables with the optimizer's slots and the counter that Google's releases hold too."""
    slots = {
        f"{name}/{slot}": np.ones_like(value) for name, value in variables.items() for slot in ("adam_m", "adam_v")
    }
    return {**variables, **slots, "global_step": np.int64(125_000)}


def googles_outputs(v: Variables, config: Mapping[str, Any], batch: list[Any], xp: Any, erf: Any) -> dict[str, Any]:
    """What modeling.py and run_pretraining.py of google-research/albert and google-research/bert compute.

    Args:
        v: arrays of `xp`, by Google's names.
        batch: ids, mask and types, (B, S) each.
        xp: numpy, or TensorFlow's numpy.
    """
    ids, mask, types = batch
    albert, heads, width = "embedding_size" in config, config["num_attention_heads"], config["hidden_size"]

    def act(x: Any) -> Any:
        if config["hidden_act"] == "relu":
            return xp.maximum(x, 0.0)
        if albert or config["hidden_act"] == "gelu_new":  # for BERT: its code of 2019 and later
            return 0.5 * x * (1.0 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        return 0.5 * x * (1.0 + erf(x / math.sqrt(2)))

    def dense(x: Any, scope: str) -> Any:
        return xp.matmul(x, v[f"{scope}/kernel"]) + v[f"{scope}/bias"]

    def norm(x: Any, scope: str) -> Any:
        centred = x - xp.mean(x, axis=-1, keepdims=True)
        variance = xp.mean(centred * centred, axis=-1, keepdims=True)
        return centred / xp.sqrt(variance + 1e-12) * v[f"{scope}/gamma"] + v[f"{scope}/beta"]

    def by_head(x: Any) -> Any:
        return xp.transpose(xp.reshape(x, (*ids.shape, heads, width // heads)), (0, 2, 1, 3))

    def attention(x: Any, scope: str) -> Any:
        q, k, value = (by_head(dense(x, f"{scope}/{name}")) for name in ("query", "key", "value"))
        scores = xp.matmul(q, xp.transpose(k, (0, 1, 3, 2))) / math.sqrt(width // heads)
        scores = scores + (1.0 - mask[:, None, None, :]) * -10000.0
        weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
        weights = weights / xp.sum(weights, axis=-1, keepdims=True)
        return xp.reshape(xp.transpose(xp.matmul(weights, value), (0, 2, 1, 3)), (*ids.shape, width))

    table = v["bert/embeddings/word_embeddings"]
    x = xp.take(table, ids, axis=0) + xp.take(v["bert/embeddings/token_type_embeddings"], types, axis=0)
    x = norm(x + v["bert/embeddings/position_embeddings"][: ids.shape[1]], "bert/embeddings/LayerNorm")
    if "bert/encoder/embedding_hidden_mapping_in/kernel" in v:
        x = dense(x, "bert/encoder/embedding_hidden_mapping_in")
    states = [x]
    for layer in range(config["num_hidden_layers"]):
        if albert:
            group = int(layer / config["num_hidden_layers"] * config["num_hidden_groups"])
            for inner in range(config["inner_group_num"]):
                scope = f"bert/encoder/transformer/group_{group}/inner_group_{inner}"
                context = dense(attention(x, f"{scope}/attention_1/self"), f"{scope}/attention_1/output/dense")
                x = norm(x + context, f"{scope}/LayerNorm")
                middle = act(dense(x, f"{scope}/ffn_1/intermediate/dense"))
                x = norm(x + dense(middle, f"{scope}/ffn_1/intermediate/output/dense"), f"{scope}/LayerNorm_1")
                states.append(x)
        else:
            scope = f"bert/encoder/layer_{layer}"
            context = dense(attention(x, f"{scope}/attention/self"), f"{scope}/attention/output/dense")
            x = norm(x + context, f"{scope}/attention/output/LayerNorm")
            middle = act(dense(x, f"{scope}/intermediate/dense"))
            x = norm(x + dense(middle, f"{scope}/output/dense"), f"{scope}/output/LayerNorm")
            states.append(x)
    pooled = xp.tanh(dense(x[:, 0], "bert/pooler/dense"))
    found = {"last_hidden_state": x, "pooler_output": pooled}
    found |= {f"hidden_states.{at}": state for at, state in enumerate(states)}

    def output(x: Any, scope: str) -> Any:
        return xp.matmul(x, xp.transpose(v[f"{scope}output_weights"])) + v[f"{scope}output_bias"]

    if "cls/predictions/output_bias" in v:
        words = act(dense(x, "cls/predictions/transform/dense"))
        words = norm(words, "cls/predictions/transform/LayerNorm")
        found["words"] = xp.matmul(words, xp.transpose(table)) + v["cls/predictions/output_bias"]
    if "cls/seq_relationship/output_bias" in v:
        found["order"] = output(pooled, "cls/seq_relationship/")
    if "output_bias" in v:
        found["classes"] = output(pooled, "")
    if "cls/squad/output_bias" in v:
        found["starts"], found["ends"] = (output(x, "cls/squad/")[..., at] for at in (0, 1))
    return found


def numpy_outputs(variables: Variables, config: Mapping[str, Any], batch: list[Any], dtype: Any) -> dict[str, Any]:
    """`googles_outputs` in numpy, in float32 or float64."""
    given = {name: value.astype(dtype) for name, value in variables.items()}
    ids, mask, types = batch
    erf = np.vectorize(math.erf, otypes=[dtype])
    return googles_outputs(given, config, [ids, mask.astype(dtype), types], np, erf)


def release(folder: Path, config: Mapping[str, Any]) -> Path:
    """A folder with the files of a release, but no values of variables."""
    folder.mkdir(parents=True)
    name = "albert_config.json" if "embedding_size" in config else "bert_config.json"
    (folder / name).write_text(json.dumps(config))
    (folder / "model.ckpt-best.index").touch()
    return folder
