"""All layers in one call, in C++ and as one Triton kernel: parity, the same bits in any batch, the barrier, the choice."""

import importlib.util
import inspect
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from albert_fast import ALBERTConfig, ALBERTModel, explain, ops
from albert_fast.runtime import dispatch
from albert_fast.testing import ALL_CASES, poison_empty
from albert_fast.testing.gpu.fake_graphs import in_threads
from albert_fast.testing.parity import check_forward, device_of, every_pair, make_inputs, parity_tests

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
if importlib.util.find_spec("triton") is not None:
    from albert_fast.kernels import _tuning
    from albert_fast.kernels import encoder as encoder_kernel

FORWARD, _ = parity_tests("encoder")
CASE = ALL_CASES["encoder"]


def drawn(shape, **options):
    return make_inputs(CASE, shape, options, torch.float32)


@FORWARD
def test_forward(case, shape, options, dtype, backend):
    check_forward(case, shape, options, dtype, backend)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=9),
    st.sampled_from([(26, 1), (48, 3), (64, 2)]),
    st.integers(1, 200),
    st.booleans(),
)
def test_any_lengths(lengths, size, middle, wanted):
    check_forward(CASE, (tuple(lengths), *size, middle, 1, 2), {"wanted": wanted}, torch.float32, "cpp")


@pytest.mark.parametrize("lengths", [(3,), (40, 1, 7), (11,) * 30, (300,), (150, 0, 149, 2)])
@pytest.mark.parametrize("wanted", [False, True])
def test_bitwise_the_same_on_any_number_of_threads_and_in_any_batch(lengths, wanted, threads):
    # few rows are shared by columns, more of them by rows, with and without a sequence across a border
    inputs = drawn((lengths, 64, 2, 1000, 1, 3), wanted=wanted)
    threads(1)
    expected = CASE.run(inputs, "cpp")
    for count in (2, 3, 5):
        threads(count)
        assert torch.equal(CASE.run(inputs, "cpp"), expected)
    if wanted:
        return
    for begin, end in zip(inputs["cu_seqlens"][:-1].tolist(), inputs["cu_seqlens"][1:].tolist(), strict=True):
        alone = {**inputs, "hidden": inputs["hidden"][begin:end], "cu_seqlens": torch.tensor([0, end - begin]).int()}
        assert torch.equal(CASE.run(alone, "cpp"), expected[begin:end])


def test_two_threads_with_a_model_each():
    def work(inputs, expected):
        for _ in range(20):
            torch.testing.assert_close(CASE.run(inputs, "cpp"), expected, atol=1e-5, rtol=1e-5)

    many = [drawn(((30, 5, 60), 48, 2, 96, 1, 3)) for _ in range(2)]
    assert in_threads(*(partial(work, inputs, CASE.run(inputs, "reference")) for inputs in many)) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_runs_on_one_thread(threads):
    threads(2)
    inputs = drawn(((130, 60), 64, 2, 200, 1, 2))
    expected = CASE.run(inputs, "cpp")
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(CASE.run(inputs, "cpp"), expected) and torch.get_num_threads() == 1 else 1)
    ended = time.monotonic() + 60
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < ended:
        time.sleep(0.02)
    if not done[0]:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done == (child, 0), "the child waits for threads that it does not have, or computes something else"


def test_threads_rest_after_a_call(threads):
    threads(2)
    inputs = drawn(((130, 60), 64, 2, 200, 1, 2))
    CASE.run(inputs, "cpp")
    for _ in range(10):  # OpenMP's threads look for more work for some milliseconds, which may last on a busy machine
        before = time.process_time()
        time.sleep(0.5)
        if (spent := time.process_time() - before) < 0.1:
            break
    assert spent < 0.1


