"""Vocabulary files to pipelines of the `tokenizers` library: how each format is read, built and trained.

The unigram pipeline follows the released ALBERT code (tokenization.preprocess_text and encode_pieces): quotes
unified, NFKD without combining marks, lower case, then SentencePiece; a piece never ends in digit-comma.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

FILES = ("tokenizer.json", "spiece.model", "vocab.txt")
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_UNIGRAM_TOKENS = {
    "pad_token": "<pad>", "unk_token": "<unk>", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]",
}  # fmt: skip
_WORDPIECE_TOKENS = {**_UNIGRAM_TOKENS, "pad_token": "[PAD]", "unk_token": "[UNK]"}
# Punctuation that ALBERT's vocabulary keeps apart from words (user_defined_symbols of its release).
_SYMBOLS = ("(", ")", '"', "-", ".", "\u2013", "\u00a3", "\u20ac")
# A number must not swallow the comma behind it; the release re-splits such pieces, this cost keeps them from winning.
_DIGIT_COMMA_PENALTY = 100.0


def require(name: str) -> Any:
    """Module `name`, or an ImportError that says which extra brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is not installed: pip install 'albert-fast[text]'") from error


def find(folder: Path) -> Path:
    """The vocabulary file of a folder; FileNotFoundError that names what was looked for."""
    for name in FILES:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no vocabulary in {folder}: looked for {', '.join(FILES)}; Tokenizer.save writes one")


