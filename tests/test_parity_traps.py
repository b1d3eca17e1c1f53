"""Where implementations of ALBERT part, one trap after the other; and bad input, which gets an error with its name."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import albert_fast
from albert_fast.models import reference
from albert_fast.models.config import ALBERTConfig
from albert_fast.models.reference.albert import LayerNorm
from albert_fast.testing.model_pairs import NAMES, OUTPUTS, SMALL, drawn_inputs, model_pair

MODULES = [pytest.param(reference, id="eager"), pytest.param(albert_fast, id="fast")]
ACTIVATIONS = ["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate", "gelu", "gelu_python", "relu"]


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# (layers, groups, layer) where Google's rule and Hugging Face's give the layer to different groups.
GROUP_CASES = [
    (layers, groups, i)
    for layers in range(1, 49)
    for groups in range(1, layers + 1)
    for i in range(layers)
    if int(i / layers * groups) != int(i / (layers / groups))
]


def test_groups_follow_hugging_face() -> None:
    assert len(GROUP_CASES) == 36
    assert not {layers for layers, _, _ in GROUP_CASES} & {12, 24}
    for layers, groups, i in GROUP_CASES:
        config = ALBERTConfig(**SMALL | {"num_hidden_layers": layers, "num_hidden_groups": groups})
        assert config.group_of_layer(i) == int(i / (layers / groups))


@pytest.mark.parametrize("module", MODULES)
def test_a_model_whose_groups_differ_between_google_and_hugging_face(module: ModuleType) -> None:
    layers, groups, _ = GROUP_CASES[0]
    ours, theirs = model_pair(module, "Model", SMALL | {"num_hidden_layers": layers, "num_hidden_groups": groups})
    ids = torch.arange(12).view(2, 6)
    assert_equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_that_of_transformers_draw_by_draw(name: str) -> None:
    """In training, from one seed: every dropout stands where Hugging Face has it, and the FFN's output has none."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3, "classifier_dropout_prob": 0.4}
    ours, theirs = model_pair(reference, name, SMALL | rates)
    inputs = drawn_inputs(name, ours.config, "none", 3)
    torch.manual_seed(0)
    actual = ours.train()(**inputs)
    torch.manual_seed(0)
    expected = theirs.train()(**inputs)
    for field in OUTPUTS[name]:
        assert_equal(actual[field], expected[field])
        assert not torch.allclose(actual[field], ours.eval()(**inputs)[field])


def test_ffn_output_dropout_on_request() -> None:
    """Google's code drops out the FFN's output; so do we where the configuration asks for it."""
    for asked in (False, True):
        config = ALBERTConfig(**SMALL, hidden_dropout_prob=0.5, ffn_output_dropout=asked)
        model = reference.ALBERTModel(config).train()
        dropped: list[float] = []
        model.encoder.albert_layer_groups[0].albert_layers[0].dropout.register_forward_hook(
            lambda _module, _inputs, output, dropped=dropped: dropped.append(float((output == 0).float().mean()))
        )
        model(torch.arange(24)[None])
        assert len(dropped) == 3
        assert all(0.4 < share < 0.6 if asked else share == 0 for share in dropped)


