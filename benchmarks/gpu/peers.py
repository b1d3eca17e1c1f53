"""What only a GPU is measured against: torch's attention libraries, all layers operator by operator, steps of training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from shared.engines import maskless_sdpa
from shared.harness import allowed_error
from shared.operators import OperatorGroup
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ops
from albert_fast.inspect.timing import Side
from albert_fast.layers.packing import longest_first
from albert_fast.testing import ALL_CASES

# attention ----------------------------------------------------------------------------------------------------------------

SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


class AttentionGroup(OperatorGroup):
    """Our attention on sequences of `lengths` against torch's, one side for each of its libraries.

    Sequences of one length are a dense batch. For several lengths torch gets a nested tensor over the same packed rows, or
    padded tensors and a mask; padding them is not timed, and only real tokens are compared.
    """

    def __init__(
        self,
        name: str,
        lengths: Sequence[int],
        heads: int,
        head_dim: int,
        backward: bool,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        case = ALL_CASES["attention"]
        super().__init__(case, case.eager, name, (tuple(lengths), None, heads, head_dim), backward, dtype, device)
        self.lengths, self.heads = lengths, heads
        self.dense = len(set(lengths)) == 1

    def sides(self) -> tuple[str, ...]:
        """Our backend and torch's libraries: on a GPU only one takes float32, and flash takes no mask."""
        if self.device.type == "cpu":
            libraries: tuple[str, ...] = ("flash",)
        elif self.dtype == torch.float32:
            libraries = ("efficient",)
        else:
            libraries = ("cudnn", "efficient", *(("flash",) if self.dense else ()))
        if self.dense:
            return self.backend, *(f"sdpa-{library}" for library in libraries)
        return self.backend, "sdpa-nested", *(f"sdpa-padded-{library}" for library in libraries)

    def build(self, side: str) -> Side:
        if side == self.backend:
            inputs = self.inputs
            if not self.dense:  # models compute it once for all layers
                inputs = inputs | {"sequence_order": longest_first(inputs["cu_seqlens_q"])}
            return self._side(self.case.function, inputs, self._differentiated())
        if side.startswith("sdpa-padded"):
            return self._padded(SDPA[side.rpartition("-")[2]])
        if side != "sdpa-nested":
            return self._side(dense(SDPA[side.removeprefix("sdpa-")]), self.inputs, self._differentiated())
        # It needs contiguous q, k and v; inference_mode does not allow nested tensors to be made.
        apart = {name: t.contiguous() for name, t in self._differentiated().items()}
        inputs = self.inputs | apart
        return self._side(nested, inputs, apart) if self.backward else Side(torch.no_grad()(lambda: nested(**inputs)))

    def comparable(self, output: Any) -> tuple[Tensor, ...]:
        """Packed (T, H); padded answers (B, heads, S, head_dim) are packed first."""
        outputs = super().comparable(output)
        if outputs[0].dim() == 2:
            return outputs
        return tuple(t.transpose(1, 2)[self._real()].flatten(1) for t in outputs)

    def _real(self) -> Tensor:
        """(B, S) bool, True at tokens."""
        lengths = torch.tensor(self.lengths, device=self.device)
        return torch.arange(max(self.lengths), device=self.device) < lengths[:, None]

    def _pad(self, packed: Tensor) -> Tensor:
        """(T, H) -> (B, heads, S, head_dim), zeros where there is no token."""
        real = self._real()
        padded = packed.new_zeros(*real.shape, packed.shape[1])
        padded[real] = packed
        return padded.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _padded(self, library: SDPBackend) -> Side:
        leaves = [self._pad(self.inputs[name]).requires_grad_(self.backward) for name in ("q", "k", "v")]
        mask = self._real()[:, None, None, :]

        def forward() -> Tensor:
            with sdpa_kernel(library):
                return F.scaled_dot_product_attention(*leaves, mask, scale=self.inputs["softmax_scale"])

        if not self.backward:
            return Side(torch.inference_mode()(forward))
        cotangent = self._pad(self.cotangent())
        return Side(lambda output: torch.autograd.grad(output, leaves, cotangent), forward)


