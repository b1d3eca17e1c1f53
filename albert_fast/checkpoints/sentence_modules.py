"""Reads a sentence-transformers folder: modules.json, which names the steps from a text to a vector, and their settings.

| file | what it says |
|---|---|
| modules.json | the modules in order, each with its class and its folder |
| sentence_bert_config.json in the first module's folder | max_seq_length, do_lower_case |
| config_sentence_transformers.json | prompts, default_prompt_name, truncate_dim |

Source: `SentenceTransformer._load_modules` and `Transformer.load_config` of sentence-transformers 6.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from ..runtime.files import read_json, read_json_object

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
# The first module's settings had the name of its family in old versions.
ENCODER_SETTINGS = tuple(
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta")
)
# Names of the class of the first module, today's and those of the first versions.
_ENCODERS = ("Transformer", "BERT", "RoBERTa", "DistilBERT", "ALBERT", "CamemBERT", "XLMRoBERTa")
_PACKAGE = "sentence_transformers."
MODULE_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class SentenceModule:
    """One module after the encoder. kind: its class, such as "Dense". folder: its weights and config.json."""

    kind: str
    folder: Path
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"{self.folder} ({self.kind})"


@dataclass(frozen=True)
class SentenceFolder:
    """What a sentence-transformers folder asks for.

    encoder: the folder of the encoder's config.json, weights and vocabulary.
    max_length: tokens that texts are cut to; None where the folder does not say.
    lower_case: whether texts become lower case before the vocabulary's own rules.
    kind: the class that the folder was saved from, such as "SentenceTransformer" or "CrossEncoder".
    modules: those after the encoder. prompts: what stands before a text, by name.
    activation: the class whose result a cross-encoder's score is; None where the folder does not say.
    """

    root: Path
    encoder: Path
    max_length: int | None
    lower_case: bool
    kind: str
    modules: tuple[SentenceModule, ...]
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    truncate_dim: int | None = None
    activation: str | None = None


def read(folder: Path) -> SentenceFolder | None:
    """Reads the folder of a modules.json, or the encoder's folder in it that modules.json names.

    Returns:
        None where there is no modules.json: a plain encoder.

    Raises:
        ValueError: a file that is no such JSON, a module that no class of sentence-transformers makes, a path that leads
            out of the folder; the message names the file or the module.
    """
    root = _root(folder)
    if root is None:
        if (folder / MODULES).is_file():
            _entries(folder / MODULES)
        return None
    file = root / MODULES
    entries = _entries(file)
    kinds = [_known_kind(file, entry) for entry in entries]
    if kinds[0] not in _ENCODERS:
        raise ValueError(f"{file}: begins with {kinds[0]}; the first module must be an encoder (Transformer)")
    if len(entries) > 1 and (second := next((kind for kind in kinds[1:] if kind in _ENCODERS), None)):
        raise ValueError(f"{file}: names {second} after the first module; one encoder is read")
    encoder = root / _inner_path(file, entries[0])
    given = next((read_json_object(path) for name in ENCODER_SETTINGS if (path := encoder / name).is_file()), {})
    where = encoder / ENCODER_SETTINGS[0]
    length, lower = given.get("max_seq_length"), given.get("do_lower_case", False)
    if length is not None and not (_is_count(length)):
        raise ValueError(f"{where}: max_seq_length is {length!r:.100}; expected a number of tokens")
    if not isinstance(lower, bool):
        raise ValueError(f"{where}: do_lower_case is {lower!r:.100}; expected true or false")
    modules = []
    for kind, entry in zip(kinds[1:], entries[1:], strict=True):
        place = root / _inner_path(file, entry)
        config = place / "config.json"
        modules.append(SentenceModule(kind, place, read_json_object(config) if config.is_file() else {}))
    return SentenceFolder(root, encoder, length, lower, modules=tuple(modules), **_settings(root / SETTINGS, given))


def describe(folder: Path) -> str | None:
    """Lists the modules after the encoder of a sentence-transformers folder, such as "Pooling (cls_token), Normalize".

    Args:
        folder: the folder with the encoder's config.json: that of modules.json, or a folder in it that modules.json names.

    Returns:
        None if there is no modules.json, or if it names only an encoder.
    """
    root = _root(folder)
    if root is None:
        return None
    modules = _lenient(root / MODULES)
    later = [module for module in modules if not _kind(module).endswith("Transformer")]
    return ", ".join(_with_modes(root, module) for module in later) or None


def fetch(get: Callable[[str], Path | None]) -> None:
    """Fetches the files that `read` and the modules need from a repository; `get` returns a file's path or None."""
    file = get(MODULES)
    if file is None:
        return
    for name in (SETTINGS, *ENCODER_SETTINGS[:1]):
        get(name)
    for entry in _entries(file)[1:]:
        path = _inner_path(file, entry)
        if str(path) != ".":
            weights = MODULE_WEIGHTS if _kind(entry) in ("Dense", "LayerNorm") else ()
            get(f"{path}/config.json")
            next((name for name in weights if get(f"{path}/{name}") is not None), None)


