"""Files that ask for more than a checkpoint needs, or were made for another library: a clear error, before much is read."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from albert_fast import ALBERTConfig, ALBERTModel
from albert_fast.checkpoints import weights
from albert_fast.models import reference
from albert_fast.testing.model_pairs import SMALL


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    reference.ALBERTModel(ALBERTConfig(**SMALL)).save_pretrained(tmp_path)
    return tmp_path


# config.json


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("layer_norm_eps", ["1e-12", None, -1, float("nan"), float("inf"), True, [1e-12], {}]),
        ("initializer_range", ["0.02", None, -0.02, float("-inf")]),
        ("hidden_dropout_prob", ["0", None, 1, -0.1, float("nan"), False]),
        ("attention_probs_dropout_prob", [[0.0], 2]),
        ("classifier_dropout_prob", ["none", 1.5]),
        ("vocab_size", ["50", 50.0, None, 0, -3, True, 10**12, 10**30, [50]]),
        ("hidden_size", [48.0, 49, "48"]),
        ("num_hidden_layers", [10**6, "2", float("inf")]),
        ("num_hidden_groups", [10**7, None]),
        ("inner_group_num", [10**5]),
        ("num_labels", ["2", 0, 10**9, 2.0]),
        ("pad_token_id", [10**6, "0", 0.0, True, [0], -(10**6)]),
        ("bos_token_id", ["2", 2.5]),
        ("eos_token_id", ["3", [3, "4"], {}]),
        ("tie_word_embeddings", [1, "true", None]),
        ("id2label", [["a"], {}, {"a": "b"}, {"0": ["x"]}, {"0": None}, {"0": "a", "00": "b"}, {"-1": "a"}, 3, "ab"]),
        ("label2id", [["a"], {"a": "b"}, {"a": 1.5}, {"a": None}]),
        ("hidden_act", [["gelu"], None, 3, "swish"]),
        ("problem_type", [["regression"], 3, "ranking"]),
        ("model_type", [["albert"], None, "bert"]),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_field_and_file(
    field: str, values: list[Any], saved: Path
) -> None:
    file = saved / "config.json"
    good = json.loads(file.read_text())
    for value in values:
        file.write_text(json.dumps(good | {field: value}))
        with pytest.raises(ValueError, match=rf"config\.json: config: .*{field}") as caught:
            ALBERTModel.from_pretrained(saved)
        assert len(str(caught.value)) < 400


def test_values_that_can_be_used(saved: Path) -> None:
    file = saved / "config.json"
    good = json.loads(file.read_text())
    for changed in (
        {"layer_norm_eps": 0}, {"pad_token_id": None}, {"pad_token_id": -1}, {"eos_token_id": [1, 2]},
        {"classifier_dropout_prob": None}, {"num_hidden_layers": 1000}, {"id2label": {"1": "b", "0": 7}},
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": "0", "b": 1, "c": 2}}, {"anything": {"else": [1]}},
    ):  # fmt: skip
        file.write_text(json.dumps(good | changed))
        config = ALBERTModel.from_pretrained(saved).config
        assert all(
            config.to_dict()[key] == value for key, value in changed.items() if key not in ("id2label", "label2id")
        )
    assert ALBERTConfig(id2label={"1": "b", "0": 7}).id2label == {1: "b", 0: "7"}
    assert ALBERTConfig(id2label={0: "a"}, label2id={"a": "0"}).label2id == {"a": 0}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (b'{"a":' + b"[" * 200_000, "not valid JSON"),
        (b'{"vocab_size":' + b"9" * 9999 + b"}", "not valid JSON"),
        ('{"vocab_size": 50}'.encode("utf-16"), "UTF-16"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b'{"vocab_size": 50, "vocab_size": 60}', "'vocab_size' is there twice"),
        (b"[1]", "expected a JSON object, got list"),
        (b"{}{}", "not valid JSON"),
    ],
    ids=["empty", "blank", "deep", "long number", "utf-16", "bytes", "twice", "list", "two"],
)
def test_a_config_that_is_no_json_object(content: bytes, message: str, saved: Path) -> None:
    (saved / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        ALBERTModel.from_pretrained(saved)


def test_a_config_with_a_byte_order_mark_or_an_equal_key_twice(saved: Path) -> None:
    file = saved / "config.json"
    content = file.read_bytes()
    file.write_bytes(b"\xef\xbb\xbf" + content.replace(b"{", b'{"hidden_size": 48, ', 1))
    assert ALBERTModel.from_pretrained(saved).config.hidden_size == 48


def test_a_config_of_many_megabytes_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (saved / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match=r"config\.json: 1099511627776 bytes are too many"):
        ALBERTModel.from_pretrained(saved)


def test_sizes_that_no_memory_holds(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json: a model of these sizes cannot be made here"):
        ALBERTModel.from_pretrained(saved, vocab_size=2**31 - 1, embedding_size=2**31 - 1)


# Weights


def bomb(path: Path, members: int = 3, size: int = 1 << 20) -> None:
    """A file of torch.save whose data was compressed, to a thousandth of its size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        for number in range(members):
            archive.writestr(f"a/data/{number}", bytes(size))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(saved: Path) -> None:
    os.remove(saved / "model.safetensors")
    bomb(saved / "pytorch_model.bin", members=8, size=16 << 20)
    script = """
import resource, sys
import albert_fast
used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    albert_fast.ALBERTModel.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used < 64 << 10)  # KiB
"""
    run = subprocess.run([sys.executable, "-c", script, str(saved)], capture_output=True, text=True, check=True)
    assert "pytorch_model.bin: not a readable checkpoint: its" in run.stdout
    assert "would unpack to 134" in run.stdout
    assert run.stdout.endswith("True\n")


