"""The configuration of an ALBERT encoder and decoder; config.json has the form of transformers' `EncoderDecoderConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from ..layers.spec import LayerSpec
from .config import ALBERTConfig
from .config_attributes import keeps_other_keys
from .config_checks import is_integer

# Fields that the encoder and the decoder share, under these names in both parts of config.json.
_SHARED = (
    "vocab_size", "embedding_size", "hidden_size", "hidden_dropout_prob", "attention_probs_dropout_prob",
    "max_position_embeddings", "initializer_range", "layer_norm_eps", "pad_token_id",
)  # fmt: skip
# Field -> its name in the decoder's part.
_DECODER = {
    "num_decoder_layers": "num_hidden_layers",
    "num_decoder_groups": "num_hidden_groups",
    "decoder_attention_heads": "num_attention_heads",
    "decoder_intermediate_size": "intermediate_size",
    "decoder_hidden_act": "hidden_act",
    "decoder_type_vocab_size": "type_vocab_size",
}
_TOP = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "tie_word_embeddings")


@keeps_other_keys
@dataclass
class ALBERTSeq2SeqConfig(ALBERTConfig):
    """ALBERTConfig's fields describe the encoder; the decoder shares its widths, its vocabulary and its dropout.

    Args:
        num_decoder_layers, decoder_attention_heads, decoder_intermediate_size, decoder_hidden_act: of the decoder; None: as
            the encoder's.
        num_decoder_groups: groups of decoder layers that share weights, as `num_hidden_groups` for the encoder.
        decoder_type_vocab_size: rows of the decoder's table of token types, of which it reads the first.
        decoder_start_token_id: the token before the first of a target; None: `bos_token_id`.

    Raises:
        ValueError: as ALBERTConfig; parts of a config.json that do not fit together, or of another architecture.
    """

    model_type: ClassVar[str] = "encoder-decoder"

    num_decoder_layers: int | None = None
    num_decoder_groups: int = 1
    decoder_attention_heads: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_hidden_act: str | None = None
    decoder_type_vocab_size: int = 1
    decoder_start_token_id: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, usual in (
            ("num_decoder_layers", self.num_hidden_layers),
            ("decoder_attention_heads", self.num_attention_heads),
            ("decoder_intermediate_size", self.intermediate_size),
            ("decoder_hidden_act", self.hidden_act),
            ("decoder_start_token_id", self.bos_token_id),
        ):
            if getattr(self, name) is None:
                setattr(self, name, usual)
        for name in ("num_decoder_groups", "decoder_type_vocab_size"):
            if not is_integer(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"config: {name} must be a positive integer, got {getattr(self, name)!r}")
        for name in ("eos_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if not is_integer(value) or not 0 <= value < self.vocab_size:
                raise ValueError(f"config: {name} must be an id of the vocabulary of {self.vocab_size}, got {value!r}")
        if not self.tie_word_embeddings:
            raise ValueError("config: tie_word_embeddings must be true: encoder, decoder and output share one table")
        self.decoder_config()

    def decoder_config(self) -> ALBERTConfig:
        """The decoder's layers, as a configuration of an encoder of the same sizes.

        Raises:
            ValueError: sizes that ALBERTConfig refuses.
        """
        values = {name: getattr(self, name) for name in _SHARED}
        values |= {name: getattr(self, own) for own, name in _DECODER.items()}
        try:
            return ALBERTConfig(**values)
        except ValueError as error:
            raise ValueError(str(error).replace("config: ", "config: decoder: ", 1)) from error

    def decoder_spec(self) -> LayerSpec:
        """The sizes and options of a decoder layer; its feed-forward output has dropout, as ELECTRA's."""
        return dataclasses.replace(self.decoder_config().layer_spec(), ffn_dropout=self.hidden_dropout_prob)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Any:
        """From the contents of a config.json: of transformers' form, or with the fields of this class side by side."""
        if "encoder" not in values and "decoder" not in values:
            return super().from_dict(values)
        encoder, decoder = (_part(values, *names) for names in (("encoder", "albert"), ("decoder", "electra")))
        for name, wanted in (("is_decoder", True), ("add_cross_attention", True)):
            if decoder.get(name) is not wanted:
                raise ValueError(f"config: decoder: {name} must be true, got {decoder.get(name)!r}")
        for name in _SHARED:
            if name in decoder and name in encoder and decoder[name] != encoder[name]:
                raise ValueError(
                    f"config: {name} must be the same in encoder and decoder, got {encoder[name]!r} and {decoder[name]!r}"
                )
        known = {f.name for f in dataclasses.fields(ALBERTConfig)} - {"extra"}
        flat = {name: value for name, value in encoder.items() if name in known}
        flat |= {own: decoder[name] for own, name in _DECODER.items() if name in decoder}
        flat.setdefault("num_decoder_groups", flat.get("num_decoder_layers", 1))  # transformers' layers share nothing
        rest = {
            name: value for name, value in values.items() if name not in ("encoder", "decoder", "is_encoder_decoder")
        }
        return super().from_dict(flat | {name: value for name, value in rest.items() if value is not None})

    def to_dict(self) -> dict[str, Any]:
        """The contents of config.json, readable by transformers' `EncoderDecoderConfig`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(ALBERTConfig) if f.name != "extra"}
        encoder = ALBERTConfig(**fields).to_dict()
        decoder = {name: encoder[name] for name in _SHARED} | {
            name: getattr(self, own) for own, name in _DECODER.items()
        }
        decoder |= {"model_type": "electra", "is_decoder": True, "add_cross_attention": True}
        decoder |= {"bos_token_id": self.bos_token_id, "eos_token_id": self.eos_token_id}
        top = {name: getattr(self, name) for name in _TOP}
        return {
            **self.extra,
            "model_type": self.model_type,
            "is_encoder_decoder": True,
            "encoder": encoder,
            "decoder": decoder,
            **top,
        }


def _part(values: Mapping[str, Any], name: str, model_type: str) -> Mapping[str, Any]:
    part = values.get(name)
    if not isinstance(part, Mapping):
        raise ValueError(f"config: {name} must be an object, got {type(part).__name__}")
    if part.get("model_type") != model_type:
        raise ValueError(f"config: {name}: model_type is {part.get('model_type')!r}, expected {model_type!r}")
    return part
