"""What a pre-training run reads, trains and writes: the fields of its configuration file, with their defaults and ranges."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.config import ALBERTConfig
from ..text.documents import CUTS


def _sizes(hidden_size: int, layers: int, heads: int, intermediate_size: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size,
    }


# Sizes of new models: the paper's (table 1), and one for a CPU.
SIZES: dict[str, dict[str, Any]] = {
    "small": _sizes(256, 4, 4, 1024),
    "base": _sizes(768, 12, 12, 3072),
    "large": _sizes(1024, 24, 16, 4096),
    "xlarge": _sizes(2048, 24, 16, 8192),
    "xxlarge": _sizes(4096, 12, 64, 16384),
}
KINDS, OPTIMIZERS, SCHEDULES, PRECISIONS, STARTS = (
    ("unigram", "wordpiece"),
    ("adamw", "lamb"),
    ("linear", "cosine"),
    ("float32", "bfloat16"),
    ("random", "counts"),
)
# The vocabulary and the special tokens fill these.
_NO_SIZES = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "extra"}


@dataclass
class DataConfig:
    """The text.

    Attributes:
        files: text, tables or saved data sets, see `read_documents`.
        held_out: files to evaluate on; without any, the share `held_out_share` of the documents, which are not trained on.
        documents: what ends a document of plain text: "blank_lines" or "lines".
        text_column: of tables and data sets; default: text, sentence or review.
        max_length: tokens of a sequence. short_share: share of the sequences that are shorter, of random length.
        mask_probability: share of the tokens to hide. longest_run: words that are hidden together, 1 to it.
        workers: processes that prepare batches; 0: the training process does.
    """

    files: list[str] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    held_out_share: float = 0.01
    documents: str = "blank_lines"
    text_column: str | None = None
    max_length: int = 128
    short_share: float = 0.1
    mask_probability: float = 0.15
    longest_run: int = 3
    workers: int = 0

    def __post_init__(self) -> None:
        _check("data", self, _among(CUTS), "documents")
        _check("data", self, _within(0, 1, ends="[)"), "held_out_share", "short_share")
        _check("data", self, _within(0, 1, ends="()"), "mask_probability")
        _check("data", self, _within(8, 1 << 20), "max_length")
        _check("data", self, _within(1, 8), "longest_run")
        _check("data", self, _within(0, 1024), "workers")


@dataclass
class VocabularyConfig:
    """The vocabulary: learnt from the text, or `path`, the folder or hub name of a checkpoint whose vocabulary to take.

    Attributes:
        size: pieces, at most: a short text gives fewer.
        kind, lower_case, keep_accents, character_coverage: as `train_tokenizer` takes them. keep_accents keeps every combining
            mark, for scripts that need them.
        lines: sentences that a unigram vocabulary is learnt from, drawn at random; 0: all. WordPiece takes all.
    """

    path: str | None = None
    size: int = 30000
    kind: str = "unigram"
    lower_case: bool = True
    keep_accents: bool = False
    character_coverage: float = 0.99995
    lines: int = 1_000_000

    def __post_init__(self) -> None:
        _check("vocabulary", self, _among(KINDS), "kind")
        _check("vocabulary", self, _within(20, 1 << 24), "size")
        _check("vocabulary", self, _within(0, 1, ends="(]"), "character_coverage")
        _check("vocabulary", self, _within(0, 1 << 40), "lines")


@dataclass
class OptimizerConfig:
    """How weights change.

    Attributes:
        name: "adamw" or "lamb". learning_rate: the highest; default: 5e-4 of AdamW, 1.76e-3 of LAMB (the paper's, for batches
            of 4,096 sequences of 512 tokens).
        weight_decay: of matrices and embeddings, not of biases and LayerNorm.
        warmup_ratio: share of the steps in which the rate rises. schedule: "linear" or "cosine", how it falls after that.
        max_grad_norm: larger gradients are scaled down to this L2 norm.
    """

    name: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    warmup_ratio: float = 0.06
    schedule: str = "linear"
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _check("optimizer", self, _among(OPTIMIZERS), "name")
        _check("optimizer", self, _among(SCHEDULES), "schedule")
        _check("optimizer", self, _within(0, 1, ends="[)"), "beta1", "beta2", "warmup_ratio")
        _check("optimizer", self, _within(0, math.inf, ends="[)"), "weight_decay")
        _check("optimizer", self, _within(0, math.inf, ends="()"), "learning_rate", "max_grad_norm")

    @property
    def highest_rate(self) -> float:
        default = 5e-4 if self.name == "adamw" else 1.76e-3
        return default if self.learning_rate is None else self.learning_rate


@dataclass
class PretrainConfig:
    """A pre-training run: see the parts.

    Attributes:
        output: the folder of the run.
        model: `size`, a name of SIZES ("small" if there is none), and fields of ALBERTConfig that replace its sizes.
        start: the weights of a new model: "random", or "counts", see starting_weights.py: a short run on little text gets much
            further with it.
        init_from: a checkpoint to start from, of ALBERT; then `model` stays empty and the vocabulary is the checkpoint's.
        steps: optimizer steps. batch_tokens: tokens of a step, over all processes and micro-batches.
        accumulation: micro-batches of a step, so that a large batch needs less memory.
        precision: "float32", or "bfloat16": weights in float32 and forwards under torch.autocast.
        sharded: FSDP2 in place of DistributedDataParallel: each process keeps a share of weights and optimizer state.
        save_steps, evaluate_steps, log_steps: how often the state is saved, the held-out text measured, a record logged.
        evaluation_tokens: tokens of the held-out text to measure on, at most.
        seed: of every random choice.
    """

    output: str = ""
    data: DataConfig = field(default_factory=DataConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    start: str = "random"
    init_from: str | None = None
    steps: int = 10_000
    batch_tokens: int = 16_384
    accumulation: int = 1
    precision: str = "float32"
    sharded: bool = False
    save_steps: int = 500
    evaluate_steps: int = 500
    log_steps: int = 50
    evaluation_tokens: int = 200_000
    seed: int = 0

    def __post_init__(self) -> None:
        _check("", self, _among(PRECISIONS), "precision")
        _check("", self, _among(STARTS), "start")
        _check("", self, _within(1, 1 << 40), "steps", "accumulation", "save_steps", "evaluate_steps", "log_steps")
        _check("", self, _within(1, 1 << 40), "evaluation_tokens")
        _check("", self, _within(0, 2**32 - 1), "seed")
        if self.batch_tokens < self.accumulation * self.data.max_length:
            raise ValueError(
                f"batch_tokens must hold a sequence of data.max_length = {self.data.max_length} tokens for each of "
                f"{self.accumulation} micro-batches, got {self.batch_tokens}"
            )

    def check_complete(self, has_documents: bool) -> None:
        """ValueError where a run has no text or no folder, or a file that does not exist; or asks for two starts."""
        if not self.output:
            raise ValueError("output is missing: the folder of the run")
        if bool(self.data.files) == has_documents:
            raise ValueError("give data.files or documents" + (", not both" if has_documents else ""))
        for file in (*self.data.files, *self.data.held_out):
            if not Path(file).exists():
                raise FileNotFoundError(f"{file}: no such file or folder")
        if self.init_from is not None and (self.model or self.vocabulary.path is not None):
            raise ValueError("init_from has its own sizes and vocabulary: leave out model and vocabulary.path")
        if self.init_from is not None and self.start != "random":
            raise ValueError(f"init_from has its own weights: leave out start={self.start}")
        if self.init_from is None:
            self.new_model()

    def new_model(self, **fields: Any) -> ALBERTConfig:
        """The configuration of a new model; `fields` replace others.

        Raises:
            ValueError: an unknown size, a field that ALBERTConfig does not have or that the vocabulary fills, a value out of
                range, a model with too few positions.
        """
        given = {key: value for key, value in self.model.items() if key != "size"}
        size = self.model.get("size", "small")
        if size not in SIZES:
            raise ValueError(f"model.size must be one of {', '.join(SIZES)}, got {size!r}")
        known = {one.name for one in dataclasses.fields(ALBERTConfig)} - _NO_SIZES
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"model.{unknown[0]} is no size of a model; known: size, {', '.join(sorted(known))}")
        longest = max(512, self.data.max_length)
        values = {"max_position_embeddings": longest, **SIZES[size], **given, **fields}
        config = ALBERTConfig(**values)
        if config.max_position_embeddings < self.data.max_length:
            raise ValueError(
                f"model.max_position_embeddings {config.max_position_embeddings} is less than data.max_length "
                f"{self.data.max_length}"
            )
        return config


def load_config(file: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Reads a YAML file with the fields of PretrainConfig, and overrides such as "optimizer.learning_rate=1e-3".

    Relative paths are relative to the working directory.

    Raises:
        ValueError: a field that does not exist, or has another type or range; the message names file or override.
        OSError: the file cannot be read. ImportError: omegaconf is not installed.
    """
    try:
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError
    except ImportError as error:
        raise ImportError("a configuration file needs omegaconf: pip install 'albert-fast[pretrain]'") from error
    config: Any = OmegaConf.structured(PretrainConfig)
    part = str(file)
    try:
        loaded = OmegaConf.load(file)
        if OmegaConf.is_list(loaded):
            raise ValueError(f"{file}: expected fields and values, found a list")
        config = OmegaConf.merge(config, loaded)
        for part in overrides:
            if "=" not in part:
                raise ValueError(f"{part}: an override has the form field=value")
            config = OmegaConf.merge(config, OmegaConf.from_dotlist([part]))
        part = str(file)
        made: PretrainConfig = OmegaConf.to_object(config)  # type: ignore[assignment]
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{part}: {_reason(error)}") from error
    return made


def _reason(error: Exception) -> str:
    """What is wrong, in a line, without OmegaConf's lines about its own objects."""
    key = getattr(error, "full_key", None)
    line = " ".join(str(error).split("\n    full_key")[0].split())
    return f"{key}: {line}" if key and str(key) not in line else line


Fits = tuple[Callable[[Any], bool], str]


def _check(part: str, config: Any, fits: Fits, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not fits[0](value):
            raise ValueError(f"{part}{'.' if part else ''}{name} {fits[1]}, got {value!r}")


def _among(values: Sequence[str]) -> Fits:
    return lambda value: value in values, f"must be one of {', '.join(values)}"


def _within(low: float, high: float, ends: str = "[]") -> Fits:
    """Each condition is false for NaN."""

    def fits(value: float) -> bool:
        above = low <= value if ends[0] == "[" else low < value
        return above and (value <= high if ends[1] == "]" else value < high)

    return fits, f"must lie in {ends[0]}{low:g}, {high:g}{ends[1]}"


__all__ = ["SIZES", "DataConfig", "OptimizerConfig", "PretrainConfig", "VocabularyConfig", "load_config"]
