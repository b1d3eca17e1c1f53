"""The fast models against the reference: any batch, any mask, packed input, some tokens only, compiled, exported."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import albert_fast
from albert_fast import ALBERTConfig, ALBERTModel, explain, ops
from albert_fast.layers.packing import packed_already
from albert_fast.layers.wanted import WantedTokens
from albert_fast.models import reference
from albert_fast.runtime import dispatch

SMALL = {
    "vocab_size": 61, "embedding_size": 12, "hidden_size": 40, "num_attention_heads": 4, "intermediate_size": 56,
    "num_hidden_layers": 3, "max_position_embeddings": 48,
}  # fmt: skip


def pair(name="ALBERTModel", backend="auto", **fields):
    """The reference and the fast model of class `name` with the same random weights, in eval mode."""
    config = ALBERTConfig(**{**SMALL, "initializer_range": 0.2, **fields})
    slow = getattr(reference, name)(config).eval()
    fast = getattr(albert_fast, name)(config, backend=backend).eval()
    fast.load_state_dict(slow.state_dict())
    return slow, fast


def assert_same(actual, expected, atol=2e-5):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4)


@st.composite
def batches(draw):
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 48))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["none", "right", "left", "holes", "empty rows"]))
    lengths = generator.integers(1, columns + 1, (rows, 1))
    column = np.arange(columns)[None]
    masks = {
        "none": np.ones((rows, columns)), "right": column < lengths, "left": column >= columns - lengths,
        "holes": generator.random((rows, columns)) < 0.6,
        "empty rows": (column < lengths) * (generator.random((rows, 1)) < 0.5),
    }  # fmt: skip
    return torch.from_numpy(generator.integers(0, 61, (rows, columns))), torch.from_numpy(masks[kind].astype(np.int64))


@pytest.mark.parametrize(("backend", "grad"), [("reference", False), ("cpp", False), ("cpp", True)])
def test_any_batch_and_mask(backend, grad):
    slow, fast = pair(backend=backend)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(batches())
    def check(batch):
        ids, mask = batch
        with torch.set_grad_enabled(grad):  # without, all layers are one operator
            expected, actual = slow(ids, mask), fast(ids, mask)
        assert_same(actual.last_hidden_state, expected.last_hidden_state)
        assert_same(actual.pooler_output, expected.pooler_output)
        assert (actual.last_hidden_state[mask == 0] == 0).all()

    check()


def test_a_sequence_does_not_feel_its_neighbours():
    _, fast = pair()
    ids = torch.randint(0, 61, (4, 30))
    mask = torch.ones_like(ids)
    mask[0, 11:] = 0
    with torch.no_grad():
        together = fast(ids, mask).last_hidden_state[0, :11]
        ids[1:] = torch.randint(0, 61, (3, 30))
        assert torch.equal(fast(ids, mask).last_hidden_state[0, :11], together)
        assert_same(fast(ids[:1, :11]).last_hidden_state[0], together)


@pytest.mark.parametrize("name", ["ALBERTModel", "ALBERTForMaskedLM", "ALBERTForSequenceClassification"])
def test_gradients(name):
    slow, fast = pair(name)
    ids, mask = torch.randint(1, 61, (3, 17)), torch.ones(3, 17, dtype=torch.long)
    mask[1, 9:] = 0
    losses = []
    for model in (slow, fast):
        output = model(ids, mask)[0]
        losses.append((output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum())
        losses[-1].backward()
    expected = {key: p.grad for key, p in slow.named_parameters() if p.grad is not None}
    actual = {key: p.grad for key, p in fast.named_parameters() if p.grad is not None}
    assert actual.keys() == expected.keys()
    # A softmax does not feel a shift: the key bias's gradient is rounding alone, so the largest gradient is the measure.
    largest = max(grad.norm() for grad in expected.values())
    for key, grad in expected.items():
        assert (actual[key] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, key


def test_forward_packed_is_forward_without_the_padding():
    _, fast = pair()
    lengths = [5, 17, 1, 0, 8]
    cu_seqlens = torch.tensor([0, 5, 22, 23, 23, 31], dtype=torch.int32)
    packed_ids = torch.randint(0, 61, (31,))
    ids, mask = torch.zeros(5, 17, dtype=torch.long), torch.zeros(5, 17, dtype=torch.long)
    for row, (length, sequence) in enumerate(zip(lengths, packed_ids.split(lengths), strict=True)):
        ids[row, :length], mask[row, :length] = sequence, 1
    with torch.no_grad():
        packed = fast.forward_packed(packed_ids, cu_seqlens, 17, output_hidden_states=True)
        padded = fast(ids, mask, output_hidden_states=True)
    assert torch.equal(packed.last_hidden_state, padded.last_hidden_state[mask == 1])
    assert torch.equal(packed.pooler_output, padded.pooler_output)
    for a, b in zip(packed.hidden_states, padded.hidden_states, strict=True):
        assert torch.equal(a, b[mask == 1])


@pytest.mark.parametrize(
    ("cu_seqlens", "max_seqlen", "error"),
    [
        (torch.tensor([0, 9], dtype=torch.int32), 9, ValueError),
        (torch.tensor([0, 6, 4, 8], dtype=torch.int32), 8, ValueError),
        (torch.tensor([1, 8], dtype=torch.int32), 8, ValueError),
        (torch.tensor([0, 8]), 8, TypeError),
        (torch.tensor([0, 8], dtype=torch.int32), 7, ValueError),
        (torch.tensor([0, 8], dtype=torch.int32), 49, ValueError),
    ],
)
def test_forward_packed_trusts_no_cu_seqlens(cu_seqlens, max_seqlen, error):
    _, fast = pair()
    with pytest.raises(error):
        fast.forward_packed(torch.zeros(8, dtype=torch.long), cu_seqlens, max_seqlen)


def test_lengths_on_the_cpu_are_checked_there_and_copied_without_a_wait(monkeypatch):
    pinned, copied = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    whole = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *a, **k: copied.append((a, k)) or whole(self, *a, **k))
    lengths, meta = torch.tensor([0, 5, 8], dtype=torch.int32), torch.device("meta")
    found = packed_already(8, lengths, 5, meta)
    assert found.cu_seqlens.is_meta, "which nothing can be read from"
    assert (pinned, copied) == ([lengths], [((meta,), {"non_blocking": True})])
    for tokens, longest in ((9, 5), (8, 4)):
        with pytest.raises(ValueError, match=r"cu_seqlens must run|the longest sequence has 5"):
            packed_already(tokens, lengths, longest, meta)
    assert packed_already(8, lengths, 5, lengths.device).cu_seqlens is lengths
    assert len(pinned) == 1
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="would repeat the lengths"):
        packed_already(8, lengths, 5, meta)


def test_only_some_tokens_of_the_last_layer():
    _, fast = pair()
    ids, mask = torch.randint(0, 61, (4, 19)), torch.ones(4, 19, dtype=torch.long)
    mask[0, 7:], mask[2] = 0, 0
    wanted = torch.rand(4, 19) < 0.3
    with torch.no_grad():
        everything = fast(ids, mask)
        some = fast(ids, mask, wanted_tokens=wanted)
        first = fast(ids, mask, wanted_tokens="first")
    assert some.pooler_output is None
    assert_same(some.last_hidden_state, everything.last_hidden_state[wanted & (mask == 1)], atol=1e-6)
    assert first.last_hidden_state is None
    assert_same(first.pooler_output, everything.pooler_output, atol=1e-6)


def test_masked_lm_for_labelled_tokens_only():
    _, fast = pair("ALBERTForMaskedLM")
    ids, mask = torch.randint(0, 61, (4, 19)), torch.ones(4, 19, dtype=torch.long)
    mask[1, 5:] = 0
    labels = torch.where(torch.rand(4, 19) < 0.3, ids, -100)
    everything = fast(ids, mask, labels=labels)
    some = fast(ids, mask, labels=labels, wanted_tokens=labels != -100)
    assert_same(some.loss, everything.loss)
    assert_same(some.logits, everything.logits[(labels != -100) & (mask == 1)])


@pytest.mark.parametrize("shape", [(19, 4), (4, 18), (5, 19)])
def test_wanted_tokens_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"wanted_tokens .* does not fit the batch of \(4, 19\)"):
        pair()[1](torch.zeros(4, 19, dtype=torch.long), wanted_tokens=torch.ones(shape, dtype=torch.bool))


def test_wanted_tokens_refuse_what_no_model_computes():
    mask = torch.ones(4, 19, dtype=torch.bool)
    for which in ("frist", "", "ALL"):
        with pytest.raises(ValueError, match=f'must be "all", "first" or "masked", got {which!r}'):
            WantedTokens(which)
    for which, its_mask in (("all", mask), ("first", mask), ("masked", None)):
        with pytest.raises(ValueError, match='"masked" needs a mask, and only "masked" takes one'):
            WantedTokens(which, its_mask)


def test_an_unknown_argument_is_named():
    ids = torch.zeros(2, 3, dtype=torch.long)
    for name in ("ALBERTForMaskedLM", "ALBERTForQuestionAnswering", "ALBERTForSequenceClassification"):
        with pytest.raises(TypeError, match=rf"{name}.forward\(\) got an unexpected keyword argument 'head_mask'"):
            pair(name)[1](ids, head_mask=None)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("ALBERTForMaskedLM", "aot_eager"),
        pytest.param("ALBERTModel", "aot_eager", marks=pytest.mark.thorough),
        pytest.param("ALBERTForSequenceClassification", "aot_eager", marks=pytest.mark.thorough),
        # Machine code for one of them, which takes half a minute: heads are traced alike, and add no operators of ours.
        pytest.param("ALBERTModel", "inductor", marks=pytest.mark.thorough),
    ],
)
def test_compiled_as_one_graph(name, backend):
    _, fast = pair(name, num_hidden_layers=2)
    compiled = torch.compile(fast, fullgraph=True, backend=backend)
    for rows, columns in ((2, 9), (3, 14)):
        ids, mask = torch.randint(1, 61, (rows, columns)), torch.ones(rows, columns, dtype=torch.long)
        mask[0, 4:] = 0
        with torch.no_grad():
            assert_same(compiled(ids, mask)[0], fast(ids, mask)[0])
    gradients = []
    for model in (fast, compiled):
        fast.zero_grad()
        model(ids, mask)[0].square().sum().backward()
        # Of a parameter that was not used, eager torch gives no gradient and compiled code zeros.
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in fast.parameters()])
    largest = max(grad.norm() for grad in gradients[0])
    for expected, actual in zip(*gradients, strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm() + 1e-6 * largest


def test_exported():
    _, fast = pair("ALBERTForSequenceClassification")
    ids, mask = torch.randint(0, 61, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    with torch.no_grad():
        program = torch.export.export(fast, (ids, mask), strict=False)
        assert_same(program.module()(ids, mask).logits, fast(ids, mask).logits)


def test_bfloat16_and_float16_stay_near():
    slow, fast = pair(initializer_range=0.05)
    ids = torch.randint(0, 61, (3, 20))
    with torch.no_grad():
        exact = slow(ids).last_hidden_state
        for dtype in (torch.bfloat16, torch.float16):
            ours = fast.to(dtype)(ids).last_hidden_state.float()
            theirs = slow.to(dtype)(ids).last_hidden_state.float()
            slow.float(), fast.load_state_dict(slow.state_dict())
            assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 1e-3 * exact.norm()


def test_autocast_trains_as_the_reference_does():
    slow, fast = pair("ALBERTForSequenceClassification", initializer_range=0.05)
    ids, labels = torch.randint(1, 61, (4, 15)), torch.tensor([0, 1, 1, 0])
    losses, gradients = [], []
    for model, enabled in ((slow, False), (slow, True), (fast, True)):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model(ids, labels=labels).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append(model.albert.embeddings.word_embeddings.weight.grad.clone())
    for exact, theirs, ours in (losses, gradients):
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm() + 5e-3 * exact.norm()


def test_a_second_derivative_is_refused_not_wrong():
    x = torch.randn(3, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(ops.bias_gelu(x, torch.zeros(5)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        gradient.sum().backward()


def test_a_batch_without_tokens():
    ids, mask = torch.randint(0, 61, (2, 5)), torch.zeros(2, 5, dtype=torch.long)
    for name in ("ALBERTModel", "ALBERTForSequenceClassification", "ALBERTForMaskedLM"):
        slow, fast = pair(name, num_hidden_layers=2)
        with torch.no_grad():
            assert_same(fast(ids, mask)[0], slow(ids, mask)[0])
    slow, fast = pair("ALBERTForSequenceClassification", num_hidden_layers=2)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert_same(compiled(ids, mask).logits, slow(ids, mask).logits)


def test_dropout_trains_and_repeats():
    fields = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.1, "ffn_output_dropout": True}
    slow, fast = pair(**fields)
    ids = torch.randint(1, 61, (4, 24))
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(fast.train()(ids).last_hidden_state)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    runs[0].sum().backward()
    mean = torch.stack([fast(ids).last_hidden_state for _ in range(200)]).mean(0)
    reference_mean = torch.stack([slow.train()(ids).last_hidden_state for _ in range(200)]).mean(0)
    assert (mean - reference_mean).norm() < 0.15 * reference_mean.norm()


def test_a_bad_id_is_named_with_its_place_in_the_batch():
    _, fast = pair()
    ids, mask = torch.randint(0, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, 5:] = 0
    ids[2, 4] = 61
    for backend in ("cpp", "reference"):
        fast.execution.backend = backend
        with pytest.raises(IndexError, match=r"input_ids\[2, 4\] is 61.*61 rows"):
            fast(ids, mask)
        with pytest.raises(IndexError, match=r"token_type_ids\[1, 8\] is -1"):
            fast(
                ids.clamp(max=60),
                mask,
                token_type_ids=torch.full((3, 9), 0).index_put((torch.tensor(1), torch.tensor(8)), torch.tensor(-1)),
            )
    ids[0, 7] = -100  # padding is never read
    ids[2, 4] = 0
    fast(ids, mask)


def test_nan_travels_and_stays_in_its_sequence():
    slow, fast = pair()
    embeds = torch.randn(3, 8, 12)
    embeds[1, 3, 5] = float("nan")
    with torch.no_grad():
        expected, actual = slow(inputs_embeds=embeds).last_hidden_state, fast(inputs_embeds=embeds).last_hidden_state
    assert torch.equal(actual.isnan(), expected.isnan())
    assert actual[1].isnan().all()
    assert not actual[[0, 2]].isnan().any()


def test_training_without_dropout_draws_no_number():
    _, fast = pair(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    before = torch.get_rng_state()
    fast.train()(torch.randint(0, 61, (3, 9), generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_all_layers_in_one_call_only_where_that_computes_the_same():
    slow, fast = pair(num_hidden_groups=3, inner_group_num=2)
    encoder, ids = fast.encoder, torch.randint(0, 61, (3, 9))

    def why():
        return encoder.why_not_one_call(torch.zeros(1, 40), "auto")

    assert "torch.no_grad()" in why()
    encoder.requires_grad_(False)
    assert why() is None
    assert "torch.no_grad()" in encoder.why_not_one_call(torch.zeros(1, 40, requires_grad=True), "auto")
    with torch.no_grad():
        assert_same(fast(ids).last_hidden_state, slow(ids).last_hidden_state)
        assert "backend='reference'" in encoder.why_not_one_call(torch.zeros(1, 40), "reference")
        assert "bfloat16" in encoder.why_not_one_call(torch.zeros(1, 40).bfloat16(), "auto")
        with torch.autocast("cpu"):
            assert "autocast" in why()
        assert "training" in fast.train().encoder.why_not_one_call(torch.zeros(1, 40), "auto")
        fast.eval()
        seen = []
        with encoder.distinct()[3].attention.register_forward_hook(lambda *_: seen.append(1)):
            assert "hooks" in why()
            fast(ids)
        assert seen
        with encoder.distinct()[3].attention.register_forward_pre_hook(lambda *_: None):
            assert "hooks" in why()
        assert why() is None

        class Doubled(torch.nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        dense = encoder.distinct()[0].attention.dense
        encoder.distinct()[0].attention.dense = replaced = Doubled(40, 40)
        replaced.load_state_dict(dense.state_dict())
        assert "replaced" in why()


def test_explain_says_what_runs_where_and_why():
    _, fast = pair("ALBERTForSequenceClassification")
    ids, mask = torch.randint(0, 61, (4, 10)), torch.ones(4, 10, dtype=torch.long)
    mask[:, 6:] = 0
    with torch.no_grad():
        (one,) = (step for step in explain(fast, ids, mask).steps if step.name == "encoder")
    plan = explain(fast, ids, mask)
    assert "torch.no_grad()" in plan.summary
    layers = [step for step in plan.steps if step.name not in ("embedding_projection", "pooler", "head: classifier")]
    assert one.gflop == pytest.approx(sum(step.gflop for step in layers))
    assert "24 real tokens" in str(plan)
    assert "40% padding" in str(plan)
    assert "3 layers in 1 group(s), 4 heads of 10, " in plan.summary
    steps = {step.name: step for step in plan.steps}
    assert steps["attention"].backend == "cpp"
    assert steps["attention"].times == 2
    assert steps["last layer: bias_gelu"].rows == 4
    half = explain(fast.to(torch.float16), ids, mask)
    reasons = {step.why for step in half.steps if step.backend == "reference"}
    assert any("not float16" in reason for reason in reasons)
    with pytest.raises(TypeError, match="Linear"):
        explain(torch.nn.Linear(2, 2), ids)


def test_backends_that_cannot_run_say_why(tmp_path):
    _, fast = pair()
    fast.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"CUDA kernels need a GPU|has no cuda kernel"):
        ALBERTModel.from_pretrained(tmp_path, backend="cuda")
    if not torch.cuda.is_available():
        for models in (albert_fast, reference):
            with pytest.raises(dispatch.BackendUnavailableError, match=r"device='cuda:0'.*device='cpu'"):
                models.ALBERTModel.from_pretrained(tmp_path, device="cuda:0")
    with pytest.raises(ValueError, match="magic"):
        ALBERTModel.from_pretrained(tmp_path, backend="magic")
    with pytest.raises(ValueError, match="fp12"):
        ALBERTModel.from_pretrained(tmp_path, precision="fp12")


def test_a_classifier_takes_no_wanted_tokens():
    _, fast = pair("ALBERTForSequenceClassification")
    with pytest.raises(TypeError, match="wanted_tokens"):
        fast(torch.zeros(1, 2, dtype=torch.long), wanted_tokens=torch.ones(1, 2) > 0)


def test_what_is_no_tensor_or_config_is_named_with_a_remedy():
    _, fast = pair("ALBERTModel")
    ids = torch.randint(0, 61, (2, 5))
    for wrong in (ids.tolist(), ids.numpy(), "A film."):
        with pytest.raises(TypeError, match=rf"got {type(wrong).__name__}: torch\.as_tensor"):
            fast(wrong)
    with pytest.raises(TypeError, match="attention_mask must be a tensor, got list"):
        fast(ids, ids.tolist())
    with pytest.raises(ValueError, match="tensors on meta hold no ids"):
        fast.to("meta")(ids.to("meta"))
    with pytest.raises(TypeError, match=r"got dict: ALBERTConfig\.from_dict"):
        albert_fast.ALBERTModel(fast.config.to_dict())


def test_a_file_without_its_configuration_is_named(tmp_path):
    _, fast = pair("ALBERTModel")
    fast.save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in .*, where a checkpoint has it"):
        albert_fast.ALBERTModel.from_pretrained(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", ["ALBERTForSequenceClassification", "ALBERTForQuestionAnswering"])
def test_transformers_trainer_passes_no_count_of_items(name):
    # Where a forward takes any argument the Trainer adds num_items_in_batch, unless the model says that it must not.
    for model in pair(name):
        assert model.accepts_loss_kwargs is False
        with pytest.raises(TypeError, match="num_items_in_batch"):
            model(torch.zeros(1, 3, dtype=torch.long), num_items_in_batch=3)
