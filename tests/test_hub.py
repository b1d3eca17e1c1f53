"""Names that are no folder here are looked up on the hub, through huggingface_hub, whose answers are played here."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from albert_fast import reference, weights
from albert_fast.config import ALBERTConfig
from albert_fast.testing.twins import SMALL


class EntryNotFoundError(Exception):
    """As huggingface_hub's: this repository has no such file."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose subfolders are the repositories of a hub; what is fetched lands in a cache beside it."""
    repositories, cache = tmp_path / "hub", tmp_path / "cache"

    def hf_hub_download(name: str, file: str) -> str:
        if not (repositories / name).is_dir():
            raise OSError(f"401 Client Error: Repository Not Found: {name}")
        if not (repositories / name / file).exists():
            raise EntryNotFoundError(f"404 Client Error: {name}/{file}")
        target = cache / name.replace("/", "--") / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repositories / name / file, target)
        return str(target)

    module, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    module.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    errors.EntryNotFoundError = EntryNotFoundError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    monkeypatch.chdir(tmp_path)
    return repositories


def test_a_model_from_the_hub(hub: Path) -> None:
    model = reference.ALBERTModel(ALBERTConfig(**SMALL))
    model.save_pretrained(hub / "someone" / "albert-small.v2")
    (hub / "someone" / "albert-small.v2" / "pytorch_model.bin").write_text("never fetched")
    loaded = reference.ALBERTModel.from_pretrained("someone/albert-small.v2")
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.state_dict().items())
    cached = weights.resolve("someone/albert-small.v2")
    assert sorted(path.name for path in cached.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("stem", ["pytorch_model.bin", "shards"])
def test_other_layouts_on_the_hub(stem: str, hub: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AlbertModel(transformers.AlbertConfig(**SMALL))
    theirs.save_pretrained(hub / "albert", max_shard_size="20KB" if stem == "shards" else "1GB")
    if stem != "shards":
        torch.save(theirs.state_dict(), hub / "albert" / stem)
        (hub / "albert" / "model.safetensors").unlink()
    loaded = reference.ALBERTModel.from_pretrained("albert")
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_nothing_on_the_hub(hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no/model: no such folder here, and the hub answers: 401"):
        weights.resolve("no/model")
    (hub / "empty").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"empty: no such folder here, and the hub answers: 404.*config.json"):
        weights.resolve("empty")
    (hub / "empty" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"empty: this repository of the hub holds none of model.safetensors"):
        weights.resolve("empty")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"some/model: .*pip install albert-fast\[hub\]"):
        weights.resolve("some/model")


@pytest.mark.parametrize("name", ["/no/such/folder", "../up", "a/b/c", "spaces are not allowed"])
def test_what_cannot_be_a_name_on_the_hub_is_not_asked_for(name: str, hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        weights.resolve(name)
