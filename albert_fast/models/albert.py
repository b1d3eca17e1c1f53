"""The fast ALBERT, top-down: ids, packing, embedding, the shared layer L times, what the caller wants.

    input_ids, attention_mask (B, S)
      -> pack                   padding is removed here; from now on T real tokens and cu_seqlens
      -> embedding_projection   (T, H)
      -> the layer of each group, num_hidden_layers times; the last one only for the tokens that are wanted
      -> unpack, or a head's logits

Same modules, same parameters and same numbers as `models/reference` and Hugging Face (Lan et al. 2019).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.adapters import project_tanh
from ..layers.embeddings import FactorisedEmbeddings
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs
from ..layers.layer import Layer
from ..layers.packing import Packing, check_mask, pack, packed_already
from ..layers.run import Run
from ..layers.stack import LayerGroup, LayerStack
from ..layers.wanted import WantedRows, WantedTokens, blank_empty, first_rows, take
from ..runtime.registration import is_jit_traced, is_traced, refuse_onnx
from .config import ALBERTConfig
from .execution import Execution, ExecutionState
from .outputs import BaseModelOutput
from .pretrained import PretrainedMixin


class ALBERTGroup(LayerGroup):
    """The inner_group_num layers that run one after another at a step, under Hugging Face's names."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__()
        self.albert_layers = nn.ModuleList(Layer(config.layer_spec()) for _ in range(config.inner_group_num))

    def layers(self) -> list[Layer]:
        return list(self.albert_layers)  # type: ignore[arg-type]


class ALBERTStack(LayerStack):
    """The groups of layers under Hugging Face's names, and the projection of the embeddings, which has its name here."""

    def __init__(self, config: ALBERTConfig) -> None:
        super().__init__(config.layer_spec(), config.group_indices(), config.inner_group_num)
        self.embedding_hidden_mapping_in = nn.Linear(config.embedding_size, config.hidden_size)
        self.albert_layer_groups = nn.ModuleList(ALBERTGroup(config) for _ in range(config.num_hidden_groups))

    def groups(self) -> list[ALBERTGroup]:
        return list(self.albert_layer_groups)  # type: ignore[arg-type]


class ALBERTModel(PretrainedMixin):
    """ALBERT's encoder on fused operators.

    Args:
        config: an ALBERTConfig.
        add_pooling_layer: whether `pooler_output` is computed.
        backend: "auto", or one backend's name for every operator that has it.
    """

    prefix = ""
    execution_class = Execution

    def __init__(self, config: ALBERTConfig, add_pooling_layer: bool = True, *, backend: str = "auto") -> None:
        super().__init__(config)
        rows = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        self.embeddings = FactorisedEmbeddings(
            rows, config.embedding_size, config.layer_norm_eps, config.pad_token_id, config.hidden_dropout_prob
        )
        self.encoder = ALBERTStack(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.execution_state = ExecutionState(backend)
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
        wanted = WantedTokens.of(wanted_tokens)
        output_hidden_states = self.asked("output_hidden_states", output_hidden_states)
        inputs = Inputs(input_ids, None, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        given = inputs.given()
        if given.dim() != (1 if inputs_embeds is None else 2):
            raise ValueError(f"expected input_ids (T,) or inputs_embeds (T, E), got the shape {tuple(given.shape)}")
        packing = packed_already(len(given), cu_seqlens, max_seqlen, given.device)
        inputs = inputs._replace(cu_seqlens=packing.cu_seqlens)
        if position_ids is None:
            self.check_length(max_seqlen)
        replayed = None if output_hidden_states else self._replay(inputs, wanted)
        if replayed is not None:
            return self._output(replayed, return_dict)
        if position_ids is None:
            starts, lengths = packing.cu_seqlens[:-1].long(), packing.cu_seqlens.diff().long()
            starts = torch.repeat_interleave(starts, lengths, output_size=given.shape[0])
            inputs = inputs._replace(position_ids=torch.arange(given.shape[0], device=given.device) - starts)
        return self._output(self.compute(packing, inputs, wanted, output_hidden_states), return_dict)

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
        output_hidden_states = self.asked("output_hidden_states", output_hidden_states)
        output_attentions = self.asked("output_attentions", output_attentions)
        if not (output_hidden_states or output_attentions) and (replayed := self._replay(inputs, wanted)) is not None:
            return replayed
        packing = pack((batch, columns), inputs.attention_mask, device)
        if is_jit_traced():  # a trace keeps this number, and is run on batches of any length
            packing = replace(packing, max_seqlen=max(int(columns), self.config.max_position_embeddings))
        if inputs.position_ids is None:
            positions = torch.arange(columns, device=device)[None].expand(batch, columns)
            inputs = inputs._replace(position_ids=positions)
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
        """The real tokens' embeddings, projected to (T, H)."""
        tokens = inputs.pack(packing)
        width = self.config.embedding_size
        if inputs.inputs_embeds is not None and inputs.inputs_embeds.shape[-1] != width:
            shape = tuple(inputs.inputs_embeds.shape)
            raise ValueError(f"inputs_embeds {shape} do not have embedding_size = {width} columns")
        types = torch.zeros_like(tokens.positions) if tokens.types is None else tokens.types
        # A traced call raises its errors later, outside of this block.
        with nullcontext() if is_traced() else ops.placing(packing.locate):
            return self.embeddings(
                tokens, types, self.encoder.embedding_hidden_mapping_in, self.execution_state.backend
            )

    def _pool(self, hidden: Tensor, packing: Packing, rows: WantedRows | None, empty: bool) -> Tensor | None:
        """(B, H): the pooler's result for each sequence's first token, zeros for a sequence without one."""
        if self.pooler is None:
            return None
        if empty:
            first = hidden.new_zeros(packing.num_sequences, hidden.shape[1])
        elif packing.is_dense:
            first = packing.scatter(hidden)[:, 0].contiguous() if rows is None else hidden
        elif rows is None:
            first = blank_empty(take(hidden, first_rows(packing, hidden.shape[0]).rows), packing)
        else:
            first = blank_empty(hidden, packing)
        return project_tanh(self.pooler, first)

    def _output(self, encoded: Encoded, return_dict: bool | None) -> Any:
        output = BaseModelOutput(
            last_hidden_state=None if encoded.wanted.which == "first" else encoded.scatter(encoded.hidden),
            pooler_output=encoded.pooled,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output if self.asked("use_return_dict", return_dict) else output.to_tuple()

    def check_length(self, columns: int) -> None:
        """ValueError for a sequence of more tokens than there are positions."""
        limit = self.config.max_position_embeddings
        if columns > limit:
            raise ValueError(f"a sequence of {columns} tokens is longer than max_position_embeddings = {limit}: cut it")
