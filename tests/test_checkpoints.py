"""Checkpoints that are sound: both ways with transformers bit for bit, layouts, old names, heads, dtypes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest
import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import albert_fast
from albert_fast.checkpoints import weights
from albert_fast.models import reference
from albert_fast.models.load_arguments import FLOAT_DTYPES
from albert_fast.testing.model_pairs import NAMES, OUTPUTS, SMALL, drawn_inputs, model_pair

MODULES = [pytest.param(reference, id="eager"), pytest.param(albert_fast, id="fast")]
WORDS = "albert.embeddings.word_embeddings.weight"


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A pre-training model as transformers saves it: encoder, pooler, MLM and SOP heads."""
    model_pair(reference, "ForPreTraining", SMALL)[1].save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_bit_for_bit(module: ModuleType, name: str, tied: bool, tmp_path: Path) -> None:
    """transformers saves, we load and save, transformers loads: keys, dtypes and bits stay, in memory and on disk."""
    fields = SMALL | {"tie_word_embeddings": tied, "num_hidden_groups": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
    _, theirs = model_pair(module, name, fields)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(module, f"ALBERT{name}").from_pretrained(tmp_path / "theirs")
    assert not ours.training
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    assert_same_bits(
        load_file(tmp_path / "ours" / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    )
    with safetensors.safe_open(tmp_path / "ours" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    back, report = getattr(transformers, f"Albert{name}").from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert_same_bits(back.state_dict(), theirs.state_dict())
    for key, value in theirs.config.to_dict().items():
        assert key in ("dtype", "_name_or_path") or getattr(back.config, key) == value, key
    again = getattr(module, f"ALBERT{name}").from_pretrained(tmp_path / "ours")
    assert again.config.to_dict() == ours.config.to_dict() | {"architectures": [f"Albert{name}"], "dtype": "float32"}
    inputs = drawn_inputs(name, ours.config, "right", 0)
    for field in OUTPUTS[name]:
        assert torch.equal(again(**inputs)[field], ours(**inputs)[field])


@pytest.mark.parametrize("layout", ["one file", "shards", "bin", "bin shards", "a path to the file"])
def test_every_layout_of_files(layout: str, saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    path = folder
    if layout == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif layout.endswith("shards"):
        write_shards(folder, state, "pytorch_model" if layout.startswith("bin") else "model")
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        path = folder / "model.safetensors" if layout.startswith("a path") else folder
    assert_same_bits(dict(weights.load_checkpoint(path)), state)
    expected = reference.ALBERTForPreTraining.from_pretrained(saved).state_dict()
    assert_same_bits(reference.ALBERTForPreTraining.from_pretrained(path).state_dict(), expected)


def write_shards(folder: Path, state: dict[str, Tensor], stem: str) -> Path:
    """Three shards and their index, as transformers names them; returns the index."""
    weight_map = {}
    for number in range(3):
        part = {key: tensor for i, (key, tensor) in enumerate(state.items()) if i % 3 == number}
        suffix = "safetensors" if stem == "model" else "bin"
        shard = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        if stem == "model":
            save_file(part, folder / shard)
        else:
            torch.save(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


def test_shards_written_by_transformers(tmp_path: Path) -> None:
    _, theirs = model_pair(reference, "ForPreTraining", SMALL)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert_same_bits(reference.ALBERTForPreTraining.from_pretrained(tmp_path).state_dict(), theirs.state_dict())


@pytest.mark.parametrize("module", MODULES)
def test_old_names_and_prefixes(module: ModuleType, saved: Path) -> None:
    """gamma and beta, nn.DataParallel's prefix, Google's two LayerNorms of a layer, buffers of old versions."""
    expected = module.ALBERTForPreTraining.from_pretrained(saved).state_dict()
    old = {}
    for key, tensor in load_file(saved / "model.safetensors").items():
        if "norm" in key.lower():
            key = key.replace(".weight", ".gamma").replace(".bias", ".beta")
        key = key.replace("full_layer_layer_norm", "LayerNorm_1").replace("attention.LayerNorm", "LayerNorm")
        old[f"module.{key}"] = tensor
    old["module.albert.embeddings.position_ids"] = torch.arange(24)[None]
    os.remove(saved / "model.safetensors")
    torch.save(old, saved / "pytorch_model.bin")
    assert sum(key.endswith(("gamma", "beta")) for key in old) == 8
    assert_same_bits(module.ALBERTForPreTraining.from_pretrained(saved).state_dict(), expected)


@pytest.mark.parametrize("module", MODULES)
def test_heads_come_and_go(module: ModuleType, saved: Path, tmp_path: Path) -> None:
    """A bare model takes the encoder out of any checkpoint; a head takes a bare encoder; what is not there is said."""
    state = load_file(saved / "model.safetensors")
    body = {key.removeprefix("albert."): tensor for key, tensor in state.items() if key.startswith("albert.")}
    bare = module.ALBERTModel.from_pretrained(saved)
    assert_same_bits(bare.state_dict(), {key: body[key] for key in bare.state_dict()})
    assert body.keys() == bare.state_dict().keys()

    masked = module.ALBERTForMaskedLM.from_pretrained(saved)
    assert all(torch.equal(tensor, state[key]) for key, tensor in masked.state_dict().items() if "decoder" not in key)
    masked.save_pretrained(tmp_path / "without pooler")
    assert module.ALBERTModel.from_pretrained(tmp_path / "without pooler").pooler is None

    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"bare.*'classifier\.weight' is missing; allow_missing_head"):
        module.ALBERTForSequenceClassification.from_pretrained(tmp_path / "bare", num_labels=5)
    with pytest.warns(UserWarning, match=r"bare.*no weights for: classifier;"):
        started = module.ALBERTForSequenceClassification.from_pretrained(
            tmp_path / "bare", num_labels=5, allow_missing_head=True
        )
    assert started.classifier.weight.shape == (5, 48)
    assert started.classifier.weight.any()
    assert_same_bits(started.albert.state_dict(), bare.state_dict())
    with pytest.warns(UserWarning, match=r"no weights for: classifier, pooler;"):
        module.ALBERTForSequenceClassification.from_pretrained(tmp_path / "without pooler", allow_missing_head=True)


@pytest.mark.parametrize("module", MODULES)
def test_both_widths_of_the_sentence_order_head(module: ModuleType, tmp_path: Path) -> None:
    """Google's has 2 outputs, whatever num_labels says; Hugging Face's has num_labels."""
    _, two = model_pair(module, "ForPreTraining", SMALL)
    two.save_pretrained(tmp_path / "two")
    google = module.ALBERTForPreTraining.from_pretrained(tmp_path / "two", num_labels=5)
    ids = torch.arange(10).view(2, 5)
    assert google.config.num_labels == 5
    assert torch.equal(
        google(ids).sop_logits, module.ALBERTForPreTraining.from_pretrained(tmp_path / "two")(ids).sop_logits
    )
    order = torch.tensor([0, 1])
    torch.testing.assert_close(
        google(ids, labels=ids, sentence_order_label=order).loss, two(ids, labels=ids, sentence_order_label=order).loss
    )
    five = transformers.AlbertForPreTraining(transformers.AlbertConfig(**SMALL | {"num_labels": 5}))
    five.save_pretrained(tmp_path / "five")
    assert_same_bits(module.ALBERTForPreTraining.from_pretrained(tmp_path / "five").state_dict(), five.state_dict())
    with pytest.raises(ValueError, match=r"'sop_classifier.classifier.bias' has the shape \(5,\), expected \(3,\)"):
        module.ALBERTForPreTraining.from_pretrained(tmp_path / "five", num_labels=3)


@pytest.mark.parametrize("module", MODULES)
def test_tied_tensors_in_the_file(module: ModuleType, saved: Path) -> None:
    """Written out by some: fine while they are equal. Only the decoder's: it serves both. Different: an error."""
    file = saved / "model.safetensors"
    state = load_file(file)
    words, bias = state[WORDS], state["predictions.bias"]
    expected = module.ALBERTForPreTraining.from_pretrained(saved).state_dict()
    tied = state | {"predictions.decoder.weight": words.clone(), "predictions.decoder.bias": bias.clone()}
    save_file(tied, file)
    assert_same_bits(module.ALBERTForPreTraining.from_pretrained(saved).state_dict(), expected)
    save_file({key: tensor for key, tensor in tied.items() if key != "predictions.bias"}, file)
    assert_same_bits(module.ALBERTForPreTraining.from_pretrained(saved).state_dict(), expected)
    save_file(tied | {"predictions.decoder.weight": words + 1}, file)
    with pytest.raises(ValueError, match=r"model.safetensors: 'predictions.decoder.weight' differs from '.*word_emb"):
        module.ALBERTForPreTraining.from_pretrained(saved)
    untied = module.ALBERTForPreTraining.from_pretrained(saved, tie_word_embeddings=False)
    assert torch.equal(untied.predictions.decoder.weight, words + 1)
    assert torch.equal(untied.albert.embeddings.word_embeddings.weight, words)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_file(module: ModuleType, dtype: torch.dtype, saved: Path) -> None:
    """Half precision becomes float32, exactly, and is saved as float32, whatever the old config.json said."""
    theirs = transformers.AlbertForPreTraining.from_pretrained(saved).to(dtype)
    theirs.save_pretrained(saved)
    config = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(config | {"torch_dtype": str(dtype).removeprefix("torch.")}))
    ours = module.ALBERTForPreTraining.from_pretrained(saved)
    assert_same_bits(ours.state_dict(), {key: tensor.float() for key, tensor in theirs.state_dict().items()})
    ours.save_pretrained(saved)
    back = transformers.AlbertForPreTraining.from_pretrained(saved)
    assert_same_bits(back.state_dict(), ours.state_dict())


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_of_the_eager_models(precision: str, saved: Path, tmp_path: Path) -> None:
    dtype = FLOAT_DTYPES[precision]
    model = reference.ALBERTForPreTraining.from_pretrained(saved, precision=precision)
    exact = reference.ALBERTForPreTraining.from_pretrained(saved)
    assert_same_bits(model.state_dict(), {key: tensor.to(dtype) for key, tensor in exact.state_dict().items()})
    model.save_pretrained(tmp_path / "half")
    back = transformers.AlbertForPreTraining.from_pretrained(tmp_path / "half", dtype="auto")
    assert_same_bits(back.state_dict(), model.state_dict())


def test_what_the_eager_models_cannot_do(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"'cpp'.*'auto' or 'reference'"):
        reference.ALBERTModel.from_pretrained(saved, backend="cpp")
    with pytest.raises(ValueError, match=r"'int8'.*fp32, bf16, fp16"):
        reference.ALBERTModel.from_pretrained(saved, precision="int8")
    reference.ALBERTModel.from_pretrained(saved, backend="reference")
    reference.ALBERTModel.from_pretrained(saved, device="cpu")


@pytest.mark.parametrize("module", MODULES)
def test_overrides_of_the_configuration(module: ModuleType, saved: Path) -> None:
    model = module.ALBERTModel.from_pretrained(saved, hidden_dropout_prob=0.25, num_labels=7)
    assert (model.config.hidden_dropout_prob, model.config.num_labels) == (0.25, 7)
    with pytest.raises(TypeError, match="hidden_dropout"):
        module.ALBERTModel.from_pretrained(saved, hidden_dropout=0.25)
    with pytest.raises(ValueError, match=r"model.safetensors: 'encoder.*query.*' has the shape \(48,.*expected \(96,"):
        module.ALBERTModel.from_pretrained(saved, hidden_size=96)


def test_query_key_and_value_of_a_state_dict_are_named_one_by_one() -> None:
    model = albert_fast.ALBERTModel(albert_fast.ALBERTConfig(**SMALL))
    query, value = (
        f"encoder.albert_layer_groups.0.albert_layers.0.attention.{name}.weight" for name in ("query", "value")
    )
    state = model.state_dict()
    missing = {name: tensor for name, tensor in state.items() if name != value}
    with pytest.raises(RuntimeError, match=rf'Missing key\(s\) in state_dict: "{value}"'):
        model.load_state_dict(missing)
    assert model.load_state_dict(missing, strict=False).missing_keys == [value]
    for part in (state[query][:-1], state[query][:, :-1]):
        with pytest.raises(RuntimeError, match=rf"size mismatch for {query}: .*\[{len(part)}, {part.shape[1]}\]"):
            model.load_state_dict({**state, query: part})
    assert_same_bits(model.state_dict(), state)


def test_a_folder_of_transformers_trainer(tmp_path: Path) -> None:
    """The Trainer saves a model that is not its PreTrainedModel without config.json."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    source, folder = tmp_path / "model", tmp_path / "trained"
    model = albert_fast.ALBERTForSequenceClassification(albert_fast.ALBERTConfig(**SMALL)).eval()
    model.save_pretrained(source)
    arguments = transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True)
    transformers.Trainer(model=model, args=arguments).save_model(str(folder))
    assert not (folder / "config.json").exists(), "the Trainer writes it now: the error needs no advice any more"
    with pytest.raises(
        FileNotFoundError, match=r"no config\.json in .*trained.*Trainer saved the weights alone"
    ) as caught:
        albert_fast.ALBERTForSequenceClassification.from_pretrained(folder)
    assert 'from_pretrained(folder, config="the folder or id of the model that was trained")' in str(caught.value)
    assert "trainer.model.save_pretrained(folder)" in str(caught.value)
    loaded = albert_fast.ALBERTForSequenceClassification.from_pretrained(folder, config=str(source))
    assert_same_bits(loaded.state_dict(), model.state_dict())
    (folder / "training_args.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.json in ") as caught:
        albert_fast.ALBERTForSequenceClassification.from_pretrained(folder)
    assert "Trainer" not in str(caught.value)
