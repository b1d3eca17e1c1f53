"""What libraries around Hugging Face's models do to a model: save, resume, adapt, step. Nothing is lost, names fit."""

from __future__ import annotations

import pytest
import safetensors.torch
import torch

import albert_fast
from albert_fast import ALBERTConfig, ALBERTForMaskedLM, ALBERTForSequenceClassification, ALBERTModel

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 60, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 64, "max_position_embeddings": 32, "initializer_range": 0.2, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0,
}  # fmt: skip
HEADS = ["ForMaskedLM", "ForPreTraining", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
         "ForMultipleChoice"]  # fmt: skip
IDS = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(0))


def made(name, seed=0):
    torch.manual_seed(seed)
    return getattr(albert_fast, f"ALBERT{name}")(ALBERTConfig(**SIZES)).eval()


def outputs(model):
    ids = IDS[:, None].expand(-1, 2, -1) if type(model).__name__.endswith("MultipleChoice") else IDS
    with torch.no_grad():
        return model(ids, return_dict=False)[0]


def labels(name):
    places, rows = torch.arange(4), torch.tensor([0, 1, 1, 0])
    return {
        "ForMaskedLM": {"labels": IDS}, "ForPreTraining": {"labels": IDS, "sentence_order_label": rows},
        "ForSequenceClassification": {"labels": rows}, "ForTokenClassification": {"labels": IDS % 2},
        "ForQuestionAnswering": {"start_positions": places, "end_positions": places + 2},
        "ForMultipleChoice": {"labels": rows},
    }[name]  # fmt: skip


def assert_same_states(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


# files ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("name", ["Model", *HEADS])
def test_accelerate_resumes_what_it_saved(name, safe, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, other = made(name), made(name, seed=9)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(other)
    accelerator.load_state(str(tmp_path))
    assert_same_states(other.state_dict(), model.state_dict())
    assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize("name", ["Model", "ForMaskedLM", "ForPreTraining"])
def test_accelerate_loads_the_model_it_saved(name, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, other = made(name), made(name, seed=9)
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path))
    accelerate.load_checkpoint_in_model(other, str(tmp_path))
    assert_same_states(other.state_dict(), model.state_dict())
    assert torch.equal(outputs(other), outputs(model))


def test_integer_weights_are_saved_whole(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    made("Model").save_pretrained(tmp_path / "float")
    model = ALBERTModel.from_pretrained(tmp_path / "float", precision="int8")
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path / "saved"))
    saved = safetensors.torch.load_file(tmp_path / "saved" / "model.safetensors")
    assert_same_states(saved, dict(model.state_dict()))


@pytest.mark.parametrize("name", ["ForMaskedLM", "ForPreTraining", "ForTokenClassification"])
def test_safetensors_takes_models_and_states(name, tmp_path):
    model = made(name)
    safetensors.torch.save_model(model, str(tmp_path / "model"))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "state")
    by_model, by_state = made(name, seed=8), made(name, seed=9)
    safetensors.torch.load_model(by_model, str(tmp_path / "model"))
    by_state.load_state_dict(safetensors.torch.load_file(tmp_path / "state"))
    for other in (by_model, by_state):
        assert_same_states(other.state_dict(), model.state_dict())
        assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize("name", ["ForMaskedLM", "ForPreTraining"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_state_may_have_either_name_of_a_tied_parameter(name, wrapped):
    model = made(name)
    state = model.state_dict()
    for absent in ("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"):
        other = made(name, seed=9)
        given = {key: tensor for key, tensor in state.items() if key != absent}
        if wrapped:  # as DistributedDataParallel does
            torch.nn.ModuleDict({"module": other}).load_state_dict({f"module.{k}": v for k, v in given.items()})
        else:
            other.load_state_dict(given)
        assert_same_states(other.state_dict(), state)
        assert other.predictions.decoder.weight is other.albert.embeddings.word_embeddings.weight


def test_a_state_without_both_names_of_a_tied_parameter_is_refused():
    state = made("ForMaskedLM").state_dict()
    del state["predictions.decoder.weight"], state["albert.embeddings.word_embeddings.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*word_embeddings"):
        made("ForMaskedLM").load_state_dict(state)


@pytest.mark.parametrize("name", HEADS)
def test_trainer_resumes_from_its_checkpoints(name, tmp_path):
    pytest.importorskip("accelerate")

    def trained(resume=None):
        model = made(name)
        rows = [
            {"input_ids": ids, **{key: value[i] for key, value in labels(name).items()}} for i, ids in enumerate(IDS)
        ]
        if name == "ForMultipleChoice":
            rows = [{**row, "input_ids": row["input_ids"].expand(2, -1)} for row in rows]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / ("resumed" if resume else "whole")), max_steps=3, save_steps=1, learning_rate=0.01,
            per_device_train_batch_size=2, report_to=[], disable_tqdm=True, use_cpu=True, logging_steps=1,
            label_names=list(labels(name)), remove_unused_columns=False,
        )  # fmt: skip
        trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return model, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    model, losses = trained()
    again, after = trained(str(tmp_path / "whole" / "checkpoint-2"))
    assert len(losses) == 3
    assert after == losses
    assert_same_states(again.state_dict(), model.state_dict())
    saved = safetensors.torch.load_file(tmp_path / "whole" / "checkpoint-3" / "model.safetensors")
    assert_same_states(saved, dict(model.state_dict()))


