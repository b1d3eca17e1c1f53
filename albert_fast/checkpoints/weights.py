"""Finds checkpoints in Hugging Face's layout, reads their tensors and fills a model with them.

It reads model.safetensors, sharded safetensors, and pytorch_model.bin and its shards; no code from a file ever runs. Every
check happens before the first parameter changes, so that nothing is half-loaded; an error names the file and the key.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from ..runtime import files
from ..text import vocabulary
from . import sentence_modules
from .families import Family
from .hub import Repository, near

WEIGHTS_NAMES = tuple(name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json"))
SOP = "sop_classifier.classifier"  # the sentence order head of ALBERT
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SOP = "sop_classifier.classifier"
# A safetensors header has about 120 bytes per tensor; the reader takes seconds for the 100 MB that the format allows.
LARGEST_HEADER = 16 << 20
# Limits of a zip file. torch.save stores its members uncompressed: they unpack to less than the size of the file.
MOST_MEMBERS = 100_000
MOST_UNPACKED = 4
_TENSORFLOW = (
    "a checkpoint of TensorFlow or Flax: `albert-fast convert FOLDER OUT` converts Google's .ckpt files; transformers 4 converts "
    "the others: AlbertForPreTraining.from_pretrained(folder, from_tf=True) or from_flax=True, then save_pretrained"
)
_FOREIGN = re.compile(r"\.ckpt(-\w+)?\.(index|meta|data-\d+-of-\d+)$|\.ckpt-\w+$|\.h5$|\.msgpack$|^saved_model\.pb$")


class Checkpoint(dict[str, Tensor]):
    """Tensors by name; `files` holds the file that each one was read from."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, Path] = {}


def resolve(
    path_or_hub_id: str | Path, *, weights: bool = True, names: tuple[str, ...] = WEIGHTS_NAMES, **hub: Any
) -> Path:
    """Returns a local file or folder as it is; looks anything else up on the Hugging Face hub or in its local cache.

    Args:
        path_or_hub_id: a path, or `model` or `owner/model` on the hub.
        weights: False if config.json is enough.
        names: accepted names of the file of weights, in order of preference.
        hub: revision, cache_dir, token, local_files_only, force_download, subfolder: as huggingface_hub takes them.

    Raises:
        FileNotFoundError: it is in neither place; the message suggests a path with a similar name.
        PermissionError: a file or folder that may not be read.
        ValueError: a checkpoint of TensorFlow, an empty path.
        ImportError: there is no such path, and huggingface_hub is not installed.
    """
    hub = {name: value for name, value in hub.items() if value is not None and value != ""}
    if path_or_hub_id == "":
        raise ValueError("the checkpoint's path is empty; '.' is the current folder")
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
    # The tokenizer's files too: a hub name works for texts as well.
    for file in (*vocabulary.FILES, *vocabulary.SETTINGS) if weights else ():
        repository.fetch(file)
    if weights:
        sentence_modules.fetch(repository.fetch)
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
    """The WEIGHTS_NAMES of one kind (None: both); a `variant` such as "fp16" gives model.fp16.safetensors."""
    names = [name for name in WEIGHTS_NAMES if use_safetensors in (None, "safetensors" in name)]
    if variant is None:
        return tuple(names)
    stems = [name.rpartition(".") for name in names]
    return tuple(f"{stem}.{variant}.{end}" for stem, _, end in stems)


def is_index(path: Path) -> bool:
    """Whether a file lists shards, such as model.safetensors.index.json."""
    return path.suffix == ".json" and ".index" in path.name


def shipped_model() -> Path:
    """The folder of the sentiment classifier in this package (English, "negative" and "positive").

    Raises:
        FileNotFoundError: this installation does not have it.
    """
    folder = Path(__file__).resolve().parents[1] / "data" / "sst2-small"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder}: the shipped model is not there; name a checkpoint")
    return folder


