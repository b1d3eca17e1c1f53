"""The configuration as code written for transformers uses it: any keyword, attributes, labels, files."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch

from albert_fast import ALBERTConfig

# What Kokoro's config.json passes to transformers' AlbertConfig.
KOKORO = {
    "hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 32,
    "num_hidden_layers": 2, "dropout": 0.1,
}  # fmt: skip


def test_other_keywords_are_kept_as_transformers_keeps_them() -> None:
    config = ALBERTConfig(vocab_size=178, **KOKORO, torch_dtype="bfloat16")
    assert (config.dropout, config.hidden_dropout_prob) == (0.1, 0.0)
    assert config.dtype is config.torch_dtype is torch.bfloat16
    assert config.to_dict()["dropout"] == 0.1
    config.mine = 3
    assert (config.mine, config.to_dict()["mine"]) == (3, 3)
    assert not hasattr(config, "never_set")
    for name, default in (("is_encoder_decoder", False), ("architectures", None), ("name_or_path", "")):
        assert getattr(config, name) == default
    with pytest.raises(ValueError, match="model_type is 'bert'"):
        ALBERTConfig(model_type="bert")
    with pytest.raises(ValueError, match="return_dict must be true or false, got 'no'"):
        ALBERTConfig(return_dict="no")


def test_a_misspelt_field_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="'hiden_size' is kept but not read; did you mean 'hidden_size'"):
        assert ALBERTConfig(hiden_size=8).hidden_size == 4096
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ALBERTConfig(**KOKORO)


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, dataclasses.replace, lambda c: pickle.loads(pickle.dumps(c))]
)
def test_a_copy_has_its_own_attributes(again) -> None:  # type: ignore[no-untyped-def]
    config = ALBERTConfig(**KOKORO)
    other = again(config)
    assert other == config
    other.dropout = 0.5
    assert config.dropout == 0.1
    assert other != config


def test_no_key_of_a_file_hides_a_method() -> None:
    config = ALBERTConfig.from_dict(
        {"to_dict": 1, "head_dim": 7, "activation": "x", "hidden_size": 64, "num_attention_heads": 4}
    )
    assert (config.to_dict()["to_dict"], config.head_dim, config.activation) == (1, 16, "gelu_tanh")


def test_labels_agree_however_they_are_set() -> None:
    config = ALBERTConfig()
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    config.num_labels = 3
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    config.id2label = {"0": "no", "1": "yes"}
    assert (config.num_labels, config.label2id, config.label(1)) == (2, {"no": 0, "yes": 1}, "yes")
    other = config.replace(id2label={0: "a", 1: "b", 2: "c"})
    assert (other.num_labels, other.label2id) == (3, {"a": 0, "b": 1, "c": 2})
    assert other.replace(num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_what_is_unknown_to_replace_suggests_a_field() -> None:
    with pytest.raises(TypeError, match="config has no field hidden_sise; did you mean hidden_size"):
        ALBERTConfig().replace(hidden_sise=8)
    assert ALBERTConfig(**KOKORO).replace(dropout=0.2).dropout == 0.2


def test_files(tmp_path: Path) -> None:
    config = ALBERTConfig(**KOKORO, output_attentions=True, num_labels=3)
    config.save_pretrained(tmp_path / "new" / "folder")
    read, unused = ALBERTConfig.from_pretrained(
        tmp_path / "new" / "folder", hidden_dropout_prob=0.3, return_unused_kwargs=True, unheard_of=1
    )
    assert unused == {"unheard_of": 1}
    assert read == config.replace(hidden_dropout_prob=0.3)
    assert read.name_or_path == str(tmp_path / "new" / "folder")
    difference = json.loads(config.to_json_string())
    assert difference.keys() == {*KOKORO, "model_type", "output_attentions", "id2label", "label2id"}
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    with pytest.raises(FileNotFoundError, match=r"no config\.json there"):
        ALBERTConfig.from_pretrained(tmp_path)


def test_update_sets_all_or_nothing() -> None:
    config = ALBERTConfig(**KOKORO)
    config.update({"hidden_dropout_prob": 0.4, "mine": 1})
    assert (config.hidden_dropout_prob, config.mine) == (0.4, 1)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        config.update({"attention_probs_dropout_prob": 0.4, "num_hidden_layers": 0})
    assert config.attention_probs_dropout_prob == 0.0
    assert "hidden_size" in config
    assert config.get_text_config() is config


def test_transformers_reads_and_writes_the_same(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AlbertConfig(**KOKORO, num_labels=5)
    ours = ALBERTConfig.from_dict(theirs.to_dict())
    assert {key: value for key, value in ours.to_dict().items() if theirs.to_dict().get(key) != value} == {
        "id2label": {str(i): f"LABEL_{i}" for i in range(5)}
    }
    ours.save_pretrained(tmp_path)
    back = transformers.AlbertConfig.from_pretrained(tmp_path)
    assert (back.dropout, back.num_labels, back.hidden_size) == (0.1, 5, 48)


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, True), ({"return_dict": False}, False), ({"use_return_dict": False}, False), ({"torchscript": True}, False)],
)
def test_what_asks_for_tuples(values: dict[str, bool], expected: bool) -> None:
    assert ALBERTConfig.from_dict(values).use_return_dict is expected