def test_nan_stays_in_its_sequence():
    inputs = drawn(((6, 9, 3), 48, 2, 96, 1, 2))
    clean = CASE.run(inputs, "cpp")
    inputs["hidden"][8, 5] = float("nan")
    out = CASE.run(inputs, "cpp")
    assert out[6:15].isnan().all()
    assert torch.equal(out[:6], clean[:6])
    assert torch.equal(out[15:], clean[15:])


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("48 columns are not a multiple of num_heads = 5", {"num_heads": 5}),
        ("unknown act 'swish'", {"act": "swish"}),
        (r"each from 0 to 0, got \[1\]", {"layer_indices": [1]}),
        (r"at least one layer, .* got \[\]", {"layer_indices": []}),
        (r"cu_seqlens must run from 0 to 7", {"cu_seqlens": torch.tensor([0, 8], dtype=torch.int32)}),
        (r"expected cu_seqlens of shape \(2,\) in torch.int32", {"cu_seqlens": torch.tensor([0, 7])}),
        ("give both wanted_rows and cu_wanted, or neither", {"wanted_rows": torch.tensor([0])}),
        (
            r"wanted_rows\[0\] is 7, outside its sequence.* 0 to 6",
            {"wanted_rows": torch.tensor([7]), "cu_wanted": torch.tensor([0, 1], dtype=torch.int32)},
        ),
    ],
)
def test_bad_input_is_named(message, changes):
    with pytest.raises(ValueError, match=message):
        ops.encoder(**{**drawn(((7,), 48, 2, 96, 1, 1)), **changes})


def test_misshapen_weights_are_named():
    inputs = drawn(((7,), 48, 2, 96, 1, 1))
    place = list(ops.WEIGHTS).index("dense")
    inputs["weights"][place] = torch.zeros(48, 47)
    with pytest.raises(ValueError, match=r"expected dense of shape \(48, 48\)"):
        ops.encoder(**inputs)
    inputs["weights"][place] = torch.zeros(48, 48, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"got \(48, 48\) in torch.bfloat16"):
        ops.encoder(**inputs)


# the persistent kernel -------------------------------------------------------------------------------------------------------

# Several tiles of rows, sequences that share a tile of queries, a split inner dimension; heads of 16, 26, 128 and 7.
KERNEL_SHAPES = [
    ((40, 0, 3, 24), 32, 2, 328, 1, 2),
    ((5, 1, 1, 30), 52, 2, 64, 1, 1),
    ((18,), 128, 1, 48, 1, 1),
    ((2, 0, 9), 35, 5, 645, 2, 2),
]


def by_kernel(inputs, step_programs=0):
    with poison_empty():
        return encoder_kernel.encoder_fwd(*inputs.values(), step_programs=step_programs)


@needs_triton
@every_pair(shape=KERNEL_SHAPES, dtype=[torch.float32, torch.bfloat16, torch.float16], wanted=[False, True])
def test_triton_kernel_against_torch(shape, dtype, wanted):
    check_forward(CASE, shape, {"wanted": wanted}, dtype, "triton")


@needs_triton
@pytest.mark.parametrize("wanted", [False, True])
def test_triton_kernel_is_bitwise_the_same_however_its_tiles_are_divided(wanted):
    inputs = make_inputs(CASE, KERNEL_SHAPES[0], {"wanted": wanted}, torch.bfloat16, "triton")
    # One launch, whose programs wait for each other, of which the interpreter has one.
    expected = by_kernel(inputs)
    # A launch for every phase.
    for programs in (2, 5):
        assert torch.equal(by_kernel(inputs, programs), expected), f"{programs} programs"


class Launches:
    """In the kernel's place: starts it `times` times for each launch, and keeps what it was given."""

    def __init__(self, monkeypatch, times=1):
        self.kernel, self.times, self.given = encoder_kernel._encoder_fwd_kernel, times, []
        monkeypatch.setattr(encoder_kernel, "_encoder_fwd_kernel", self)

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.given.append((grid[0], inspect.signature(self.kernel.fn).bind(*args, **self.named(options)).arguments))
            for _ in range(self.times):
                self.kernel[grid](*args, **options)

        return launch

    def named(self, options):
        return {name: value for name, value in options.items() if name in self.kernel.arg_names}


@needs_triton
def test_no_phase_of_the_triton_kernel_reads_what_it_writes(monkeypatch):
    inputs = make_inputs(CASE, KERNEL_SHAPES[0], {"wanted": True}, torch.bfloat16, "triton")
    expected = by_kernel(inputs, 2)
    Launches(monkeypatch, times=2)
    assert torch.equal(by_kernel(inputs, 2), expected)


