"""The models on a GPU against the plain reference in float64 on the CPU, with the reference on that GPU as the yardstick.

ALBERT_FAST_TEST_DEVICE=cpu rehearses this file where there is no GPU: all but what streams need.
"""

from __future__ import annotations

import copy
import itertools
import os
import threading

import pytest
import torch

import albert_fast
from albert_fast import ALBERTConfig
from albert_fast.models import reference
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES, assert_close_calibrated, poison_empty
from albert_fast.testing.gpu.tf32 import TF32Products, tf32_asked_for
from albert_fast.testing.model_pairs import NAMES, OUTPUTS, drawn_inputs, drawn_mask, gradients
from albert_fast.testing.parity import check_backward, check_forward, make_inputs
from albert_fast.testing.tolerances import SLACK, largest_error

DEVICE = torch.device(os.environ.get("ALBERT_FAST_TEST_DEVICE", "cuda"))
ON_GPU = DEVICE.type == "cuda"
pytestmark = pytest.mark.skipif(ON_GPU and not torch.cuda.is_available(), reason="there is no GPU here")
if ON_GPU:
    # cuBLAS reads it once, at its first product. Without it, torch's deterministic mode refuses to multiply.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

CONFIGS = {
    "small": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 384, "num_hidden_layers": 3},
    "odd": {"hidden_size": 78, "num_attention_heads": 3, "intermediate_size": 129, "num_hidden_layers": 2},
    "base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12},
    "large": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24},
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
MASKS = ["none", "right", "left", "holes", "empty row"]
ROWS, COLUMNS = 4, 37
# Every kind of mask on the smaller models, one each on the larger.
GRID = [(size, kind) for size in ("small", "odd") for kind in MASKS] + [
    ("base", "right"),
    ("base", "none"),
    ("large", "holes"),
]
# Every operator with a kernel for GPUs: so many rows that a program walks over many tiles, and never a whole number of tiles.
TOKENS, LENGTHS = (4099, (512, 509, 1, 128, 31, 512, 77)) if ON_GPU else (41, (17, 1, 23))
REAL_SHAPES = {
    "embedding_projection": (TOKENS, 128, 768, 30000, 512, 2),
    "embedding_layer_norm": (TOKENS, 768, 30522, 512, 2),
    "attention": (LENGTHS, None, 12, 64),
    "bias_gelu": (TOKENS, 3072),
    "linear_gelu": (TOKENS, 768, 3072),
    "add_layer_norm": (TOKENS, 768),
    "gelu_layer_norm": (TOKENS, 128),
    "linear_cross_entropy": (TOKENS // 4, 128, 30000),
    "encoder": (LENGTHS, 768, 12, 3072, 2, 2),
    "quantized_encoder": (LENGTHS, 768, 12, 3072, 2, 2),
}


def real_size():
    """(id, operator, options, dtype) of every operator with a kernel on DEVICE."""
    for op, (name, dtype) in itertools.product(REAL_SHAPES, DTYPES.items()):
        first = dispatch.runnable_on(op, DEVICE.type)[0]
        if dispatch.why_not(op, DEVICE.type, first, dtype) is None:
            for options in filter(lambda options: ALL_CASES[op].takes(options, dtype), ALL_CASES[op].options):
                yield "-".join([op, *(f"{k}={v}" for k, v in options.items()), name]), op, options, dtype


def models(name, size, dtype, **fields):
    """(exact, same, fast) with the same weights: float64 on the CPU, the reference and ours in `dtype` on DEVICE."""
    config = ALBERTConfig(
        **{"vocab_size": 301, "embedding_size": 64, "max_position_embeddings": 64, **CONFIGS[size], **fields}
    )
    exact = getattr(reference, name)(config).eval()
    with torch.no_grad():
        for key, parameter in exact.named_parameters():
            noise = torch.randn(parameter.shape)
            if "norm" in key.lower():
                parameter.copy_(0.1 * noise + key.endswith("weight"))
            else:
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.1))
    exact.to(dtype)  # all three compute with the rounded weights
    same = copy.deepcopy(exact).to(DEVICE)
    fast = getattr(albert_fast, name)(config).eval().to(DEVICE, dtype)
    fast.load_state_dict(exact.state_dict())
    return exact.double(), same, fast


