"""`albert-fast fill-mask`: the likeliest words for [MASK] in a text."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from . import _options as options
from ._errors import UsageError, reports_errors
from ._lines import Lines, given_text


@reports_errors
def command(
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT...", help="Text with one [MASK] or more; - reads lines of standard input."),
    ],
    model: options.Model,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Candidates for each mask.")] = 5,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="A JSON object for each text.")] = False,
    backend: options.Backend = "auto",
    precision: options.PrecisionOption = None,
    device: options.Device = None,
    threads: options.Threads = None,
) -> None:
    """Show the likeliest pieces for each [MASK] of a text, with their probabilities.

    The answer for a text: number of the mask, probability, piece, text with that piece in place. The model needs its
    masked-language head. With --jsonl: {"text": ..., "masks": [[{"token": ..., "score": ...}, ...], ...]}.

    \b
    Examples:
      albert-fast fill-mask "The film was [MASK]." -m my-albert
      albert-fast fill-mask - -m my-albert --top-k 10 --jsonl < lines.txt
    """
    import torch

    from ..checkpoints.weights import resolve

    options.set_threads(threads)
    folder, place = resolve(model), options.place(device)
    tokenizer = options.text_tokenizer(folder)
    if tokenizer.mask_token is None:
        raise UsageError(f"{model}: its vocabulary has no mask token")
    if top_k > tokenizer.vocab_size:
        raise UsageError(f"--top-k {top_k}: the vocabulary has {tokenizer.vocab_size} pieces")
    network = options.load("ALBERTForMaskedLM", folder, backend, precision, place)
    limit = options.token_limit(tokenizer, network.config, None)
    as_text = [token for token in tokenizer.all_special_tokens if token != tokenizer.mask_token]

    def answer(text: str, name: str) -> None:
        encoded = tokenizer(text, return_tensors="pt", split_special_tokens=as_text)
        batch = {key: value.to(place) for key, value in encoded.items()}
        masks = batch["input_ids"] == tokenizer.mask_token_id
        if not masks.any():
            raise ValueError(f"{name}: no {tokenizer.mask_token} in {text!r}; write it where a word is to be found")
        if masks.shape[1] > limit:
            raise ValueError(f"{name}: {masks.shape[1]} tokens, the model takes {limit}")
        with torch.inference_mode():
            logits = network(**batch, wanted_tokens=masks).logits  # (N masks, V)
        scores, ids = logits.float().softmax(-1).topk(top_k)
        found = [
            [(tokenizer.convert_ids_to_tokens(i), score, i) for i, score in zip(row_ids, row, strict=True)]
            for row_ids, row in zip(ids.tolist(), scores.tolist(), strict=True)
        ]
        if jsonl:
            plain = [[{"token": piece, "score": round(score, 6)} for piece, score, _ in row] for row in found]
            sys.stdout.write(json.dumps({"text": text, "masks": plain}, ensure_ascii=False) + "\n")
        else:
            whole = batch["input_ids"][0].tolist()
            places = masks[0].nonzero()[:, 0].tolist()
            for number, (where, row) in enumerate(zip(places, found, strict=True), 1):
                for piece, score, i in row:
                    filled = tokenizer.decode([*whole[1:where], i, *whole[where + 1 : -1]])
                    sys.stdout.write(f"{number}\t{score:.6f}\t{piece}\t{filled}\n")
        sys.stdout.flush()

    if texts != ["-"]:
        for position, text in enumerate(texts, 1):
            answer(given_text(text, f"text {position}"), f"text {position}")
        return
    with Lines("-", options.InputFormat.text) as lines:
        while records := lines.window(1):
            answer(records[0].text, f"standard input, line {records[0].line}")
