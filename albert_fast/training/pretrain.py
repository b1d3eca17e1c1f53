"""Pre-trains an ALBERT from text: hidden words and sentence order. What `albert-fast pretrain` does.

    pretrain(PretrainConfig(output="my-albert", data=DataConfig(files=["corpus.txt.gz"])))

1. The configuration, the files and the folder are checked.
2. The vocabulary is learnt from the text, or taken from a checkpoint.
3. The text is tokenised once, into files in the folder.
4. The model is trained. Every save writes the whole state of the run and the model.

| in the folder | what |
|---|---|
| config.json, model.safetensors | the model of the last save, for from_pretrained |
| tokenizer.json, tokenizer_config.json | the vocabulary |
| corpus-*/ | the tokenised text; may be deleted when the run is over |
| log.jsonl, tensorboard/, curves.png | the settings and figures, as text and as pictures |
| training_state.pt | everything that `resume=True` needs to continue with the same losses |
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints.saving import folder_of
from ..checkpoints.weights import resolve
from ..models.heads import ALBERTForPreTraining
from ..text.batching import for_plain_text
from ..text.documents import split_sentences
from ..text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from . import checks
from .checkpointing import STATE_NAME, claimed
from .corpus import Corpus, Documents, open_corpus, tokenised
from .distributed import Processes, joined_processes
from .masking import Masks
from .pretrain_config import PretrainConfig
from .pretrain_run import PretrainingRun
from .segments import PretrainingData, split_documents
from .starting_weights import start_from_counts

# Not part of what a resumed run must have in common: names of files, whose content counts, and where and how work is done.
_FREE = ("output", "sharded")
_FREE_DATA = ("files", "held_out", "workers")


@dataclass
class PretrainResult:
    """What a run achieved.

    Attributes:
        steps: optimizer steps that are done.
        history: the records of the log.
        figures: the last measurement of the held-out text, see `PretrainingRun.evaluate`; empty without one.
        rank: the number of this process under torchrun; all of them return the same.
    """

    output_dir: Path
    steps: int
    history: list[dict[str, Any]]
    figures: dict[str, float]
    rank: int = 0


def pretrain(
    config: PretrainConfig,
    *,
    documents: Iterable[Any] | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
    report: Callable[[str], None] | None = None,
) -> PretrainResult:
    """Pre-trains a model by hidden words and sentence order; under torchrun with all of its processes.

    Args:
        documents: in place of config.data.files: strings, or dicts with a text column, that can be read more than once: a
            list, or a `datasets.Dataset`.
        resume: continue the run in the folder if there is one. Text and settings must be the same, except for the number of
            steps, how often is saved and measured, and the number of processes.
        device: default: a GPU if there is one, under torchrun one for each process.
        progress: a bar on standard error, on a terminal; elsewhere a line for each record.
        report: called with lines about the run; default: they go to standard error if `progress` is on.

    Raises:
        FileExistsError: the folder holds a run and `resume` is off, or a model that no run wrote.
        LockedError: another run is writing to the folder.
        ValueError: settings out of range, files that are no text, a state with other settings. ImportError: a library is
            missing. OSError: a file that cannot be read, a folder that cannot be written, a full disk; the last state is
            unchanged.
        FloatingPointError: the loss is no longer finite; the state on disk is that of an earlier step.
        KeyboardInterrupt: Ctrl-C, after the current step was finished and the state saved; under torchrun at once, with the
            state of the last save.
    """
    config.check_complete(documents is not None)
    folder = Path(config.output)
    with joined_processes(device) as (processes, device):
        if config.sharded and processes.waiting is None:
            raise ValueError("sharded=true shares weights among the processes of torchrun: start the run with it")
        shown = (report or _say) if (progress or report) and processes.is_first else lambda line: None
        checks.check_device(device)
        # The folder's lock belongs to the first process, which alone writes there.
        with claimed(folder, resume) if processes.is_first else nullcontext():
            names = _prepare(config, documents, folder, resume, shown) if processes.is_first else []
            names = processes.gathered(names)[0]
            corpora = [open_corpus(folder / name) for name in names]
            tokenizer = for_plain_text(load_tokenizer(folder))
            run = _make_run(config, corpora, names, tokenizer, processes, device, shown, bar=progress, resume=resume)
            if resume:
                run.load()
            _introduce(run, tokenizer, shown)
            run.run()
    measured = [record for record in run.history if "masked_accuracy" in record]
    figures = {key: value for key, value in measured[-1].items() if key != "step"} if measured else {}
    return PretrainResult(folder, run.step, run.history, figures, processes.rank)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _prepare(
    config: PretrainConfig,
    rows: Iterable[Any] | None,
    folder: Path,
    resume: bool,
    say: Callable[[str], None],
) -> list[str]:
    """Writes vocabulary and tokenised text; returns the names of the corpora: the text, and the held-out text if it has files."""
    data = config.data
    documents = Documents(tuple(data.files), data.documents, data.text_column, rows)
    if rows is not None and iter(rows) is rows:
        raise ValueError("documents can be read only once; give a list, or another object that can be read again")
    if not (resume and (folder / STATE_NAME).exists()):
        tokenizer = _vocabulary(config, documents, say)
        tokenizer.model_max_length = tokenizer.settings["model_max_length"] = data.max_length
        tokenizer.save(folder)
    tokenizer = for_plain_text(load_tokenizer(folder))
    sources = [documents]
    if data.held_out:
        sources.append(Documents(tuple(data.held_out), data.documents, data.text_column))
    return [tokenised(source, tokenizer, folder, say).name for source in sources]


def _vocabulary(config: PretrainConfig, documents: Documents, say: Callable[[str], None]) -> Tokenizer:
    path, how = config.init_from or config.vocabulary.path, config.vocabulary
    if path is not None:
        return load_tokenizer(folder_of(resolve(path)))
    sentences = (sentence for document in documents for sentence in split_sentences(document))
    tokenizer = train_tokenizer(
        sentences,
        how.size,
        at_most=True,
        kind=how.kind,
        lower_case=how.lower_case,
        keep_accents=how.keep_accents,
        character_coverage=how.character_coverage,
        max_lines=how.lines,
        seed=config.seed,
    )
    say(f"vocabulary: {tokenizer.vocab_size:,} pieces learnt from the text ({how.size:,} were asked for)")
    return tokenizer


def _make_run(
    config: PretrainConfig,
    corpora: list[Corpus],
    names: list[str],
    tokenizer: Tokenizer,
    processes: Processes,
    device: torch.device,
    say: Callable[[str], None],
    *,
    bar: bool,
    resume: bool,
) -> PretrainingRun:
    data = config.data
    share = 0.0 if data.held_out else data.held_out_share
    trained, held = split_documents(len(corpora[0].document_ends), share, config.seed)
    torch.manual_seed(config.seed)
    model = _model(config, tokenizer)
    if config.start == "counts" and not (resume and (Path(config.output) / STATE_NAME).exists()):
        say("counting words that stand near each other")
        start_from_counts(model, corpora[0], trained, config.seed)
    if processes.rank:  # after the weights, which all processes have in common, each draws dropout of its own
        torch.manual_seed(config.seed + processes.rank)
    checks.check_disk(Path(config.output), model, averaged=False)
    masks = Masks(tokenizer, data.mask_probability, data.longest_run)
    ids = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    first = processes.rank * config.accumulation
    options: dict[str, Any] = {"max_length": data.max_length, "short_share": data.short_share, "seed": config.seed}
    batches = PretrainingData(
        corpora[0],
        trained,
        masks,
        ids,
        batch_tokens=config.batch_tokens,
        parts=processes.size * config.accumulation,
        mine=range(first, first + config.accumulation),
        **options,
    )
    held_out = None
    if data.held_out or len(held):
        measured = np.arange(len(corpora[1].document_ends)) if data.held_out else held
        held_out = PretrainingData(
            corpora[-1],
            measured,
            masks,
            ids,
            batch_tokens=max(config.batch_tokens // config.accumulation, processes.size * data.max_length),
            parts=processes.size,
            mine=range(processes.rank, processes.rank + 1),
            **options,
        )
    settings = dataclasses.asdict(config) | {"model": model.config.to_dict(), "corpora": names}
    settings["optimizer"]["learning_rate"] = config.optimizer.highest_rate
    settings = {key: value for key, value in settings.items() if key not in _FREE}
    settings["data"] = {key: value for key, value in settings["data"].items() if key not in _FREE_DATA}
    bar = bar and sys.stderr.isatty()
    return PretrainingRun(config, model, batches, held_out, settings, processes, device, say, bar=bar)


def _model(config: PretrainConfig, tokenizer: Tokenizer) -> ALBERTForPreTraining:
    if config.init_from is None:
        return ALBERTForPreTraining(
            config.new_model(
                vocab_size=tokenizer.vocab_size,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.cls_token_id,
                eos_token_id=tokenizer.sep_token_id,
            )
        )
    model: ALBERTForPreTraining = ALBERTForPreTraining.from_pretrained(config.init_from).float()
    checks.check_trainable(model.config, config.init_from)
    checks.check_vocabulary(tokenizer, model.config, config.init_from)
    checks.check_length(config.data.max_length, model.config)
    return model


def _introduce(run: PretrainingRun, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
    """Lines that a user should read before the first step."""
    config, data, processes = run.config, run.data, run.processes
    weights = sum(parameter.numel() for parameter in run.model.parameters())
    say(f"model: {weights:,} weights, {tokenizer.vocab_size:,} pieces; {processes.size} x {run.device}")
    tokens = int((data.ends - data.begins).sum())
    epochs = config.steps / len(data.plan(0))
    say(
        f"{config.steps:,} steps of {config.batch_tokens:,} tokens, {epochs:.3g} passes over {tokens:,} tokens; "
        f"{config.optimizer.name}, learning rate {config.optimizer.highest_rate:g}"
    )
    if run.held_out is None:
        say("no held-out text: only the loss of the training text is measured")
    say(f"state and model go to {run.folder} every {config.save_steps:,} steps; --resume (resume=True) continues")


__all__ = ["PretrainResult", "pretrain"]