# adapters -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = transformers.AlbertConfig(**SIZES)
    transformers.AlbertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def both(folder):
    theirs = transformers.AlbertForSequenceClassification.from_pretrained(folder)
    return theirs, ALBERTForSequenceClassification.from_pretrained(folder)


TARGETS = [
    ["query", "value"],
    ["query", "key", "value", "dense", "ffn", "ffn_output"],
    "all-linear",
    r".*attention\.key",
]


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("from_theirs", [True, False])
def test_an_adapter_of_either_model_fits_the_other(folder, tmp_path, targets, from_theirs):
    peft = pytest.importorskip("peft")
    theirs, ours = both(folder)
    source, target = (theirs, ours) if from_theirs else (ours, theirs)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    adapted = peft.get_peft_model(source, config)
    torch.manual_seed(3)
    with torch.no_grad():
        plain = adapted(input_ids=IDS)["logits"]
        for name, parameter in sorted(adapted.named_parameters()):
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        expected = adapted.eval()(input_ids=IDS)["logits"]
        assert not torch.allclose(expected, plain, atol=1e-3)
        adapted.save_pretrained(tmp_path / "adapter")
        loaded = peft.PeftModel.from_pretrained(target, str(tmp_path / "adapter")).eval()
        torch.testing.assert_close(loaded(input_ids=IDS)["logits"], expected, rtol=1e-5, atol=1e-5)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=IDS)["logits"], expected, rtol=1e-5, atol=1e-5)


def test_adapted_gradients_are_those_of_their_model(folder):
    peft = pytest.importorskip("peft")
    found = []
    for model in both(folder):
        config = peft.LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
        torch.manual_seed(2)
        adapted = peft.get_peft_model(model, config).train()
        adapted(input_ids=IDS, labels=torch.tensor([0, 1, 1, 0]))["loss"].backward()
        found.append({name: p.grad for name, p in adapted.named_parameters() if p.grad is not None})
    theirs, ours = found
    assert theirs.keys() == ours.keys()
    assert len(ours) == 4
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


# optimizers -----------------------------------------------------------------------------------------------------------------


class LAMB(torch.optim.Optimizer):
    """Its first step (You et al. 2020): a sign, as long as the matrix that it moves."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            update = parameter.grad / (parameter.grad.abs() + 1e-6) + 0.01 * parameter
            parameter.sub_(update, alpha=0.01 * float(parameter.norm() / update.norm()))


def adafactor(parameters):
    return torch.optim.Adafactor(parameters, lr=0.01)


def muon(parameters):
    return torch.optim.Muon([p for p in parameters if p.dim() == 2], lr=0.01)


@pytest.mark.parametrize("make", [LAMB, adafactor, muon])
def test_a_step_that_looks_at_whole_matrices_is_that_of_their_model(folder, make):
    theirs, ours = both(folder)
    moved = []
    for model in (theirs.train(), ours.train()):
        with torch.no_grad():  # as in a trained model: not all of one size
            attention = model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
            attention.value.weight.mul_(5)
            attention.key.weight.mul_(0.2)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        optimizer = make(list(model.parameters()))
        model(input_ids=IDS, labels=torch.tensor([0, 1, 1, 0])).loss.backward()
        optimizer.step()
        moved.append({name: tensor - before[name] for name, tensor in model.state_dict().items()})
    for name, step in moved[0].items():
        if name.endswith("key.bias"):  # a softmax does not feel it: its gradient is rounding alone
            continue
        assert (moved[1][name] - step).norm() <= 0.02 * step.norm(), name


def test_their_masked_lm_reads_what_is_saved_and_the_other_way_round(tmp_path):
    ours = made("ForMaskedLM")
    ours.save_pretrained(tmp_path / "ours")
    theirs = transformers.AlbertForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    assert_same_states(dict(theirs.state_dict()), dict(ours.state_dict()))
    theirs.save_pretrained(tmp_path / "theirs")
    again = ALBERTForMaskedLM.from_pretrained(tmp_path / "theirs")
    assert torch.equal(outputs(again), outputs(ours))
    by_safetensors = made("ForMaskedLM", seed=9)  # their file has one name of what is tied
    safetensors.torch.load_model(by_safetensors, str(tmp_path / "theirs" / "model.safetensors"))
    assert torch.equal(outputs(by_safetensors), outputs(ours))
