"""Learns new vocabularies from lines of text, as pipelines of the `tokenizers` library."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import normalization as _normalization
from .vocabulary import (
    AS_SAVED,
    WORDPIECE_TOKENS,
    add_tokens,
    public_settings,
    require,
    unigram_pipeline,
    wordpiece_pipeline,
)

if TYPE_CHECKING:
    import tokenizers

# Punctuation that is never part of a longer piece in ALBERT's vocabulary (user_defined_symbols of its release).
_SYMBOLS = ("(", ")", '"', "-", ".", "\u2013", "\u00a3", "\u20ac")


@dataclass(frozen=True)
class UnigramTraining:
    """How to train a unigram vocabulary; the fields are the arguments of `train_tokenizer`."""

    vocab_size: int
    at_most: bool
    lower_case: bool
    keep_accents: bool
    character_coverage: float
    max_lines: int
    seed: int


def train_unigram(lines: Iterable[str], how: UnigramTraining) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Runs SentencePiece's trainer with the flags of ALBERT's release, on text that the pipeline's rules normalized."""
    sentencepiece = require("sentencepiece")
    normalizer = _normalization.build(
        require("tokenizers"), _normalization.albert_steps(how.lower_case, how.keep_accents)
    )
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(how.seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(normalizer.normalize_str(line.rstrip("\r\n")) for line in lines),
            model_writer=model,
            vocab_size=how.vocab_size,
            hard_vocab_limit=not how.at_most,
            model_type="unigram",
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="<pad>",
            unk_piece="<unk>",
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
            user_defined_symbols=list(_SYMBOLS),
            character_coverage=how.character_coverage,
            input_sentence_size=how.max_lines,
            shuffle_input_sentence=how.max_lines > 0,
            max_sentence_length=1 << 24,  # the trainer would silently drop longer lines
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        least = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if most:
            reason = f"it holds enough for {most[1]}; lower vocab_size"
        elif least:
            reason = f"its characters alone need {least[1]}; raise vocab_size"
        else:
            reason = str(error)
        raise ValueError(f"no vocabulary of {how.vocab_size} pieces can be learnt from this text: {reason}") from error
    backend, settings = unigram_pipeline(
        model.getvalue(), (how.lower_case, how.keep_accents, True), "the trained model"
    )
    return _trained(backend, settings)


def train_wordpiece(
    lines: Iterable[str], vocab_size: int, lower_case: bool, keep_accents: bool
) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """Runs the WordPiece trainer of `tokenizers`, with BERT's special tokens (ids 0 to 4) and rules, but keeps vowel signs."""
    backends = require("tokenizers")
    strip = not keep_accents if keep_accents == lower_case else None  # None: strip accents exactly if lower_case is on
    model = backends.models.WordPiece(unk_token=WORDPIECE_TOKENS["unk_token"])
    backend, settings = wordpiece_pipeline(model, {"do_lower_case": lower_case, "strip_accents": False})
    if not keep_accents:
        accents = _normalization.build(backends, _normalization.accent_steps())
        backend.normalizer = backends.normalizers.Sequence([accents, backend.normalizer])
    specials = list(WORDPIECE_TOKENS.values())
    trainer = backends.trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False)
    texts: Iterator[str] = (line.rstrip("\r\n") for line in lines)
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() > vocab_size:
        raise ValueError(f"vocab_size {vocab_size} is less than the {backend.get_vocab_size()} characters of this text")
    settings = {**settings, "tokenizer_class": AS_SAVED, "do_lower_case": lower_case, "strip_accents": strip}
    return _trained(backend, settings)


def _trained(backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    settings = {**settings, "model_max_length": 512, "added_tokens_decoder": {}, "extra_special_tokens": []}
    add_tokens(backend, settings, {})
    return backend, public_settings(settings)