@pytest.mark.parametrize("module", MODULES)
def test_the_projection_is_there_when_e_equals_h(module: ModuleType) -> None:
    ours, theirs = model_pair(module, "Model", SMALL | {"embedding_size": 48})
    ids = torch.arange(6).view(1, 6)
    before = ours(ids).last_hidden_state
    with torch.no_grad():
        for model in (ours, theirs):
            model.encoder.embedding_hidden_mapping_in.weight.mul_(2)
    assert_equal(ours(ids).last_hidden_state, theirs(ids).last_hidden_state)
    assert not torch.allclose(ours(ids).last_hidden_state, before)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_name(module: ModuleType, name: str) -> None:
    ours, theirs = model_pair(module, "ForMaskedLM", SMALL | {"hidden_act": name})
    ids = torch.arange(12).view(2, 6)
    assert_equal(ours(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_statistics_are_float32(dtype: torch.dtype) -> None:
    """A row without variance: eps = 1e-12 is 0 in float16, and 0 / 0 would be NaN; a wide row: its squares overflow."""
    norm = LayerNorm(8, eps=1e-12).to(dtype)
    assert torch.equal(norm(torch.full((1, 8), 300.0, dtype=dtype)), torch.zeros(1, 8, dtype=dtype))
    wide = torch.linspace(-6e4, 6e4, 8)[None].to(dtype)
    torch.testing.assert_close(norm(wide), F.layer_norm(wide.float(), (8,)).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """Close to float32 by as much as the dtype's own rounding, after three layers of it."""
    ours, _ = model_pair(reference, name, SMALL)
    inputs = drawn_inputs(name, ours.config, "left", 7)
    expected = ours(**inputs)
    actual = ours.to(dtype)(**inputs)
    for field in OUTPUTS[name]:
        assert actual[field].dtype == dtype
        # Where question answering is padded each dtype has its own lowest value.
        real = expected[field] > torch.finfo(torch.float32).min
        assert torch.equal(real, actual[field] > torch.finfo(dtype).min)
        error = (actual[field].double() - expected[field].double())[real].norm() / expected[field][real].norm()
        assert error <= (1e-5 if dtype == torch.float64 else 10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("module", MODULES)
def test_the_token_head_falls_back_to_the_hidden_dropout(module: ModuleType) -> None:
    for rate, expected in ((None, 0.3), (0.1, 0.1), (0.0, 0.0)):
        config = ALBERTConfig(**SMALL, hidden_dropout_prob=0.3, classifier_dropout_prob=rate)
        assert module.ALBERTForTokenClassification(config).dropout.p == expected


@pytest.mark.parametrize("module", MODULES)
def test_the_pad_token_learns_nothing_from_look_ups(module: ModuleType) -> None:
    ours, theirs = model_pair(module, "Model", SMALL | {"pad_token_id": 3})
    for model in (ours, theirs):
        model(torch.tensor([[1, 3, 3, 2]])).last_hidden_state[0, 0, 0].backward()
        gradient = model.embeddings.word_embeddings.weight.grad
        assert not gradient[3].any()
        assert gradient[1].any()


@pytest.mark.parametrize("module", MODULES)
def test_initial_weights(module: ModuleType) -> None:
    """N(0, initializer_range), zero biases, a zero row for the pad token; decoder and embeddings are one tensor."""
    fields = SMALL | {"initializer_range": 0.05, "vocab_size": 2000, "pad_token_id": 3}
    model = module.ALBERTForPreTraining(ALBERTConfig(**fields))
    state = model.state_dict()
    words = state["albert.embeddings.word_embeddings.weight"]
    assert not words[3].any()
    assert words.std().item() == pytest.approx(0.05, rel=0.05)
    ffn = state["albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"]
    assert ffn.std().item() == pytest.approx(0.05, rel=0.1)
    assert model.predictions.decoder.weight is model.albert.embeddings.word_embeddings.weight
    assert model.predictions.decoder.bias is model.predictions.bias
    for key, tensor in state.items():
        if key.endswith("bias"):
            assert not tensor.any(), key
        elif "norm" in key.lower():
            assert (tensor == 1).all(), key
    untied = module.ALBERTForMaskedLM(ALBERTConfig(**SMALL, tie_word_embeddings=False))
    assert untied.predictions.decoder.weight is not untied.albert.embeddings.word_embeddings.weight


def changed(tensor: Tensor, row: int, column: int, value: int) -> Tensor:
    tensor = tensor.clone()
    tensor[row, column] = value
    return tensor


IDS = torch.arange(8).view(2, 4)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("error", "parts", "arguments"),
    [
        (IndexError, ["40", "1, 2"], {"input_ids": changed(IDS, 1, 2, 40)}),
        (IndexError, ["-1", "0, 3"], {"input_ids": changed(IDS, 0, 3, -1)}),
        (IndexError, ["token_type_ids", "2", "1, 1"], {"input_ids": IDS, "token_type_ids": changed(IDS * 0, 1, 1, 2)}),
        (IndexError, ["position_ids", "24", "0, 0"], {"input_ids": IDS, "position_ids": changed(IDS, 0, 0, 24)}),
        (ValueError, ["25", "24"], {"input_ids": torch.zeros(1, 25, dtype=torch.int64)}),
        (ValueError, ["(2, 5)", "(2, 4)"], {"input_ids": IDS, "attention_mask": torch.ones(2, 5)}),
        (ValueError, ["(2, 1, 4, 4)", "(2, 4)"], {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 4, 4)}),
        (ValueError, ["token_type_ids (2, 3)", "(2, 4)"], {"input_ids": IDS, "token_type_ids": IDS[:, :3]}),
        (ValueError, ["position_ids (1, 3)", "(2, 4)"], {"input_ids": IDS, "position_ids": IDS[:1, :3]}),
        (ValueError, ["(4,)"], {"input_ids": IDS[0]}),
        (ValueError, ["(2, 4)"], {"inputs_embeds": torch.randn(2, 4)}),
        (ValueError, ["(2, 4, 15)", "16"], {"inputs_embeds": torch.randn(2, 4, 15)}),
        (ValueError, ["exactly one"], {}),
        (ValueError, ["exactly one"], {"input_ids": IDS, "inputs_embeds": torch.randn(2, 4, 16)}),
        (TypeError, ["inputs_embeds", "int64"], {"inputs_embeds": torch.zeros(2, 4, 16, dtype=torch.int64)}),
        (TypeError, ["input_ids", "float32"], {"input_ids": IDS.float()}),
        (TypeError, ["input_ids", "bool"], {"input_ids": IDS.bool()}),
        (TypeError, ["token_type_ids", "float32"], {"input_ids": IDS, "token_type_ids": IDS * 0.0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(module: ModuleType, error: type[Exception], parts: list[str], arguments: dict[str, Any]) -> None:
    model, _ = model_pair(module, "Model", SMALL)
    with pytest.raises(error) as caught:
        model(**arguments)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(
    ("name", "fields", "labels"),
    [
        ("ForMaskedLM", {}, {"labels": IDS[:, :3]}),
        ("ForTokenClassification", {}, {"labels": IDS[0]}),
        ("ForSequenceClassification", {}, {"labels": torch.tensor([0, 1, 0])}),
        ("ForSequenceClassification", {"problem_type": "multi_label_classification"}, {"labels": torch.ones(2)}),
        ("ForQuestionAnswering", {}, {"start_positions": torch.tensor([0]), "end_positions": torch.tensor([0, 1])}),
    ],
)
def test_labels_that_do_not_fit(module: ModuleType, name: str, fields: dict[str, Any], labels: Any) -> None:
    model, _ = model_pair(module, name, SMALL | fields)
    with pytest.raises(ValueError, match=r"labels \("):
        model(IDS, **labels)


@pytest.mark.parametrize("module", MODULES)
def test_question_answering_has_two_labels(module: ModuleType) -> None:
    with pytest.raises(ValueError, match="num_labels"):
        module.ALBERTForQuestionAnswering(ALBERTConfig(**SMALL))


@pytest.mark.parametrize("module", MODULES)
def test_multiple_choice_needs_choices(module: ModuleType) -> None:
    model = module.ALBERTForMultipleChoice(ALBERTConfig(**SMALL))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        model(IDS)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", ["Model", "ForMaskedLM", "ForSequenceClassification"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.float16])
def test_a_row_for_all_rows(module: ModuleType, name: str, dtype: torch.dtype) -> None:
    """Masks, types and positions (1, S) are every row's, as in transformers, in any dtype."""
    ours, theirs = model_pair(module, name, SMALL)
    ids, whole = torch.randint(0, 40, (3, 6)), torch.ones(3, 6, dtype=torch.long)
    mask, types = torch.tensor([[1, 1, 1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 1, 0, 0]])
    with torch.no_grad():
        expected = ours(ids, mask * whole, types * whole, torch.arange(6).repeat(3, 1))[0]
        actual = ours(ids, mask.to(dtype), types, torch.arange(6)[None])[0]
        assert torch.equal(actual, expected)
        assert not torch.equal(ours(ids)[0], expected)
        if name == "ForSequenceClassification":
            everywhere = theirs(ids, mask * whole, types * whole).logits
            torch.testing.assert_close(actual, everywhere, rtol=1e-4, atol=1e-4)
    for wrong in (torch.ones(2, 6), torch.ones(1, 5), torch.ones(6), torch.ones(3, 1, 1, 6)):
        with pytest.raises(ValueError, match=r"attention_mask \(.*\) does not fit"):
            ours(ids, wrong)
        with pytest.raises(ValueError, match=r"token_type_ids \(.*\) does not fit"):
            ours(ids, None, wrong.long())


@pytest.mark.parametrize("module", MODULES)
def test_a_row_for_all_choices(module: ModuleType) -> None:
    ours, _ = model_pair(module, "ForMultipleChoice", SMALL)
    ids, mask = torch.randint(0, 40, (2, 3, 6)), torch.tensor([[[1] * 4 + [0] * 2, [1] * 6, [0] + [1] * 5]])
    with torch.no_grad():
        assert torch.equal(ours(ids, mask).logits, ours(ids, mask.repeat(2, 1, 1)).logits)
        assert not torch.equal(ours(ids, mask).logits, ours(ids).logits)
