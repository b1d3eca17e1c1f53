"""Loads a checkpoint's model and tokenizer for a task over texts: device, precision and length are chosen here."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.families import ENCODER_DECODER
from ..checkpoints.saving import config_path, folder_of, missing_config
from ..checkpoints.weights import MissingHeadError, is_index, resolve
from ..models.auto import config_of
from ..models.encoder_config import EncoderConfig
from ..models.pretrained import held_precision
from ..runtime.devices import choose_device
from ..runtime.files import read_json_object
from ..text.batching import TextPair, for_plain_text
from ..text.tokenizer import Tokenizer, load_tokenizer
from .errors import UsageError
from .token_batches import Batching, TokenBatch

# The end of the name of a checkpoint's class -> the command that reads it.
COMMANDS = {
    "ForSequenceClassification": "classify",
    "ForTokenClassification": "tag",
    "ForQuestionAnswering": "answer",
    "ForMultipleChoice": "choose",
    "ForMaskedLM": "fill-mask",
    "EncoderDecoderModel": "translate",
}


class TextModel:
    """A model and its tokenizer; the base class of the tasks.

    Args:
        model_class: the class of the model, such as ALBERTForMaskedLM or AutoModel.
        checkpoint: a folder or a name on the Hugging Face hub.
        max_length: texts are cut to this many tokens; default: as many as the model takes.
        batch_size: most texts that are computed at a time; None where only the number of their tokens matters.
        backend, precision: as for `from_pretrained`.
        device: default: a GPU if there is one.

    Attributes:
        folder: the checkpoint's folder, or its single file of weights.
        max_length: the limit in tokens that is in force.

    Raises:
        ValueError: `max_length` is more than the model's positions, or leaves no room for a text. FileNotFoundError: no
            config.json. UsageError: the checkpoint lacks the head that the task needs. What `from_pretrained` and
            `load_tokenizer` raise.
    """

    # What the task needs, and what reads an encoder alone; for an error message.
    head, instead = "encoder of its own", ""

    def __init__(
        self,
        model_class: Any,
        checkpoint: str | Path,
        *,
        max_length: int | None = None,
        batch_size: int | None = 32,
        backend: str = "auto",
        precision: str | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        self.folder, self.batch_size, self.backend = checkpoint_path(checkpoint), batch_size, backend
        if not config_path(self.folder).is_file():
            raise missing_config(self.folder)
        self.device = choose_device(device)
        about = read_json_object(config_path(self.folder))
        hint = self.instead if (command := _command_for(about)) is None else f"; `albert-fast {command}` reads it"
        writes = getattr(model_class, "base_model_prefix", "") == ENCODER_DECODER.attribute
        if writes != (about.get("model_type") == ENCODER_DECODER.model_type):
            raise UsageError(f"{checkpoint} has no {self.head}{hint}")
        self.tokenizer = for_plain_text(load_tokenizer(folder_of(self.folder)))
        try:
            self.model: Any = model_class.from_pretrained(
                self.folder,
                backend=backend,
                precision=precision,
                device=self.device,
                return_dict=True,  # whatever config.json says
                output_hidden_states=False,
                output_attentions=False,
            )
        except MissingHeadError as error:
            raise UsageError(f"{checkpoint} has no {self.head}{hint}") from error
        self.precision: str = self.model.execution.quantized or precision or "fp32"
        self.max_length = token_limit(self.tokenizer, self.model.config, max_length)
        self.tokenizer("", max_length=self.max_length)  # an error where the special tokens alone are longer

    @property
    def takes_types(self) -> bool:
        """Whether token types make a difference to the model."""
        return bool(self.model.base_model.takes_types)

    def token_batches(
        self, texts: Sequence[str | TextPair], batch_tokens: int, before: str = ""
    ) -> Iterator[TokenBatch]:
        """Batches of about `batch_tokens` tokens, on the CPU, without padding; tokenising runs ahead of the caller.

        Args:
            before: what stands before every text.

        Raises:
            ValueError: batch_tokens below 1; later half of a surrogate pair in a text.
        """
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; expected at least 1")
        how = Batching(self.tokenizer, self.max_length, batch_tokens, self.batch_size, self.takes_types, before)
        return how.batches(texts)


def _command_for(config: Mapping[str, Any]) -> str | None:
    """The command for the class that a config.json names; None where it names none or another."""
    names = config.get("architectures") or [""]
    return next((command for end, command in COMMANDS.items() if str(names[0]).endswith(end)), None)


def checkpoint_path(checkpoint: str | Path) -> Path:
    """The folder or the file of weights that `checkpoint` names; a model on the hub is fetched.

    Raises:
        ValueError: a file that is none of weights. What `resolve` raises.
    """
    path = resolve(checkpoint)
    if path.is_file() and path.suffix not in (".safetensors", ".bin", ".pt", ".pth") and not is_index(path):
        raise ValueError(f"{path} is no checkpoint, which is a folder or a file of weights")
    return path


def checked_texts(texts: Sequence[str | TextPair]) -> Sequence[str | TextPair]:
    """`texts`, or a list of them where they are no sequence, when every one is a str or (str, str or None).

    Raises:
        TypeError: a text that is not a str, or one str in place of a list; names its place.
    """
    if isinstance(texts, (str, bytes)):
        raise TypeError(f"texts must be a list of str; it is a {type(texts).__name__}: put it in a list")
    texts = texts if isinstance(texts, (list, tuple)) else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str) and not _is_pair(text):
            raise TypeError(f"text {index} is {reprlib.repr(text)}; expected a str, or two of them")
    return texts


def _is_pair(text: Any) -> bool:
    is_two = isinstance(text, (tuple, list)) and len(text) == 2
    return is_two and isinstance(text[0], str) and (text[1] is None or isinstance(text[1], str))


@contextmanager
def progress_bar(total: int, shown: bool, unit: str = " texts") -> Iterator[Callable[[int], object]]:
    """Gives a function that counts done texts, or other units, in a bar on standard error that shows them per second.

    Raises:
        ImportError: it is to be shown, and tqdm is not installed.
    """
    if not shown:
        yield lambda count: None
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("show_progress needs tqdm: pip install 'albert-fast[cli]'") from error
    with tqdm(total=total, unit=unit) as bar:
        yield bar.update


@contextmanager
def quiet_about_modules() -> Iterator[None]:
    """Suppresses `from_pretrained`'s warning about a sentence-transformers folder, for callers that keep its modules."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"[^\n]*: a sentence-transformers folder: ")
        yield


def token_limit(tokenizer: Tokenizer, config: EncoderConfig, max_length: int | None) -> int:
    """Tokens that a text is cut to. ValueError where `max_length` is more than the model has positions."""
    positions = config.longest
    if max_length is not None and max_length > positions:
        raise ValueError(f"max_length {max_length} is more than the model's {positions} positions")
    return max_length or min(tokenizer.model_max_length, positions)


def stated_precision(path: Path, precision: str | None) -> str:
    """The precision that was asked for; by default the one that config.json states, else float32."""
    if precision is not None:
        return precision
    return held_precision(config_of(path), path) or "fp32"


def holds_floats(path: Path) -> bool:
    """Whether the weights of a checkpoint are floats. False where config.json cannot be read; loading reports that."""
    try:
        config = config_of(path)
    except (OSError, ValueError):
        return False
    return config.extra.get("quantization_config") is None
