"""ALBERT in torch.nn.TransformerEncoder, torch's own fused encoder: the side `torch-nested`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from albert_fast.models.outputs import BaseModelOutput


class TransformerEncoder(nn.Module):
    """ALBERT's shape in torch.nn.TransformerEncoder, whose fast path takes padding out as nested tensors.

    Embeddings are transformers' own; then one TransformerEncoderLayer, num_hidden_layers times, with the checkpoint's
    weights. Its GELU is the exact one: of a checkpoint with the tanh form the numbers are close, not the same.
    """

    def __init__(self, theirs: nn.Module) -> None:
        super().__init__()
        config: Any = theirs.config
        self.embeddings, self.project = theirs.embeddings, theirs.encoder.embedding_hidden_mapping_in
        source: Any = theirs.encoder.albert_layer_groups[0].albert_layers[0]
        layer = nn.TransformerEncoderLayer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=config.layer_norm_eps,
            batch_first=True,
            norm_first=False,
        )
        attention = source.attention
        qkv = (attention.query, attention.key, attention.value)
        with torch.no_grad():
            layer.self_attn.in_proj_weight.copy_(torch.cat([linear.weight for linear in qkv]))
            layer.self_attn.in_proj_bias.copy_(torch.cat([linear.bias for linear in qkv]))
        layer.self_attn.out_proj.load_state_dict(attention.dense.state_dict())
        layer.linear1.load_state_dict(source.ffn.state_dict())
        layer.linear2.load_state_dict(source.ffn_output.state_dict())
        layer.norm1.load_state_dict(attention.LayerNorm.state_dict())
        layer.norm2.load_state_dict(source.full_layer_layer_norm.state_dict())
        self.tower = nn.TransformerEncoder(layer, 1, enable_nested_tensor=True)
        self.tower.layers = nn.ModuleList([layer] * config.num_hidden_layers)
        self.tower.num_layers = config.num_hidden_layers
        self.to(next(theirs.parameters()).dtype).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None) -> BaseModelOutput:
        """(B, S) ids and mask -> last_hidden_state (B, S, H); with no mask the fast path stays dense."""
        hidden = self.project(self.embeddings(input_ids))
        padding = None if attention_mask is None else attention_mask == 0
        return BaseModelOutput(self.tower(hidden, src_key_padding_mask=padding), None, None, None)
