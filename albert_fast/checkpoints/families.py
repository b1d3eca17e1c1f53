"""What each family of models calls things in its checkpoints: one entry per family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


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
)
FAMILIES = {family.model_type: family for family in (ALBERT,)}
