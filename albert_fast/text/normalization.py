"""Text rules of ALBERT's release as steps of a `tokenizers` normalizer, and how settings change a saved normalizer.

A step is a dict, in the form in which tokenizer.json holds it. ALBERT's steps follow the released code
(tokenization.preprocess_text, then SentencePiece's own character map): blanks and quotes unified, NFKD without the
characters whose canonical combining class is not 0, lower case as Python's str.lower. Vowel signs of Indic scripts
and most marks of Thai have class 0 and stay. BERT's rule, NFD without category Mn, is the library's BertNormalizer;
it makes words of such scripts equal, so vocabularies that are trained here follow ALBERT's in this.
"""

from __future__ import annotations

import base64
import functools
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Step = dict[str, Any]

# Blanks of str.split that SentencePiece's character maps delete, which would join two words.
_BLANKS: Step = {"type": "Replace", "pattern": {"Regex": r"[\x0b\x1c-\x1f]"}, "content": " "}
_QUOTES: tuple[Step, ...] = tuple(
    {"type": "Replace", "pattern": {"String": quote}, "content": '"'} for quote in ("``", "''")
)
# str.lower turns a capital sigma at the end of a word into the final form; the library's Lowercase does not.
_FINAL_SIGMA: Step = {
    "type": "Replace",
    "pattern": {"Regex": r"(?<=\p{Cased}\p{Case_Ignorable}*)\u03A3(?!\p{Case_Ignorable}*\p{Cased})"},
    "content": "\u03c2",
}
_LOWER: tuple[Step, ...] = (_FINAL_SIGMA, {"type": "Lowercase"})
_BERT_KEYS = {
    "do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars",
}  # fmt: skip


def albert_steps(
    lower_case: bool, keep_accents: bool, remove_space: bool = True, charsmap: bytes = b"", composes: bool = False
) -> list[Step]:
    """Steps of ALBERT's release.

    Args:
        lower_case, keep_accents, remove_space: do_lower_case, keep_accents and remove_space of tokenizer_config.json.
        charsmap: precompiled character map of a SentencePiece model; empty for none.
        composes: whether that map composes characters. The library applies the map to graphemes of up to 5 bytes and
            so never composes the Hangul or vowel signs of two parts that NFKD took apart; NFC does. With accents kept
            it must not run, because it sorts marks, which the map does not.
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
    """Steps that take off accents and keep vowel signs, for the front of a BertNormalizer that keeps accents."""
    return [{"type": "NFD"}, _combining_marks(), {"type": "NFC"}]


def build(library: Any, steps: Iterable[Step]) -> Any:
    """Normalizer of the `tokenizers` library (its module `tokenizers`) from steps of `albert_steps`."""
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
    """A tokenizer.json's normalizer, changed where tokenizer_config.json says something else, as in transformers.

    Args:
        normalizer: content of "normalizer". A key that is not in `given` leaves it as it is.
        given: do_lower_case, keep_accents, remove_space, strip_accents, tokenize_chinese_chars, where they are stated.
        model: "type" of tokenizer.json's model.
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
        # transformers' BertTokenizer builds its own normalizer in place of any other.
        defaults = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True}
        steps = [{"type": "BertNormalizer", **defaults}]
    return _joined([{**step, **stated} if step["type"] == "BertNormalizer" else step for step in steps])


def contracted(normalizer: bytes | None) -> list[str]:
    """Strings that a normalizer (its serialised JSON) replaces by fewer characters."""
    import json

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
    """Whether a step belongs behind the release's rules: SentencePiece's map and what prepares it."""
    return step["type"] in ("NFC", "NFKC", "Precompiled") or (step["type"] == "Replace" and step["content"] == " ")


def _before(steps: list[Step], found: Callable[[Step], bool], new: list[Step]) -> list[Step]:
    """The steps with new ones in front of the first step that is found, else at the end."""
    places = [index for index, step in enumerate(steps) if step != _BLANKS and found(step)]
    at = places[0] if places else len(steps)
    return [*steps[:at], *new, *steps[at:]]


def _with_true_spans(steps: list[Step]) -> list[Step]:
    """The steps with one more before each Precompiled: it deletes what the map deletes at the start of a text.

    The text that comes out is the same. But the library's Precompiled shifts the spans of the whole text by the
    characters that it deletes there; Replace does not.
    """
    out: list[Step] = []
    for step in steps:
        deletes = _leading(step["precompiled_charsmap"]) if step["type"] == "Precompiled" else None
        if deletes is not None and deletes not in out:
            out.append(deletes)
        out.append(step)
    return out


def _flat(normalizer: Mapping[str, Any] | None) -> list[Step]:
    """Steps of a normalizer, sequences within sequences opened."""
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
    """Step that deletes the characters for which unicodedata.combining is not 0; all are below U+20000."""
    codes = [code for code in range(0x300, 0x20000) if unicodedata.combining(chr(code))]
    return {"type": "Replace", "pattern": {"Regex": f"[{_ranges(codes)}]"}, "content": ""}


@functools.lru_cache(maxsize=4)
def _leading(charsmap: str) -> Step | None:
    """Step that deletes, at the start of a text, the blanks, controls and marks that a character map deletes."""
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
    """Code points in rising order as the inside of a regular expression's character class."""
    runs: list[list[int]] = []
    for code in codes:
        if runs and runs[-1][1] == code - 1:
            runs[-1][1] = code
        else:
            runs.append([code, code])
    return "".join(f"\\x{{{first:x}}}" + (f"-\\x{{{last:x}}}" if last > first else "") for first, last in runs)
