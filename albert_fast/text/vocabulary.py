"""Reads vocabulary files as pipelines of the `tokenizers` library.

The text rules are in normalization.py. A unigram piece never ends in digit-comma, as in ALBERT's release
(tokenization.encode_pieces). A setting in tokenizer_config.json overrides tokenizer.json, as in transformers.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import math
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import normalization as _normalization

if TYPE_CHECKING:
    import tokenizers

FILES = ("tokenizer.json", "spiece.model", "vocab.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
MAX_BYTES = 128 << 20  # the largest vocabularies in use have 20 MB
MAX_ID = 1 << 24  # the library counts from 0 to the highest id when it writes a pipeline
_UNIGRAM_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
WORDPIECE_TOKENS = {**_UNIGRAM_TOKENS, "pad_token": "[PAD]", "unk_token": "[UNK]"}
_RULES = ("do_lower_case", "keep_accents", "remove_space", "strip_accents", "tokenize_chinese_chars")
_FLAGS = (*_RULES, "split_special_tokens")
_SIDES = ("padding_side", "truncation_side")
# The class of transformers that reads tokenizer.json unchanged; its AlbertTokenizer deletes vowel signs.
AS_SAVED = "PreTrainedTokenizerFast"
# Numbers must not include the comma after them. The release splits such pieces again; this penalty keeps them out.
_DIGIT_COMMA_PENALTY = 100.0


def require(name: str) -> Any:
    """Imports module `name`; the ImportError says which extra installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install 'albert-fast[text]'") from error


@contextlib.contextmanager
def naming(subject: str) -> Iterator[None]:
    """Turns errors of a library in the block, also Rust panics, into a ValueError that begins with `subject`."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{subject}: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 gives no public name for it
            raise
        raise ValueError(f"{subject}: the tokenizers library failed: {error}") from error


def find(folder: Path) -> Path:
    """Finds the vocabulary file of a folder: tokenizer.json, else spiece.model or vocab.txt.

    If both of the latter exist, four questions decide between those with at most vocab_size pieces, in this order: which
    kind does tokenizer_class name; which has exactly vocab_size pieces; which is the only one that is not larger; which
    kind does config.json's model_type use.

    Raises:
        FileNotFoundError: there is none; the message lists the names. ValueError: the four questions have no answer.
    """
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no vocabulary in {folder}: looked for {', '.join(FILES)}; Tokenizer.save writes one")
    if found[0].name == "tokenizer.json" or len(found) == 1:
        return found[0]
    model = _json(folder / "config.json")
    size = model.get("vocab_size")
    named = str(_json(folder / "tokenizer_config.json").get("tokenizer_class") or model.get("tokenizer_class") or "")
    pieces = {file: read(file, warn=False)[0].get_vocab_size() for file in found}
    fitting = [file for file in found if not isinstance(size, int) or pieces[file] <= size]
    exact = [file for file in found if pieces[file] == size]
    by_class = [file for file in found if named.startswith({".model": "Albert", ".txt": "Bert"}[file.suffix])]
    by_type = found[:1] if model.get("model_type") == "albert" else []
    for wanted in (by_class, exact, fitting, by_type):
        if len(wanted) == 1 and wanted[0] in fitting:
            return wanted[0]
    have = " and ".join(f"{file.name} ({count} pieces)" for file, count in pieces.items())
    raise ValueError(
        f"{folder}: holds {have}; tokenizer_class {named or 'not stated'} and vocab_size {size} do not say which one is "
        "the model's: load one by its path, or set tokenizer_class in tokenizer_config.json"
    )


def read(file: Path, warn: bool = True) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Reads a vocabulary file and the JSON files in its folder; returns the pipeline and tokenizer_config's settings."""
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; a vocabulary has at most {MAX_BYTES}")
    given = _settings_of_folder(file)
    if file.suffix == ".json":
        backend, defaults = _read_pipeline(file, given)
    elif file.suffix == ".model":
        rules = given.get("do_lower_case", True), given.get("keep_accents", False), given.get("remove_space", True)
        backend, defaults = unigram_pipeline(file.read_bytes(), rules, str(file))
        given["tokenizer_class"] = AS_SAVED
    elif file.suffix == ".txt":
        backend, defaults = _read_wordpiece(file, given)
    else:
        raise ValueError(f"{file}: not a vocabulary; known endings: .json, .model, .txt")
    settings = {**defaults, **given}
    with naming(str(file)):
        add_tokens(backend, settings, given)
        probe = [settings[key] or "" for key in _UNIGRAM_TOKENS]
        backend.encode(" ".join([*probe, "a,1"]))  # raises for a broken pipeline
    size = _json(file.with_name("config.json")).get("vocab_size")
    if warn and isinstance(size, int) and backend.get_vocab_size() > size:
        warnings.warn(
            f"albert_fast: {file} has {backend.get_vocab_size()} pieces, the model in the same folder (config.json) {size}: ids "
            "from there on are errors",
            stacklevel=3,
        )
    return backend, public_settings(settings)