def copy(asked: SentenceFolder, target: Path) -> Path:
    """Copies modules.json, the settings and the modules after the encoder into the folder `target`.

    Returns:
        The encoder's folder in `target`, which exists; the encoder's weights and vocabulary are left to the caller.
    """
    root = asked.root.resolve()
    encoder = target / asked.encoder.resolve().relative_to(root)
    encoder.mkdir(parents=True, exist_ok=True)
    for file in stored_files(asked):
        name = file.relative_to(root)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)
    return encoder


def stored_files(asked: SentenceFolder) -> list[Path]:
    """The files of the folder beside the encoder's config.json, weights and vocabulary."""
    encoder = asked.encoder.resolve()
    places = {module.folder.resolve() for module in asked.modules} - {encoder}
    files = [asked.root / MODULES, asked.root / SETTINGS, *(encoder / name for name in ENCODER_SETTINGS)]
    files += [place / name for place in sorted(places) for name in ("config.json", *MODULE_WEIGHTS)]
    return [file.parent.resolve() / file.name for file in files if file.is_file()]


def _root(folder: Path) -> Path | None:
    """The folder of the modules.json that names `folder` as one of its modules'."""
    folder = folder.resolve()
    for root in (folder, folder.parent):
        modules = _lenient(root / MODULES)
        if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
            continue
        if root == folder or folder.name in (str(module.get("path")) for module in modules):
            return root
    return None


def _entries(file: Path) -> list[dict[str, Any]]:
    entries = read_json(file)
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file}: not a list of modules")
    return entries


def _kind(module: dict[str, Any]) -> str:
    return str(module.get("type", "?")).rpartition(".")[2]


def _known_kind(file: Path, entry: dict[str, Any]) -> str:
    if not str(entry.get("type", "")).startswith(_PACKAGE):
        raise ValueError(f"{file}: module {entry.get('type')!r:.200} is code of its own, which is never run")
    return _kind(entry)


def _inner_path(file: Path, entry: dict[str, Any]) -> PurePosixPath:
    path = PurePosixPath(str(entry.get("path", "")).replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in str(path):
        raise ValueError(f"{file}: the path {entry.get('path')!r:.200} leads out of the folder")
    return path


def _settings(file: Path, encoder: dict[str, Any]) -> dict[str, Any]:
    """The fields of SentenceFolder that config_sentence_transformers.json states."""
    given = read_json_object(file) if file.is_file() else {}
    prompts, default, width = given.get("prompts") or {}, given.get("default_prompt_name"), given.get("truncate_dim")
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise ValueError(f"{file}: prompts is {prompts!r:.100}; expected an object of names and texts")
    # These two names are there in every folder.
    known = {"query": "", "document": "", **{name: text or "" for name, text in prompts.items()}}
    if default is not None and default not in known:
        raise ValueError(f"{file}: default_prompt_name is {default!r:.100}; the prompts are {', '.join(known)}")
    if width is not None and not _is_count(width):
        raise ValueError(f"{file}: truncate_dim is {width!r:.100}; expected a number of columns")
    task = encoder.get("transformer_task", "feature-extraction")
    kind = given.get("model_type") or ("SentenceTransformer" if task == "feature-extraction" else f"model for {task}")
    return {
        "kind": str(kind),
        "prompts": known,
        "default_prompt": default,
        "truncate_dim": width,
        "activation": given.get("activation_fn"),
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _with_modes(root: Path, module: dict[str, Any]) -> str:
    settings = _lenient(root / str(module.get("path", "")) / "config.json")
    if _kind(module) != "Pooling" or not isinstance(settings, dict):
        return _kind(module)
    modes = [
        name.removeprefix("pooling_mode_")
        for name, on in settings.items()
        if name.startswith("pooling_mode_") and on is True
    ]
    modes += [str(settings["pooling_mode"])] if "pooling_mode" in settings else []
    return f"Pooling ({', '.join(modes)})" if modes else "Pooling"


def _lenient(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