def read(file: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Pipeline and tokenizer_config settings of one vocabulary file and the JSON files beside it."""
    given = _settings_beside(file)
    if file.suffix == ".json":
        backend, defaults = _read_pipeline(file, given)
    elif file.suffix == ".model":
        lower, accents = bool(given.get("do_lower_case", True)), bool(given.get("keep_accents", False))
        backend, defaults = _unigram(file.read_bytes(), lower, accents, str(file))
    elif file.suffix == ".txt":
        backend, defaults = _read_wordpiece(file, given)
    else:
        raise ValueError(f"{file}: not a vocabulary; known endings: .json, .model, .txt")
    settings = {**defaults, **given}
    _add_tokens(backend, settings, file)
    return backend, _public(settings)


def _settings_beside(file: Path) -> dict[str, Any]:
    """What tokenizer_config, special_tokens_map, added_tokens and config.json beside a vocabulary say about it."""
    config = _json(file.with_name("tokenizer_config.json"))
    known = {key: config[key] for key in ("do_lower_case", "keep_accents", "strip_accents", "tokenize_chinese_chars",
                                          "tokenizer_class") if config.get(key) is not None}  # fmt: skip
    tokens = {**_json(file.with_name("special_tokens_map.json")), **config}
    for key in _UNIGRAM_TOKENS:
        value = tokens.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if content is not None:
            known[key] = str(content)
    added = {int(i): token for i, token in (config.get("added_tokens_decoder") or {}).items()}
    for content, i in _json(file.with_name("added_tokens.json")).items():
        added.setdefault(int(i), {"content": content})
    known["added_tokens_decoder"] = added
    # transformers writes 1e30 where no limit is known.
    limits = [config.get("model_max_length"), _json(file.with_name("config.json")).get("max_position_embeddings")]
    real = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < 1e9]
    if real:
        known["model_max_length"] = min(real)
    return known


def _json(file: Path) -> dict[str, Any]:
    """Content of a JSON object, {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _read_pipeline(file: Path, given: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    backends = require("tokenizers")
    content = _json(file)
    normalizer = content.get("normalizer") or {}
    if normalizer.get("type") == "BertNormalizer":
        # The configuration beside the file outranks what is baked into it, as in transformers.
        for key, baked in (("do_lower_case", "lowercase"), ("strip_accents", "strip_accents"),
                           ("tokenize_chinese_chars", "handle_chinese_chars")):  # fmt: skip
            normalizer[baked] = given.get(key, normalizer.get(baked))
    try:
        backend = backends.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file}: not a tokenizer.json that this version of tokenizers reads: {error}") from error
    backend.no_padding()
    wordpiece = (content.get("model") or {}).get("type") == "WordPiece"
    names = _WORDPIECE_TOKENS if backend.token_to_id("[PAD]") is not None else _UNIGRAM_TOKENS
    return backend, {"tokenizer_class": "BertTokenizer" if wordpiece else "AlbertTokenizer", **names}


def _read_wordpiece(file: Path, given: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    try:
        # Only a line feed ends a line: some pieces are line separators of Unicode.
        pieces = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8: {error}") from error
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokens = {**_WORDPIECE_TOKENS, **given}
    missing = [tokens[key] for key in ("pad_token", "unk_token", "cls_token", "sep_token") if tokens[key] not in vocab]
    if missing:
        raise ValueError(f"{file}: {len(pieces)} lines without {', '.join(missing)}: not a WordPiece vocabulary")
    model = require("tokenizers").models.WordPiece(vocab, unk_token=tokens["unk_token"])
    return _wordpiece(model, given)


def _wordpiece(model: Any, given: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """BERT's pipeline: control characters out, CJK characters apart, lower case, accents off with lower case."""
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
    return backend, {"tokenizer_class": "BertTokenizer", "do_lower_case": True, **_WORDPIECE_TOKENS}


def _unigram_normalizer(lower_case: bool, keep_accents: bool, charsmap: bytes) -> Any:
    normalizers = require("tokenizers").normalizers
    steps = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
    if not keep_accents:
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if lower_case:
        steps.append(normalizers.Lowercase())
    if charsmap:
        steps.append(normalizers.Precompiled(charsmap))
    return normalizers.Sequence(steps)


def _unigram(
    model: bytes, lower_case: bool, keep_accents: bool, name: str
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Pipeline of a serialised SentencePiece model; name is how errors call it."""
    sentencepiece, backends = require("sentencepiece"), require("tokenizers")
    try:
        if not model:
            raise ValueError("the file is empty")  # sentencepiece takes it for "no model given"
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        charsmap, is_unigram = _normalization(model)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"{name}: not a SentencePiece model: {error}") from error
    if not is_unigram:
        raise ValueError(f"{name}: a SentencePiece model of another kind than unigram, which ALBERT uses")
    pieces = []
    for i in range(processor.get_piece_size()):
        piece = processor.id_to_piece(i)
        digit_comma = len(piece) > 1 and piece[-1] == "," and piece[-2].isdigit()
        pieces.append((piece, processor.get_score(i) - (_DIGIT_COMMA_PENALTY if digit_comma else 0.0)))
    backend = backends.Tokenizer(backends.models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=False))
    backend.normalizer = _unigram_normalizer(lower_case, keep_accents, charsmap)
    backend.pre_tokenizer = backends.pre_tokenizers.Sequence(
        [
            backends.pre_tokenizers.WhitespaceSplit(),
            backends.pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always"),
        ]
    )
    backend.decoder = backends.decoders.Metaspace(replacement="\u2581", prepend_scheme="always")
    settings = {"tokenizer_class": "AlbertTokenizer", "do_lower_case": lower_case, "keep_accents": keep_accents}
    return backend, {**settings, **_UNIGRAM_TOKENS}


def _add_tokens(backend: tokenizers.Tokenizer, settings: dict[str, Any], file: Path) -> None:
    """Makes the special tokens special, adds the ones beyond the vocabulary, sets [CLS] A [SEP] and the pair form."""
    backends = require("tokenizers")
    if backend.token_to_id(settings["mask_token"]) is None:
        settings["mask_token"] = None  # a vocabulary of a model without masked-language head
    names = [settings[key] for key in _UNIGRAM_TOKENS if settings[key] is not None]
    missing = [name for name in names if backend.token_to_id(name) is None]
    if missing:
        raise ValueError(f"{file}: the special tokens {', '.join(missing)} are not in the vocabulary")
    already = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([backends.AddedToken(n, normalized=False) for n in names if n not in already])
    for i, token in sorted(settings["added_tokens_decoder"].items()):
        if token["content"] in already or token["content"] in names:
            continue
        flags = {key: bool(token[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in token}
        backend.add_tokens([backends.AddedToken(token["content"], special=bool(token.get("special")), **flags)])
        if backend.token_to_id(token["content"]) != i:
            raise ValueError(f"{file}: the added token {token['content']!r} is said to be {i}, which is taken or a gap")
    if backend.post_processor is None:
        cls, sep = settings["cls_token"], settings["sep_token"]
        backend.post_processor = backends.processors.TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, backend.token_to_id(cls)), (sep, backend.token_to_id(sep))],
        )


def train_unigram(
    lines: Iterable[str],
    vocab_size: int,
    at_most: bool,
    lower_case: bool,
    keep_accents: bool,
    coverage: float,
    max_lines: int,
    seed: int,
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """SentencePiece's trainer with the flags of ALBERT's release, on text that went through the pipeline's rules."""
    sentencepiece = require("sentencepiece")
    normalizer = _unigram_normalizer(lower_case, keep_accents, b"")
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(normalizer.normalize_str(line.rstrip("\r\n")) for line in lines),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=not at_most,
            model_type="unigram",
            pad_id=0, unk_id=1, bos_id=-1, eos_id=-1, pad_piece="<pad>", unk_piece="<unk>",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            user_defined_symbols=list(_SYMBOLS),
            character_coverage=coverage,
            input_sentence_size=max_lines,
            shuffle_input_sentence=max_lines > 0,
            max_sentence_length=1 << 24,  # longer lines would be dropped without a word
            minloglevel=2,
        )  # fmt: skip
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if most:
            reason = f"it holds enough for {most[1]}; lower vocab_size"
        elif least:
            reason = f"its characters alone need {least[1]}; raise vocab_size"
        else:
            reason = str(error)
        raise ValueError(f"no vocabulary of {vocab_size} pieces can be learnt from this text: {reason}") from error
    backend, settings = _unigram(model.getvalue(), lower_case, keep_accents, "the trained model")
    return _trained(backend, settings)


def train_wordpiece(
    lines: Iterable[str], vocab_size: int, lower_case: bool, keep_accents: bool
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """WordPiece's trainer of `tokenizers`, with BERT's text rules and special tokens (ids 0 to 4)."""
    backends = require("tokenizers")
    strip = not keep_accents if keep_accents == lower_case else None  # None: as lower_case says
    model = backends.models.WordPiece(unk_token=_WORDPIECE_TOKENS["unk_token"])
    backend, settings = _wordpiece(model, {"do_lower_case": lower_case, "strip_accents": strip})
    specials = list(_WORDPIECE_TOKENS.values())
    trainer = backends.trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    texts: Iterator[str] = (line.rstrip("\r\n") for line in lines)
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() > vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is less than the {backend.get_vocab_size()} characters of this text")
    return _trained(backend, {**settings, "do_lower_case": lower_case, "strip_accents": strip})


def _trained(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    settings = {**settings, "model_max_length": 512, "added_tokens_decoder": {}}
    _add_tokens(backend, settings, Path("the trained vocabulary"))
    return backend, _public(settings)


def _public(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as tokenizer_config.json holds them."""
    return {key: value for key, value in settings.items() if key != "added_tokens_decoder" and value is not None}


def _normalization(model: bytes) -> tuple[bytes, bool]:
    """Character map of a SentencePiece model, and whether it is a unigram model.

    Read from the protobuf wire format (sentencepiece_model.proto: ModelProto.normalizer_spec = 3 with
    precompiled_charsmap = 2; trainer_spec = 2 with model_type = 3, unigram = 1 by default): the processor does not
    give them away, and the module that sentencepiece ships for it ties users to one release of protobuf.
    """
    fields = dict(_fields(model))
    charsmap = dict(_fields(bytes(fields.get(3, b"")))).get(2, b"")
    kind = dict(_fields(bytes(fields.get(2, b"")))).get(3, 1)
    return bytes(charsmap), kind == 1


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message, one level deep; bytes for nested messages and strings."""
    view, at = memoryview(message), 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = view[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(view):
        key = varint()
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            yield field, varint()
            continue
        size = varint() if wire_type == 2 else {1: 8, 5: 4}.get(wire_type, -1)
        if size < 0 or at + size > len(view):
            raise ValueError(f"bad protobuf field at byte {at}")
        yield field, view[at : at + size]
        at += size
