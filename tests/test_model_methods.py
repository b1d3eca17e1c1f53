"""Methods that transformers' users call on a model do what they do there."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import albert_fast
from albert_fast import (
    ALBERTConfig,
    ALBERTForMaskedLM,
    ALBERTForPreTraining,
    ALBERTForSequenceClassification,
    ALBERTModel,
)
from albert_fast.checkpoints.weights import shipped_model
from albert_fast.models import head_model, reference
from albert_fast.testing.model_pairs import NAMES, SMALL

HEADS = [getattr(albert_fast, f"ALBERT{name}") for name in NAMES if name != "Model"]


def made(kind: Any, **fields: Any) -> Any:
    torch.manual_seed(0)
    return kind(ALBERTConfig(**SMALL | {"num_labels": 2} | fields)).eval()


def theirs(ours: Any) -> Any:
    """transformers' model with the same weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig(**ours.config.to_dict())
    model = getattr(transformers, type(ours).__name__.replace("ALBERT", "Albert"))(config).eval()
    model.load_state_dict(ours.state_dict())
    return model


@pytest.mark.parametrize("module", [albert_fast, reference])
@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_places_are_transformers(module: ModuleType, name: str) -> None:
    ours = made(getattr(module, f"ALBERT{name}"))
    hf = theirs(ours)
    assert (ours.device, ours.dtype) == (hf.device, hf.dtype)
    assert (ours.base_model_prefix, ours.main_input_name) == (hf.base_model_prefix, hf.main_input_name)
    for frozen in (False, True):
        for model in (ours, hf):
            next(model.parameters()).requires_grad_(not frozen)
        for options in ({}, {"only_trainable": True}, {"exclude_embeddings": True}):
            assert ours.num_parameters(**options) == hf.num_parameters(**options), options
    assert ours.get_memory_footprint() == hf.get_memory_footprint(return_buffers=False)
    assert ours.base_model is getattr(ours, "albert", ours)
    assert ours.get_input_embeddings() is ours.base_model.embeddings.word_embeddings
    assert (ours.get_output_embeddings() is None) == (hf.get_output_embeddings() is None)
    assert ours.all_tied_weights_keys == hf.all_tied_weights_keys
    assert ours.can_generate() is False
    assert ours.half().dtype == torch.float16
    batch = {"input_ids": torch.zeros(3, 5, dtype=torch.long)}
    assert ours.floating_point_ops(batch) == 6 * 15 * ours.num_parameters(exclude_embeddings=True)


@pytest.mark.parametrize("module", [albert_fast, reference])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["Model", "ForMaskedLM", "ForPreTraining", "ForSequenceClassification"])
def test_resized_embeddings(module: ModuleType, name: str, tied: bool, tmp_path: Path) -> None:
    model = made(getattr(module, f"ALBERT{name}"), tie_word_embeddings=tied)
    head = getattr(model, "predictions", None)
    if head is not None:
        nn.init.normal_(head.bias, mean=3.0)
        nn.init.normal_(head.decoder.bias, mean=3.0)
    words = model.get_input_embeddings()
    old = words.weight.detach().clone()
    old_bias = None if head is None else head.decoder.bias.detach().clone()
    ids = torch.randint(1, 40, (2, 6))
    before = model(ids)[0].detach()
    assert model.resize_token_embeddings() is words
    assert model.resize_token_embeddings(43, pad_to_multiple_of=8) is words
    assert (words.num_embeddings, model.config.vocab_size, words.weight.shape) == (48, 48, (48, 16))
    assert torch.equal(words.weight[:40], old)
    torch.testing.assert_close(words.weight[40:], old.mean(0).expand(8, 16), rtol=0, atol=1e-3)
    assert words.weight[40:].std(0).max() > 0, "rows that are all the same learn the same"
    after = model(ids)[0]
    torch.testing.assert_close(after[..., : before.shape[-1]], before, rtol=1e-5, atol=1e-5)
    new = torch.tensor([[2, 47, 3]])
    if head is None:
        assert model(new)[0].isfinite().all()
    else:
        assert head.decoder.weight.shape == (48, 16)
        assert (head.decoder.weight is words.weight) == tied
        assert (head.decoder.bias is head.bias) == tied
        assert torch.equal(head.decoder.bias[:40], old_bias)
        torch.testing.assert_close(head.decoder.bias[40:], old_bias.mean().expand(8), rtol=0, atol=1e-3)
        more = {"sentence_order_label": torch.tensor([1])} if name == "ForPreTraining" else {}
        model(new, labels=new, **more).loss.backward()
        assert words.weight.grad[47].abs().max() > 0
    model.save_pretrained(tmp_path)
    loaded = getattr(module, f"ALBERT{name}").from_pretrained(tmp_path)
    assert torch.equal(loaded(new)[0], model(new)[0])
    torch.testing.assert_close(theirs(model)(new)[0], model(new)[0], rtol=1e-4, atol=1e-4)
    model.resize_token_embeddings(20)
    assert torch.equal(model.get_input_embeddings().weight, old[:20])
    for wrong in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="new_num_tokens must be a positive integer"):
            model.resize_token_embeddings(wrong)