def assert_gradients_calibrated(exact, same, fast, dtype):
    """A parameter's gradient errs, in norm, at most twice as much as the reference's in the same dtype, plus a small term.

    Gradients that are zero but for rounding (of the keys' bias, say) are held against the norm of all of them together.
    """
    expected, yardstick, actual = gradients(exact), gradients(same), gradients(fast)
    assert actual.keys() == expected.keys() == yardstick.keys()
    total = sum(float(gradient.square().sum()) for gradient in expected.values()) ** 0.5
    assert total > 0
    floor = max(4 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps / 4) * total
    for key, gradient in expected.items():
        error, allowed = (float((other[key].cpu().double() - gradient).norm()) for other in (actual, yardstick))
        allowed = 2 * allowed + SLACK[dtype] * float(gradient.norm()) + floor
        assert error <= allowed, f"{key}: error {error:.3g} exceeds {allowed:.3g}, norm {float(gradient.norm()):.3g}"


def on_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def test_every_kernel_for_gpus_has_a_real_shape():
    assert set(REAL_SHAPES) == {op for op, devices in dispatch.TABLE.items() if devices["cuda"][0] != "reference"}


@pytest.mark.parametrize(
    ("op", "options", "dtype"), [row[1:] for row in real_size()], ids=[row[0] for row in real_size()]
)
def test_an_operator_on_a_batch_of_real_size(op, options, dtype):
    if "precision" in options and (reason := dispatch.why_not_quantized(options["precision"], DEVICE, "auto")):
        pytest.skip(reason)
    backend = dispatch.resolve(op, DEVICE.type, dtype)
    assert backend != "reference"
    check_forward(ALL_CASES[op], REAL_SHAPES[op], options, dtype, backend)
    if ALL_CASES[op].gradients:
        check_backward(ALL_CASES[op], REAL_SHAPES[op], options, dtype, backend)


@pytest.mark.skipif(not ON_GPU, reason="TF32 is for tensor cores")
@pytest.mark.parametrize("op", ["attention", "linear_gelu", "linear_cross_entropy", "encoder"])
def test_float32_is_multiplied_as_tf32_where_torch_is_asked_for_it(op):
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this chip has no TF32")
    case, backend = ALL_CASES[op], dispatch.resolve(op, DEVICE.type, torch.float32)
    inputs = make_inputs(case, REAL_SHAPES[op], {}, torch.float32, backend)
    with torch.no_grad():
        exact, default = case.exact(inputs), case.run(inputs, backend)
        with tf32_asked_for():
            asked = case.run(inputs, backend)
        again = case.run(inputs, backend)
    size = float(exact.abs().max())
    assert largest_error(default, exact) < 2**-16 * size
    assert 2**-15 * size < largest_error(asked, exact) < 2**-7 * size
    assert torch.equal(again, default)
    with tf32_asked_for(), TF32Products():
        check_forward(case, REAL_SHAPES[op], {}, torch.float32, backend)
        if case.gradients:
            check_backward(case, REAL_SHAPES[op], {}, torch.float32, backend)


@pytest.mark.skipif(not ON_GPU, reason="graphs are a GPU's")
def test_a_graph_is_replayed_where_float32_multiplies_as_in_its_capture():
    fast, ids, mask = encoder()
    graphed = copy.deepcopy(fast)
    graphed.execution.warmup([])

    def pooled(model, asked):
        with tf32_asked_for(asked):
            return model(ids, mask).pooler_output

    with torch.no_grad():
        for asked in (False, True, False):
            same, other = pooled(fast, asked), pooled(fast, not asked)
            for _ in range(3):  # before its bucket is captured, and after
                found = pooled(graphed, asked)
                # Not bitwise: a bucket has more rows, and cuBLAS may choose another kernel for them.
                assert (found - same).abs().max() < 0.5 * (found - other).abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "mask_kind"), GRID, ids=["-".join(row).replace(" ", "_") for row in GRID])
