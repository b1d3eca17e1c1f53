"""Checkpoints in Hugging Face's layout, read and written so that nothing is half-loaded and nothing half-written.

Reading: model.safetensors, sharded safetensors, pytorch_model.bin (weights_only: no code from a file ever runs) and its
shards. Every check happens before the first parameter changes; an error names the file and the key. Writing: beside the
old files, flushed to the disk, then renamed.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..runtime import files
from ..text import vocabulary as _vocabulary
from . import sentence_modules
from .hub import Repository, near

WEIGHTS_NAMES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
BODY = ("embeddings.", "encoder.", "pooler.")
HEADS = ("pooler.", "predictions.", "sop_classifier.", "classifier.", "qa_outputs.")
# Buffers that older versions of transformers wrote; both follow from the configuration.
BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
OLD_NAMES = (
    (r"^module\.", ""),  # nn.DataParallel
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"(\.albert_layers\.\d+)\.LayerNorm_1\.", r"\1.full_layer_layer_norm."),  # Google's two LayerNorms of a layer
    (r"(\.albert_layers\.\d+)\.LayerNorm\.", r"\1.attention.LayerNorm."),
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SOP = "sop_classifier.classifier"
# A safetensors header has some 120 bytes a tensor; its reader takes seconds for the 100 MB that the format allows.
LARGEST_HEADER = 16 << 20
# Of a file of torch.save: its members lie in it as they are, so that it unpacks to less than its own size.
MOST_MEMBERS = 100_000
MOST_UNPACKED = 4
_TENSORFLOW = (
    "a checkpoint of TensorFlow or Flax, which is not read here; transformers 4 converts it to safetensors: "
    "AlbertForPreTraining.from_pretrained(folder, from_tf=True) or from_flax=True, then save_pretrained; Google's .ckpt files "
    "with its convert_albert_original_tf_checkpoint_to_pytorch.py"
)
_FOREIGN = re.compile(r"\.ckpt(-\w+)?\.(index|meta|data-\d+-of-\d+)$|\.ckpt-\w+$|\.h5$|\.msgpack$|^saved_model\.pb$")
# What the scratch folders of saves are named after: one for both files of a checkpoint.
CHECKPOINT = "checkpoint"


class Checkpoint(dict[str, Tensor]):
    """Tensors by name, and in `files` the file that each one was read from."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Path] = {}


def resolve(
    path_or_hub_id: str | Path, *, weights: bool = True, names: tuple[str, ...] = WEIGHTS_NAMES, **hub: Any
) -> Path:
    """A local file or folder as it is; anything else is looked up on the Hugging Face hub (or in its local cache).

    Args:
        path_or_hub_id: a path, or `model` or `owner/model` on the hub.
        weights: whether weights are needed, or config.json alone.
        names: the files of weights that will do, the first one first.
        hub: revision, cache_dir, token, local_files_only, force_download, subfolder: as huggingface_hub takes them.

    Raises:
        FileNotFoundError: neither here nor there; says at once what a misspelt path is close to.
        PermissionError: a file or folder that may not be read.
        ValueError: a checkpoint of TensorFlow.
        ImportError: not here, and huggingface_hub is not installed.
    """
    hub = {name: value for name, value in hub.items() if value is not None and value != ""}
    path = Path(path_or_hub_id).expanduser()
    if path.exists():
        folder = path / hub.get("subfolder", "")
        if not folder.exists():
            raise FileNotFoundError(f"{folder}: no such file or folder{near(str(folder))}")
        if not os.access(folder, os.R_OK | os.X_OK if folder.is_dir() else os.R_OK):
            raise PermissionError(errno.EACCES, "no permission to read it", str(folder))
        return folder
    if path.with_name(f"{path.name}.index").exists():
        raise ValueError(f"{path}: {_TENSORFLOW}")
    name = str(path_or_hub_id)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise FileNotFoundError(f"{name}: no such file or folder{near(name)}")
    repository = Repository(name, **hub)
    config = repository.fetch("config.json")
    if config is None:
        raise repository.missing("config.json")
    # A name of the hub serves for text too.
    for file in (*_vocabulary.FILES, *_vocabulary.SETTINGS, *sentence_modules.FILES) if weights else ():
        repository.fetch(file)
    for file in names if weights else ():
        found = repository.fetch(file)
        if found is None:
            continue
        if is_index(found):
            for shard in sorted(set(_read_index(found).values())):
                if repository.fetch(shard) is None:
                    raise repository.missing(shard)
        return config.parent
    if weights:
        raise repository.missing(", ".join(names))
    return config.parent


