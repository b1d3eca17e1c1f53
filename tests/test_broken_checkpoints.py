"""Checkpoints that do not fit, are truncated or hostile: an error that names file and key, and nothing half-loaded."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import albert_fast
from albert_fast.checkpoints import weights
from albert_fast.models import reference
from albert_fast.models.config import ALBERTConfig
from albert_fast.testing.model_pairs import SMALL, model_pair

MODULES = [pytest.param(reference, id="eager"), pytest.param(albert_fast, id="fast")]
LAYER = "encoder.albert_layer_groups.0.albert_layers.0."


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A pre-training model as transformers saves it."""
    model_pair(reference, "ForPreTraining", SMALL)[1].save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}ffn.bias": None}, rf"model.safetensors: '{LAYER}ffn.bias' is missing"),
        ({"encoder.extra": torch.ones(2)}, r"model.safetensors: 'encoder.extra' is not a tensor of ALBERTModel"),
        (
            {f"{LAYER}attention.key.weight": torch.ones(48, 47)},
            r"key.weight' has the shape \(48, 47\), expected \(48, 48\)",
        ),
        ({"pooler.bias": torch.ones(48, 1)}, r"'pooler.bias' has the shape \(48, 1\), expected \(48,\)"),
        ({"pooler.bias": None}, r"'pooler.bias' is missing"),
        (
            {"pooler.bias": torch.ones(48, dtype=torch.int32)},
            r"'pooler.bias' must be a dense tensor of floats, got torch.int32",
        ),
        (
            {"pooler.bias": torch.ones(48, dtype=torch.complex64)},
            r"'pooler.bias' must be a dense tensor of floats, got torch.complex64",
        ),
        ({"embeddings.LayerNorm.gamma": torch.ones(16)}, r"LayerNorm.gamma' .*are both 'embeddings.LayerNorm.weight'"),
    ],
    ids=["missing", "extra", "misshapen", "one dimension more", "half a head", "integers", "complex", "twice"],
)
def test_wrong_tensors(module: ModuleType, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    model, theirs = model_pair(module, "Model", SMALL)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message.replace(".0.", r"\.0\.")):
        module.ALBERTModel.from_pretrained(tmp_path)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    other = {key: torch.full_like(t, 9.0) if t.is_floating_point() else t for key, t in state.items()}
    with pytest.raises(ValueError, match="checkpoint: "):
        weights.load_into(model, weights.rename_old_names(other, model.family), model.family)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_all_problems_are_listed() -> None:
    model = reference.ALBERTModel(ALBERTConfig(**SMALL))
    state = {key: tensor[:1] for key, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"(?s)ALBERTModel cannot be loaded:\n(checkpoint: '.*\n){10}\.\.\. and 15 more"
    ):
        weights.load_into(model, state, model.family)
    with pytest.raises(ValueError, match=r"'pooler.bias' must be a dense tensor of floats, got torch.float32 on meta"):
        weights.load_into(model, model.state_dict() | {"pooler.bias": torch.ones(48, device="meta")}, model.family)
    with pytest.raises(ValueError, match=r"'pooler.bias' must be a dense tensor of floats, got torch.sparse_coo"):
        weights.load_into(model, model.state_dict() | {"pooler.bias": torch.ones(48).to_sparse()}, model.family)


# Broken and hostile files.


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 300, 0.5, -1])
def test_truncated_safetensors(kept: float, saved: Path) -> None:
    file = saved / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)] if isinstance(kept, float) else data[:kept])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable checkpoint: "):
        reference.ALBERTModel.from_pretrained(saved)


