"""The table look-ups of `embedding_layer_norm` and `embedding_projection`: their tensors, checks, C++ calls and reference."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..runtime import dispatch
from ..runtime.operands import Operand, hold, matrix
from ._dropout import keep_scale_2d
from ._token_errors import TABLES, index_error
from .add_layer_norm import layer_norm_bwd_ref


class Lookup(NamedTuple):
    """What the normalised embeddings are computed from, in the order in which the operators take it.

    token_type_ids and token_type are both None where a model has no token types.
    """

    input_ids: Tensor | None  # (T,) int64, or None with inputs_embeds
    inputs_embeds: Tensor | None  # (T, E)
    token_type_ids: Tensor | None  # (T,) int64
    position_ids: Tensor  # (T,) int64
    word: Tensor  # (V, E)
    token_type: Tensor | None  # (Y, E)
    position: Tensor  # (P, E)
    ln_weight: Tensor  # (E,)
    ln_bias: Tensor  # (E,)

    @property
    def ids(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The indices into the three tables, in the order of `TABLES`."""
        return self.input_ids, self.token_type_ids, self.position_ids

    @property
    def sizes(self) -> tuple[int, int, int]:
        """V, Y (0 without types) and P."""
        return len(self.word), 0 if self.token_type is None else len(self.token_type), len(self.position)

    def dense(self) -> Lookup:
        return Lookup._make(None if t is None else t.contiguous() for t in self)

    def kernel_tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors in the order of the C++ and CUDA functions; inputs_embeds take the place of `word`."""
        rows = self.word if self.inputs_embeds is None else self.inputs_embeds
        return *self.ids, rows, self.token_type, self.position, self.ln_weight, self.ln_bias

    def sums_ref(self) -> Tensor:
        """(T, E) float32: (word + type) + position, in the order of Hugging Face's sum."""
        words = self.word[self.input_ids] if self.inputs_embeds is None else self.inputs_embeds
        rows = words.float()
        if self.token_type is not None and self.token_type_ids is not None:
            rows = rows + self.token_type.float()[self.token_type_ids]
        return rows + self.position.float()[self.position_ids]


COUNT = len(Lookup._fields)


def lookup_schema(types: str = "Tensor") -> str:
    """A Lookup as arguments of an operator; `types` is "Tensor?" where there may be no token types."""
    return (
        f"Tensor? input_ids, Tensor? inputs_embeds, {types} token_type_ids, Tensor position_ids, Tensor word, "
        f"{types} token_type, Tensor position, Tensor ln_weight, Tensor ln_bias"
    )


def lookup_operands(op: str, lookup: Lookup) -> list[Operand]:
    """The operands of LayerNorm of the summed embeddings, in the order of `Lookup.kernel_tensors`."""
    input_ids, inputs_embeds, dtype = lookup.input_ids, lookup.inputs_embeds, lookup.word.dtype
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError(f"{op}: give exactly one of input_ids and inputs_embeds")
    if (lookup.token_type_ids is None) != (lookup.token_type is None):
        raise ValueError(f"{op}: give both token_type_ids and token_type, or neither")
    named = (("word", lookup.word), ("token_type", lookup.token_type), ("position", lookup.position))
    sizes = [(0, 0) if t is None else matrix(op, name, t, "embedding size") for name, t in named]
    first = next(t for t in lookup.ids if t is not None)
    width = sizes[0][1]
    if first.dim() != 1:
        raise ValueError(f"{op}: ids must have the shape (T,), got {tuple(first.shape)}")
    tokens = first.shape[0]
    ids: list[Operand] = []
    for name, values in zip(TABLES, lookup.ids, strict=True):
        if values is not None and values.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {values.dtype}")
        ids.append((name, values, (tokens,), torch.int64))
    words: Operand = ("word", lookup.word, sizes[0], dtype)
    return [
        *ids,
        words if inputs_embeds is None else ("inputs_embeds", inputs_embeds, (tokens, width), dtype),
        ("token_type", lookup.token_type, (sizes[1][0], width), dtype),
        ("position", lookup.position, (sizes[2][0], width), dtype),
        ("ln_weight", lookup.ln_weight, (width,), dtype),
        ("ln_bias", lookup.ln_bias, (width,), dtype),
    ]