@needs_triton
def test_triton_kernel_takes_strided_tensors_and_starts_no_program_without_work(monkeypatch):
    inputs = make_inputs(CASE, KERNEL_SHAPES[1], {"wanted": True}, torch.float32, "triton")
    expected = by_kernel(inputs)
    wide = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items() if torch.is_tensor(x)}
    wide["weights"] = [torch.stack([x, x], -1)[..., 0] for x in inputs["weights"]]
    assert torch.equal(by_kernel({**inputs, **wide}), expected)
    launches = Launches(monkeypatch, times=0)
    monkeypatch.setattr(encoder_kernel, "_programs", lambda device: 10_000)
    by_kernel(inputs)
    assert launches.given[0][0] <= encoder_kernel.PROGRAMS


@needs_triton
def test_programs_of_the_triton_kernel_meet_behind_every_phase_and_leave_no_count_of_splits(monkeypatch):
    inputs = make_inputs(CASE, KERNEL_SHAPES[0], {}, torch.bfloat16, "triton")
    launches = Launches(monkeypatch)
    by_kernel(inputs)
    ((programs, given),) = launches.given
    assert given["ffn_output_steps"] * given["BLOCK_K"] < given["middle_width"], "the inner dimension is split"
    assert (given["first_phase"], given["end_phase"]) == (0, 5 * 2 + 1)
    state = given["buffers"].state_ptr
    assert state[0] == programs * 5 * 2, "none is needed behind the last"
    assert not state[1:].any()


@needs_triton
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_triton_kernel_keeps_nan_and_infinity_in_their_sequence(bad):
    inputs = make_inputs(CASE, ((6, 9, 3), 32, 2, 96, 1, 2), {}, torch.bfloat16, "triton")
    clean = by_kernel(inputs)
    inputs["hidden"][8, 5] = float(bad)
    out = by_kernel(inputs)
    assert torch.equal(out.isnan().cpu(), CASE.eager(**inputs).isnan().cpu())
    assert out[6:15].isnan().all()
    assert torch.equal(out[:6], clean[:6])
    assert torch.equal(out[15:], clean[15:])


@needs_triton
def test_triton_kernel_takes_tokens_behind_the_last_sequence_and_rows_of_empty_ones():
    """As graphs have them: their buckets are larger than the batches."""
    inputs = make_inputs(CASE, ((9, 4), 32, 2, 64, 1, 2), {}, torch.float32, "triton")
    expected, device = by_kernel(inputs), inputs["hidden"].device
    more = {**inputs, "hidden": torch.cat([inputs["hidden"], torch.full((11, 32), torch.nan, device=device)])}
    more["cu_seqlens"] = torch.tensor([0, 9, 13, 13, 13], dtype=torch.int32, device=device)
    torch.testing.assert_close(by_kernel(more)[:13], expected, atol=1e-5, rtol=1e-5)
    firsts = {
        "wanted_rows": torch.tensor([0, 9, 13, 13], device=device),
        "cu_wanted": torch.arange(5, device=device).int(),
    }
    torch.testing.assert_close(by_kernel({**more, **firsts})[:2], expected[[0, 9]], atol=1e-5, rtol=1e-5)


@needs_triton
def test_triton_kernel_of_a_row_whose_sequence_has_no_keys_attends_to_nothing():
    inputs = make_inputs(CASE, ((5, 0, 2), 32, 2, 64, 1, 1), {}, torch.float32, "triton")
    device = inputs["hidden"].device
    inputs["wanted_rows"], inputs["cu_wanted"] = (
        torch.tensor([1, 3, 6], device=device),
        torch.arange(4, device=device).int(),
    )
    # In C++ such a row is computed from zeros, here from the row of `hidden` that is asked for.
    torch.testing.assert_close(by_kernel(inputs), CASE.eager(**inputs), atol=1e-5, rtol=1e-5)
    # Keys whose scores are all minus infinity are others than none: there torch has NaN.
    weights = dict(zip(ops.WEIGHTS, inputs["weights"], strict=True))
    weights["query_bias"][:], weights["key_bias"][:] = 1e25, -1e25
    expected = CASE.run(inputs, "reference").isnan()
    assert torch.equal(by_kernel(inputs).isnan(), expected)
    assert expected.all(1).tolist() == [True, False, True]