def test_new_rows_without_the_mean() -> None:
    model = made(ALBERTForMaskedLM, initializer_range=0.5)
    nn.init.constant_(model.get_input_embeddings().weight, 7.0)
    model.resize_token_embeddings(1040, mean_resizing=False)
    new = model.get_input_embeddings().weight[40:]
    assert abs(new.mean()) < 0.05
    assert abs(new.std() - 0.5) < 0.02
    assert torch.equal(model.predictions.bias[40:], torch.zeros(1000))


@pytest.mark.parametrize("kind", [ALBERTForMaskedLM, ALBERTForPreTraining])
def test_a_table_replaced_by_hand(kind: Any, tmp_path: Path) -> None:
    model, ids = made(kind), torch.tensor([[2, 44, 3]])
    more = {"sentence_order_label": torch.tensor([1])} if kind is ALBERTForPreTraining else {}
    table = nn.Embedding(45, 16)
    model.albert.embeddings.word_embeddings = table
    with torch.no_grad():
        state = model.albert(ids).last_hidden_state
        table.weight[44] += 1
        assert not torch.equal(model.albert(ids).last_hidden_state, state), "the new table is read"
    for options in ({}, {"labels": ids, **more}, {"labels": ids, "output_logits": False, **more}):
        with pytest.raises(ValueError, match=r"has 45 rows, the decoder 40: call model\.tie_weights\(\)"):
            model(ids, **options)
    model.tie_weights()
    assert model.predictions.decoder.weight is table.weight
    assert model.predictions.bias.shape == (45,)
    assert torch.isfinite(model(ids, labels=ids, **more).loss)
    model.save_pretrained(tmp_path)
    assert kind.from_pretrained(tmp_path).config.vocab_size == 45
    model.set_input_embeddings(nn.Embedding(45, 16))
    head_model._warn_of_untied.cache_clear()
    with pytest.warns(UserWarning, match=r"no longer share a table.*tie_weights"):
        model(ids)
    with pytest.raises(ValueError, match="rows of 17, embedding_size is 16"):
        model.set_input_embeddings(nn.Embedding(45, 17))


def test_output_embeddings() -> None:
    model = made(ALBERTForMaskedLM, tie_word_embeddings=False)
    decoder = nn.Linear(16, 40)
    model.set_output_embeddings(decoder)
    assert model.get_output_embeddings() is decoder
    assert model.predictions.bias is decoder.bias
    assert torch.isfinite(model(torch.tensor([[1, 2]])).logits).all()
    with pytest.raises(ValueError, match="ALBERTModel has no decoder"):
        made(ALBERTModel).set_output_embeddings(decoder)


def test_gradient_checkpointing_is_recompute() -> None:
    model = made(ALBERTForSequenceClassification)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert (model.execution.recompute, model.is_gradient_checkpointing, model.albert.is_gradient_checkpointing) == (
        "layers",
        True,
        True,
    )
    model.gradient_checkpointing_disable()
    assert model.execution.recompute == "nothing"
    model = made(reference.ALBERTForSequenceClassification)
    with pytest.raises(ValueError, match="reference keeps everything"):
        model.gradient_checkpointing_enable()


@pytest.mark.parametrize("module", [albert_fast, reference])
def test_inputs_that_require_grads(module: ModuleType) -> None:
    model = made(module.ALBERTForSequenceClassification)
    model.requires_grad_(False)
    ids = torch.randint(1, 40, (2, 5))
    assert not model(ids).logits.requires_grad
    model.enable_input_require_grads()
    assert model(ids).logits.requires_grad
    with torch.no_grad():
        assert not model(ids).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(ids).logits.requires_grad


def test_a_subclass_calls_post_init() -> None:
    class Custom(ALBERTForSequenceClassification):
        def __init__(self, config: ALBERTConfig) -> None:
            super().__init__(config)
            self.more = nn.Linear(48, 1000)
            self.post_init()

    model = made(Custom, initializer_range=0.3)
    assert abs(model.more.weight.std() - 0.3) < 0.01
    assert torch.equal(model.more.bias, torch.zeros(1000))


