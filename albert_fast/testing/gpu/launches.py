"""The calls of every launcher in kernels/ that the compile check records: all tile sizes, dtypes and flags."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from .recording import Launch, record
from .tf32 import tf32_asked_for

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# The types of a product's operands: "tf32" is float32 when torch is asked for TF32.
NUMBERS = {**DTYPES, "tf32": torch.float32}
# Tensors of launches have no memory: 64 sequences of 512 tokens would take gigabytes.
_empty = partial(torch.empty, device="meta")
_ROWS = 32768
# One width for every tile that `row_tiles` gives, and one that is not a multiple of 16 elements.
_ROW_WIDTHS = (128, 200, 256, 512, 1024, 2048, 4096, 8192, 16384)
# Calls of the released models, which the short check compiles for every chip.
_EVERY_CHIP = {
    "add_layer_norm": {"bf16 N768", "bf16 N1024 dropout"},
    "embedding_layer_norm": {"bf16 N768", "bf16 N1024 dropout"},
    "bias_gelu": {"bf16 N3072 gelu_tanh", "bf16 N3072 gelu_tanh dropout"},
    "linear_gelu": {"bf16 K768 gelu_tanh"},
}

# (label, a call of the launcher, whether the kernel should use tensor cores)
Case = tuple[str, Callable[[], Any], bool]


def _with(numbers: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, multiplying operands of this type of NUMBERS."""

    def asking() -> None:
        with tf32_asked_for():
            run()

    return asking if numbers == "tf32" else run


def _attention_launches() -> Iterator[Case]:
    from ...kernels.attention import attention_fwd
    from ...kernels.attention_bwd import attention_bwd

    sequences = 64
    sequence_order = _empty(sequences, dtype=torch.int32)

    def run(
        dtype: torch.dtype, head_dim: int, lengths: tuple[int, int], dropout_p: float, causal: bool, cached: bool
    ) -> None:
        heads = 3 if head_dim % 2 else 12  # with an odd head size also an odd row length, so that slices begin anywhere
        q, k, v = _empty(sequences * max(lengths), 3 * heads * head_dim, dtype=dtype).chunk(3, dim=1)
        q, ends = q[: sequences * lengths[0]], torch.arange(sequences + 1, dtype=torch.int32)
        batch = (ends * lengths[0], ends * lengths[1], sequence_order if dropout_p else None, *lengths)
        numbers: list[Any] = [heads, 0.125, dropout_p, 1, causal]
        if cached:
            in_cache: list[Any] = [batch[0], batch[1][:-1], *batch[2:], *numbers, batch[1].diff()]
            attention_fwd(q, k, v, *in_cache)
            return
        out, _ = attention_fwd(q, k, v, *batch, *numbers)
        attention_bwd(out, q, k, v, q, k, v, *batch, *numbers)

    # Few queries, short sequences, long sequences. Dropout takes the most registers, so every tile is compiled with it.
    few, short, long = (16, 512), (64, 64), (512, 512)
    tiles = [(d, lengths, 0.1) for d in (16, 32, 64, 128, 256) for lengths in (few, short, long)]
    padded = [(d, long, 0.1) for d in (37, 80)]
    # The released models' heads, and tiles that are too large to run with dropout.
    plain = [(64, long, 0.0), (128, long, 0.0)]
    # float16 takes the same tiles as bfloat16 and no more registers: one call is enough.
    chosen = {"f32": [*tiles, *padded], "bf16": [*tiles, *padded, *plain], "f16": [(64, short, 0.1)]}
    chosen["tf32"] = [*tiles, padded[1], plain[1]]
    # Decoders: causal, whose masked blocks take the most registers in the largest tiles, and one query of a cache.
    causal = {"f32": [(64, long, 0.1)], "bf16": [(64, long, 0.1), (64, long, 0.0), (128, long, 0.1)], "f16": []}
    causal["bf16"].append((32, short, 0.1))  # has a limit on registers of its own
    causal["tf32"] = [(64, long, 0.1)]
    for name, dtype in NUMBERS.items():
        kinds = [*((row, False, False) for row in chosen[name]), *((row, True, False) for row in causal[name])]
        kinds += [((64, few, 0.0), False, True)] if name == "bf16" else []
        for (head_dim, lengths, dropout_p), is_causal, cached in kinds:
            label = f"{name} D{head_dim} Q{lengths[0]} K{lengths[1]}" + (" dropout" if dropout_p else "")
            label += " causal" * is_causal + " cached" * cached
            yield (
                label,
                _with(name, partial(run, dtype, head_dim, lengths, dropout_p, is_causal, cached)),
                name != "f32",
            )


