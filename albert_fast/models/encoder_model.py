"""The fast encoder of every family, top-down: ids, packing, embedding, layers, what the caller wants.

input_ids, attention_mask (B, S)
  -> pack                   padding is removed here; from now on T real tokens and cu_seqlens
  -> the embeddings         (T, H); each family's file has its own
  -> the layer of each group, num_hidden_layers times; the last one only for the tokens that are wanted
  -> unpack, or a head's logits
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.adapters import project_tanh
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs, PackedInputs
from ..layers.packing import Packing, check_mask, pack, packed_already
from ..layers.run import Run
from ..layers.stack import LayerStack
from ..layers.wanted import WantedRows, WantedTokens, blank_empty, first_rows, take
from ..runtime.registration import is_jit_traced, is_traced, refuse_onnx
from .encoder_config import EncoderConfig
from .execution import Execution, ExecutionState
from .outputs import BaseModelOutput
from .pretrained import PretrainedMixin


class EncoderModel(PretrainedMixin):
    """An encoder on fused operators. A family's class makes `embeddings`, `encoder` and `pooler`, and defines `embedded`.

    keeps_first: pool each sequence's first token as it is, for a head that has no use for a pooler.
    """

    prefix = ""
    execution_class = Execution
    has_token_types: ClassVar[bool] = True

    embeddings: Any
    encoder: LayerStack
    pooler: Any
    keeps_first = False

    def __init__(self, config: EncoderConfig, backend: str) -> None:
        super().__init__(config)
        self.execution_state = ExecutionState(backend)

    @property
    def takes_types(self) -> bool:
        """Whether token types make a difference."""
        return self.has_token_types and getattr(self.config, "type_vocab_size", 1) > 1

    def embedded(self, tokens: PackedInputs, types: Tensor) -> Tensor:
        """The embeddings (T, H) of the real tokens; `types` (T,)."""
        raise NotImplementedError

    def pooling(self) -> nn.Module | None:
        """The Linear of the pooler, or None."""
        pooler: nn.Module | None = self.pooler
        return pooler

    def positions(self, inputs: Inputs) -> Tensor:
        """The position (B, S) or (T,) of every token, where the caller gave none: its place in the sequence."""
        given = inputs.given()
        if inputs.cu_seqlens is None:
            batch, columns = inputs.shape()
            return torch.arange(columns, device=given.device)[None].expand(batch, columns)
        starts, lengths = inputs.cu_seqlens[:-1].long(), inputs.cu_seqlens.diff().long()
        starts = torch.repeat_interleave(starts, lengths, output_size=given.shape[0])
        return torch.arange(given.shape[0], device=given.device) - starts

    # Whether `positions` are the columns, which CUDA graphs then write by themselves.
    positions_are_columns: ClassVar[bool] = True

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
        wanted_tokens: WantedTokens | Tensor | str = "all",
    ) -> Any:
        """Encode a padded batch.

        Args:
            input_ids: (B, S) integers, or `inputs_embeds` (B, S, E), exactly one of them.
            attention_mask: (B, S), or (1, S) for all rows, of any dtype: 0 at padding, in any pattern: right, left, holes,
                whole rows. Padding is never read.
            token_type_ids: (B, S) or (1, S), default 0. position_ids: (B, S) or (1, S), default the column.
            output_hidden_states, output_attentions: also return every layer's states (B, S, H), the projected embeddings
                first, and probabilities (B, heads, S, S), which are computed separately, without dropout.
            return_dict: False returns the tuple of the fields that are set. None: these three are as in the configuration.
            wanted_tokens: which tokens the caller wants; the last layer is computed for those alone. "all"; "first", for
                `pooler_output` only (last_hidden_state is then None); or (B, S) bool (last_hidden_state is then (N, H), the
                real ones among them, row by row, and there is no pooler_output).

        Returns:
            BaseModelOutput: last_hidden_state (B, S, H), zeros at padding; pooler_output (B, H), of each row's first real
            token (a row without any pools a zero vector); hidden_states; attentions.

        Raises:
            ValueError, TypeError: shapes or dtypes that do not fit, a batch longer than max_position_embeddings.
            IndexError: an id, type or position outside its table; names the value and its position.
        """
        inputs = Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        encoded = self.encode(inputs, wanted_tokens, output_hidden_states, output_attentions)
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
        wanted_tokens: WantedTokens | Tensor | str = "all",
    ) -> Any:
        """Encode a batch that holds no padding.

        Args:
            input_ids: (T,), the sequences one after another, or `inputs_embeds` (T, E).
            cu_seqlens: (B + 1,) int32, each sequence's first row, and T at the end. On the CPU it is checked at once and
                copied in the background; on a GPU each call waits for it.
            max_seqlen: at least the number of tokens of the longest sequence.
            token_type_ids, position_ids: (T,); positions default to the place in the sequence.
            wanted_tokens: as in `forward`; a mask has the shape (T,).

        Returns:
            As `forward`, with last_hidden_state and hidden_states (T, H).

        Raises:
            As `forward`; ValueError where cu_seqlens does not run from 0 to T without falling.
        """
        inputs = Inputs(input_ids, None, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        return self._output(self.encode_packed(inputs, wanted_tokens, output_hidden_states), return_dict)

    def encode_packed(
        self,
        inputs: Inputs,
        wanted_tokens: WantedTokens | Tensor | str = "all",
        output_hidden_states: bool | None = None,
    ) -> Encoded:
        """`forward_packed` for heads; `inputs` has cu_seqlens and max_seqlen."""
        wanted = WantedTokens.of(wanted_tokens)
        output_hidden_states = self.asked("output_hidden_states", output_hidden_states)
        given = inputs.given()
        if given.dim() != (1 if inputs.inputs_embeds is None else 2):
            raise ValueError(f"expected input_ids (T,) or inputs_embeds (T, E), got the shape {tuple(given.shape)}")
        assert inputs.cu_seqlens is not None
        assert inputs.max_seqlen is not None
        packing = packed_already(len(given), inputs.cu_seqlens, inputs.max_seqlen, given.device)
        inputs = inputs._replace(cu_seqlens=packing.cu_seqlens)
        if inputs.position_ids is None:
            self.check_length(packing.max_seqlen)
            if not self.positions_are_columns:
                inputs = inputs._replace(position_ids=self.positions(inputs))
        replayed = None if output_hidden_states else self._replay(inputs, wanted)
        if replayed is not None:
            return replayed
        if inputs.position_ids is None:
            inputs = inputs._replace(position_ids=self.positions(inputs))
        return self.compute(packing, inputs, wanted, output_hidden_states)

    def encode(
        self,
        inputs: Inputs,
        wanted_tokens: WantedTokens | Tensor | str = "all",
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Encoded:
        """`forward` for heads: the real tokens stay packed."""
        wanted = WantedTokens.of(wanted_tokens)
        batch, columns = inputs.shape()
        if inputs.position_ids is None:
            self.check_length(columns)
        inputs, device = inputs.for_all_rows(), inputs.given().device
        if inputs.position_ids is None and not self.positions_are_columns:
            inputs = inputs._replace(position_ids=self.positions(inputs))
        output_hidden_states = self.asked("output_hidden_states", output_hidden_states)
        output_attentions = self.asked("output_attentions", output_attentions)
        if not (output_hidden_states or output_attentions) and (replayed := self._replay(inputs, wanted)) is not None:
            return replayed
        packing = pack((batch, columns), inputs.attention_mask, device)
        if is_jit_traced():  # a trace keeps this number, and is run on batches of any length
            packing = replace(packing, max_seqlen=max(int(columns), self.config.longest))
        if inputs.position_ids is None:
            inputs = inputs._replace(position_ids=self.positions(inputs))
        return self.compute(packing, inputs, wanted, output_hidden_states, output_attentions)

    def _replay(self, inputs: Inputs, wanted: WantedTokens) -> Encoded | None:
        """The forward as a CUDA graph, see `execution.graphs`; None where there is none. Arguments are checked as without."""
        graphs = self.execution_state.graphs  # read once: another thread may turn them off
        if graphs is None or is_traced() or inputs.input_ids is None or wanted.which == "masked":
            return None
        inputs.check_ids()
        if inputs.attention_mask is not None:
            check_mask(inputs.shape(), inputs.attention_mask)
        return graphs.run(self, inputs, wanted)

    def compute(
        self,
        packing: Packing,
        inputs: Inputs,
        wanted: WantedTokens,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> Encoded:
        """The forward itself, operator by operator; position_ids are given. Without a mask it never waits for a GPU."""
        refuse_onnx()
        packing = packing.with_sequence_order()
        hidden = self.embed(packing, inputs)
        # Without a token in the whole batch there is nothing to want. A compiled graph knows that only without a mask.
        empty = (packing.is_dense or not is_traced()) and hidden.shape[0] == 0
        rows = None if empty and wanted.which != "masked" else wanted.rows(packing, hidden.shape[0])
        states: list[Tensor] | None = [] if output_hidden_states else None
        attentions: list[Tensor] | None = [] if output_attentions else None
        state = self.execution_state
        hidden = self.encoder(hidden, packing, rows, Run(state.backend, state.recompute, states, attentions))
        return Encoded(
            packing,
            wanted,
            hidden,
            None if wanted.which == "masked" else self._pool(hidden, packing, rows, empty),
            None if states is None else tuple(packing.scatter(one) for one in states),
            None if attentions is None else tuple(attentions),
        )

    def embed(self, packing: Packing, inputs: Inputs) -> Tensor:
        """The real tokens' embeddings (T, H)."""
        tokens = inputs.pack(packing)
        width = self.config.word_embedding_size
        if inputs.inputs_embeds is not None and inputs.inputs_embeds.shape[-1] != width:
            shape = tuple(inputs.inputs_embeds.shape)
            raise ValueError(f"inputs_embeds {shape} do not have embedding_size = {width} columns")
        if tokens.types is not None and not self.has_token_types:
            raise ValueError(f"{type(self).__name__} has no token types: leave token_type_ids out")
        types = torch.zeros_like(tokens.positions) if tokens.types is None else tokens.types
        # A traced call raises its errors later, outside of this block.
        with nullcontext() if is_traced() else ops.placing(packing.locate):
            return self.embedded(tokens, types)

    def embed_ids(self, packing: Packing, ids: Tensor) -> Tensor:
        """`embed` for ids (B, S) at their usual positions."""
        inputs = Inputs(ids)
        return self.embed(packing, inputs._replace(position_ids=self.positions(inputs)))

    def _pool(self, hidden: Tensor, packing: Packing, rows: WantedRows | None, empty: bool) -> Tensor | None:
        """(B, H): the pooler's result for each sequence's first token, zeros for a sequence without one."""
        pooling = self.pooling()
        if pooling is None and not self.keeps_first:
            return None
        if rows is None:
            first = self.first_states(hidden, packing, empty)
        else:
            first = hidden if packing.is_dense else blank_empty(hidden, packing)
        return first if pooling is None else project_tanh(pooling, first)

    def first_states(self, hidden: Tensor, packing: Packing, empty: bool = False) -> Tensor:
        """(B, H) of each sequence's first token, from the states (T, H) of all; zeros for a sequence without one, or where the
        batch is `empty`."""
        if empty:
            return hidden.new_zeros(packing.num_sequences, hidden.shape[1])
        if packing.is_dense:
            return packing.scatter(hidden)[:, 0].contiguous()
        return blank_empty(take(hidden, first_rows(packing, hidden.shape[0]).rows), packing)

    def _output(self, encoded: Encoded, return_dict: bool | None) -> Any:
        output = BaseModelOutput(
            last_hidden_state=None if encoded.wanted.which == "first" else encoded.scatter(encoded.hidden),
            pooler_output=None if self.pooling() is None else encoded.pooled,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if self.asked("use_return_dict", return_dict) else output.to_tuple()

    def check_length(self, columns: int) -> None:
        """ValueError for a sequence of more tokens than there are positions."""
        limit = self.config.longest
        if columns > limit:
            name = "max_position_embeddings" if limit == self.config.max_position_embeddings else "the longest possible"
            raise ValueError(f"a sequence of {columns} tokens is longer than {name} = {limit}: cut it")