def weights_names(use_safetensors: bool | None = None, variant: str | None = None) -> tuple[str, ...]:
    """WEIGHTS_NAMES of one kind, with "fp16" say as `variant`: model.fp16.safetensors."""
    names = [name for name in WEIGHTS_NAMES if use_safetensors in (None, "safetensors" in name)]
    if variant is None:
        return tuple(names)
    stems = [name.rpartition(".") for name in names]
    return tuple(f"{stem}.{variant}.{end}" for stem, _, end in stems)


def is_index(path: Path) -> bool:
    """Whether a file lists shards: model.safetensors.index.json, or with a variant before the ending."""
    return path.suffix == ".json" and ".index" in path.name


def shipped_model() -> Path:
    """Folder of the sentiment classifier that comes with the package (English, "negative" and "positive").

    Raises:
        FileNotFoundError: this installation was made without it.
    """
    folder = Path(__file__).resolve().parents[1] / "data" / "sst2-small"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: the shipped model is not there; name a checkpoint")
    return folder


def load_checkpoint(path: str | Path, names: tuple[str, ...] = WEIGHTS_NAMES) -> Checkpoint:
    """All tensors of a checkpoint folder (the first of `names` in it), of a single weights file or of an index.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a file that is truncated, hostile or anything but plain tensors by name.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            foreign = sorted(file.name for file in path.iterdir() if _is_foreign(file))
            why = f"; {foreign[0]} is {_TENSORFLOW}" if foreign else ""
            raise FileNotFoundError(f"{path}: holds none of {', '.join(names)}{why}")
        path = found[0]
    checkpoint = Checkpoint()
    if not is_index(path):
        _read_file(path, checkpoint)
        return checkpoint
    weight_map = _read_index(path)
    for shard in sorted(set(weight_map.values())):
        if not (path.parent / shard).is_file():
            raise FileNotFoundError(f"{path} lists a shard that does not exist: {shard}")
        _read_file(path.parent / shard, checkpoint)
    for key in sorted(weight_map.keys() | checkpoint.keys()):
        if key not in checkpoint:
            raise ValueError(f"{path} lists {key!r} in {weight_map[key]}, which does not hold it")
        if key not in weight_map:
            raise ValueError(f"{path}: does not list {key!r}, which stands in {checkpoint.files[key]}")
        if weight_map[key] != checkpoint.files[key].name:
            raise ValueError(f"{path}: says that {key!r} is in {weight_map[key]}, it is in {checkpoint.files[key]}")
    return checkpoint


def _read_index(path: Path) -> dict[str, str]:
    """key -> file name of its shard, beside the index."""
    try:
        shards = dict(files.read_json_object(path)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of shards: {error!r}") from error
    for key, shard in shards.items():
        # A plain name: an index must not lead out of its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard):
            raise ValueError(f"{path}: {key!r} is said to be in {shard!r}, which is not the name of a shard")
    return shards


def _read_file(path: Path, checkpoint: Checkpoint) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if _is_foreign(path):
        raise ValueError(f"{path}: {_TENSORFLOW}")
    try:
        if path.suffix == ".safetensors":
            _check_header(path)
            with safetensors.safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        elif path.suffix in (".bin", ".pt", ".pth"):
            _check_members(path)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise ValueError("expected .safetensors, .bin, .pt, .pth or .index.json")
    except Exception as error:  # a hostile pickle can make the reader raise anything
        raise ValueError(f"{path}: not a readable checkpoint: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path}: expected tensors by name, got {type(tensors).__name__}")
    for key, tensor in tensors.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {key!r} is not a tensor by name but {type(tensor).__name__}")
        if key in checkpoint:
            raise ValueError(f"{path}: {key!r} also stands in {checkpoint.files[key]}")
        checkpoint[key] = tensor.detach()
        checkpoint.files[key] = path


def _check_header(path: Path) -> None:
    """ValueError for a safetensors header that its reader would take seconds over, or that the file does not have."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise ValueError(f"its header of {length} bytes is too long, at most {LARGEST_HEADER} bytes are read")