def _settings_of_folder(file: Path) -> dict[str, Any]:
    """Reads tokenizer_config, special_tokens_map, added_tokens and config.json in a vocabulary's folder."""
    path = file.with_name("tokenizer_config.json")
    config = _json(path)
    known = {key: config[key] for key in (*_FLAGS, *_SIDES, "tokenizer_class") if config.get(key) is not None}
    for key, value in known.items():
        right = value in ("left", "right") if key in _SIDES else isinstance(value, bool if key in _FLAGS else str)
        if not right:
            want = "'left' or 'right'" if key in _SIDES else "true or false" if key in _FLAGS else "a name"
            raise ValueError(f"{path}: {key} is {value!r:.100}; expected {want}")
    added, older = config.get("added_tokens_decoder"), {}
    where, older_path = f"{path}: added_tokens_decoder", file.with_name("special_tokens_map.json")
    if added is None:  # as in transformers, the two older files are read only if this entry is missing
        older = _json(older_path)
        where = str(file.with_name("added_tokens.json"))
        added = {str(index): {"content": content} for content, index in _json(Path(where)).items()}
    tokens = {**config, **older}
    for key in _UNIGRAM_TOKENS:
        if tokens.get(key) is not None:
            known[key] = _content(tokens[key], f"{older_path if key in older else path}: {key}")
    if not isinstance(added, dict):
        raise ValueError(f"{where} is {added!r:.100}; expected an object of id and token")
    known["added_tokens_decoder"] = {
        _index(index, where): {**(token if isinstance(token, dict) else {}), "content": _content(token, where)}
        for index, token in added.items()
    }
    extra = tokens.get("extra_special_tokens") or tokens.get("additional_special_tokens") or []
    where = f"{path}: extra_special_tokens or additional_special_tokens"
    if not isinstance(extra, (list, dict)):
        raise ValueError(f"{where} is {extra!r:.100}; expected a list")
    known["extra_special_tokens"] = [
        _content(token, where) for token in (extra.values() if isinstance(extra, dict) else extra)
    ]
    # transformers writes 1e30 if it knows no limit.
    longest = config.get("model_max_length")
    if isinstance(longest, bool) or not isinstance(longest, (int, float, type(None))) or longest == 0:
        raise ValueError(f"{path}: model_max_length is {longest!r:.100}; expected a number of tokens")
    limits = [longest, _json(file.with_name("config.json")).get("max_position_embeddings")]
    real = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < 1e9]
    if real:
        known["model_max_length"] = min(real)
    return known