def _add_layer_norm_launches() -> Iterator[Case]:
    from ...kernels.add_layer_norm import add_layer_norm_bwd, add_layer_norm_fwd

    cases = [(n, 0.1) for n in _ROW_WIDTHS] + [(n, 0.0) for n in (312, 768, 4096, 16384)]
    for name, dtype in DTYPES.items():
        for n, p in cases if name != "f16" else [(768, 0.0)]:
            x, vector, stats = _empty(_ROWS, n, dtype=dtype), _empty(n, dtype=dtype), _empty(_ROWS)
            label = f"{name} N{n}" + (" dropout" if p else "")
            yield label, partial(add_layer_norm_fwd, x, vector, x, vector, vector, 1e-12, p, 1), False
            yield label, partial(add_layer_norm_bwd, x, x, vector, x, vector, stats, stats, p, 1), False


def _gelu_layer_norm_launches() -> Iterator[Case]:
    from ...kernels.gelu_layer_norm import gelu_layer_norm_bwd, gelu_layer_norm_fwd

    cases = [(n, "gelu_erf") for n in _ROW_WIDTHS] + [(128, "gelu_tanh"), (128, "relu")]
    for name, dtype in DTYPES.items():
        for n, act in cases if name != "f16" else [(128, "gelu_tanh")]:
            x, vector, stats = _empty(_ROWS, n, dtype=dtype), _empty(n, dtype=dtype), _empty(_ROWS)
            yield f"{name} N{n} {act}", partial(gelu_layer_norm_fwd, x, vector, vector, vector, 1e-12, act), False
            yield f"{name} N{n} {act}", partial(gelu_layer_norm_bwd, x, x, vector, vector, stats, stats, act), False


def _embedding_layer_norm_launches() -> Iterator[Case]:
    from ...kernels.embedding_layer_norm import embedding_layer_norm_bwd, embedding_layer_norm_fwd

    ids, stats = _empty(_ROWS, dtype=torch.int64), _empty(_ROWS)
    # Dropout takes the most registers, so every tile is compiled with it. The tables are BERT's.
    cases = [(n, 0.1, True, True) for n in _ROW_WIDTHS] + [(768, 0.0, True, True), (768, 0.0, False, True)]
    cases += [(768, 0.1, True, False), (384, 0.0, True, True)]
    for name, dtype in DTYPES.items():
        for n, p, typed, from_ids in cases if name != "f16" else [(768, 0.0, True, True)]:
            word, types, positions, vector = (
                _empty(*shape, dtype=dtype) for shape in ((30522, n), (2, n), (512, n), (n,))
            )
            given, embeds = (ids, None) if from_ids else (None, _empty(_ROWS, n, dtype=dtype))
            tables = (given, embeds, ids if typed else None, ids, word, types if typed else None, positions)
            label = f"{name} N{n}" + (" dropout" if p else "") + ("" if typed else " no types")
            label += "" if from_ids else " embeds"
            grad = _empty(_ROWS, n, dtype=dtype)
            yield label, partial(embedding_layer_norm_fwd, *tables, vector, vector, 1e-12, p, 1), False
            yield label, partial(embedding_layer_norm_bwd, grad, *tables, vector, stats, stats, p, 1), False


def _bias_gelu_launches() -> Iterator[Case]:
    from ...kernels.bias_gelu import bias_gelu_bwd, bias_gelu_fwd

    plain = [(3072, "gelu_tanh", 0.0), (3072, "gelu_erf", 0.0), (3072, "relu", 0.0), (1250, "gelu_erf", 0.0)]
    # Dropout where registers are scarcest: bfloat16 has most elements in flight, and the slope of tanh most terms.
    chosen = {"f32": plain, "bf16": [*plain, (3072, "gelu_tanh", 0.1)], "f16": [plain[0], plain[-1]]}
    for name, dtype in DTYPES.items():
        for n, act, p in chosen[name]:
            x, bias = _empty(_ROWS, n, dtype=dtype), _empty(n, dtype=dtype)
            label = f"{name} N{n} {act}" + (" dropout" if p else "")
            yield label, partial(bias_gelu_fwd, x, bias, act, p, 1), False
            yield label, partial(bias_gelu_bwd, x, x, bias, act, p, 1), False
    x = _empty(_ROWS, 3072, dtype=torch.bfloat16)  # after linear_gelu's product, which added the bias
    yield "bf16 N3072 gelu_tanh no bias", partial(bias_gelu_fwd, x, None, "gelu_tanh"), False
    yield "bf16 N3072 gelu_tanh no bias", partial(bias_gelu_bwd, x, x, None, "gelu_tanh"), False