def load_checkpoint(path: str | Path, names: tuple[str, ...] = WEIGHTS_NAMES) -> Checkpoint:
    """Reads all tensors of a checkpoint folder (from the first of `names` in it), of a single file or of an index.

    Raises:
        FileNotFoundError: no weights there.
        ValueError: a file that is truncated or hostile, or holds anything but tensors by name.
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
            raise ValueError(f"{path}: does not list {key!r}, which is in {checkpoint.files[key]}")
        if weight_map[key] != checkpoint.files[key].name:
            raise ValueError(f"{path}: says that {key!r} is in {weight_map[key]}; it is in {checkpoint.files[key]}")
    return checkpoint


def _read_index(path: Path) -> dict[str, str]:
    """Reads an index: key -> the name of the shard in the same folder."""
    try:
        shards = dict(files.read_json_object(path)["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not an index of shards: {error!r}") from error
    for key, shard in shards.items():
        # Plain names only: an index must not point outside its folder.
        if not isinstance(shard, str) or not re.fullmatch(r"[\w-][\w.-]*\.(safetensors|bin)", shard):
            raise ValueError(f"{path}: {key!r} is listed in {shard!r}, which is not the name of a shard")
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
            raise ValueError(f"{path}: {key!r} is also in {checkpoint.files[key]}")
        checkpoint[key] = tensor.detach()
        checkpoint.files[key] = path


def _check_header(path: Path) -> None:
    """ValueError for a safetensors header that is missing or so long that the reader would take seconds."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > LARGEST_HEADER:
        raise ValueError(f"its header of {length} bytes is too long, at most {LARGEST_HEADER} bytes are read")


