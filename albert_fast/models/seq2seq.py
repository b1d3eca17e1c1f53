"""ALBERTForConditionalGeneration: an ALBERT encoder and a decoder that write one text from another, such as its translation.

source ids (B, S) -> the encoder, on packed tokens (Ts, H)
target ids (B, T), each the token before the one to predict -> the decoder (Tt, H), which reads the source's states
  -> scores of every word (Tt, V), from the table that encoder, decoder and output share

Hugging Face's model of the same numbers is EncoderDecoderModel(AlbertModel, ElectraForCausalLM) with shared layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.families import ENCODER_DECODER
from ..checkpoints.saving import save_checkpoint
from ..generation.options import GenerationOptions
from ..generation.search import generate
from ..layers.cache import DecoderCache
from ..layers.encoded import Encoded
from ..layers.inputs import Inputs, check_ids
from ..layers.packing import Packing, pack, packed_already
from ..layers.run import Run
from ..ops.linear_cross_entropy import IGNORED
from ..runtime.derived import weights_stay
from ..runtime.modes import mode
from ..runtime.registration import is_traced
from .albert import ALBERTModel
from .decoder import Decoder, Past, gather_layers, spread_layers
from .encoder_config import EncoderConfig
from .execution import Execution
from .head_model import HeadModel
from .load_arguments import FLOAT_DTYPES
from .losses import cross_entropy
from .outputs import Seq2SeqOutput
from .pretrained import config_contents
from .seq2seq_config import ALBERTSeq2SeqConfig


class Seq2SeqExecution(Execution):
    """`model.execution`: the decoder runs where and as the encoder does, in floats."""

    @classmethod
    def check(cls, backend: str, precision: str) -> None:
        super().check(backend, precision)
        if precision not in FLOAT_DTYPES:
            raise ValueError(
                f"precision {precision!r}: a model that generates text takes one of {', '.join(FLOAT_DTYPES)}"
            )

    def use(self, backend: str, precision: str, calibration: Any = None) -> None:
        self.check(backend, precision)
        super().use(backend, precision, calibration)

    def drop_float(self) -> None:
        """Nothing: the decoder's products read the weights as floats."""