def dense(library: SDPBackend) -> Callable[..., Tensor]:
    """Returns attention of equally long sequences by one of torch's libraries; its arguments are the OpCase's."""

    def attention(q, k, v, cu_seqlens_q, num_heads, softmax_scale, **_):
        batch = len(cu_seqlens_q) - 1
        heads = (t.view(batch, -1, num_heads, t.shape[1] // num_heads).transpose(1, 2) for t in (q, k, v))
        with sdpa_kernel(library):
            out = F.scaled_dot_product_attention(*heads, scale=softmax_scale)
        return out.transpose(1, 2).reshape(q.shape)

    return attention


def nested(q, k, v, cu_seqlens_q, max_seqlen_q, num_heads, softmax_scale, **_):
    """attention with torch's jagged nested tensors, which are views of the packed rows."""
    offsets = cu_seqlens_q.long()
    heads = (
        torch.nested.nested_tensor_from_jagged(
            t.unflatten(1, (num_heads, -1)), offsets, min_seqlen=1, max_seqlen=max_seqlen_q
        ).transpose(1, 2)
        for t in (q, k, v)
    )
    return F.scaled_dot_product_attention(*heads, scale=softmax_scale).transpose(1, 2).values().reshape(q.shape)


# linear_gelu --------------------------------------------------------------------------------------------------------------


class LinearGeluGroup(OperatorGroup):
    """linear_gelu; in inference also each way to compute it: two of cuBLASLt's, and every tile of ours."""

    def sides(self) -> tuple[str, ...]:
        return *super().sides(), *(() if self.backward or self.device.type == "cpu" else self._routes())

    def build(self, side: str) -> Side:
        route = self._routes().get(side)
        if route is None:
            return super().build(side)
        from albert_fast.kernels.linear_gelu import start_route

        x, weight, bias, act = (self.inputs[name] for name in ("x", "weight", "bias", "act"))
        return Side(torch.inference_mode()(lambda: start_route(x, weight, bias, act, False, route)[0]))

    def _routes(self) -> dict[str, dict[str, int]]:
        from albert_fast.kernels.linear_gelu import linear_gelu_routes

        tokens, _, middle = self.shape
        routes = linear_gelu_routes(tokens, middle, self.dtype, self.inputs["act"], False)
        return {_route_name(route): route for route in routes}


def _route_name(route: dict[str, int]) -> str:
    """ "cublaslt_epilogue", or "tile-128x128x64"."""
    sizes = [str(route[size]) for size in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if size in route]
    return f"tile-{'x'.join(sizes)}" if sizes else next(iter(route))


# encoder ------------------------------------------------------------------------------------------------------------------


class EncoderGroup(OperatorGroup):
    """encoder on few tokens: one kernel and the layers' operators, both as CUDA graphs, and plain torch."""

    def __init__(self, lengths: Sequence[int], sizes: tuple[int, int, int, int], device: torch.device) -> None:
        """sizes: hidden, heads, intermediate, layers."""
        hidden, heads, middle, steps = sizes
        shape, name = (tuple(lengths), hidden, heads, middle, 1, steps), f"{len(lengths)}x{max(lengths)}"
        case, dtype = ALL_CASES["encoder"], torch.float32 if device.type == "cpu" else torch.bfloat16
        super().__init__(case, case.eager, name, shape, False, dtype, device)
        self.longest = max(lengths)

    def sides(self) -> tuple[str, ...]:
        return self.backend, "operators", "eager"

    def build(self, side: str) -> Side:
        if side == "eager":
            return super().build(side)
        function = self.case.function if side == self.backend else partial(by_operators, longest=self.longest)
        call = torch.inference_mode()(partial(function, **self.inputs))
        return Side(call if self.device.type == "cpu" else replayed(call))


def by_operators(hidden, weights, layer_indices, cu_seqlens, num_heads, softmax_scale, eps, act, longest, **_):
    """All layers by the operators that models otherwise run; arguments as the OpCase's."""
    layers = ops.split_layers(weights)
    for w in layers:
        for kind in ("", "_bias"):
            w[f"qkv{kind}"] = torch.cat([w[f"{name}{kind}"] for name in ("query", "key", "value")])
    for layer_index in layer_indices:
        w = layers[layer_index]
        q, k, v = F.linear(hidden, w["qkv"], w["qkv_bias"]).chunk(3, dim=1)
        context = ops.attention(q, k, v, cu_seqlens, cu_seqlens, longest, longest, num_heads, softmax_scale)
        attended = ops.add_layer_norm(
            F.linear(context, w["dense"]), w["dense_bias"], hidden, w["norm_weight"], w["norm_bias"], eps
        )
        middle = ops.linear_gelu(attended, w["ffn"], w["ffn_bias"], act)
        hidden = ops.add_layer_norm(
            F.linear(middle, w["ffn_output"]),
            w["ffn_output_bias"],
            attended,
            w["full_norm_weight"],
            w["full_norm_bias"],
            eps,
        )
    return hidden


def replayed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Captures `call` as a CUDA graph and returns its replay."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


# the whole model ----------------------------------------------------------------------------------------------------------


def allowed(side: str, dtype: torch.dtype) -> float:
    """The largest relative error: torch-nested computes the exact GELU, which differs from the tanh form."""
    return max(5e-3, allowed_error(side, dtype)) if side == "torch-nested" else allowed_error(side, dtype)


# training -----------------------------------------------------------------------------------------------------------------


class Training:
    """Runs steps of masked language modelling (forward, backward, AdamW) of one side, always on the same batch.

    Args:
        side: albert_fast, hf-sdpa or hf-compile. checkpoint: a folder of an ALBERTForMaskedLM.
        ids, labels: (B, S); no label at -100.
    """

    def __init__(self, side: str, checkpoint: Path, ids: Tensor, labels: Tensor) -> None:
        self.ids, self.labels, self.device = ids, labels, ids.device
        self.losses: list[Tensor] = []
        model: Any
        if side == "albert_fast":
            model = ALBERTForMaskedLM.from_pretrained(checkpoint, device=ids.device)
        else:
            from transformers import AlbertForMaskedLM

            model = AlbertForMaskedLM.from_pretrained(checkpoint, attn_implementation=maskless_sdpa()).to(ids.device)
        self.model = model.train()
        # Ours can leave out the scores of tokens without a label.
        self.options: dict[str, Any] = (
            {"wanted_tokens": labels != -100, "output_logits": False} if side == "albert_fast" else {}
        )
        self.call = torch.compile(model, dynamic=False) if side == "hf-compile" else model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = self.call(self.ids, labels=self.labels, **self.options).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())


def masked_lm(config: ALBERTConfig, folder: Path) -> Path:
    """Writes a checkpoint of random weights into `folder` and returns it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ALBERTForMaskedLM(config).save_pretrained(folder)
    return folder
