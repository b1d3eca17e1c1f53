"""The text rules of ALBERT's release as steps of a `tokenizers` normalizer, and how settings change a saved normalizer.

A step is a dict in the form of tokenizer.json. ALBERT's steps follow the released code (tokenization.preprocess_text,
then SentencePiece's character map): blanks and quotes are unified; NFKD, and characters whose canonical combining class
is not 0 are deleted; lower case as in Python's str.lower. Vowel signs of Indic scripts and most marks of Thai have class
0 and stay. BERT's rule (NFD, and category Mn is deleted) is the library's BertNormalizer. It deletes those vowel signs, so
that different words become equal; vocabularies that are trained here follow ALBERT's rule.
"""

from __future__ import annotations

import base64
import functools
import json
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Step = dict[str, Any]

# Blanks for str.split that SentencePiece's character maps delete: without this step two words would be joined.
_BLANKS: Step = {"type": "Replace", "pattern": {"Regex": r"[\x0b\x1c-\x1f]"}, "content": " "}
_QUOTES: tuple[Step, ...] = tuple(
    {"type": "Replace", "pattern": {"String": quote}, "content": '"'} for quote in ("``", "''")
)
# At the end of a word, str.lower turns a capital sigma into the final form; the library's Lowercase does not.
_FINAL_SIGMA: Step = {
    "type": "Replace",
    "pattern": {"Regex": r"(?<=\p{Cased}\p{Case_Ignorable}*)\u03A3(?!\p{Case_Ignorable}*\p{Cased})"},
    "content": "\u03c2",
}
_LOWER: tuple[Step, ...] = (_FINAL_SIGMA, {"type": "Lowercase"})
_BERT_KEYS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


def albert_steps(
    lower_case: bool, keep_accents: bool, remove_space: bool = True, charsmap: bytes = b"", composes: bool = False
) -> list[Step]:
    """Makes the steps of ALBERT's release.

    Args:
        lower_case, keep_accents, remove_space: do_lower_case, keep_accents and remove_space of tokenizer_config.json.
        charsmap: the precompiled character map of a SentencePiece model; empty for none.
        composes: whether that map composes characters. The library applies the map to graphemes of at most 5 bytes, so
            it does not compose Hangul and vowel signs that NFKD took apart; an NFC step does. NFC must not run when
            accents are kept, because it sorts marks, which the map does not.
    """
    steps = [*([_BLANKS] if remove_space else ()), *_QUOTES]
    if not keep_accents:
        steps += [{"type": "NFKD"}, _combining_marks()]
    if lower_case:
        steps += _LOWER
    if composes and not keep_accents:
        steps.append({"type": "NFC"})
    if charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap).decode()})
    return _with_true_spans(steps)


def accent_steps() -> list[Step]:
    """Steps that delete accents and keep vowel signs; they run before a BertNormalizer that keeps accents."""
    return [{"type": "NFD"}, _combining_marks(), {"type": "NFC"}]


def build(library: Any, steps: Iterable[Step]) -> Any:
    """Makes a normalizer of the `tokenizers` library (`library` is its module) from steps of `albert_steps`."""
    made = []
    for step in steps:
        if step["type"] == "Replace":
            pattern = step["pattern"]
            made.append(
                library.normalizers.Replace(
                    library.Regex(pattern["Regex"]) if "Regex" in pattern else pattern["String"], step["content"]
                )
            )
        elif step["type"] == "Precompiled":
            made.append(library.normalizers.Precompiled(base64.b64decode(step["precompiled_charsmap"])))
        else:
            made.append(getattr(library.normalizers, step["type"])())
    return library.normalizers.Sequence(made)


def obey(normalizer: Mapping[str, Any] | None, given: Mapping[str, Any], model: str) -> Step | None:
    """Changes a tokenizer.json's normalizer to what tokenizer_config.json says, as transformers does.

    Args:
        normalizer: the content of "normalizer".
        given: those of do_lower_case, keep_accents, remove_space, strip_accents and tokenize_chinese_chars that
            tokenizer_config.json states; the others change nothing.
        model: the "type" of tokenizer.json's model.
    """
    steps = _flat(normalizer)
    if model == "Unigram":
        return _joined(_with_true_spans(_obey_albert(steps, given)))
    if "strip_accents" in given and all(step in steps for step in accent_steps()):
        if not given["strip_accents"]:
            steps = [step for step in steps if step not in accent_steps()]
        given = {key: value for key, value in given.items() if key != "strip_accents"}
    stated = {baked: given[key] for key, baked in _BERT_KEYS.items() if key in given}
    if stated and model == "WordPiece" and not any(step["type"] == "BertNormalizer" for step in steps):
        # transformers' BertTokenizer replaces any other normalizer by its own.
        defaults = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
        steps = [{"type": "BertNormalizer", **defaults}]
    return _joined([{**step, **stated} if step["type"] == "BertNormalizer" else step for step in steps])