def test_save_pretrained_takes_what_transformers_takes(tmp_path: Path) -> None:
    model = made(ALBERTForMaskedLM)
    state = {key: 2 * tensor for key, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", is_main_process=False)
    assert not (tmp_path / "a").exists()
    model.save_pretrained(
        tmp_path / "a", True, state, safe_serialization=True, max_shard_size="1MB", save_function=torch.save
    )
    loaded = ALBERTForMaskedLM.from_pretrained(tmp_path / "a").state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    with pytest.raises(ValueError, match="safetensors is written"):
        model.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(ValueError, match=r"state_dict: 'albert\.embeddings\.LayerNorm\.bias' is missing"):
        model.save_pretrained(
            tmp_path / "b", state_dict={k: v for k, v in state.items() if "embeddings.LayerNorm.b" not in k}
        )
    with pytest.raises(TypeError, match="unexpected argument 'safe_serialisation'"):
        model.save_pretrained(tmp_path / "b", safe_serialisation=True)
    assert not (tmp_path / "b").exists()


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: dict[str, Any] = {}

    class HfApi:
        def __init__(self, token: Any) -> None:
            uploaded["token"] = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            assert exist_ok
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: str, **more: Any) -> str:
            uploaded.update(more, repo_id=repo_id, files=sorted(path.name for path in Path(folder_path).iterdir()))
            return "https://hub/commit"

    module = ModuleType("huggingface_hub")
    module.HfApi = HfApi  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    assert made(ALBERTModel).push_to_hub("small", token="t", commit_message="First") == "https://hub/commit"
    assert uploaded["files"] == ["config.json", "model.safetensors"]
    assert (uploaded["repo_id"], uploaded["token"], uploaded["commit_message"]) == ("me/small", "t", "First")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install albert-fast\[hub\]"):
        made(ALBERTModel).push_to_hub("small")


@pytest.mark.parametrize("kind", [ALBERTModel, *HEADS])
def test_help_on_forward_says_what_it_takes(kind: Any) -> None:
    text, names = inspect.getdoc(kind.forward) or "", inspect.signature(kind.forward).parameters
    assert "overridden" not in text
    assert all(part in text for part in ("Args:", "Returns:", "Raises:", "(B"))
    assert [parameter.kind for parameter in names.values()].count(inspect.Parameter.VAR_KEYWORD) == 0
    assert all(name in text for name in names if name != "self")
    first = ["self", "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"]
    assert list(names)[:6] == first
    last = ["output_hidden_states", "output_attentions", "return_dict"]
    assert [name for name in names if name in last] == last
    assert all(names[name].default is None for name in last)


@pytest.mark.parametrize("kind", HEADS)
def test_the_loss_function_is_forwards(kind: Any) -> None:
    if kind in (albert_fast.ALBERTForQuestionAnswering, ALBERTForPreTraining):
        pytest.skip("its loss is of two logits")
    model = made(kind)
    ids = torch.randint(1, 40, (2, 2, 5) if kind is albert_fast.ALBERTForMultipleChoice else (2, 5))
    labels = torch.randint(
        0, 2, (2, 5) if kind in (ALBERTForMaskedLM, albert_fast.ALBERTForTokenClassification) else (2,)
    )
    out = model(ids, labels=labels)
    torch.testing.assert_close(model.loss_function(out.logits, labels), out.loss)


def test_pipelines_of_transformers_run_our_models() -> None:
    transformers = pytest.importorskip("transformers")
    folder = shipped_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = ALBERTConfig.from_pretrained(folder)
    texts = ["a good film", f"a bad {tokenizer.mask_token}, and long"]
    cases = {
        "text-classification": (ALBERTForSequenceClassification.from_pretrained(folder), texts),
        "token-classification": (albert_fast.ALBERTForTokenClassification(config.replace(num_labels=3)).eval(), texts),
        "fill-mask": (ALBERTForMaskedLM(config).eval(), texts[1:]),
        # That pipeline reads index 0 of what it has made a plain dictionary, or of a tuple.
        "feature-extraction": (ALBERTModel.from_pretrained(folder, return_dict=False), texts),
    }
    for task, (ours, given) in cases.items():
        answers = [
            transformers.pipeline(task, model=model, tokenizer=tokenizer, device="cpu")(given)
            for model in (ours, theirs(ours))
        ]
        assert _rounded(answers[0]) == _rounded(answers[1]), task


def _rounded(answer: Any) -> Any:
    if isinstance(answer, dict):
        return {key: _rounded(value) for key, value in answer.items()}
    if isinstance(answer, (list, tuple)):
        return [_rounded(value) for value in answer]
    return pytest.approx(float(answer), abs=1e-4) if isinstance(answer, float) or hasattr(answer, "item") else answer