def _linear_gelu_launches() -> Iterator[Case]:
    from ...kernels._matmul import matmul_tiles
    from ...kernels.linear_gelu import start_route

    def start(numbers: str, width: int, act: str, keep_sums: bool, tiles: dict[str, int]) -> None:
        shapes = ((_ROWS, width), (3072, width), 3072)
        x, weight, bias = (_empty(shape, dtype=NUMBERS[numbers]) for shape in shapes)
        start_route(x, weight, bias, act, keep_sums, tiles, numbers == "tf32")

    # Storing the sums, and erf, take the most registers, so every tile is compiled with both. Then follow the default call and
    # the tiny model's width, which is not a multiple of any step along K.
    for name, dtype in NUMBERS.items():
        tiles = matmul_tiles(32768, 3072, dtype, name == "tf32")
        cases = [(768, "gelu_erf", True, tile) for tile in tiles] if name != "f16" else []
        cases += [(768, "gelu_tanh", False, tiles[0])]
        cases += [(312, "gelu_erf", True, tiles[0])] if name == "bf16" else []
        for width, act, keep_sums, tile in cases:
            label = f"{name} K{width} {act}" + (" sums" if keep_sums else "")
            yield label, partial(start, name, width, act, keep_sums, tile), name != "f32"


def _linear_cross_entropy_launches() -> Iterator[Case]:
    from ...kernels.linear_cross_entropy import linear_cross_entropy_bwd, linear_cross_entropy_fwd

    def run(dtype: torch.dtype, width: int, label_smoothing: float) -> None:
        # The vocabulary of the released models, and 15 % of the tokens.
        weight, bias = _empty(30000, width, dtype=dtype), _empty(30000, dtype=dtype)
        x, labels = _empty(4915, width, dtype=dtype), _empty(4915, dtype=torch.int64)
        loss, row_max, row_sum = linear_cross_entropy_fwd(x, weight, bias, labels, label_smoothing)
        linear_cross_entropy_bwd(loss, x, weight, bias, labels, row_max, row_sum, label_smoothing)

    # One width for every tile, and one that is padded. Label smoothing changes the code of the forward alone.
    widths = (16, 32, 64, 128, 200, 256, 512, 1024)
    for name, dtype in NUMBERS.items():
        for width in widths if name != "f16" else [128]:
            yield f"{name} E{width}", _with(name, partial(run, dtype, width, 0.0)), name != "f32"
        for width in (128, 200) if name != "f16" else []:
            yield f"{name} E{width} smoothed", _with(name, partial(run, dtype, width, 0.1)), name != "f32"


def _graph_inputs_launches() -> Iterator[Case]:
    from ...kernels._graph_inputs import graph_inputs

    batch, length = 64, 512
    static = _empty(3, batch * length, dtype=torch.int64)
    ends, lengths = _empty(batch + 1, dtype=torch.int32), _empty(batch, dtype=torch.int64)

    def run(ids_dtype: torch.dtype, mask_dtype: torch.dtype | None, packed: bool) -> None:
        ids, indices = _empty(batch, length, dtype=ids_dtype), _empty(batch * length, dtype=torch.int64)
        rows, sizes = (ids, length, 1), ((batch, length), (batch * length, batch))
        if mask_dtype is not None:
            flags = (_empty(batch, length, dtype=mask_dtype), length, 1)
            graph_inputs(rows, rows, rows, flags, lengths, None, indices, ends, static, ends, *sizes)
        else:
            given, written = (ends, None) if packed else (None, ends)
            graph_inputs(rows, rows, rows, None, None, given, None, written, static, ends, *sizes)

    long, short = torch.int64, torch.int32
    yield "i64 dense", partial(run, long, None, False), False
    yield "i64 masked", partial(run, long, long, False), False
    yield "i64 packed", partial(run, long, None, True), False
    yield "i32 masked by bool", partial(run, short, torch.bool, False), False