def lower_first(backend: Any) -> None:
    """Makes a pipeline of the `tokenizers` library lower texts first, where its normalizer does not lower them already."""
    from tokenizers import normalizers

    steps = [] if backend.normalizer is None else _flat(json.loads(backend.normalizer.__getstate__()))
    if not any(step["type"] == "Lowercase" or step.get("lowercase") is True for step in steps):
        old = [] if backend.normalizer is None else [backend.normalizer]
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *old])


def contracted(normalizer: bytes | None) -> list[str]:
    """The strings that a normalizer (given as serialised JSON) replaces by fewer characters."""
    steps = _flat(json.loads(normalizer)) if normalizer else []
    strings = ((step["pattern"].get("String", ""), step["content"]) for step in steps if step["type"] == "Replace")
    return [string for string, content in strings if len(string) > len(content) > 0]


def _obey_albert(steps: list[Step], given: Mapping[str, Any]) -> list[Step]:
    marks = _combining_marks()
    lower = [step for step in steps if step["type"] == "Lowercase"]
    strips = [step for step in steps if step["type"] == "StripAccents" or step == marks]
    if given.get("remove_space") is False:
        steps = [step for step in steps if step != _BLANKS]
    if given.get("keep_accents") is True:
        steps = [step for step in steps if step not in strips and step["type"] not in ("NFD", "NFKD")]
    if given.get("do_lower_case") is False:
        steps = [step for step in steps if step not in _LOWER]
    if given.get("do_lower_case") is True and not lower:
        steps = _before(steps, _is_last, list(_LOWER))
    if given.get("keep_accents") is False and not strips:
        steps = _before(steps, lambda step: step in _LOWER or _is_last(step), [{"type": "NFKD"}, marks])
    return steps


def _is_last(step: Step) -> bool:
    """Whether a step comes after the release's rules: SentencePiece's map and the steps that prepare it."""
    return step["type"] in ("NFC", "NFKC", "Precompiled") or (step["type"] == "Replace" and step["content"] == " ")


def _before(steps: list[Step], found: Callable[[Step], bool], new: list[Step]) -> list[Step]:
    """Inserts new steps before the first step for which `found` is true, else at the end."""
    at = next((index for index, step in enumerate(steps) if step != _BLANKS and found(step)), len(steps))
    return [*steps[:at], *new, *steps[at:]]


def _with_true_spans(steps: list[Step]) -> list[Step]:
    """Adds a step before each Precompiled that deletes what the map deletes at the start of a text.

    The resulting text is the same. But the library's Precompiled shifts the spans of the whole text by the characters
    that it deletes there; Replace does not.
    """
    out: list[Step] = []
    for step in steps:
        deletes = _leading(step["precompiled_charsmap"]) if step["type"] == "Precompiled" else None
        if deletes is not None and deletes not in out:
            out.append(deletes)
        out.append(step)
    return out


def _flat(normalizer: Mapping[str, Any] | None) -> list[Step]:
    """The steps of a normalizer as one list, without nested sequences."""
    if normalizer is None:
        return []
    if normalizer["type"] != "Sequence":
        return [dict(normalizer)]
    return [step for part in normalizer["normalizers"] for step in _flat(part)]


def _joined(steps: list[Step]) -> Step | None:
    if len(steps) == 1:
        return steps[0]
    return {"type": "Sequence", "normalizers": steps} if steps else None


@functools.cache
def _combining_marks() -> Step:
    """A step that deletes the characters whose unicodedata.combining is not 0; all of them are below U+20000."""
    codes = [code for code in range(0x300, 0x20000) if unicodedata.combining(chr(code))]
    return {"type": "Replace", "pattern": {"Regex": f"[{_ranges(codes)}]"}, "content": ""}


@functools.lru_cache(maxsize=4)
def _leading(charsmap: str) -> Step | None:
    """A step that deletes, at the start of a text, the blanks, controls and marks that a character map deletes."""
    from tokenizers import normalizers

    precompiled = normalizers.Precompiled(base64.b64decode(charsmap))
    codes = [c for c in _invisible() if precompiled.normalize_str(chr(c)) == ""]
    pattern = {"Regex": rf"\A[{_ranges(codes)}]+"}
    return {"type": "Replace", "pattern": pattern, "content": ""} if codes else None


@functools.cache
def _invisible() -> tuple[int, ...]:
    kinds = ("Cc", "Cf", "Zs", "Zl", "Zp", "Mn", "Mc", "Me")
    return tuple(code for code in range(0x10000) if unicodedata.category(chr(code)) in kinds)


def _ranges(codes: list[int]) -> str:
    """Writes sorted code points as the inside of a character class of a regular expression."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\x{{{first:x}}}" + (f"-\\x{{{last:x}}}" if last > first else "") for first, last in runs)