def _check_members(path: Path) -> None:
    """ValueError for a zip file that would unpack to much more than its own size; torch.save writes no such file."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":  # a pickle, as torch wrote before 1.6
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
    """Whether the name of a file says that it holds weights of TensorFlow or Flax."""
    return _FOREIGN.search(path.name) is not None


def rename_old_names(
    state: Mapping[str, Tensor], family: Family, prefix: str = "", mapping: Mapping[str, str] | None = None
) -> Checkpoint:
    """Renames the tensors of old checkpoints to today's names.

    Args:
        family: whose names they are.
        prefix: what the encoder's names begin with: "" for an encoder alone, `family.prefix` for a model with a head.
        mapping: pattern -> replacement, applied to the names first.

    Raises:
        ValueError: two tensors get the same name, or a name is TensorFlow's.
    """
    renamed, origin = Checkpoint(), dict[str, str]()
    for old, tensor in state.items():
        if "/" in old:
            raise ValueError(
                f"{_file(state, old)}: {old!r} names a variable of TensorFlow or Flax; it is {_TENSORFLOW}"
            )
        key = old
        for pattern, replacement in (*(mapping or {}).items(), *family.old_names):
            key = re.sub(pattern, replacement, key)
        key = key.removeprefix(family.prefix)
        if key in family.buffers:
            continue
        if key.startswith(family.body):
            key = prefix + key
        if key in renamed:
            raise ValueError(f"{_file(state, old)}: {origin[key]!r} and {old!r} are both {key!r}")
        renamed[key], origin[key] = tensor, old
        if isinstance(state, Checkpoint):
            renamed.files[key] = state.files[old]
    return renamed


def _file(state: Mapping[str, Tensor], key: str | None = None) -> str:
    """The file that `key` was read from; for a key that is missing, the file of the others."""
    files = state.files if isinstance(state, Checkpoint) else {}
    return str((files.get(key) if key else None) or next(iter(files.values()), "checkpoint"))


class MissingHeadError(ValueError):
    """A checkpoint has no tensor of a head that the model needs, and everything else."""


def load_into(
    model: nn.Module,
    state: Mapping[str, Tensor],
    family: Family,
    *,
    allow_missing_head: bool = False,
    warns_of_missing: bool = True,
    ignore_mismatched_sizes: bool = False,
    check: Callable[[str, Tensor], str | None] = lambda key, tensor: None,
    share: bool = False,
) -> dict[str, Any]:
    """Copies `state` into the parameters of `model`, in their dtypes: all of it or, after an error, nothing.

    Tensors of heads that the model does not have are ignored. A tensor that the model ties to another may be missing. A
    sentence order head of width 2, as in Google's releases, replaces one of num_labels.

    Args:
        state: tensors under the model's names, see `rename_old_names`.
        family: the model's.
        allow_missing_head: a head that `state` lacks entirely keeps its random weights, with a warning unless `warns_of_missing`
            is False.
        ignore_mismatched_sizes: a tensor of another shape keeps its random weights, with a warning.
        check: returns what is wrong with a tensor of the right shape and dtype, or None.
        share: the tensors of `state` become the model's parameters, and are not copied.

    Returns:
        missing_keys, unexpected_keys, mismatched_keys and error_msgs, as transformers returns them.

    Raises:
        ValueError: missing, extra or misshapen tensors, tensors that are not floats, tied tensors that differ, or what
            `check` finds. MissingHeadError: nothing is wrong but that `state` lacks a head.
    """
    expected = model.state_dict(keep_vars=True)
    heads = {head: {key for key in expected if _head(key, family) == head} for head in family.heads}
    complete, problems = dict[str, Tensor](), list[str]()
    missing, unexpected, mismatched = set[str](), set[str](), set[tuple[str, tuple[int, ...], tuple[int, ...]]]()

    def problem(key: str, text: str) -> None:
        problems.append(f"{_file(state, key)}: {key!r} {text}")

    sop_width = state[f"{SOP}.bias"].numel() if f"{SOP}.bias" in state else 0
    resize_sop = sop_width == 2 and f"{SOP}.bias" in expected and expected[f"{SOP}.bias"].numel() != 2

    for key, tensor in state.items():
        head = _head(key, family)
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
                found = tensor.layout if tensor.layout != torch.strided else tensor.dtype
                problem(key, f"must be a dense tensor of {wanted}, got {found}{' on meta' if tensor.is_meta else ''}")
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

    absent = {head for head, keys in heads.items() if keys and not any(_head(key, family) == head for key in state)}
    others = len(problems)
    for key in expected.keys() - complete.keys():
        if allow_missing_head and _head(key, family) in absent:
            complete[key] = expected[key]
            missing.add(key)
        elif _head(key, family) in absent:
            problem(key, "is missing; allow_missing_head=True starts this head from random weights")
        else:
            problem(key, "is missing")
            others += 1
    if problems:
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        error = ValueError if others else MissingHeadError
        raise error(f"{type(model).__name__} cannot be loaded:\n" + "\n".join(sorted(problems)[:10]) + more)

    if absent and warns_of_missing:
        names = ", ".join(sorted(head.rstrip(".") for head in absent))
        warnings.warn(f"{_file(state)} has no weights for: {names}; they start at random", stacklevel=3)
    if mismatched:
        lines = "; ".join(f"{key} {found}, the model has {shape}" for key, found, shape in sorted(mismatched))
        warnings.warn(f"{_file(state)}: tensors of other shapes start at random: {lines}", stacklevel=3)
    if resize_sop:
        head_model, old = model.get_submodule("sop_classifier"), model.get_parameter(f"{SOP}.weight")
        head_model.classifier = nn.Linear(old.shape[1], 2, device=old.device, dtype=old.dtype)
    model.load_state_dict(complete, strict=True, assign=share)
    return {
        "missing_keys": missing,
        "unexpected_keys": unexpected,
        "mismatched_keys": mismatched,
        "error_msgs": [],
    }


def _fits(found: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a checkpoint's dtype may fill the model's: any float fills a float; integers and float8 must be equal."""
    return found in FLOATS if wanted in FLOATS else found == wanted


def _head(key: str, family: Family) -> str | None:
    """The entry of `family.heads` that `key` belongs to; None for the encoder's tensors."""
    key = key.removeprefix(family.prefix)
    return next((head for head in family.heads if key.startswith(head)), None)


def tied(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yields (alias, first name) for every further name of a parameter that `model` has under several names."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            yield name, first[id(parameter)]