def test_outputs_and_gradients_of_the_encoder(size, mask_kind, dtype):
    dtype = DTYPES[dtype]
    everything = models("ALBERTModel", size, dtype)
    # float64 on the CPU is slow.
    rows, columns = (ROWS, COLUMNS) if size in ("small", "odd") else (2, 19)
    inputs = {"input_ids": torch.randint(301, (rows, columns)), "token_type_ids": torch.randint(2, (rows, columns))}
    if (mask := drawn_mask(mask_kind, rows, columns, seed=1)) is not None:
        inputs["attention_mask"] = mask
    outputs = []
    for model in everything:
        device = next(model.parameters()).device
        with poison_empty():
            outputs.append(model(**{name: tensor.to(device) for name, tensor in inputs.items()}))
    for name in ("last_hidden_state", "pooler_output"):
        exact, same, fast = (getattr(output, name).detach().cpu() for output in outputs)
        assert fast.dtype == dtype
        assert_close_calibrated(fast, same, exact, name)
    cotangents = [torch.randn(state.shape) for state in (outputs[0].last_hidden_state, outputs[0].pooler_output)]
    for output in outputs:
        states = output.last_hidden_state, output.pooler_output
        with poison_empty():
            torch.autograd.backward(states, [c.to(state) for c, state in zip(cotangents, states, strict=True)])
    assert_gradients_calibrated(*everything, dtype)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("mask_kind", ["none", "holes"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "Model"])
def test_every_head_s_loss_logits_and_gradients(name, mask_kind, dtype):
    dtype = DTYPES[dtype]
    labels = {"num_labels": 2 if name in ("ForPreTraining", "ForQuestionAnswering") else 3}
    everything = exact, same, fast = models(f"ALBERT{name}", "small", dtype, **labels)
    inputs = drawn_inputs(name, exact.config, mask_kind, seed=5)
    outputs = exact(**inputs), same(**on_device(inputs)), fast(**on_device(inputs))
    logits_err = 0.0
    for key in OUTPUTS[name]:
        answers = [getattr(output, key).detach().cpu().double() for output in outputs]
        # Question answering has the dtype's lowest number at padding.
        exact_answer, same_answer, fast_answer = (a.masked_fill(a < -1e30, 0.0) for a in answers)
        assert_close_calibrated(fast_answer.to(dtype), same_answer, exact_answer, key)
        logits_err = max(logits_err, largest_error(same_answer, exact_answer))
    # A cross-entropy changes by up to twice as much as its logits; two of them are added, and one may be right by chance.
    expected, yardstick, loss = (output.loss.detach().cpu() for output in outputs)
    assert_close_calibrated(loss, yardstick, expected, "loss", slack=4 * logits_err / float(expected))
    for output in outputs:
        output.loss.backward()
    assert_gradients_calibrated(*everything, dtype)


def encoder(**fields):
    """Our ALBERTModel on DEVICE, and a batch of random lengths."""
    fast = models("ALBERTModel", "small", torch.float32, **fields)[2]
    return (
        fast,
        torch.randint(301, (ROWS, COLUMNS), device=DEVICE),
        drawn_mask("right", ROWS, COLUMNS, seed=2).to(DEVICE),
    )


def test_packed_input_gives_what_padded_input_gives():
    fast, ids, mask = encoder()
    lengths = mask.sum(1)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    with torch.no_grad():
        packed = fast.forward_packed(ids[mask.bool()], cu_seqlens, COLUMNS)
        padded = fast(ids, mask)
    assert torch.equal(packed.last_hidden_state, padded.last_hidden_state[mask.bool()])
    torch.testing.assert_close(packed.pooler_output, padded.pooler_output, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not ON_GPU, reason="streams are a GPU's")
