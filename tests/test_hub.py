"""Names that are no folder here are looked up on the hub, through huggingface_hub, whose answers are played here."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from albert_fast.checkpoints import weights
from albert_fast.models import reference
from albert_fast.models.config import ALBERTConfig
from albert_fast.testing.model_pairs import SMALL


class EntryNotFoundError(Exception):
    """As huggingface_hub's: this repository has no such file."""


class HfHubHTTPError(OSError):
    """As huggingface_hub's: the hub's answer is an error."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose subfolders are the repositories of a hub; what is fetched lands in a cache beside it."""
    repositories, cache, asked = tmp_path / "hub", tmp_path / "cache", []

    def hf_hub_url(name: str, file: str, **where: str) -> str:
        return f"{name}/{file}"

    def get_hf_file_metadata(url: str, token: object, timeout: float) -> None:
        assert timeout <= 10, "a misspelt folder waits"
        if not (repositories / url).exists():
            raise HfHubHTTPError(f"404 Client Error: {url}")

    def hf_hub_download(name: str, file: str, **arguments: object) -> str:
        asked.append((file, arguments))
        if not (repositories / name).is_dir():
            raise HfHubHTTPError(f"401 Client Error: Repository Not Found: {name}")
        if not (repositories / name / file).exists():
            raise EntryNotFoundError(f"404 Client Error: {name}/{file}")
        target = cache / name.replace("/", "--") / file
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repositories / name / file, target)
        return str(target)

    module, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
    module.asked = asked  # type: ignore[attr-defined]
    for function in (hf_hub_download, hf_hub_url, get_hf_file_metadata):
        setattr(module, function.__name__, function)
    errors.EntryNotFoundError, errors.HfHubHTTPError = EntryNotFoundError, HfHubHTTPError  # type: ignore[attr-defined]
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


@pytest.fixture
def theirs() -> torch.nn.Module:
    """Made before `hub` hides huggingface_hub, which transformers imports."""
    transformers = pytest.importorskip("transformers")
    model: torch.nn.Module = transformers.AlbertModel(transformers.AlbertConfig(**SMALL))
    return model


@pytest.mark.parametrize("stem", ["pytorch_model.bin", "shards"])
def test_other_layouts_on_the_hub(stem: str, theirs: torch.nn.Module, hub: Path) -> None:
    theirs.save_pretrained(hub / "albert", max_shard_size="20KB" if stem == "shards" else "1GB")
    if stem != "shards":
        torch.save(theirs.state_dict(), hub / "albert" / stem)
        (hub / "albert" / "model.safetensors").unlink()
    loaded = reference.ALBERTModel.from_pretrained("albert")
    assert all(torch.equal(tensor, theirs.state_dict()[key]) for key, tensor in loaded.state_dict().items())


def test_nothing_on_the_hub(hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no/model: no such folder here.*, and the hub answers: 401"):
        weights.resolve("no/model")
    (hub / "empty").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=r"empty: no such folder here; this repository .* holds none of config.json"
    ):
        weights.resolve("empty")
    (hub / "empty" / "config.json").write_text("{}")
    with pytest.raises(
        FileNotFoundError, match=r"empty: no such folder here; this repository .* holds none of model.safe"
    ):
        weights.resolve("empty")


def test_arguments_reach_the_hub(hub: Path) -> None:
    reference.ALBERTModel(ALBERTConfig(**SMALL)).save_pretrained(hub / "someone" / "albert")
    given = {"revision": "v2", "cache_dir": "/some/cache", "token": "secret", "local_files_only": True}
    given |= {"force_download": False, "subfolder": "inner"}
    reference.ALBERTModel.from_pretrained("someone/albert", **given, proxies=None, use_safetensors=True)
    asked = sys.modules["huggingface_hub"].asked
    assert all(arguments == given for _, arguments in asked)
    assert {"config.json", "model.safetensors"} <= {file for file, _ in asked}
    assert not any(file.endswith(".bin") for file, _ in asked)
    asked.clear()
    config = ALBERTConfig.from_pretrained("someone/albert", revision="v3")
    assert (config.hidden_size, config.name_or_path) == (SMALL["hidden_size"], "someone/albert")
    assert asked == [("config.json", {"revision": "v3"})]


def test_a_hub_that_does_not_answer_is_asked_once(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer what is in the local cache is enough; what is not is a misspelt folder as likely as a name."""

    def silent(*_: object, **__: object) -> None:
        raise ConnectionError("nobody there")

    cached = {"a/model": True, "a/modle": False}

    def hf_hub_download(name: str, file: str, local_files_only: bool = False) -> str:
        assert local_files_only, "asked again"
        if not cached[name] or not (hub / name / file).exists():
            raise EntryNotFoundError(file)
        return str(hub / name / file)

    reference.ALBERTModel(ALBERTConfig(**SMALL)).save_pretrained(hub / "a" / "model")
    (Path("a") / "model.v2").mkdir(parents=True)
    monkeypatch.setattr(sys.modules["huggingface_hub"], "get_hf_file_metadata", silent)
    monkeypatch.setattr(sys.modules["huggingface_hub"], "hf_hub_download", hf_hub_download)
    assert reference.ALBERTModel.from_pretrained("a/model").config.hidden_size == SMALL["hidden_size"]
    reading = r"a/modle: no such folder here \(there is a/model\.v2\); as a name on the hub .* reached: nobody there"
    with pytest.raises(FileNotFoundError, match=reading):
        reference.ALBERTModel.from_pretrained("a/modle")


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"some/model: .*pip install albert-fast\[hub\]"):
        weights.resolve("some/model")


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "../up", "a/b/c", "./modle", "modle/", "~/modle", "spaces are not allowed"]
)
def test_what_cannot_be_a_name_on_the_hub_is_not_asked_for(name: str, hub: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        weights.resolve(name)


def test_the_modules_of_a_sentence_transformers_model_come_too(hub: Path) -> None:
    folder = hub / "someone" / "sentences"
    reference.ALBERTModel(ALBERTConfig(**SMALL)).save_pretrained(folder)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Normalize": "Normalize"}
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (folder / "modules.json").write_text(json.dumps(modules))
    wanted = ["1_Pooling/config.json", "2_Dense/config.json", "2_Dense/pytorch_model.bin", "sentence_bert_config.json"]
    for name in (*wanted, "onnx/model.onnx"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    cached = weights.resolve("someone/sentences")
    found = sorted(str(path.relative_to(cached)) for path in cached.rglob("*") if path.is_file())
    assert found == sorted([*wanted, "config.json", "model.safetensors", "modules.json"])
