"""Measures where the time of a forward goes on a CPU, stage by stage, and compares each stage with the machine's limit.

Limits are measured in the same run. For stages that multiply floats the limit is the rate of a large product (1024 x 768 by
768 x 3072, oneDNN's where torch has it), for integer products that of our own kernel on operands in the first cache, for
stages that move memory that of `torch.add` on arrays of the batch's size. A limit is the best of several tries. Attention in a
model of integer layers multiplies 16-bit integers, whatever the weights have.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..layers.packing import pack
from ..models.execution import encoder_of
from ..ops._schema import matrix_sizes
from ..runtime import dispatch
from ..runtime.dispatch import BackendUnavailableError
from ..runtime.linear import linear

# The stages that multiply by a layer's matrices, and the product of each.
_PRODUCT_OF = {
    "query, key, value": "qkv",
    "attention output": "dense",
    "FFN up, activation": "ffn",
    "FFN down": "ffn_output",
}
_TRIES = 15  # of the measurement of a limit


@dataclass(frozen=True)
class StageTime:
    """One stage of all layers: seconds (the mean of the threads), its work in operations or bytes, and the rate's limit.

    `unit` is "GFLOPS", "GOPS" or "GB/s"; work, rate and limit are 0 for stages that do nothing of either.
    """

    name: str
    seconds: float
    work: float
    unit: str
    limit: float

    @property
    def rate(self) -> float:
        """In 10^9 operations or bytes a second."""
        return self.work / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def of_limit(self) -> float:
        return self.rate / self.limit if self.limit else 0.0


def profile(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, rounds: int = 7
) -> list[StageTime]:
    """The stages of the `encoder` operator within one forward of `model`, in order; medians of `rounds` calls.

    Args:
        model: an ALBERTModel or a model with a head, in eval mode, on the CPU.
        input_ids: (B, S). attention_mask: (B, S), as in forward.

    Raises:
        TypeError: not one of our models.
        BackendUnavailableError: its layers cannot run in one call; says why.
    """
    encoder = encoder_of(model)
    packing = pack((input_ids.shape[0], input_ids.shape[1]), attention_mask, input_ids.device)
    with torch.inference_mode():
        states, quantized = encoder.embeddings.word_embeddings.weight.detach(), encoder.encoder.quantized
        if quantized is None:
            reason = encoder.encoder.why_not_one_call(states, encoder.execution_state.backend)
        else:
            reason = dispatch.why_not("quantized_encoder", states.device.type, "cpp", states.dtype)
        if reason is not None:
            raise BackendUnavailableError(f"no profile by stage: layers run operator by operator, as {reason}")
        encoder(input_ids, attention_mask)
        samples = []
        for _ in range(rounds):
            with ops.stage_seconds() as seconds:
                encoder(input_ids, attention_mask)
            samples.append(seconds.mean(0))
    medians = torch.stack(samples).median(0).values.tolist()
    lengths = packing.cu_seqlens.diff().double()
    tokens, pairs = float(lengths.sum()), float((lengths * lengths).sum())
    config, layers = encoder.config, len(encoder.encoder.layer_indices)
    width = config.hidden_size
    operations = {"attention": 4 * pairs * width}
    for name, product in _PRODUCT_OF.items():
        n, k = matrix_sizes(product, width, config.intermediate_size)
        operations[name] = 2 * tokens * n * k
    # Two a layer, each reads the product and the residual and writes the sum's LayerNorm.
    moved = {"add, LayerNorm": 2 * 3 * 4 * tokens * width}
    memory = _add_rate(int(tokens), width)
    products = _product_rate() if quantized is None else _integer_rate(int(quantized.removeprefix("int")))
    attention = products if quantized is None else _integer_rate(16)
    stages = []
    for name, seconds in zip(ops.STAGES, medians, strict=True):
        if name in operations:
            unit, limit = "GFLOPS" if quantized is None else "GOPS", attention if name == "attention" else products
            stages.append(StageTime(name, seconds, layers * operations[name], unit, limit))
        elif name in moved:
            stages.append(StageTime(name, seconds, layers * moved[name], "GB/s", memory))
        else:
            stages.append(StageTime(name, seconds, 0.0, "", 0.0))
    return stages


def _product_rate() -> float:
    """GFLOPS of a product that is large enough to be limited by arithmetic alone."""
    x, weight = torch.randn(1024, 768, dtype=torch.float32), torch.randn(3072, 768, dtype=torch.float32)
    return 2 * x.numel() * len(weight) / _seconds(lambda: linear(x, weight)) / 1e9


def _integer_rate(bits: int) -> float:
    """GOPS of products whose operands stay in the first cache, all threads together."""
    limit, threads, repeats = dispatch.extension().quantized_encoder_limit_cpu, torch.get_num_threads(), 5000
    operations = threads * limit(bits, 1, threads) * repeats
    return float(operations / _seconds(lambda: limit(bits, repeats, threads)) / 1e9)


def _add_rate(rows: int, columns: int) -> float:
    """GB/s of adding two (rows, columns) arrays into a third."""
    a, b = torch.randn(2, max(rows, 1), columns, dtype=torch.float32)
    out = torch.empty_like(a)
    return 3 * 4 * a.numel() / _seconds(lambda: torch.add(a, b, out=out)) / 1e9


def _seconds(call: Callable[[], object]) -> float:
    """The shortest time of a call, after two to warm up."""
    times = []
    with torch.inference_mode():
        for _ in range(_TRIES + 2):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
    return min(times[2:])