def test_two_streams_at_once():
    fast, ids, mask = encoder()
    batches = [(ids, mask), (ids.flip(0).contiguous(), mask.flip(0).contiguous())]
    with torch.no_grad():
        expected = [fast(*batch).last_hidden_state for batch in batches]
        streams = [torch.cuda.Stream() for _ in batches]
        torch.cuda.synchronize()
        actual = [[], []]
        for _ in range(10):
            for stream, batch, results in zip(streams, batches, actual, strict=True):
                with torch.cuda.stream(stream):
                    results.append(fast(*batch).last_hidden_state)
        torch.cuda.synchronize()
    for results, state in zip(actual, expected, strict=True):
        assert all(torch.equal(result, state) for result in results)


def test_two_models_in_two_threads():
    made = [encoder(), encoder()]
    failures = []

    def run(fast, ids, mask, expected):
        try:
            with torch.no_grad():
                for _ in range(10):
                    assert torch.equal(fast(ids, mask).last_hidden_state, expected)
        except Exception as error:
            failures.append(error)

    with torch.no_grad():
        expected = [fast(ids, mask).last_hidden_state for fast, ids, mask in made]
    threads = [threading.Thread(target=run, args=(*one, e)) for one, e in zip(made, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize("asked_for", [False, True], ids=["default", "deterministic"])
def test_two_backward_passes_are_bitwise_equal(asked_for):
    fast, ids, mask = encoder(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    fast.train()
    found = []
    torch.use_deterministic_algorithms(asked_for)
    try:
        for _ in range(2):
            torch.manual_seed(3)
            fast.zero_grad()
            fast(ids, mask).last_hidden_state.square().sum().backward()
            found.append(gradients(fast))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_compiled_gives_what_eager_gives(masked):
    fast, ids, mask = encoder()
    arguments = (ids, mask) if masked else (ids,)
    compiled = torch.compile(fast, fullgraph=True)
    found = []
    for call in (fast, compiled):
        fast.zero_grad()
        output = call(*arguments)
        output.last_hidden_state.square().mean().backward()
        found.append((output, gradients(fast)))
    for name in ("last_hidden_state", "pooler_output"):
        eager, traced = (getattr(output, name) for output, _ in found)
        torch.testing.assert_close(traced, eager, atol=2e-5, rtol=1e-4)
    for key, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], gradient, atol=1e-6, rtol=1e-3)


def test_a_step_under_autocast_with_a_grad_scaler():
    low = torch.float16 if ON_GPU else torch.bfloat16
    _, same, fast = models("ALBERTForMaskedLM", "small", torch.float32)
    inputs = on_device(drawn_inputs("ForMaskedLM", fast.config, "right", seed=9))
    losses, steps = [], []
    for model in (same, fast):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=256.0)
        with torch.autocast(DEVICE.type, low):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 256.0, "a gradient overflowed and the step was left out"
        losses.append(loss.item())
        steps.append({key: value - before[key] for key, value in model.state_dict().items()})
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
    total = sum(float(step.square().sum()) for step in steps[0].values()) ** 0.5
    assert total > 0
    error = sum(float((steps[1][key] - step).square().sum()) for key, step in steps[0].items()) ** 0.5
    assert error <= 5e-2 * total


def until_reported(fast, wrong, right, mask):
    """A bad id on a GPU is reported at the latest by the next call, or when the program waits for the GPU."""
    fast(wrong, mask)
    albert_fast.synchronize()
    fast(right, mask)


