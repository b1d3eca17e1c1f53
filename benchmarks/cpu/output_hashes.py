"""Prints hashes of what the models compute on a CPU: equal hashes of two commits mean equal bits.

    python benchmarks/cpu/output_hashes.py > before.txt      # in one checkout
    python benchmarks/cpu/output_hashes.py > after.txt       # in another, on the same machine
    diff before.txt after.txt

Each line is a case and the SHA-256 of its output. A case is an ALBERT of random weights that depend on their names alone, in
a precision, on a batch with padding, and, where the data folder is found, the real encoder in it. Gradients of a
training step, with dropout, are hashed too. Hashes differ between machines: instruction sets sum in different orders.
"""

from __future__ import annotations

import hashlib
import tempfile
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

import albert_fast
from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTForSequenceClassification, ALBERTModel

CONFIGS = {
    "small": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 160, "num_hidden_layers": 3},
    "groups": {
        "hidden_size": 96,
        "num_attention_heads": 3,
        "intermediate_size": 130,
        "num_hidden_layers": 4,
        "num_hidden_groups": 2,
        "inner_group_num": 2,
        "hidden_act": "gelu",
    },
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 2},
}
PRECISIONS = ("fp32", "bf16", "fp16", "int16", "int8")
LENGTHS = ([16], [1, 13, 7, 40], [5, 0, 31])


def named_weights(model: torch.nn.Module) -> None:
    """Weights that depend on their names alone, not on the order in which a model makes them."""
    for name, tensor in model.state_dict().items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(tensor.shape, generator=generator) * 0.05
        tensor.copy_(1 + drawn if name.endswith("LayerNorm.weight") or "layer_norm.weight" in name else drawn)


def batch(lengths: list[int], seed: int = 0, words: int = 500) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (B, S) of sequences of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, words, (len(lengths), max(lengths)), generator=generator)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def digest(*tensors: Tensor | None) -> str:
    """The first 16 digits of the SHA-256 of some tensors' bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def inference(name: str, sizes: dict) -> Iterator[tuple[str, str]]:
    config = ALBERTConfig(vocab_size=500, embedding_size=32, max_position_embeddings=64, **sizes)
    model = ALBERTModel(config)
    with torch.no_grad():
        named_weights(model)
    calibration = [batch([20, 9, 33], seed) for seed in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for precision in PRECISIONS:
            calibrated = calibration if precision == "int8" else None
            backend = "reference" if precision == "fp16" else "auto"  # no kernel on a CPU takes it
            loaded = ALBERTModel.from_pretrained(folder, precision=precision, backend=backend, calibration=calibrated)
            for lengths in LENGTHS:
                ids, mask = batch(lengths)
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    with torch.no_grad():
                        out = loaded(ids, mask)
                    yield f"{name}/{precision}/{lengths}/{threads}", digest(out.last_hidden_state, out.pooler_output)
            with torch.no_grad():
                states = loaded(*batch([9, 4]), output_hidden_states=True).hidden_states
            yield f"{name}/{precision}/hidden_states", digest(*states)


def training(name: str, sizes: dict) -> Iterator[tuple[str, str]]:
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "classifier_dropout_prob": 0.1}
    config = ALBERTConfig(vocab_size=500, embedding_size=32, max_position_embeddings=64, **sizes, **dropout)
    ids, mask = batch([1, 13, 7, 40])
    labels = {ALBERTForMaskedLM: ids.masked_fill(ids % 5 != 0, -100), ALBERTForSequenceClassification: ids[:, 0] % 2}
    for kind, wanted in labels.items():
        model = kind(config)
        with torch.no_grad():
            named_weights(model)
        model.train()
        torch.manual_seed(1)
        out = model(ids, mask, labels=wanted)
        out.loss.backward()
        gradients = dict(sorted((key, parameter.grad) for key, parameter in model.named_parameters()))
        yield f"{name}/{kind.__name__}/loss, gradients", digest(out.loss, out.logits, *gradients.values())


def real_encoder() -> Iterator[tuple[str, str]]:
    from albert_fast.testing import data_dir

    path = data_dir() / "plbert"
    words = ALBERTConfig.from_pretrained(path).vocab_size
    for precision in ("fp32", "int16", "int8"):
        calibration = [batch([30, 22], 3, words)] if precision == "int8" else None
        model = ALBERTModel.from_pretrained(path, precision=precision, calibration=calibration)
        with torch.no_grad():
            out = model(*batch([40, 17, 3], words=words))
        yield f"plbert/{precision}", digest(out.last_hidden_state, out.pooler_output)


def main() -> None:
    torch.manual_seed(0)
    print(f"# torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {albert_fast.__version__}")
    for name, sizes in CONFIGS.items():
        for part in (inference, training):
            for case, found in part(name, sizes):
                print(f"{found}  {case}", flush=True)
    try:
        for case, found in real_encoder():
            print(f"{found}  {case}", flush=True)
    except FileNotFoundError as error:
        print(f"# no real encoder: {error}")


if __name__ == "__main__":
    main()
