"""Weights for a short pre-training to start from, made of counts of the text in place of random numbers.

From random weights, a small model needs tens of millions of tokens until it knows which words are alike, and many more until its
attention finds the words next to a token. Both can be had in a minute:

- words: a truncated singular value decomposition of the positive pointwise mutual information of words that stand near each other
  (Levy, Goldberg and Dagan 2015, "Improving Distributional Similarity with Lessons Learned from Word Embeddings"), in all
  dimensions of the embeddings but a quarter;
- positions: sines and cosines (Vaswani et al. 2017, section 3.5) in that quarter, where the words are small;
- heads: a shift of sines is a rotation, so a head whose key is the position and whose query is the rotated position looks at the
  token before, the one after, and so on; what reads the position from a layer's input is found by least squares. The idea of
  giving attention a structure beforehand: Trockman and Kolter 2023, "Mimetic Initialization of Self-Attention Layers".

Everything is trained on from there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..models.heads import ALBERTForPreTraining
from .corpus import Array, Corpus

WINDOW = 5  # words on either side that count as near; the weight falls with the distance
MOST_TOKENS = 100_000_000  # more text hardly changes the counts
SMOOTHING = 0.75  # of the frequencies of neighbours: rare ones would else look too telling
OFFSETS = (-1, 1, -2, 2)  # what the heads of the first layer look at; three quarters of them at most
POSITION_SCALE = 2.4  # amplitude of the sines, in standard deviations of a word's elements
SHARPNESS = 14.0  # the logit of the token that a head looks at
SEQUENCES = 16  # of random words, by which the heads are aimed
_CHUNK = 8_000_000


def start_from_counts(model: ALBERTForPreTraining, corpus: Corpus, documents: Array, seed: int) -> None:
    """Replaces random weights of a new model.

    Args:
        documents: the numbers of the documents to count.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    positional = min(config.embedding_size // 4, head_dim) // 2 * 2
    embeddings = model.base_model.embeddings
    words, positions = embeddings.word_embeddings.weight, embeddings.position_embeddings.weight
    with torch.no_grad():
        counts, frequencies = _count(corpus, documents, config.vocab_size)
        vectors = _word_vectors(counts, config.embedding_size - positional, seed)
        length = vectors.norm(dim=1, keepdim=True)
        vectors *= config.initializer_range * math.sqrt(vectors.shape[1]) / length.clamp_min(1e-12)
        words[:, :positional] *= 0.1
        words[:, positional:] = torch.where(length > 0, vectors, words[:, positional:])
        model.predictions.bias.copy_(torch.log((frequencies + 1) / (frequencies + 1).sum()))
        angles, amplitude = _angles(positional, config.embedding_size), POSITION_SCALE * config.initializer_range
        positions *= 0.2
        positions[:, :positional] = amplitude * _waves(len(positions), angles)
        training = model.training
        model.eval()  # no dropout in what the heads are aimed by
        if positional:  # a quarter of a tiny embedding is nothing
            _aim_heads(model, angles, frequencies)
        model.train(training)


def _count(corpus: Corpus, documents: Array, vocab_size: int) -> tuple[Any, Tensor]:
    """How often two tokens stand near each other, a symmetric sparse matrix (V, V); and how often each occurs, (V,)."""
    from scipy import sparse

    counted = np.zeros(len(corpus.document_ends), dtype=bool)
    counted[documents] = True
    pairs = sparse.csr_matrix((vocab_size, vocab_size), dtype=np.float32)
    frequencies = np.zeros(vocab_size, dtype=np.int64)
    for tokens, numbers in _chunks(corpus):
        kept = counted[numbers]
        frequencies += np.bincount(tokens[kept], minlength=vocab_size)
        for distance in range(1, WINDOW + 1):
            near = (numbers[distance:] == numbers[:-distance]) & kept[distance:]
            rows, columns = tokens[:-distance][near], tokens[distance:][near]
            weight = np.full(len(rows), (WINDOW + 1 - distance) / WINDOW, dtype=np.float32)
            pairs += sparse.coo_matrix((weight, (rows, columns)), shape=pairs.shape).tocsr()
    return pairs + pairs.T, torch.from_numpy(frequencies).float()


def _chunks(corpus: Corpus) -> Iterator[tuple[Array, Array]]:
    """Tokens, and the number of the document of each; pairs across the end of a chunk are few."""
    for begin in range(0, min(len(corpus.tokens), MOST_TOKENS), _CHUNK):
        tokens = np.asarray(corpus.tokens[begin : begin + _CHUNK], dtype=np.int32)
        yield tokens, np.searchsorted(corpus.document_ends, np.arange(begin, begin + len(tokens)), side="right")


def _word_vectors(counts: Any, width: int, seed: int) -> Tensor:
    """(V, width): a row for each token, zero for one that never stands near another."""
    try:
        from sklearn.utils.extmath import randomized_svd
    except ImportError as error:
        raise ImportError("start=counts needs scikit-learn: pip install 'albert-fast[train]'") from error
    counts = counts.tocoo()
    sums = np.asarray(counts.sum(axis=1)).ravel()
    smoothed = sums**SMOOTHING
    expected = sums[counts.row] * (smoothed / max(smoothed.sum(), 1e-12))[counts.col]
    counts.data = np.maximum(np.log(counts.data / expected), 0).astype(np.float32)
    found, values, _ = randomized_svd(counts.tocsr(), width, n_iter=3, random_state=seed)
    vectors = torch.zeros(counts.shape[0], width)
    vectors[:, : len(values)] = torch.from_numpy(found * np.sqrt(values))
    vectors[torch.from_numpy(sums == 0)] = 0  # not only up to rounding
    # Turned at random: the first dimensions would else hold most of every vector.
    turn, _ = torch.linalg.qr(torch.randn(width, width))
    return vectors @ turn


def _angles(positional: int, embedding_size: int) -> Tensor:
    """(positional / 2,): by how much each pair of sine and cosine turns from a position to the next, fastest first."""
    return torch.exp(-math.log(10_000.0) * torch.arange(0, positional, 2) / embedding_size)


def _waves(length: int, angles: Tensor) -> Tensor:
    """(length, positional): sine and cosine of every angle at every position."""
    turns = torch.arange(length)[:, None] * angles
    return torch.stack([turns.sin(), turns.cos()], 2).flatten(1)


def _aim_heads(model: ALBERTForPreTraining, angles: Tensor, frequencies: Tensor) -> None:
    """Lets heads of the first two distinct layers look at the tokens at OFFSETS."""
    config, encoder = model.config, model.base_model
    head_dim, positional = config.hidden_size // config.num_attention_heads, 2 * len(angles)
    length = min(config.max_position_embeddings, 256)
    waves = _waves(length, angles).repeat(SEQUENCES, 1)
    # Words as often as in the text, at every position.
    ids = torch.multinomial(frequencies + 1e-6, len(waves), replacement=True).view(SEQUENCES, length)
    for depth, (layer, share) in enumerate(zip(encoder.encoder.distinct()[:2], (0.75, 0.5), strict=False)):
        seen = encoder(ids, output_hidden_states=True).hidden_states[depth].flatten(0, 1)
        # Where a token stands, read from its state by least squares: (positional, hidden).
        read = torch.linalg.lstsq(seen, waves, driver="gelsd").solution.t()
        places = (seen @ read.t()).view(SEQUENCES, length, positional)
        for head, offset in enumerate(OFFSETS[: int(share * config.num_attention_heads)]):
            if abs(offset) >= length:
                continue
            rotation = _rotation(angles, offset)
            first, last = max(0, -offset), length - max(0, offset)
            looked = (places[:, first:last] @ rotation.t() * places[:, first + offset : last + offset]).sum(2)
            scale = (SHARPNESS * math.sqrt(head_dim) / looked.mean()).sqrt()
            rows = slice(head * head_dim, head * head_dim + positional)
            layer.attention.query.weight[rows] = rotation @ read * scale
            layer.attention.key.weight[rows] = read * scale


def _rotation(angles: Tensor, offset: int) -> Tensor:
    """(P, P): from the sines and cosines of a position to those of the position `offset` later."""
    return torch.block_diag(*(
        torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
        for turn in (angles * offset).tolist()
    ))  # fmt: skip


__all__ = ["start_from_counts"]