def normed_cpu(
    op: str, lookup: Lookup, operands: list[Operand], eps: float, dropout_p: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of the summed embeddings (T, E), after dropout, and its statistics (T,), by the C++ kernel."""
    ids, sizes = tuple(tensor for _, tensor, _, _ in operands[: len(TABLES)]), lookup.sizes
    (tokens,), (_, _, (width,), dtype) = operands[1][2], operands[-1]
    memory = hold(op, torch.device("cpu"), operands)
    out = torch.empty((tokens, width), dtype=dtype)
    mean, rstd = (torch.empty(tokens, dtype=torch.float32) for _ in range(2))
    results = [t.data_ptr() for t in (out, mean, rstd)]
    numbers = eps, dropout_p, seed, dispatch.DTYPE_CODES[dtype], torch.get_num_threads()
    function = dispatch.extension().embedding_layer_norm_fwd_cpu
    bad = function(*memory.addresses, *results, tokens, width, *sizes, *numbers)
    if bad >= 0:
        raise index_error(ids, sizes)(bad)
    return out, mean, rstd


def gradients_cpu(
    op: str,
    dnormed: Tensor,
    lookup: Lookup,
    operands: list[Operand],
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    seed: int,
) -> list[Tensor]:
    """float32 gradients of `word` or inputs_embeds, token_type, position, ln_weight and ln_bias, by the C++ kernel.

    Without types that of token_type has the shape (0, E).
    """
    (_, _, (width,), dtype), (tokens,) = operands[-1], operands[1][2]
    stats: list[Operand] = [(name, t, (tokens,), torch.float32) for name, t in (("mean", mean), ("rstd", rstd))]
    given: list[Operand] = [("grad", dnormed, (tokens, width), dtype), *operands[:-1], *stats]
    memory = hold(op, torch.device("cpu"), given)
    shapes = [shape for name, _, shape, _ in operands[len(TABLES) :]]
    gradients = [torch.zeros(shape if len(shape) == 1 else (shape[0], width), dtype=torch.float32) for shape in shapes]
    addresses = [t.data_ptr() for t in gradients]
    shape = tokens, width, *lookup.sizes
    numbers = dropout_p, seed, dispatch.DTYPE_CODES[dtype], torch.get_num_threads()
    bad = dispatch.extension().embedding_layer_norm_bwd_cpu(*memory.addresses, *addresses, *shape, *numbers)
    if bad >= 0:
        raise index_error(tuple(tensor for _, tensor, _, _ in operands[: len(TABLES)]), lookup.sizes)(bad)
    return gradients


def gradients_ref(
    dnormed: Tensor, lookup: Lookup, mean: Tensor, rstd: Tensor, dropout_p: float, seed: int
) -> list[Tensor]:
    """As `gradients_cpu`, from `dnormed` (T, E) float32."""
    z = lookup.sums_ref()
    if dropout_p:
        dnormed = dnormed * keep_scale_2d(seed, z.shape, dropout_p, z.device)
    dz, dln_weight, dln_bias = layer_norm_bwd_ref(dnormed, z, lookup.ln_weight.float(), mean, rstd)
    gradients = []
    tables = zip(lookup.ids, (lookup.word, lookup.token_type, lookup.position), strict=True)
    for number, (ids, table) in enumerate(tables):
        if ids is None:
            gradients.append(dz if number == 0 else dz.new_empty((0, dz.shape[1])))
        elif table is not None:
            gradients.append(dz.new_zeros(table.shape).index_add_(0, ids, dz))
    return [*gradients, dln_weight, dln_bias]


def finished(
    gradients: list[Tensor], lookup: Lookup, padding_idx: int, position_padding_idx: int = -1
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of inputs_embeds (empty where ids were given), word, token_type, position, ln_weight and ln_bias, in the
    tables' dtype, from those of `gradients_cpu`."""
    dwords, dtype_table, dposition, dln_weight, dln_bias = gradients
    word, has_ids = lookup.word, lookup.input_ids is not None
    dword = dwords if has_ids else torch.zeros(word.shape, dtype=torch.float32, device=word.device)
    if 0 <= padding_idx < len(dword):
        dword[padding_idx] = 0.0  # torch.nn.Embedding's padding_idx, as in Hugging Face
    if 0 <= position_padding_idx < len(dposition):
        dposition[position_padding_idx] = 0.0
    dinputs = dwords.new_empty(0, word.shape[1]) if has_ids else dwords
    found = (t.to(word.dtype) for t in (dinputs, dword, dtype_table, dposition, dln_weight, dln_bias))
    return next(found), next(found), next(found), next(found), next(found), next(found)