def _encoder_launches() -> Iterator[Case]:
    from ...kernels.encoder import encoder_fwd
    from ...ops._schema import WEIGHTS, sizes_of

    def run(dtype: torch.dtype, tokens: int, heads: int, head_dim: int, wanted: bool, layers: int = 1) -> None:
        width = heads * head_dim
        weights = [_empty(*sizes_of(letters, width, 4 * width), dtype=dtype) for letters in WEIGHTS.values()]
        cu_seqlens, rows = torch.tensor([0, tokens], dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
        wanted_rows, cu_wanted = (rows, cu_seqlens) if wanted else (None, None)
        hidden = _empty(tokens, width, dtype=dtype)
        numbers = (heads, 0.125, 1e-12, "gelu_tanh")
        encoder_fwd(hidden, weights * layers, list(range(layers)), cu_seqlens, wanted_rows, cu_wanted, *numbers)

    # Every tile of products, with the released models' heads and with the largest, whole and padded; with wanted rows.
    chosen = {"f32": [(16, 64, False), (128, 128, True)], "bf16": [(16, 128, True), (128, 64, False), (128, 80, True)]}
    chosen["tf32"] = chosen["f32"]
    for name, cases in chosen.items():
        for tokens, head_dim, wanted in cases:
            label = f"{name} T{tokens} D{head_dim}" + (" wanted rows" if wanted else "")
            start = partial(run, NUMBERS[name], tokens, 12 if head_dim == 64 else 8, head_dim, wanted)
            yield label, _with(name, start), name != "f32"
    # Layers that differ read their weights through a table of addresses.
    apart = [
        ("f32", 128, 64),
        ("bf16", 16, 64),
        ("bf16", 128, 64),
        ("tf32", 128, 64),
        ("bf16", 16, 128),
        ("bf16", 128, 80),
    ]
    for name, tokens, head_dim in apart:
        start = partial(run, NUMBERS[name], tokens, 12 if head_dim == 64 else 8, head_dim, tokens == 16, 2)
        yield f"{name} T{tokens} D{head_dim} distinct layers", _with(name, start), name != "f32"


def _quantized_encoder_launches() -> Iterator[Case]:
    from ...kernels._rounding import Rounded, add_layer_norm_rounded, bias_gelu_rounded, round_rows
    from ...kernels.quantized_encoder import Matrix, quantized_product

    def product(dtype: torch.dtype, n: int, k: int, biased: bool) -> None:
        x = Rounded.empty(_ROWS, k, dtype, torch.device("meta"))
        matrix = Matrix(_empty(n, k, dtype=dtype), _empty(n), _empty(n), _empty(k), _empty(k))
        quantized_product(x, matrix, _empty(n) if biased else None)

    def rows(dtype: torch.dtype, n: int, rounding: bool = True) -> None:
        x, norm = _empty(_ROWS, n, dtype=torch.bfloat16), _empty(n, dtype=torch.bfloat16)
        vector = _empty(n)
        rounded = vector if rounding else None
        add_layer_norm_rounded(x, vector, x, norm, norm, 1e-12, rounded, rounded, dtype, n)
        if rounding:
            round_rows(x, vector, vector, dtype, n)

    for name, dtype in {"int8": torch.int8, "fp8": torch.float8_e4m3fn}.items():
        yield f"{name} N2304 K768 bias", partial(product, dtype, 2304, 768, True), True
        yield f"{name} N768", partial(rows, dtype, 768), False
        for n in (3072, 8192):
            x, vector = _empty(_ROWS, n, dtype=torch.bfloat16), _empty(n)
            yield f"{name} N{n}", partial(bias_gelu_rounded, x, vector, "gelu_tanh", vector, vector, dtype, n), False
    yield "int8 N768 K3072", partial(product, torch.int8, 768, 3072, False), True
    yield "int8 N4096", partial(rows, torch.int8, 4096), False
    x, vector = _empty(_ROWS, 16384, dtype=torch.bfloat16), _empty(16384)
    yield "int8 N16384", partial(round_rows, x, vector, vector, torch.int8, 16384), False
    yield "last layer N768", partial(rows, torch.int8, 768, False), False


CASES: dict[str, Callable[[], Iterator[Case]]] = {
    "attention": _attention_launches,
    "add_layer_norm": _add_layer_norm_launches,
    "gelu_layer_norm": _gelu_layer_norm_launches,
    "embedding_layer_norm": _embedding_layer_norm_launches,
    "bias_gelu": _bias_gelu_launches,
    "linear_gelu": _linear_gelu_launches,
    "linear_cross_entropy": _linear_cross_entropy_launches,
    "graph_inputs": _graph_inputs_launches,
    "encoder": _encoder_launches,
    "quantized_encoder": _quantized_encoder_launches,
}


def recorded_launches(*operators: str) -> list[Launch]:
    """Every different launch of these operators' Triton kernels; one that several operators share counts once.

    Raises:
        RuntimeError: Triton runs as an interpreter in this process and compiles nothing.
    """
    import triton

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton interprets kernels in this process and compiles none")
    from ... import kernels

    different: dict[tuple[Any, ...], Launch] = {}
    for operator in operators:
        own = (operator, f"{operator}_bwd")
        names = [name for _, name, _ in pkgutil.iter_modules(kernels.__path__) if name in own or name.startswith("_")]
        modules = [f"{kernels.__name__}.{name}" for name in names]
        for label, run, tensor_cores in CASES[operator]():
            every_chip = label in _EVERY_CHIP.get(operator, ())
            for launch in record(operator, label, modules, run, tensor_cores, every_chip):
                if not launch.multiplies:  # another kernel of an operator that multiplies
                    launch = replace(launch, wants_tensor_cores=False)
                key = (launch.function, launch.signature, launch.constants, launch.divisible, launch.options)
                different.setdefault(key, launch)
    return list(different.values())