def test_members_that_overlap_or_are_too_many_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.remove(saved / "model.safetensors")
    file = saved / "pytorch_model.bin"
    plain = io.BytesIO()
    with zipfile.ZipFile(plain, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(1 << 16))
    content = plain.getvalue()
    start, count = content.index(b"PK\x01\x02"), 9
    end = content.index(b"PK\x05\x06")
    second = content.index(b"PK\x01\x02", start + 4)
    entries = content[start:end] + content[second:end] * count  # the last member, listed again and again
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2 + count, 2 + count, len(entries), start, 0)
    file.write_bytes(content[:start] + entries + tail)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .*members are compressed or overlap"):
        ALBERTModel.from_pretrained(saved)
    torch.save(reference.ALBERTModel(ALBERTConfig(**SMALL)).state_dict(), file)
    ALBERTModel.from_pretrained(saved)
    monkeypatch.setattr(weights, "MOST_MEMBERS", 10)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: .*it has \d+ members, at most 10 are read"):
        ALBERTModel.from_pretrained(saved)


def test_the_format_of_torch_before_zip_loads(saved: Path) -> None:
    state = load_file(saved / "model.safetensors")
    os.remove(saved / "model.safetensors")
    torch.save(state, saved / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    loaded = ALBERTModel.from_pretrained(saved).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_a_long_header_is_refused_before_it_is_read(saved: Path) -> None:
    with (saved / "model.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + b"{")
        file.truncate(200_000_100)
    with pytest.raises(ValueError, match=r"model\.safetensors: .*its header of 200000000 bytes is too long"):
        ALBERTModel.from_pretrained(saved)


# Other libraries' files, and what may not be read


@pytest.mark.parametrize(
    "name", ["tf_model.h5", "model.ckpt-best.index", "model.ckpt-125000.data-00000-of-00001", "flax_model.msgpack",
             "saved_model.pb"]
)  # fmt: skip
def test_files_of_tensorflow_and_flax_are_named(name: str, saved: Path) -> None:
    os.remove(saved / "model.safetensors")
    (saved / name).write_bytes(b"weights")
    with pytest.raises(
        FileNotFoundError, match=rf"holds none of .*{name} is a checkpoint of TensorFlow or Flax.*convert"
    ):
        ALBERTModel.from_pretrained(saved)
    with pytest.raises(ValueError, match=rf"{name}: a checkpoint of TensorFlow or Flax.*convert"):
        ALBERTModel.from_pretrained(saved / name)
    if name.endswith(".index"):  # as TensorFlow names it: without the ending
        with pytest.raises(ValueError, match=r"model\.ckpt-best: a checkpoint of TensorFlow"):
            ALBERTModel.from_pretrained(saved / "model.ckpt-best")


def test_names_of_tensorflow_variables_are_named(saved: Path) -> None:
    key = "bert/encoder/transformer/group_0/inner_group_0/attention_1/self/query/kernel"
    save_file({key: torch.ones(3, 3)}, saved / "model.safetensors")
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: '{key}' names a variable of TensorFlow or Flax.*convert"
    ):
        ALBERTModel.from_pretrained(saved)


def test_a_folder_that_may_not_be_read_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the tests may run as root, who may read everything
    with pytest.raises(PermissionError, match=f"no permission to read it: '{saved}'"):
        ALBERTModel.from_pretrained(saved)