@pytest.mark.parametrize("bad", [-1, 301, 10**9])
def test_a_bad_id_raises_and_the_device_stays_usable(bad):
    fast, ids, mask = encoder()
    wrong = ids.clone()
    wrong[1, 0] = bad
    with torch.no_grad():
        expected = fast(ids, mask).last_hidden_state
        with pytest.raises(IndexError, match=rf"input_ids\[1, 0\] is {bad}"):
            until_reported(fast, wrong, ids, mask)
        assert torch.equal(fast(ids, mask).last_hidden_state, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint in float32."""
    folder = tmp_path_factory.mktemp("saved")
    models("ALBERTModel", "small", torch.float32)[0].float().save_pretrained(folder)
    return folder


@pytest.mark.skipif(not ON_GPU, reason="a CPU has other integers, and no float8")
@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("wanted_tokens", ["all", "first"])
def test_quantized_layers_err_as_their_reference_does(saved, precision, wanted_tokens, tmp_path):
    if reason := dispatch.why_not_quantized(precision, DEVICE, "auto"):
        pytest.skip(reason)
    ids, mask = (
        torch.randint(301, (ROWS, COLUMNS), device=DEVICE),
        drawn_mask("right", ROWS, COLUMNS, seed=2).to(DEVICE),
    )
    options = {"precision": precision, "calibration": [(ids, mask)]}
    made = albert_fast.ALBERTModel.from_pretrained(saved, device=DEVICE, **options)
    made.save_pretrained(tmp_path)
    exact = reference.ALBERTModel.from_pretrained(saved)
    with torch.no_grad(), poison_empty():
        expected = exact(ids.cpu(), mask.cpu()).pooler_output
        found = {
            backend: albert_fast.ALBERTModel.from_pretrained(
                tmp_path, device=DEVICE, precision=precision, backend=backend
            )(ids, mask, wanted_tokens=wanted_tokens)
            .pooler_output.cpu()
            .float()
            for backend in ("auto", "reference")
        }
        again = made(ids, mask, wanted_tokens=wanted_tokens).pooler_output.cpu().float()
    assert torch.equal(again, found["auto"])
    errors = {backend: float((output - expected).norm() / expected.norm()) for backend, output in found.items()}
    assert errors["auto"] <= 1.25 * errors["reference"] + 2**-8
    assert errors["reference"] < (0.1 if precision == "int8" else 0.2)


@pytest.mark.skipif(not ON_GPU, reason="graphs are a GPU's")
@pytest.mark.parametrize("wanted_tokens", ["all", "first"])
def test_quantized_layers_are_replayed(saved, wanted_tokens):
    fast = albert_fast.ALBERTModel.from_pretrained(saved, device=DEVICE, precision="int8")
    graphed = copy.deepcopy(fast)
    graphed.execution.warmup([(ROWS, COLUMNS)])
    ids, mask = (
        torch.randint(301, (ROWS, COLUMNS), device=DEVICE),
        drawn_mask("right", ROWS, COLUMNS, seed=2).to(DEVICE),
    )
    with torch.no_grad():
        for _ in range(3):  # before its bucket is captured, and after
            actual, expected = (model(ids, mask, wanted_tokens=wanted_tokens) for model in (graphed, fast))
            assert torch.equal(actual.pooler_output, expected.pooler_output)
            assert torch.equal(actual.last_hidden_state, expected.last_hidden_state) or wanted_tokens == "first"
    assert len(graphed.execution_state.graphs) >= 2


@pytest.mark.skipif(not ON_GPU, reason="the layout of a CPU is another")
def test_integers_move_between_devices(saved):
    model = albert_fast.ALBERTModel.from_pretrained(saved, precision="int8")
    state = model.encoder.state_dict()
    model.to(DEVICE)
    moved = model.encoder.state_dict()
    assert all(torch.equal(moved[key].cpu(), state[key]) for key in state)
    assert {linear.integers.dim() for layer in model.encoder.distinct() for linear in layer.products()} == {2}
    model.execution.use("auto", "int8")
    with torch.no_grad():
        ids = torch.randint(301, (2, 9), device=DEVICE)
        assert model(ids).last_hidden_state.dtype == torch.bfloat16
