"""Builds our encoder and decoder and Hugging Face's with the same weights, for parity tests.

It needs transformers, which is imported on first use.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..models.decoder import gather_layers
from ..models.seq2seq import ALBERTForConditionalGeneration
from ..models.seq2seq_config import ALBERTSeq2SeqConfig

SMALL: dict[str, Any] = {
    "vocab_size": 53,
    "embedding_size": 16,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "max_position_embeddings": 24,
    "num_decoder_layers": 4,
    "num_decoder_groups": 2,
    "decoder_hidden_act": "gelu",
}


def seq2seq_pair(seed: int = 0, backend: str = "auto", **fields: Any) -> tuple[ALBERTForConditionalGeneration, Any]:
    """(ours, Hugging Face's), in eval mode, with the same random weights: products have about the size of their inputs.

    Theirs shares the parameters of the decoder's layers in a group, and one table of words.
    """
    import transformers

    config = ALBERTSeq2SeqConfig(**(SMALL | fields))
    parts = {name: value for name, value in config.to_dict().items() if name != "model_type"}
    theirs: Any = transformers.EncoderDecoderModel(transformers.EncoderDecoderConfig(**parts))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key.lower():
                parameter.copy_(0.1 * noise + (1.0 if key.endswith("weight") else 0.0))
            else:
                parameter.copy_(noise * (1 / math.sqrt(parameter.shape[-1]) if parameter.dim() == 2 else 0.1))
    words = theirs.encoder.embeddings.word_embeddings
    theirs.decoder.electra.embeddings.word_embeddings = words
    theirs.decoder.generator_lm_head.weight = words.weight
    layers, groups = theirs.decoder.electra.encoder.layer, config.decoder_config().group_indices()
    for step, group in enumerate(groups):
        _share(layers[groups.index(group)], layers[step])
    ours = ALBERTForConditionalGeneration(config, backend=backend)
    state = {key: tensor for key, tensor in theirs.state_dict().items() if not key.startswith("encoder.pooler.")}
    ours.load_state_dict(gather_layers(state, groups), strict=True)
    return ours.eval(), theirs.eval()


def _share(first: nn.Module, other: nn.Module) -> None:
    """Give `other` the parameters of `first`, a module of the same class."""
    for name, module in first.named_modules():
        for own, parameter in module._parameters.items():
            other.get_submodule(name)._parameters[own] = parameter


def ragged_ids(rows: int, columns: int, seed: int, padding: int = 0) -> Tensor:
    """(rows, columns) random ids of SMALL's vocabulary from 4 on, with `padding` after at least 2 of them in each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, SMALL["vocab_size"], (rows, columns), generator=generator)
    lengths = torch.randint(2, columns + 1, (rows, 1), generator=generator)
    return ids.masked_fill(torch.arange(columns)[None] >= lengths, padding)
