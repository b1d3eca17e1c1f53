"""Checks of config.json: each field's type and range, and upper bounds on sizes that a file can ask for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

SIZES = (
    "vocab_size", "embedding_size", "hidden_size", "num_hidden_layers", "num_hidden_groups", "num_attention_heads",
    "intermediate_size", "inner_group_num", "max_position_embeddings", "type_vocab_size", "num_labels",
    "dim", "hidden_dim", "n_layers", "n_heads",
)  # fmt: skip
PROBABILITIES = (
    "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "classifier_dropout",
    "dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout", "summary_last_dropout",
)  # fmt: skip
MAY_BE_ABSENT = ("classifier_dropout_prob", "classifier_dropout")
# Far above every model that was trained; a file that asks for more is damaged or hostile.
LARGEST_SIZE = 2**31 - 1
MOST_LABELS = 1_000_000
MOST_LAYERS_RUN = 10_000  # num_hidden_layers x inner_group_num
MOST_LAYERS_HELD = 1_000  # num_hidden_groups x inner_group_num


def check(config: Any) -> None:
    """Check an EncoderConfig: a ValueError names the first field that cannot be used as it is, and its value."""
    fields = config.__dataclass_fields__
    for name in filter(fields.__contains__, SIZES):
        value = getattr(config, name)
        if not is_integer(value) or value < 1:
            raise ValueError(f"config: {name} must be a positive integer, got {_shown(value)}")
        largest = MOST_LABELS if name == "num_labels" else LARGEST_SIZE
        if value > largest:
            raise ValueError(f"config: {name} may be at most {largest}, got {_shown(value)}")
    if "num_hidden_groups" in fields:
        for name, most in (("num_hidden_layers", MOST_LAYERS_RUN), ("num_hidden_groups", MOST_LAYERS_HELD)):
            count = getattr(config, name) * config.inner_group_num
            if count > most:
                raise ValueError(f"config: {name} x inner_group_num may be at most {most}, got {count}")
    elif config.num_hidden_layers > MOST_LAYERS_HELD:
        name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        raise ValueError(f"config: {name} may be at most {MOST_LAYERS_HELD}, got {config.num_hidden_layers}")
    if config.hidden_size % config.num_attention_heads:
        width, heads = (config.attribute_map.get(name, name) for name in ("hidden_size", "num_attention_heads"))
        raise ValueError(
            f"config: {width} {config.hidden_size} is not a multiple of {heads} {config.num_attention_heads}"
        )
    for name in filter(fields.__contains__, PROBABILITIES):
        value = getattr(config, name)
        absent = value is None and name in MAY_BE_ABSENT
        if not absent and not (_is_number(value) and 0 <= value < 1):
            raise ValueError(f"config: {name} must be a number in [0, 1), got {_shown(value)}")
    for name in filter(fields.__contains__, ("initializer_range", "layer_norm_eps")):
        value = getattr(config, name)
        if not _is_number(value) or value < 0:
            raise ValueError(f"config: {name} must be a finite number, 0 or more, got {_shown(value)}")
    for name in filter(fields.__contains__, ("tie_word_embeddings", "ffn_output_dropout")):
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"config: {name} must be true or false, got {_shown(getattr(config, name))}")
    for name in ("output_hidden_states", "output_attentions", "return_dict"):
        if getattr(config, name) not in (None, True, False):
            raise ValueError(f"config: {name} must be true or false, got {_shown(getattr(config, name))}")
    _check_tokens(config)


def _check_tokens(config: Any) -> None:
    pad, bos, eos = config.pad_token_id, config.bos_token_id, config.eos_token_id
    # A negative one counts from the end, as in torch's Embedding.
    if pad is not None and not (is_integer(pad) and -config.vocab_size <= pad < config.vocab_size):
        raise ValueError(
            f"config: pad_token_id must be null or an id of the vocabulary of {config.vocab_size}, got {_shown(pad)}"
        )
    if bos is not None and not is_integer(bos):
        raise ValueError(f"config: bos_token_id must be null or an integer, got {_shown(bos)}")
    if eos is not None and not is_integer(eos) and not (isinstance(eos, list) and all(map(is_integer, eos))):
        raise ValueError(f"config: eos_token_id must be null, an integer or a list of integers, got {_shown(eos)}")


def class_names(id2label: Any) -> dict[int, str]:
    """`id2label` of config.json, whose keys JSON makes strings, as {0: "negative", ...}.

    Raises:
        ValueError: no object, an empty one, keys that are not class numbers, names that are neither text nor numbers.
    """
    if not isinstance(id2label, dict) or not id2label:
        raise ValueError(f'config: id2label must be an object such as {{"0": "negative"}}, got {_shown(id2label)}')
    names = {}
    for key, label in id2label.items():
        number = _class_number(key)
        if number is None or number in names:
            raise ValueError(
                f"config: id2label: {_shown(key)} is not the number of a class, or the second of this number"
            )
        if not isinstance(label, (str, int, float)):
            raise ValueError(f"config: id2label: the name of class {number} must be text, got {_shown(label)}")
        names[number] = str(label)
    return names


def class_numbers(label2id: Any) -> dict[str, int]:
    """`label2id` of config.json. ValueError for anything but an object of class numbers by name."""
    if not isinstance(label2id, dict):
        raise ValueError(f'config: label2id must be an object such as {{"negative": 0}}, got {_shown(label2id)}')
    numbers = {str(label): _class_number(value) for label, value in label2id.items()}
    for label, number in numbers.items():
        if number is None:
            raise ValueError(
                f"config: label2id: {label!r} must have the number of a class, got {_shown(label2id[label])}"
            )
    return {label: number for label, number in numbers.items() if number is not None}


def check_choice(name: str, value: Any, known: Iterable[str]) -> None:
    """ValueError for a value that is none of the names that are known."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"config: {name} {_shown(value)} is not supported; known: {', '.join(known)}")


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _class_number(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        return int(value)
    return value if is_integer(value) and value >= 0 else None


def _shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value) if not is_integer(value) or abs(value) < 10**20 else f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."