def _check_members(path: Path) -> None:
    """ValueError for a zip file that would unpack to much more than its own size, which torch.save never writes."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch's format before 1.6, a pickle
            return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        raise ValueError(f"it has {len(members)} members, at most {MOST_MEMBERS} are read")
    size, unpacked = path.stat().st_size, sum(member.file_size for member in members)
    if unpacked > MOST_UNPACKED * size:
        raise ValueError(
            f"its {size} bytes would unpack to {unpacked}: members are compressed or overlap, which torch.save never does"
        )


def _is_foreign(path: Path) -> bool:
    """Whether a file holds weights of TensorFlow or Flax, by its name."""
    return _FOREIGN.search(path.name) is not None


def rename_old_names(
    state: Mapping[str, Tensor], prefix: str = "", mapping: Mapping[str, str] | None = None
) -> Checkpoint:
    """`state` under today's names, the encoder's under `prefix`: "" for a bare model, "albert." for one with a head.

    `mapping` are patterns of names and their replacements, applied first.

    Raises:
        ValueError: two tensors of `state` come under one name, or a name is TensorFlow's.
    """
    renamed, origin = Checkpoint(), dict[str, str]()
    for old, tensor in state.items():
        if "/" in old:
            raise ValueError(
                f"{_file(state, old)}: {old!r} names a variable of TensorFlow or Flax; it is {_TENSORFLOW}"
            )
        key = old
        for pattern, replacement in (*(mapping or {}).items(), *OLD_NAMES):
            key = re.sub(pattern, replacement, key)
        key = key.removeprefix("albert.")
        if key in BUFFERS:
            continue
        if key.startswith(BODY):
            key = prefix + key
        if key in renamed:
            raise ValueError(f"{_file(state, old)}: {origin[key]!r} and {old!r} are both {key!r}")
        renamed[key], origin[key] = tensor, old
        if isinstance(state, Checkpoint):
            renamed.files[key] = state.files[old]
    return renamed


def _file(state: Mapping[str, Tensor], key: str | None = None) -> str:
    """Where `key` was read from; for a key that is not there, where its neighbours were."""
    files = state.files if isinstance(state, Checkpoint) else {}
    return str((files.get(key) if key else None) or next(iter(files.values()), "checkpoint"))


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    *,
    allow_missing_head: bool = False,
    ignore_mismatched_sizes: bool = False,
    check: Callable[[str, Tensor], str | None] = lambda key, tensor: None,
) -> dict[str, Any]:
    """Copy `state` into the parameters of `model`, in their dtypes; either all of it or, on an error, nothing.

    `state` bears the model's names (`rename_old_names`). Tensors of heads that the model does not have are left alone.
    A head of the model that `state` does not have at all keeps its random weights, with a warning, if
    `allow_missing_head`. A tensor that the model ties to another may be absent. A sentence order head of width 2, as in
    Google's releases, replaces one of num_labels. `check` says what is wrong with a tensor of the right shape and dtype.

    Raises:
        ValueError: missing, extra or misshapen tensors, tensors that are not floats, tied tensors that differ, what
            `check` finds.
    """
    expected = model.state_dict(keep_vars=True)
    heads = {head: {key for key in expected if _head(key) == head} for head in HEADS}
    complete, problems = dict[str, Tensor](), list[str]()
    missing, unexpected, mismatched = set[str](), set[str](), set[tuple[str, tuple[int, ...], tuple[int, ...]]]()

    def problem(key: str, text: str) -> None:
        problems.append(f"{_file(state, key)}: {key!r} {text}")

    sop_width = state[f"{SOP}.bias"].numel() if f"{SOP}.bias" in state else 0
    resize_sop = sop_width == 2 and f"{SOP}.bias" in expected and expected[f"{SOP}.bias"].numel() != 2

    for key, tensor in state.items():
        head = _head(key)
        if key in expected:
            shape = tuple(expected[key].shape)
            if resize_sop and key.startswith(SOP):
                shape = (2, *shape[1:])
            if tuple(tensor.shape) != shape and ignore_mismatched_sizes:
                mismatched.add((key, tuple(tensor.shape), shape))
                complete[key] = expected[key]
                continue
            if tuple(tensor.shape) != shape:
                problem(key, f"has the shape {tuple(tensor.shape)}, expected {shape}")
            elif not _fits(tensor.dtype, expected[key].dtype) or tensor.layout != torch.strided or tensor.is_meta:
                wanted = "floats" if expected[key].dtype in FLOATS else expected[key].dtype
                problem(key, f"is no dense tensor of {wanted} but {tensor.dtype}")
            elif (wrong := check(key, tensor)) is not None:
                problem(key, wrong)
            complete[key] = tensor
        elif head is None or heads[head]:
            problem(key, f"is not a tensor of {type(model).__name__}")
        else:
            unexpected.add(key)

    for alias, key in tied(model):
        both = complete.keys() & {alias, key}
        if len(both) == 1:
            complete[alias] = complete[key] = complete[both.pop()]
        elif both and not problems and not torch.equal(complete[alias], complete[key]):
            problem(alias, f"differs from {key!r}, to which it is tied; tie_word_embeddings=False keeps both")

    absent = {head for head, keys in heads.items() if keys and not any(_head(key) == head for key in state)}
    for key in expected.keys() - complete.keys():
        if allow_missing_head and _head(key) in absent:
            complete[key] = expected[key]
            missing.add(key)
        elif _head(key) in absent:
            problem(key, "is missing; allow_missing_head=True starts this head from random weights")
        else:
            problem(key, "is missing")
    if problems:
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise ValueError(f"{type(model).__name__} cannot be loaded:\n" + "\n".join(sorted(problems)[:10]) + more)

    if absent:
        names = ", ".join(sorted(head.rstrip(".") for head in absent))
        warnings.warn(f"{_file(state)} has no weights for: {names}; they start at random", stacklevel=3)
    if mismatched:
        lines = "; ".join(f"{key} {found}, the model has {shape}" for key, found, shape in sorted(mismatched))
        warnings.warn(f"{_file(state)}: tensors of other shapes start at random: {lines}", stacklevel=3)
    if resize_sop:
        head_model, old = model.get_submodule("sop_classifier"), model.get_parameter(f"{SOP}.weight")
        head_model.classifier = nn.Linear(old.shape[1], 2, device=old.device, dtype=old.dtype)
    model.load_state_dict(complete, strict=True)
    return {
        "missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched, "error_msgs": [],
    }  # fmt: skip


def _fits(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a checkpoint's tensor may fill the model's: any floats for floats, else (integers, float8) the very dtype."""
    return found in FLOATS if wanted in FLOATS else found == wanted