@needs_triton
@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_triton_kernel_of_no_token_at_all(lengths):
    inputs = make_inputs(CASE, (lengths, 32, 2, 64, 1, 2), {}, torch.float32, "triton")
    assert by_kernel(inputs).shape == (0, 32)
    some = make_inputs(CASE, ((3,), 32, 2, 64, 1, 2), {}, torch.float32, "triton")
    device = some["hidden"].device
    none = {
        "wanted_rows": torch.zeros(0, dtype=torch.int64, device=device),
        "cu_wanted": torch.zeros(2).int().to(device),
    }
    assert by_kernel({**some, **none}).shape == (0, 32)


@needs_triton
@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 10_000), st.sampled_from([16, 64, 128]))
def test_every_step_of_a_split_product_is_in_one_split(tiles, depth, block_k):
    splits, steps = encoder_kernel.split_depth(tiles, depth, block_k)
    assert (splits - 1) * steps * block_k < depth <= splits * steps * block_k, "none is empty, and nothing is left over"
    assert splits == 1 or splits * tiles <= encoder_kernel.PROGRAMS, "their sums fit the memory that they get"


COMPILED = """
import importlib
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from albert_fast.testing.gpu.launches import recorded_launches
launch = next(launch for launch in recorded_launches("encoder") if launch.label.startswith("bf16 T128 D64"))
function = getattr(importlib.import_module(launch.module), launch.function)
attributes = {path: [["tt.divisibility", 16]] for path in launch.divisible}
source = ASTSource(function, dict(launch.signature), dict(launch.constants), attributes)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(launch.options))
assert compiled.metadata.launch_cooperative_grid
print(compiled.asm["ptx"])
"""


@needs_triton
def test_barriers_of_the_triton_kernel_order_memory_as_its_docstring_says():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ptx = [line.strip() for line in done.stdout.splitlines() if not line.strip().startswith(("//", ".loc", "$L__tmp"))]
    assert not [line for line in ptx if ".nc." in line], "the read-only path does not see what others wrote"
    atomics = [i for i, line in enumerate(ptx) if re.search(r"\batom\.|\.acquire\b", line)]
    assert any(line.startswith("trap;") for line in ptx), "a program that waits in vain ends its launch"
    # The barrier: release, acquire, acquire in the loop. The four products: both in one.
    kinds = [re.search(r"\.(release|acquire|acq_rel)\b", ptx[i])[1] for i in atomics]
    assert sorted(kinds) == ["acq_rel"] * 4 + ["acquire"] * 2 + ["release"]
    assert all(".gpu." in ptx[i] and ".global" in ptx[i] for i in atomics)
    synchronises = re.compile(r"\b(bar\.sync|barrier\.sync)\b")
    for i, kind in zip(atomics, kinds, strict=True):
        between_before = itertools.takewhile(lambda line: not synchronises.search(line), reversed(ptx[:i]))
        between_after = itertools.takewhile(lambda line: not synchronises.search(line), ptx[i + 1 :])
        if kind != "acquire":
            assert not [line for line in between_before if re.search(r"\bst\.global", line)], (
                "a store escapes the release"
            )
        if kind != "release":
            assert not [line for line in between_after if re.search(r"\bld\.global|cp\.async\.c", line)], (
                "a load runs ahead"
            )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
def test_on_a_gpu_programs_that_wait_for_each_other_give_what_separate_launches_give():
    for lengths in ((16,), (128,), (100, 1, 0, 200, 35)):
        inputs = make_inputs(CASE, (lengths, 768, 12, 3072, 1, 12), {}, torch.bfloat16, "triton")
        expected = by_kernel(inputs, 64)
        for _ in range(50):
            assert torch.equal(by_kernel(inputs), expected)
        graph, out = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph):
            out = encoder_kernel.encoder_fwd(*inputs.values())
        for _ in range(50):
            out.zero_()
            graph.replay()
            assert torch.equal(out, expected)