class ALBERTForConditionalGeneration(HeadModel):
    """An ALBERT encoder, and a decoder whose layers share weights too; both and the output share one table of words.

    Args:
        config: an ALBERTSeq2SeqConfig.
        backend: "auto", or one backend's name for every operator that has it.
    """

    family = ENCODER_DECODER
    config_class: ClassVar[type[EncoderConfig]] = ALBERTSeq2SeqConfig
    base_model_prefix = ENCODER_DECODER.attribute
    prefix = ENCODER_DECODER.prefix
    encoder_class: ClassVar[Any] = ALBERTModel
    execution_class = Seq2SeqExecution
    pools = False
    encoder: ALBERTModel

    def add_head(self, config: ALBERTSeq2SeqConfig) -> None:
        self.decoder = Decoder(config, self.encoder.embeddings.word_embeddings)

    def can_generate(self) -> bool:
        """True: `generate` does."""
        return True

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        return_dict: bool | None = None,
        output_logits: bool = True,
        label_smoothing: float = 0.0,
    ) -> Any:
        """Scores of every word at every token of a target, and the loss of the words that are there.

        Args:
            input_ids, attention_mask, token_type_ids: the source (B, S), as the encoder's `forward` takes them.
            decoder_input_ids: (B, T) integers, the token before each one to predict; None: made of the labels, after
                `config.decoder_start_token_id`. decoder_attention_mask: (B, T), 0 at padding; None: there is none, or where
                decoder_input_ids come from the labels, it is where the labels are -100.
            labels: (B, T) ids to predict, -100 where there is nothing to predict; gives a loss.
            output_logits: False gives the loss alone, and needs no memory for the scores.
            label_smoothing: share of each label's probability that is spread over all words, for training.
            return_dict: as the encoder's `forward` takes it.

        Returns:
            Seq2SeqOutput: loss (), the mean over the labels; logits (B, T, V), zeros at padding; encoder_last_hidden_state
            (B, S, H), with the logits.

        Raises:
            As the encoder's `forward`; ValueError for neither labels nor decoder_input_ids, labels of another shape, -100
            between labels without decoder_input_ids, targets longer than max_position_embeddings, or output_logits=False
            without labels.
        """
        target, mask = self._target(decoder_input_ids, decoder_attention_mask, labels)
        self.encoder.check_length(target.shape[1])
        encoded = self.encode(Inputs(input_ids, attention_mask, token_type_ids), False, False)
        if len(target) != encoded.packing.num_sequences:
            raise ValueError(f"{encoded.packing.num_sequences} sources and {len(target)} targets: as many are needed")
        packing = pack((target.shape[0], target.shape[1]), mask, target.device).with_sequence_order()
        positions = torch.arange(target.shape[1], device=target.device)[None].expand(target.shape)
        ids, positions = packing.gather(target).long(), packing.gather(positions)
        packed_labels = None if labels is None else packing.gather(labels)
        output = self._decode(encoded, packing, ids, positions, packed_labels, output_logits, label_smoothing)
        if output.logits is not None:
            output.logits = packing.scatter(output.logits)
            output.encoder_last_hidden_state = encoded.scatter(encoded.hidden)
        return output if self.asked("use_return_dict", return_dict) else output.to_tuple()

    def forward_packed(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        decoder_input_ids: Tensor,
        decoder_cu_seqlens: Tensor,
        decoder_max_seqlen: int,
        labels: Tensor | None = None,
        output_logits: bool = True,
        label_smoothing: float = 0.0,
    ) -> Any:
        """`forward` for sources and targets that hold no padding.

        Args:
            input_ids: (Ts,), cu_seqlens: (B + 1,) int32, max_seqlen: the sources, as the encoder's `forward_packed` takes them.
            decoder_input_ids: (Tt,), decoder_cu_seqlens: (B + 1,) int32, decoder_max_seqlen: the same for the targets.
            labels: (Tt,). output_logits, label_smoothing: as in `forward`.

        Returns:
            Seq2SeqOutput: loss (), logits (Tt, V).

        Raises:
            As `forward` and the encoder's `forward_packed`.
        """
        encoded = self.encoder.encode_packed(Inputs(input_ids, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen))
        target = Inputs(decoder_input_ids)
        packing = packed_already(
            len(target.given()), decoder_cu_seqlens, decoder_max_seqlen, decoder_input_ids.device
        ).with_sequence_order()
        if packing.num_sequences != encoded.packing.num_sequences:
            raise ValueError(
                f"{encoded.packing.num_sequences} sources and {packing.num_sequences} targets: as many are needed"
            )
        self.encoder.check_length(packing.max_seqlen)
        check_ids("decoder_input_ids", decoder_input_ids, (len(decoder_input_ids),))
        positions = self.encoder.positions(target._replace(cu_seqlens=packing.cu_seqlens))
        if labels is not None:
            check_ids("labels", labels, tuple(decoder_input_ids.shape))
        return self._decode(
            encoded, packing, decoder_input_ids.long(), positions, labels, output_logits, label_smoothing
        )

    def _target(self, ids: Tensor | None, mask: Tensor | None, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The decoder's input (B, T) and its mask."""
        for name, given in (("decoder_input_ids", ids), ("labels", labels)):
            if given is not None:
                if given.dim() != 2:
                    raise ValueError(f"{name} must have the shape (B, T), got {tuple(given.shape)}")
                check_ids(name, given, tuple((given if ids is None else ids).shape))
        if ids is not None:
            return ids, mask
        if labels is None:
            raise ValueError("give labels or decoder_input_ids: the decoder needs a target to read")
        real = labels != IGNORED
        if not is_traced() and bool((real[:, 1:] & ~real[:, :-1]).any()):
            raise ValueError("labels have -100 before another label: give decoder_input_ids, which have words there")
        start = self.config.decoder_start_token_id
        shifted = F.pad(labels.masked_fill(~real, self.config.pad_token_id or 0)[:, :-1], (1, 0), value=start)
        return shifted, real if mask is None else mask

    def _decode(
        self,
        encoded: Encoded,
        packing: Packing,
        ids: Tensor,
        positions: Tensor,
        labels: Tensor | None,
        output_logits: bool,
        label_smoothing: float,
    ) -> Seq2SeqOutput:
        """Ids, positions and labels (Tt,) -> the loss and the packed logits (Tt, V)."""
        if labels is None and not output_logits:
            raise ValueError("output_logits=False leaves the loss alone, which needs labels")
        state = self.encoder.execution_state
        source = self.decoder.source_rows(encoded.hidden, encoded.packing)
        hidden = self.decoder(ids, positions, packing, source, Run(state.backend, state.recompute))
        parts = self.decoder.parts()
        if not output_logits:
            assert labels is not None
            return Seq2SeqOutput(loss=parts.loss(hidden, labels, self.backend, label_smoothing))
        logits = parts.scores(hidden, self.backend)
        return Seq2SeqOutput(None if labels is None else cross_entropy(logits, labels, label_smoothing), logits)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Write a text for each source.

        Args:
            input_ids, attention_mask, token_type_ids: the sources (B, S), as the encoder's `forward` takes them.
            max_new_tokens: most tokens of a text; None: 128, or as many as there are positions.
            options: num_beams, length_penalty, early_stopping, do_sample, temperature, top_k, top_p: see `GenerationOptions`.

        Returns:
            (B, 1 + N) int64: `config.decoder_start_token_id`, the text up to and with `config.eos_token_id`, then
            `config.pad_token_id`, as transformers' `generate` returns them. N is the longest text's.

        Raises:
            As the encoder's `forward` and `GenerationOptions`; ValueError for max_new_tokens above max_position_embeddings.
        """
        most = min(GenerationOptions.max_new_tokens, self.config.longest) if max_new_tokens is None else max_new_tokens
        how = GenerationOptions(most, **options)
        texts = self.write(Inputs(input_ids, attention_mask, token_type_ids), how)
        width = 1 + max(map(len, texts), default=0)
        start, pad = self.config.decoder_start_token_id, self.config.pad_token_id or 0
        rows = [[start, *text, *[pad] * (width - 1 - len(text))] for text in texts]
        return torch.tensor(rows, dtype=torch.int64, device=self.device).view(len(rows), width)

    @torch.no_grad()
    def write(self, inputs: Inputs, options: GenerationOptions) -> list[list[int]]:
        """The tokens of the text for each source, up to and with `config.eos_token_id`; `inputs` may be packed.

        Raises:
            As `generate`.
        """
        if options.max_new_tokens > self.config.longest:
            raise ValueError(
                f"max_new_tokens {options.max_new_tokens} is more than max_position_embeddings = {self.config.longest}"
            )
        with mode(self, training=False), weights_stay():
            encoded = (
                self.encode(inputs, False, False) if inputs.cu_seqlens is None else self.encoder.encode_packed(inputs)
            )
            sources, config = encoded.packing.num_sequences, self.config
            writer = _Writer(self, encoded, sources * options.num_beams, options.max_new_tokens)
            start, end = config.decoder_start_token_id, config.eos_token_id
            return generate(writer, sources, start, end, options, encoded.hidden.device)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        *arguments: Any,
        each_layer: bool = False,
        **options: Any,
    ) -> None:
        """Write config.json and model.safetensors: see `PretrainedMixin.save_pretrained`.

        Args:
            each_layer: write each layer of the decoder under a name of its own, though layers share weights, so that
                transformers' EncoderDecoderModel loads the folder. The file grows; this library reads both.

        Raises:
            TypeError: each_layer with another argument than is_main_process.
        """
        if not each_layer:
            super().save_pretrained(save_directory, is_main_process, *arguments, **options)
            return
        if arguments or options:
            raise TypeError("each_layer=True takes no other argument than is_main_process")
        if is_main_process:
            tensors = spread_layers(self.state_dict(), self.decoder.group_indices)
            save_checkpoint(self, config_contents(self), save_directory, others=tensors)

    @classmethod
    def own_tensors(cls, state: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
        return gather_layers(state, config.decoder_config().group_indices())


class _Writer:
    """The texts that one call of `write` is at: see `generation.search.Writer`."""

    def __init__(self, model: ALBERTForConditionalGeneration, encoded: Encoded, slots: int, longest: int) -> None:
        self._decoder, self._run = model.decoder, Run(model.backend)
        count = encoded.packing.num_sequences
        cache = DecoderCache(len(self._decoder.group_indices), count, slots, longest, encoded.hidden.device)
        self._sources = list(range(count))
        self._every_source = self._decoder.source_rows(encoded.hidden, encoded.packing)
        self._past = Past(cache, (), self._decoder.fused_once())
        self._place()

    def _place(self) -> None:
        device = self._past.cache.device
        chosen = torch.tensor(self._sources, dtype=torch.int64, device=device)
        self._past = self._past._replace(source=[rows.select(chosen) for rows in self._every_source])
        cu_seqlens = torch.arange(len(chosen) + 1, dtype=torch.int32, device=device)
        self._packing = Packing(None, cu_seqlens, 1, None)

    def scores(self, tokens: Tensor) -> Tensor:
        hidden = self._decoder.next_token(tokens, self._packing, self._past, self._run)
        return self._decoder.parts().scores(hidden, self._run.backend)

    def continue_from(self, parents: list[int]) -> None:
        self._past.cache.continue_from(parents)
        sources = [self._sources[parent] for parent in parents]
        if sources != self._sources:
            self._sources = sources
            self._place()