def _head(key: str) -> str | None:
    """The entry of HEADS that `key` belongs to, None for the encoder's tensors."""
    key = key.removeprefix("albert.")
    return next((head for head in HEADS if key.startswith(head)), None)


def tied(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(alias, first name) for every name under which `model` has a parameter that an earlier name has too."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            yield name, first[id(parameter)]


def save_checkpoint(
    model: nn.Module,
    values: Mapping[str, Any],
    directory: str | Path,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json, of `values`, and model.safetensors into `directory`; one process at a time, other files there stay.

    `tensors` are written in place of the model's own; ValueError where they have other names or shapes.

    A kill at any moment leaves the checkpoint that was there, or the new one, whole: both files are written in a scratch
    folder and flushed first; renaming the weights is the moment of change, and a configuration that was not renamed any
    more is found by `config_path` and renamed by the next save.
    """
    directory, state = Path(directory), model.state_dict(keep_vars=True)
    aliases = {alias for alias, _ in tied(model)}
    given = state if tensors is None else tensors
    for key in sorted((given.keys() ^ state.keys()) - aliases):
        raise ValueError(f"state_dict: {key!r} is {'missing' if key in state else 'not a tensor of the model'}")
    for key, tensor in given.items():
        if tensor.shape != state[key].shape:
            raise ValueError(f"state_dict: {key!r} has the shape {tuple(tensor.shape)}, not {tuple(state[key].shape)}")
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in given.items() if key not in aliases}
    with files.scratch(directory / CHECKPOINT, _finish) as folder:
        # In this order: `config_path` takes a configuration without its weights for a committed one.
        weights, config = folder / "model.safetensors", folder / "config.json"
        safetensors.torch.save_file(tensors, weights, metadata={"format": "pt"})
        files.flush(weights)
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        files.flush(config)
        shutil.copymode(config, weights)  # safetensors creates files that nobody else may read
        files.flush(folder)
        files.flush(directory)
        os.replace(weights, directory / "model.safetensors")
    files.flush(directory)


def config_path(directory: Path) -> Path:
    """config.json of a checkpoint, or what a save that was killed at the very end had not yet renamed to it."""
    for folder in files.scratch_folders(directory / CHECKPOINT):
        if _is_committed(folder):
            return folder / "config.json"
    return directory / "config.json"


def _is_committed(folder: Path) -> bool:
    """Whether a save's scratch folder has lost its weights to the checkpoint, and still has the configuration."""
    return (folder / "config.json").exists() and not (folder / "model.safetensors").exists()


def _finish(folder: Path) -> None:
    """Removes a save's scratch folder; a configuration whose weights are in the checkpoint already follows them."""
    if _is_committed(folder):
        os.replace(folder / "config.json", folder.parent / "config.json")
    (folder / "config.json").unlink(missing_ok=True)  # before the weights: alone it would count as committed
    shutil.rmtree(folder)
