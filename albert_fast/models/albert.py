"""The fast ALBERT: factorised embeddings, and groups of layers that share weights; `encoder_model.py` runs them.

Same modules, same parameters and same numbers as `models/reference` and Hugging Face (Lan et al. 2019).
"""

from __future__ import annotations

from torch import Tensor, nn

from ..layers.embeddings import FactorisedEmbeddings
from ..layers.inputs import PackedInputs
from ..layers.layer import Layer
from ..layers.stack import LayerGroup, LayerStack
from .config import ALBERTConfig
from .encoder_model import EncoderModel


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


class ALBERTModel(EncoderModel):
    """ALBERT's encoder on fused operators.

    Args:
        config: an ALBERTConfig.
        add_pooling_layer: whether `pooler_output` is computed.
        backend: "auto", or one backend's name for every operator that has it.
    """

    config: ALBERTConfig
    encoder: ALBERTStack

    def __init__(self, config: ALBERTConfig, add_pooling_layer: bool = True, *, backend: str = "auto") -> None:
        super().__init__(config, backend)
        rows = config.vocab_size, config.max_position_embeddings, config.type_vocab_size
        self.embeddings = FactorisedEmbeddings(
            rows, config.embedding_size, config.layer_norm_eps, config.pad_token_id, config.hidden_dropout_prob
        )
        self.encoder = ALBERTStack(config)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.init_weights()

    def embedded(self, tokens: PackedInputs, types: Tensor) -> Tensor:
        return self.embeddings(tokens, types, self.encoder.embedding_hidden_mapping_in, self.execution_state.backend)