def _content(token: Any, where: str) -> str:
    """The text of a token, which is a str or an object with "content"."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str) or not content:
        raise ValueError(f"{where}: {token!r:.100} is not a token")
    return content


def _index(index: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", str(index)):
        raise ValueError(f"{where}: {index!r:.100} is not an id")
    return int(index)


def _json(file: Path) -> dict[str, Any]:
    """Reads a JSON object from a file; {} if there is no such file."""
    if not file.is_file():
        return {}
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; expected at most {MAX_BYTES}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_pipeline(file: Path, given: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backends = require("tokenizers")
    content = _json(file)
    with naming(f"{file}: not a tokenizer.json that this version of tokenizers reads"):
        model = content.get("model") or {}
        kind, pieces = model.get("type") or "", model.get("vocab")
        if isinstance(pieces, dict) and any(i >= MAX_ID for i in pieces.values()):
            raise ValueError(f"an id of {max(pieces.values())}; expected less than {MAX_ID}")
        rules = {key: given[key] for key in _FLAGS if key in given}
        content["normalizer"] = _normalization.obey(content.get("normalizer"), rules, kind)
        backend = backends.Tokenizer.from_str(json.dumps(content))
        stated = zip(_SIDES, (backend.padding, backend.truncation), strict=True)
        sides = {side: (values or {}).get("direction", "right").lower() for side, values in stated}
        backend.no_padding()
        backend.no_truncation()
        names = dict(WORDPIECE_TOKENS if backend.token_to_id("[PAD]") is not None else _UNIGRAM_TOKENS)
        if backend.token_to_id(names["mask_token"]) is None:
            names["mask_token"] = "<mask>"  # RoBERTa's and its kin's
        template = backend.encode("").ids
        if len(template) == 2:  # names that no file states are those of the template
            names["cls_token"], names["sep_token"] = map(backend.id_to_token, template)
    return backend, {"tokenizer_class": "BertTokenizer" if kind == "WordPiece" else AS_SAVED, **sides, **names}


def _read_wordpiece(file: Path, given: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    try:
        # Only a line feed ends a line: some pieces are Unicode line separators. Some editors write U+FEFF first.
        pieces = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from error
    vocab = {piece: i for i, piece in enumerate(pieces)}  # of equal lines the last one counts, as in transformers
    tokens = {**WORDPIECE_TOKENS, **given}
    missing = [tokens[key] for key in ("pad_token", "unk_token", "cls_token", "sep_token") if tokens[key] not in vocab]
    if missing:
        raise ValueError(f"{file}: {len(pieces)} lines without {', '.join(missing)}: not a WordPiece vocabulary")
    model = require("tokenizers").models.WordPiece(vocab, unk_token=tokens["unk_token"])
    return wordpiece_pipeline(model, given)


def wordpiece_pipeline(model: Any, given: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """BERT's pipeline: deletes control characters, separates CJK characters, makes lower case and then deletes accents."""
    backends = require("tokenizers")
    backend = backends.Tokenizer(model)
    backend.normalizer = backends.normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(given.get("tokenize_chinese_chars", True)),
        strip_accents=given.get("strip_accents"),
        lowercase=bool(given.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = backends.pre_tokenizers.BertPreTokenizer()
    backend.decoder = backends.decoders.WordPiece(prefix="##")
    return backend, {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **WORDPIECE_TOKENS}


def unigram_pipeline(
    model: bytes, rules: tuple[bool, bool, bool], name: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """The pipeline of a serialised SentencePiece model.

    Args:
        rules: lower_case, keep_accents and remove_space of `normalization.albert_steps`.
        name: the model's name in error messages.
    """
    sentencepiece, backends = require("sentencepiece"), require("tokenizers")
    with naming(f"{name}: not a SentencePiece model"):
        if not model:
            raise ValueError("the file is empty")  # sentencepiece would treat it as "no model given"
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        charsmap, is_unigram = _specifications(model)
    if not is_unigram:
        raise ValueError(f"{name}: a SentencePiece model of another kind than unigram, which ALBERT uses")
    pieces = []
    for i in range(processor.get_piece_size()):
        piece, score = processor.id_to_piece(i), processor.get_score(i)
        if not math.isfinite(score):
            raise ValueError(f"{name}: piece {i}, {piece!r}, has the score {score}")
        digit_comma = len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()
        pieces.append((piece, score - (_DIGIT_COMMA_PENALTY if digit_comma else 0.0)))
    with naming(f"{name}: not a vocabulary that tokenizers reads"):
        backend = backends.Tokenizer(backends.models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=False))
        composes = processor.normalize("\u1100\u1161").endswith("\uac00")
        steps = _normalization.albert_steps(*rules, charsmap=charsmap, composes=composes)
        backend.normalizer = _normalization.build(backends, steps)
    backend.pre_tokenizer = backends.pre_tokenizers.Sequence(
        [
            backends.pre_tokenizers.WhitespaceSplit(),
            backends.pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always"),
        ]
    )
    backend.decoder = backends.decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    settings = {"tokenizer_class": AS_SAVED, "do_lower_case": rules[0], "keep_accents": rules[1]}
    return backend, {**settings, **_UNIGRAM_TOKENS}


def add_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any], given: dict[str, Any]) -> None:
    """Registers the special tokens, adds those that the vocabulary lacks, and sets the template [CLS] A [SEP] (B [SEP])."""
    backends = require("tokenizers")
    if backend.token_to_id(settings["mask_token"]) is None:
        settings["mask_token"] = None  # the vocabulary of a model without a masked-language head
    names = [settings[key] for key in _UNIGRAM_TOKENS if settings[key] is not None]
    missing = [name for name in names if backend.token_to_id(name) is None]
    if missing:
        raise ValueError(f"the special tokens {', '.join(missing)} are not in the vocabulary")
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    backend.add_special_tokens([backends.AddedToken(n, normalized=False) for n in names if n not in special])
    already = {token.content for token in backend.get_added_tokens_decoder().values()}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    added = {i: t for i, t in sorted(settings["added_tokens_decoder"].items()) if t["content"] not in already}
    # All in one call: each call rebuilds the search for added tokens.
    backend.add_tokens(
        [backends.AddedToken(t["content"], **{key: bool(t[key]) for key in flags if key in t}) for t in added.values()]
    )
    for i, token in added.items():
        if backend.token_to_id(token["content"]) != i:
            raise ValueError(f"the added token {token['content']!r} is said to be {i}, which is taken or a gap")
    extra = [name for name in settings["extra_special_tokens"] if name not in special]
    backend.add_special_tokens([backends.AddedToken(name, normalized=False) for name in extra])
    cls, sep = settings["cls_token"], settings["sep_token"]
    ids = [backend.token_to_id(cls), backend.token_to_id(sep)]
    stated = "cls_token" in given or "sep_token" in given
    if backend.post_processor is None or (stated and len(now := backend.encode("").ids) == 2 and now != ids):
        backend.post_processor = backends.processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=list({cls: ids[0], sep: ids[1]}.items()),
        )


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that tokenizer_config.json holds."""
    kept_elsewhere = ("added_tokens_decoder", "extra_special_tokens")  # tokenizer.json holds them
    return {key: value for key, value in settings.items() if key not in kept_elsewhere and value is not None}


def _specifications(model: bytes) -> tuple[bytes, bool]:
    """The character map of a SentencePiece model, and whether it is a unigram model; the processor does not tell."""
    message = _model_proto().FromString(model)
    return message.normalizer_spec.precompiled_charsmap, message.trainer_spec.model_type == 1


@functools.cache
def _model_proto() -> Any:
    """The message class of ModelProto in sentencepiece_model.proto, with the fields that `_specifications` reads.

    The module that sentencepiece ships for it works with only one major release of protobuf.
    """
    descriptors = require("google.protobuf.descriptor_pb2")
    kinds = descriptors.FieldDescriptorProto
    file = descriptors.FileDescriptorProto(name="albert_fast/sentencepiece_model.proto", package="albert_fast")
    for message, field, number, kind, kind_name, default in (
        ("TrainerSpec", "model_type", 3, kinds.TYPE_INT32, None, "1"),
        ("NormalizerSpec", "precompiled_charsmap", 2, kinds.TYPE_BYTES, None, None),
        ("ModelProto", "trainer_spec", 2, kinds.TYPE_MESSAGE, ".albert_fast.TrainerSpec", None),
        ("ModelProto", "normalizer_spec", 3, kinds.TYPE_MESSAGE, ".albert_fast.NormalizerSpec", None),
    ):
        held = next((held for held in file.message_type if held.name == message), None)
        held = file.message_type.add(name=message) if held is None else held
        held.field.add(
            name=field, number=number, label=kinds.LABEL_OPTIONAL, type=kind, type_name=kind_name, default_value=default
        )
    pool = require("google.protobuf.descriptor_pool").DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    factory = require("google.protobuf.message_factory")
    return factory.GetMessageClass(pool.FindMessageTypeByName("albert_fast.ModelProto"))