def small_model(backend):
    config = ALBERTConfig(
        vocab_size=61, embedding_size=12, hidden_size=32, num_attention_heads=2, intermediate_size=64, num_hidden_layers=3,
        max_position_embeddings=40,
    )  # fmt: skip
    return ALBERTModel(config, backend=backend).eval().requires_grad_(False).to(device_of("triton"))


@needs_triton
@pytest.mark.parametrize("wanted_tokens", ["all", "first"])
def test_a_model_takes_the_triton_kernel_by_name(monkeypatch, wanted_tokens):
    model, called = small_model("triton"), []
    kernel = encoder_kernel.encoder_fwd
    monkeypatch.setattr(encoder_kernel, "encoder_fwd", lambda *a, **k: called.append(1) or kernel(*a, **k))
    ids = torch.randint(61, (3, 7), device=device_of("triton"))
    mask = torch.tensor([[1] * 7, [0, 1, 1] * 2 + [1], [1] + [0] * 6], device=ids.device)
    assert [step.backend for step in explain(model, ids, mask).steps if step.name == "encoder"] == ["triton"]
    out = model(ids, mask, wanted_tokens=wanted_tokens)
    assert called
    model.execution.backend = "reference"
    expected = model(ids, mask, wanted_tokens=wanted_tokens)
    torch.testing.assert_close(out.pooler_output, expected.pooler_output)
    torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state)


@needs_triton
def test_why_a_model_does_not_take_the_triton_kernel():
    encoder = small_model("triton").encoder

    def why(tokens=3, backend="triton"):
        return encoder.why_not_one_call(torch.zeros(tokens, 32, device=device_of("triton")), backend)

    assert why() is None
    assert "513 tokens" in why(513)
    assert "'cuda'" in why(backend="cuda")
    encoder.spec = replace(encoder.spec, hidden_size=258, num_heads=2)
    assert "heads of 129" in why()
    encoder.train()
    assert "training" in why()


@needs_triton
def test_where_nobody_compares_kernels_a_call_looks_at_no_part_of_the_layers(monkeypatch):
    encoder = small_model("auto").encoder
    monkeypatch.setattr(dispatch, "runnable_on", lambda *_: ("triton",))  # as on a GPU
    monkeypatch.setattr(type(encoder.distinct()[0]), "is_plain", lambda layer: pytest.fail("the layers were looked at"))
    hidden = torch.zeros(3, 32, device=device_of("triton"))
    assert "ALBERT_FAST_TUNE" in encoder.why_not_one_call(hidden, "auto")


class Tuner:
    """In the place of the GPU's: the kernel takes `seconds` of it, the operators 2."""

    def __init__(self, seconds):
        self.seconds, self.winners, self.launched = seconds, {}, []

    def known(self, key):
        return self.winners.get(key)

    def choose(self, key, candidates, launch, timer):
        assert timer is _tuning.time_in_graph
        for tiles in candidates:
            launch(tiles)
        return self.winners.setdefault(key, candidates[self.seconds < 2])


@needs_triton
@pytest.mark.parametrize(("asked", "seconds", "faster"), [(False, 1, False), (True, 3, False), (True, 1, True)])
def test_by_default_the_kernel_runs_where_it_was_measured_faster(monkeypatch, asked, seconds, faster):
    tuner, launched = Tuner(seconds), []
    monkeypatch.setattr(_tuning, "asked_for", lambda: asked)
    monkeypatch.setattr(_tuning, "_tuner", lambda chip: tuner)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    sizes, run = (768, 3072, 12, 12), launched.append
    assert not ops.kernel_is_faster(torch.bfloat16, 100, sizes, None), "nothing was measured, and nothing is now"
    assert ops.kernel_is_faster(torch.bfloat16, 100, sizes, run) == faster
    assert launched == (["operators", "triton"] if asked else [])
    assert ops.kernel_is_faster(torch.bfloat16, 128, sizes, None) == faster, "as many tokens, by powers of two"
    assert not ops.kernel_is_faster(torch.bfloat16, 129, sizes, None)
