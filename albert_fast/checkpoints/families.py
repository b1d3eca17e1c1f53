"""What each family of models calls things in its checkpoints: one entry per family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Family:
    """The names of one family.

    model_type: as config.json states it.
    prefix: what the encoder's tensors begin with in a model with a head; without the dot the attribute that holds the encoder.
    class_name, hf_class_name: what this library's and Hugging Face's classes begin with.
    body: what names of the encoder's tensors begin with, without the prefix.
    heads: the same for tensors that may be absent or belong to another task; longer names first.
    buffers: names of buffers that old versions of transformers wrote; they follow from the configuration.
    old_names: patterns of names in old checkpoints, and their replacements today.
    tied: second name -> first name of the parameters that a masked-language head shares.
    lm_head: the module of the masked-language head, "" for the model itself, and the name of the decoder in it.
    pooler: a tensor that only a checkpoint with a pooler has, as an encoder alone names it; "" where the family has no pooler.
    module: the module of `models/` that holds the family's classes.
    """

    model_type: str
    prefix: str
    class_name: str
    hf_class_name: str
    body: tuple[str, ...] = ("embeddings.", "encoder.", "pooler.")
    heads: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ("embeddings.position_ids", "embeddings.token_type_ids")
    old_names: tuple[tuple[str, str], ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    lm_head: tuple[str, str] = ("", "")
    pooler: str = ""
    module: str = ""

    @property
    def attribute(self) -> str:
        """The attribute of a model with a head that holds the encoder."""
        return self.prefix.rstrip(".")

    def hf_name(self, class_name: str) -> str:
        """Hugging Face's name of one of this library's classes."""
        return class_name.replace(self.class_name, self.hf_class_name, 1)

    def own_name(self, hf_name: str) -> str:
        """This library's name of one of Hugging Face's classes."""
        return hf_name.replace(self.hf_class_name, self.class_name, 1)


# Names that every family had in old checkpoints: of nn.DataParallel and of TensorFlow's LayerNorm.
_OLD_NAMES = ((r"^module\.", ""), (r"\.gamma$", ".weight"), (r"\.beta$", ".bias"))

ALBERT = Family(
    model_type="albert",
    prefix="albert.",
    class_name="ALBERT",
    hf_class_name="Albert",
    heads=("pooler.", "predictions.", "sop_classifier.", "classifier.", "qa_outputs."),
    old_names=(
        *_OLD_NAMES,
        # The two LayerNorms of a layer in Google's releases.
        (r"(\.albert_layers\.\d+)\.LayerNorm_1\.", r"\1.full_layer_layer_norm."),
        (r"(\.albert_layers\.\d+)\.LayerNorm\.", r"\1.attention.LayerNorm."),
    ),
    tied={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
    lm_head=("predictions", "decoder"),
    pooler="pooler.weight",
    module="heads",
)

BERT = Family(
    model_type="bert",
    prefix="bert.",
    class_name="BERT",
    hf_class_name="Bert",
    heads=("pooler.", "cls.predictions.", "cls.seq_relationship.", "classifier.", "qa_outputs."),
    old_names=_OLD_NAMES,
    tied={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
    lm_head=("cls.predictions", "decoder"),
    pooler="pooler.dense.weight",
    module="bert",
)
# XLM-RoBERTa and CamemBERT are RoBERTa with other vocabularies; only what config.json calls them differs.
ROBERTA = Family(
    model_type="roberta",
    prefix="roberta.",
    class_name="RoBERTa",
    hf_class_name="Roberta",
    heads=("pooler.", "lm_head.", "classifier.", "qa_outputs."),
    old_names=_OLD_NAMES,
    tied={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    lm_head=("lm_head", "decoder"),
    pooler="pooler.dense.weight",
    module="roberta",
)
XLM_ROBERTA = replace(ROBERTA, model_type="xlm-roberta", hf_class_name="XLMRoberta")
CAMEMBERT = replace(ROBERTA, model_type="camembert", hf_class_name="Camembert")
DISTILBERT = Family(
    model_type="distilbert",
    prefix="distilbert.",
    class_name="DistilBERT",
    hf_class_name="DistilBert",
    body=("embeddings.", "transformer."),
    heads=(
        "vocab_transform.",
        "vocab_layer_norm.",
        "vocab_projector.",
        "pre_classifier.",
        "classifier.",
        "qa_outputs.",
    ),
    old_names=_OLD_NAMES,
    tied={"vocab_projector.weight": "distilbert.embeddings.word_embeddings.weight"},
    lm_head=("", "vocab_projector"),
    module="distilbert",
)
ELECTRA = Family(
    model_type="electra",
    prefix="electra.",
    class_name="ELECTRA",
    hf_class_name="Electra",
    body=("embeddings.", "embeddings_project.", "encoder."),
    heads=(
        "discriminator_predictions.",
        "generator_predictions.",
        "generator_lm_head.",
        "sequence_summary.",
        "classifier.",
        "qa_outputs.",
    ),
    old_names=_OLD_NAMES,
    tied={"generator_lm_head.weight": "electra.embeddings.word_embeddings.weight"},
    lm_head=("", "generator_lm_head"),
    module="electra",
)
# An ALBERT encoder with a decoder; `models/seq2seq.py` alone reads it, so it is none of FAMILIES.
ENCODER_DECODER = Family(
    model_type="encoder-decoder",
    prefix="encoder.",
    class_name="ALBERTForConditionalGeneration",
    hf_class_name="EncoderDecoderModel",
    body=("embeddings.", "encoder."),
    heads=("pooler.",),
    old_names=ALBERT.old_names,
    tied={
        "decoder.electra.embeddings.word_embeddings.weight": "encoder.embeddings.word_embeddings.weight",
        "decoder.generator_lm_head.weight": "encoder.embeddings.word_embeddings.weight",
    },
    lm_head=("decoder", "generator_lm_head"),
    module="seq2seq",
)
FAMILIES = {
    family.model_type: family for family in (ALBERT, BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA)
}
