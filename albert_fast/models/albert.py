"""The fast ALBERT, top-down: ids, packing, embedding, the shared layer L times, what the caller needs.

    input_ids, attention_mask (B, S)
      -> pack                   padding leaves here; from now on T real tokens and cu_seqlens
      -> embedding_projection   (T, H)
      -> the layer of each group, num_hidden_layers times; the last one only for the tokens that are asked for
      -> unpack, or a head's logits

Same modules, same parameters and same numbers as `reference.py` and Hugging Face (Lan et al. 2019); query, key and value
become one product at run time.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..execution.graphs import Call, GraphCache
from ..layers.adapters import project_tanh
from ..layers.packing import Packing, blank_empty, check_mask, first_tokens, pack, packed_already, select, take
from ..layers.stack import Embeddings, Encoder
from ..runtime.registration import is_jit_traced, is_traced, refuse_onnx
from .config import ALBERTConfig
from .fast_model import FastModel
from .outputs import BaseModelOutput


@dataclass(frozen=True)
class Encoded:
    """The encoder's result before it is unpacked: hidden (T, H), or (N, H) of the tokens asked for; pooled (B, H)."""

    packing: Packing
    output_tokens: Tensor | str
    hidden: Tensor
    pooled: Tensor | None
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    @classmethod
    def of(cls, output: BaseModelOutput, packing: Packing, output_tokens: Tensor | str) -> Encoded:
        """Packed again, what a call of the encoder returned."""
        hidden = output.last_hidden_state
        if not isinstance(hidden, Tensor):
            raise TypeError(
                f"the encoder returned no last_hidden_state (B, S, H): a hook made it {type(output).__name__}"
            )
        if not isinstance(output_tokens, Tensor):
            hidden = packing.gather(hidden)
        return cls(packing, output_tokens, hidden, output.pooler_output, output.hidden_states, output.attentions)

    def scatter(self, per_token: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) -> (B, S, ...); where only some tokens were asked for they stay as they are, (N, ...)."""
        return per_token if isinstance(self.output_tokens, Tensor) else self.packing.scatter(per_token, fill)

    def labels(self, labels: Tensor) -> Tensor:
        """The labels (B, S) of the tokens in `hidden`."""
        expected = self.packing.shape
        if labels.shape != expected:
            raise ValueError(f"labels {tuple(labels.shape)} do not fit the batch of {expected}")
        if isinstance(self.output_tokens, Tensor):
            return self.packing.gather(labels)[self.packing.gather(self.output_tokens)]
        return self.packing.gather(labels)


class ALBERTModel(FastModel):
    """ALBERT's encoder on fused operators.

    Args:
        config: an ALBERTConfig.
        add_pooling_layer: whether `pooler_output` is computed.
        backend: "auto", or one backend's name for every operator that has it.
    """

    prefix = ""

    @property
    def base(self) -> ALBERTModel:
        return self

    def __init__(self, config: ALBERTConfig, add_pooling_layer: bool = True, *, backend: str = "auto") -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.backend = backend
        self._graphs: GraphCache | None = None  # see `warmup`
        self.init_weights()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        output_tokens: Tensor | str = "all",
    ) -> Any:
        """Encode a padded batch.

        Args:
            input_ids: (B, S) integers, or `inputs_embeds` (B, S, E), exactly one of them.
            attention_mask: (B, S), or (1, S) for all rows, of any dtype: 0 where padded, in any pattern: right, left, holes,
                whole rows. What stands there is never read.
            token_type_ids: (B, S) or (1, S), default 0. position_ids: (B, S) or (1, S), default the column.
            output_hidden_states, output_attentions: also return every layer's states (B, S, H), the projected embeddings
                first, and probabilities (B, heads, S, S), which are computed apart, without dropout.
            return_dict: False returns the tuple of what is set. These three are as the configuration says where None.
            output_tokens: which tokens the caller needs; the last layer is computed for those alone. "all"; "first", for
                `pooler_output` only (then last_hidden_state is None); or (B, S) bool (then last_hidden_state is (N, H), the
                real ones among them, row by row, and there is no pooler_output).

        Returns:
            BaseModelOutput: last_hidden_state (B, S, H), zeros at padding; pooler_output (B, H), of each row's first real
            token (a row without one pools a zero vector); hidden_states; attentions.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, a batch longer than max_position_embeddings.
            IndexError: an id, type or position outside its table; names the value and where it stands.
        """
        encoded = self.encode(
            input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, output_hidden_states, output_attentions,
            output_tokens,
        )  # fmt: skip
        return self._output(encoded, return_dict)

    def forward_packed(
        self,
        input_ids: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        output_tokens: Tensor | str = "all",
    ) -> Any:
        """Encode a batch that holds no padding.

        Args:
            input_ids: (T,), the sequences one after another, or `inputs_embeds` (T, E).
            cu_seqlens: (B + 1,) int32, each sequence's first row, and T at the end. On the CPU it is checked at once and
                copied in the background; on a GPU each call waits for it.
            max_seqlen: at least the longest sequence's tokens.
            token_type_ids, position_ids: (T,); positions default to the place in the sequence.
            output_tokens: as in `forward`, a tensor of shape (T,).

        Returns:
            As `forward`, with last_hidden_state and hidden_states (T, H).

        Raises:
            As `forward`; ValueError where cu_seqlens does not run from 0 to T without falling.
        """
        output_hidden_states = self.asked("output_hidden_states", output_hidden_states)
        given = exactly_one(input_ids, inputs_embeds)
        if given.dim() != (1 if inputs_embeds is None else 2):
            raise ValueError(f"expected input_ids (T,) or inputs_embeds (T, E), got the shape {tuple(given.shape)}")
        packing = packed_already(len(given), cu_seqlens, max_seqlen, given.device)
        cu_seqlens = packing.cu_seqlens
        if position_ids is None:
            self._check_length(max_seqlen)
        call = input_ids, token_type_ids, position_ids, output_tokens, None, cu_seqlens, max_seqlen
        replayed = None if output_hidden_states else self._replay((len(given),), *call)
        if replayed is not None:
            return self._output(replayed, return_dict)
        if position_ids is None:
            starts = torch.repeat_interleave(
                cu_seqlens[:-1].long(), cu_seqlens.diff().long(), output_size=given.shape[0]
            )
            position_ids = torch.arange(given.shape[0], device=given.device) - starts
        encoded = self.compute(
            packing, input_ids, token_type_ids, position_ids, inputs_embeds, output_hidden_states, False, output_tokens
        )
        return self._output(encoded, return_dict)

    def encode(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, token_type_ids: Tensor | None,
        position_ids: Tensor | None, inputs_embeds: Tensor | None, output_hidden_states: bool | None,
        output_attentions: bool | None, output_tokens: Tensor | str,
    ) -> Encoded:  # fmt: skip
        """`forward` as the heads want it: the real tokens still packed."""
        given = exactly_one(input_ids, inputs_embeds)
        if given.dim() != (2 if inputs_embeds is None else 3):
            raise ValueError(
                f"expected input_ids (B, S) or inputs_embeds (B, S, E), got the shape {tuple(given.shape)}"
            )
        batch, columns = given.shape[:2]
        if position_ids is None:
            self._check_length(columns)
        position_ids, token_type_ids, attention_mask = (
            for_all_rows(tensor, batch, columns) for tensor in (position_ids, token_type_ids, attention_mask)
        )
        output_hidden_states = self.asked("output_hidden_states", output_hidden_states)
        output_attentions = self.asked("output_attentions", output_attentions)
        if not (output_hidden_states or output_attentions):
            call = input_ids, token_type_ids, position_ids, output_tokens, attention_mask
            if (replayed := self._replay((batch, columns), *call)) is not None:
                return replayed
        packing = pack((batch, columns), attention_mask, given.device)
        if is_jit_traced():  # a trace keeps this number, and is run on batches of any length
            packing = replace(packing, max_seqlen=max(int(columns), self.config.max_position_embeddings))
        if position_ids is None:
            position_ids = torch.arange(columns, device=given.device)[None].expand(batch, columns)
        return self.compute(
            packing, input_ids, token_type_ids, position_ids, inputs_embeds, output_hidden_states, output_attentions,
            output_tokens,
        )  # fmt: skip

    def _replay(
        self, shape: tuple[int, ...], input_ids: Tensor | None, token_type_ids: Tensor | None,
        position_ids: Tensor | None, output_tokens: Tensor | str, attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None, max_seqlen: int = 0,
    ) -> Encoded | None:  # fmt: skip
        """The forward as a CUDA graph, see `graphs`; None where it is none. Arguments are checked as without."""
        graphs = self._graphs  # read once: another thread may turn them off
        if graphs is None or is_traced() or input_ids is None or isinstance(output_tokens, Tensor):
            return None
        for name, ids in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
            if ids is not None:
                _check_ids(name, ids, shape)
        if attention_mask is not None:
            check_mask((shape[0], shape[1]), attention_mask)
        call = Call(input_ids, token_type_ids, position_ids, output_tokens, attention_mask, cu_seqlens, max_seqlen)
        return graphs.run(self, call)

    def compute(
        self, packing: Packing, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor,
        inputs_embeds: Tensor | None, output_hidden_states: bool, output_attentions: bool, output_tokens: Tensor | str,
    ) -> Encoded:  # fmt: skip
        """The forward itself, operator by operator; without a mask it never waits for a GPU."""
        refuse_onnx()
        packing = packing.ordered()
        hidden = self.embed(packing, input_ids, token_type_ids, position_ids, inputs_embeds)
        # Without a token in the whole batch there is nothing to ask for. A compiled graph can ask only if no mask was given.
        empty = (packing.is_dense or not is_traced()) and hidden.shape[0] == 0
        queries = None
        if isinstance(output_tokens, Tensor):
            queries = select(packing, output_tokens, hidden.shape[0])
        elif output_tokens == "first":
            queries = None if empty else first_tokens(packing, hidden.shape[0])
        elif output_tokens != "all":
            raise ValueError(f'output_tokens must be "all", "first" or a bool tensor, got {output_tokens!r}')
        states: list[Tensor] | None = [] if output_hidden_states else None
        attentions: list[Tensor] | None = [] if output_attentions else None
        hidden = self.encoder(hidden, packing, queries, self.backend, states, attentions)
        pooled = None
        if self.pooler is not None and not isinstance(output_tokens, Tensor):
            if empty:
                first = hidden.new_zeros(packing.num_sequences, hidden.shape[1])
            elif packing.is_dense:
                first = packing.scatter(hidden)[:, 0].contiguous() if queries is None else hidden
            elif queries is None:
                first = blank_empty(take(hidden, first_tokens(packing, hidden.shape[0]).rows), packing)
            else:
                first = blank_empty(hidden, packing)
            pooled = project_tanh(self.pooler, first)
        return Encoded(
            packing, output_tokens, hidden, pooled,
            None if states is None else tuple(packing.scatter(state) for state in states),
            None if attentions is None else tuple(attentions),
        )  # fmt: skip

    def _output(self, encoded: Encoded, return_dict: bool | None) -> Any:
        every = isinstance(encoded.output_tokens, Tensor) or encoded.output_tokens == "all"  # of the tokens asked for
        output = BaseModelOutput(
            last_hidden_state=encoded.scatter(encoded.hidden) if every else None,
            pooler_output=encoded.pooled,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if self.asked("use_return_dict", return_dict) else output.to_tuple()

    def embed(
        self, packing: Packing, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor,
        inputs_embeds: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """The real tokens' embeddings, projected to (T, H)."""
        ids, types, positions, embeds = self._packed(packing, input_ids, token_type_ids, position_ids, inputs_embeds)
        if types is None:
            types = torch.zeros_like(positions)
        # A traced call meets its errors later, outside of this.
        with nullcontext() if is_traced() else ops.placing(packing.place):
            return self.embeddings(
                ids, types, positions, embeds, self.encoder.embedding_hidden_mapping_in, self.backend
            )

    def _packed(
        self, packing: Packing, input_ids: Tensor | None, token_type_ids: Tensor | None, position_ids: Tensor,
        inputs_embeds: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
        """Ids, types (None: all 0), positions and embeddings of the real tokens, (T,) and (T, E); checked."""
        given = exactly_one(input_ids, inputs_embeds)
        shape = given.shape[: 1 if packing.shape is None else 2]
        ids = None if input_ids is None else _packed_ids("input_ids", input_ids, packing, shape)
        positions = _packed_ids("position_ids", position_ids, packing, shape)
        types = None if token_type_ids is None else _packed_ids("token_type_ids", token_type_ids, packing, shape)
        if inputs_embeds is not None and not inputs_embeds.is_floating_point():
            raise TypeError(f"inputs_embeds must be floats, got {inputs_embeds.dtype}")
        if inputs_embeds is not None and inputs_embeds.shape[-1] != self.config.embedding_size:
            width = self.config.embedding_size
            raise ValueError(f"inputs_embeds {tuple(inputs_embeds.shape)} do not have embedding_size = {width} columns")
        return ids, types, positions, None if inputs_embeds is None else packing.gather(inputs_embeds)

    def _check_length(self, columns: int) -> None:
        limit = self.config.max_position_embeddings
        if columns > limit:
            raise ValueError(f"a sequence of {columns} tokens is longer than max_position_embeddings = {limit}: cut it")


def exactly_one(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    given = input_ids if inputs_embeds is None else inputs_embeds
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if not isinstance(given, Tensor):
        raise TypeError(f"expected a tensor, got {type(given).__name__}: torch.as_tensor makes one")
    if given.is_meta:
        raise ValueError("tensors on meta hold no ids: load the model and its input on the CPU or a GPU")
    return given


def for_all_rows(tensor: Tensor | None, batch: int, columns: int) -> Tensor | None:
    """(1, S) as (B, S); anything else as it is."""
    if batch != 1 and isinstance(tensor, Tensor) and tensor.shape == (1, columns):
        return tensor.expand(batch, columns)
    return tensor


def _check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    """TypeError where `ids` are not integers, ValueError where their shape is not the batch's."""
    if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        raise TypeError(f"{name} must be integers, got {ids.dtype}")
    if ids.shape != shape:
        raise ValueError(f"{name} {tuple(ids.shape)} does not fit the batch of {tuple(shape)}")


def _packed_ids(name: str, ids: Tensor, packing: Packing, shape: tuple[int, ...]) -> Tensor:
    """`ids` packed, int64; checked."""
    _check_ids(name, ids, shape)
    packed = packing.gather(ids)
    return packed if packed.dtype == torch.int64 else packed.long()