@pytest.mark.parametrize(
    "header",
    [
        b"{}" * 40,
        b'{"pooler.bias": {"dtype": "F32", "shape": [48], "data_offsets": [0, 1000000]}}',
        b'{"pooler.bias": {"dtype": "F32", "shape": [18446744073709551615, 4], "data_offsets": [0, 16]}}',
        b'{"pooler.bias": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
        b'"b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        b"[" * 1000,
    ],
    ids=["no json", "behind the end", "overflow", "unknown dtype", "overlap", "nested"],
)
def test_hostile_safetensors(header: bytes, saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable checkpoint: "):
        reference.ALBERTModel.from_pretrained(saved)


class Attack:
    """Unpickled carelessly, this would create the file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_no_code_from_a_pickle_runs(saved: Path) -> None:
    os.remove(saved / "model.safetensors")
    state = {"pooler.weight": torch.ones(2), "harm": Attack(saved / "harmed")}
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))):
        write(state, saved / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model.bin: not a readable checkpoint: "):
            reference.ALBERTModel.from_pretrained(saved)
    assert not (saved / "harmed").exists()


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {"state_dict": {"pooler.weight": torch.ones(2)}},
        {3: torch.ones(2)},
        torch.ones(2),
        {"epoch": 3},
    ],
    ids=["list", "nested", "integer key", "tensor", "number"],
)
def test_a_bin_of_anything_but_tensors_by_name(content: Any, saved: Path) -> None:
    os.remove(saved / "model.safetensors")
    torch.save(content, saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin: .*(expected tensors by name|is not a tensor by name)"):
        reference.ALBERTModel.from_pretrained(saved)


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, -1])
def test_truncated_bin(kept: float, saved: Path) -> None:
    file = saved / "pytorch_model.bin"
    torch.save(load_file(saved / "model.safetensors"), file)
    os.remove(saved / "model.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)] if isinstance(kept, float) else data[:kept])
    with pytest.raises(ValueError, match=r"pytorch_model.bin: not a readable checkpoint: "):
        reference.ALBERTModel.from_pretrained(saved)


@pytest.fixture
def shards(saved: Path) -> dict[str, str]:
    """`saved` in two shards; returns the map of its index."""
    state = load_file(saved / "model.safetensors")
    os.remove(saved / "model.safetensors")
    half = len(state) // 2
    names = {key: f"model-0000{1 + (i >= half)}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        save_file({key: state[key] for key in names if names[key] == name}, saved / name)
    return names


def test_broken_shards(saved: Path, shards: dict[str, str]) -> None:
    index, good, key = saved / "model.safetensors.index.json", shards, "albert.pooler.bias"

    def load_with(weight_map: Any) -> None:
        index.write_text(json.dumps({"weight_map": weight_map}))
        reference.ALBERTModel.from_pretrained(saved)

    load_with(good)
    for elsewhere in ("../secret.safetensors", "/etc/passwd", "..", "a/b.safetensors", "shard.pkl", "", 3, None):
        with pytest.raises(ValueError, match=rf"index.json: '{key}' is listed in .*not the name of a shard"):
            load_with(good | {key: elsewhere})
    with pytest.raises(ValueError, match=rf"index.json lists 'encoder.nowhere' in {good[key]}, which does not"):
        load_with(good | {"encoder.nowhere": good[key]})
    other = next(shard for shard in good.values() if shard != good[key])
    with pytest.raises(ValueError, match=rf"index.json: says that '{key}' is in {other}; it is in .*{good[key]}"):
        load_with(good | {key: other})
    with pytest.raises(ValueError, match=rf"index.json: does not list '{key}', which is in .*{good[key]}"):
        load_with({k: v for k, v in good.items() if k != key})
    with pytest.raises(FileNotFoundError, match=r"index\.json lists a shard that does not exist: gone\.safetensors"):
        load_with(good | {key: "gone.safetensors"})
    for broken in ("", "[]", '{"weight_map": 3}', '{"weight_map": ["a"]}', "{}", "[" * 100_000):
        index.write_text(broken)
        with pytest.raises(ValueError, match=r"index.json: not an index of shards"):
            reference.ALBERTModel.from_pretrained(saved)


def test_a_key_in_two_shards(saved: Path, shards: dict[str, str]) -> None:
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    key = "albert.pooler.bias"
    one, two = sorted(set(shards.values()))
    for name in (one, two):
        save_file(load_file(saved / name) | {key: torch.ones(48)}, saved / name)
    with pytest.raises(ValueError, match=rf"{two}: '{key}' is also in .*{one}"):
        reference.ALBERTModel.from_pretrained(saved)


def test_nothing_there(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", "./nowhere", "no/such/place", "no where"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            reference.ALBERTModel.from_pretrained(path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        reference.ALBERTModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "albert", **SMALL}))
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        reference.ALBERTModel.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json: .*bert"):
        reference.ALBERTModel.from_pretrained(tmp_path)
