"""from_pretrained takes what people pass to transformers': obeyed, ignored where harmless, or refused with what to do."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import albert_fast
from albert_fast import ALBERTConfig, ALBERTForSequenceClassification, ALBERTModel
from albert_fast.models import reference
from albert_fast.runtime.dispatch import BackendUnavailableError
from albert_fast.testing.model_pairs import NAMES, SMALL, drawn_inputs

HARMLESS: list[dict[str, Any]] = [
    {"attn_implementation": "sdpa"}, {"low_cpu_mem_usage": True, "trust_remote_code": True}, {"device_map": "cpu"},
    {"device_map": {"": "cpu"}}, {"device_map": "auto"}, {"quantization_config": None, "load_in_8bit": False},
    {"revision": "main", "cache_dir": "/none", "token": "x", "local_files_only": True, "force_download": False},
    {"use_safetensors": True, "variant": None, "subfolder": "", "proxies": None, "use_auth_token": False},
    {"from_tf": False, "key_mapping": {}, "max_memory": None, "tp_plan": None}, {"_fast_init": True, "mirror": None},
]  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    ALBERTForSequenceClassification(ALBERTConfig(**SMALL)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("arguments", HARMLESS, ids=lambda arguments: ",".join(arguments))
def test_what_changes_nothing(saved: Path, arguments: dict[str, Any]) -> None:
    loaded = ALBERTForSequenceClassification.from_pretrained(saved, **arguments)
    expected = load_file(saved / "model.safetensors")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert (loaded.device.type, loaded.dtype) == (
        "cuda" if "auto" in arguments.values() and torch.cuda.is_available() else "cpu",
        torch.float32,
    )


@pytest.mark.parametrize("asked", [{"precision": "fp16"}, {"dtype": "float16"}])
def test_float16_on_a_cpu_is_refused_unless_the_reference_is_asked_for(saved: Path, asked: dict[str, Any]) -> None:
    for name in ("auto", "cpp"):
        with pytest.raises(BackendUnavailableError, match="not float16"):
            ALBERTModel.from_pretrained(saved, **asked, backend=name, device="cpu")
    with pytest.raises(BackendUnavailableError, match=r"precision='bf16'.*backend='reference'"):
        ALBERTModel.from_pretrained(saved, **asked, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ALBERTModel.from_pretrained(saved, **asked, backend="reference", device="cpu")
        assert model(torch.tensor([[2, 5, 3]])).last_hidden_state.dtype == torch.float16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quantization_config": object()}, TypeError, "takes no 'quantization_config': take precision='int8'"),
        ({"load_in_4bit": True}, TypeError, "takes no 'load_in_4bit': take precision='int8'"),
        ({"from_tf": True}, TypeError, "convert the checkpoint first"),
        ({"dtype": torch.float64}, ValueError, "dtype=torch.float64: models load in torch.float32, torch.bfloat16"),
        ({"torch_dtype": "nonsense"}, ValueError, "torch_dtype='nonsense'"),
        ({"dtype": "float16", "precision": "bf16"}, TypeError, "precision='bf16' contradict each other"),
        ({"device_map": "cuda", "device": "cpu"}, TypeError, "device='cpu' contradict each other"),
        ({"device_map": {"albert": 0, "classifier": 1}}, ValueError, "a model runs on one device"),
        ({"add_pooling_layer": False}, TypeError, "add_pooling_layer is for an encoder"),
        ({"num_label": 3}, TypeError, "did you mean num_labels"),
        ({"cache_dri": "/x"}, TypeError, "takes no 'cache_dri'; did you mean 'cache_dir'"),
        ({"utterly_unknown": 1}, TypeError, "config has no field utterly_unknown"),
        ({"variant": "fp16"}, FileNotFoundError, "holds none of model.fp16.safetensors"),
        (
            {"use_safetensors": False},
            FileNotFoundError,
            "holds none of pytorch_model.bin, pytorch_model.bin.index.json",
        ),
        ({"subfolder": "inner"}, FileNotFoundError, "inner: no such file or folder"),
    ],
)
def test_what_cannot_be_obeyed_says_what_to_do(
    saved: Path, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ALBERTForSequenceClassification.from_pretrained(saved, **arguments)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [(torch.bfloat16, torch.bfloat16), ("float16", torch.float16), ("torch.float32", torch.float32)],
)
def test_dtypes_name_a_precision(saved: Path, name: str, value: Any, expected: torch.dtype) -> None:
    backend = "reference" if expected == torch.float16 else "auto"
    assert ALBERTModel.from_pretrained(saved, **{name: value}, backend=backend).dtype == expected


@pytest.mark.parametrize("stated", [True, False])
def test_dtype_auto_is_the_checkpoints(saved: Path, tmp_path: Path, stated: bool) -> None:
    shutil.copytree(saved, tmp_path / "model")
    file, config = tmp_path / "model" / "model.safetensors", tmp_path / "model" / "config.json"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(file).items()}, file)
    values = json.loads(config.read_text())
    values.pop("dtype")
    config.write_text(json.dumps(values | ({"dtype": "bfloat16"} if stated else {})))
    assert ALBERTModel.from_pretrained(tmp_path / "model", dtype="auto").dtype == torch.bfloat16
    assert ALBERTModel.from_pretrained(tmp_path / "model").dtype == torch.float32


@pytest.mark.parametrize("precision", ["int8", "int16"])
def test_integers_load_as_they_are(saved: Path, tmp_path: Path, precision: str) -> None:
    made = ALBERTModel.from_pretrained(saved, precision=precision)
    made.save_pretrained(tmp_path)
    ids = torch.randint(1, 40, (2, 7))
    for arguments in ({}, {"dtype": "auto"}):
        loaded = ALBERTModel.from_pretrained(tmp_path, **arguments)
        assert loaded.execution.quantized == precision
        assert torch.equal(loaded(ids).last_hidden_state, made(ids).last_hidden_state)
    with pytest.raises(ValueError, match=f"holds {precision} weights: load it with precision='{precision}'"):
        ALBERTModel.from_pretrained(tmp_path, dtype=torch.float32)
    with pytest.raises(ValueError, match="plain PyTorch"):
        reference.ALBERTModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("module", [albert_fast, reference])
def test_the_pooler_is_as_asked_for(saved: Path, tmp_path: Path, module: ModuleType) -> None:
    assert module.ALBERTModel.from_pretrained(saved).pooler is not None
    without = module.ALBERTModel.from_pretrained(saved, add_pooling_layer=False)
    assert without.pooler is None
    without.save_pretrained(tmp_path)
    assert module.ALBERTModel.from_pretrained(tmp_path).pooler is None
    with pytest.raises(ValueError, match=r"'pooler\.\w+' is missing; allow_missing_head=True"):
        module.ALBERTModel.from_pretrained(tmp_path, add_pooling_layer=True)


def test_tensors_of_other_shapes(saved: Path) -> None:
    with pytest.raises(ValueError, match="has the shape"):
        ALBERTForSequenceClassification.from_pretrained(saved, num_labels=5)
    with pytest.warns(UserWarning, match=r"start at random: classifier.bias \(3,\), the model has \(5,\)"):
        loaded, info = ALBERTForSequenceClassification.from_pretrained(
            saved, num_labels=5, ignore_mismatched_sizes=True, output_loading_info=True
        )
    assert loaded.classifier.weight.shape == (5, 48)
    assert 0 < loaded.classifier.weight.std() < 0.1
    assert {key for key, _, _ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    body = load_file(saved / "model.safetensors")["albert.pooler.weight"]
    assert torch.equal(loaded.albert.pooler.weight, body)


def test_loading_info(saved: Path) -> None:
    _, info = ALBERTModel.from_pretrained(saved, output_loading_info=True)
    assert info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    assert not info["missing_keys"]
    with pytest.warns(UserWarning, match="has no weights for: predictions"):
        _, info = albert_fast.ALBERTForMaskedLM.from_pretrained(
            saved, allow_missing_head=True, output_loading_info=True
        )
    assert "predictions.dense.weight" in info["missing_keys"]


def test_configurations_and_tensors_from_elsewhere(saved: Path, tmp_path: Path) -> None:
    state = load_file(saved / "model.safetensors")
    other = {key: 2 * tensor for key, tensor in state.items()}
    config = ALBERTConfig.from_pretrained(saved)
    for given in (config, config.to_dict(), saved):
        loaded = ALBERTForSequenceClassification.from_pretrained(None, config=given, state_dict=other)
        assert torch.equal(loaded.classifier.weight, other["classifier.weight"])
    loaded = ALBERTForSequenceClassification.from_pretrained(saved, state_dict=other, hidden_dropout_prob=0.5)
    assert torch.equal(loaded.classifier.weight, other["classifier.weight"])
    assert loaded.config.hidden_dropout_prob == 0.5
    assert config.hidden_dropout_prob == 0.0
    with pytest.raises(TypeError, match=r"from_pretrained\(None\) needs config= and state_dict="):
        ALBERTModel.from_pretrained(None)
    renamed = {key.replace("classifier", "score"): tensor for key, tensor in state.items()}
    shutil.copytree(saved, tmp_path / "a" / "inner")
    save_file(renamed, tmp_path / "a" / "inner" / "model.fp16.safetensors")
    mapped = ALBERTForSequenceClassification.from_pretrained(
        tmp_path / "a", subfolder="inner", variant="fp16", key_mapping={"^score": "classifier"}
    )
    assert torch.equal(mapped.classifier.weight, state["classifier.weight"])


def test_transformers_configuration_is_one(saved: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AlbertConfig.from_pretrained(saved)
    loaded = ALBERTForSequenceClassification.from_pretrained(saved, config=config)
    assert loaded.config.hidden_size == 48
    assert loaded.name_or_path == str(saved)
    made = ALBERTForSequenceClassification.from_config(config, dtype=torch.bfloat16)
    assert (made.dtype, made.classifier.out_features) == (torch.bfloat16, 3)


@pytest.mark.parametrize("module", [albert_fast, reference])
@pytest.mark.parametrize("name", NAMES)
def test_config_json_decides_what_is_returned(module: ModuleType, name: str, tmp_path: Path) -> None:
    fields = SMALL | ({"num_labels": 2} if name == "ForQuestionAnswering" else {})
    model = getattr(module, f"ALBERT{name}")(ALBERTConfig(**fields)).eval()
    inputs = drawn_inputs(name, model.config, "right", 0)
    model.save_pretrained(tmp_path)
    plain = model(**inputs)
    assert "hidden_states" not in plain
    for asked in ({"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}):
        values = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(values | asked))
        loaded = getattr(module, f"ALBERT{name}").from_pretrained(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(values))
        with torch.no_grad():
            silent, overruled = loaded(**inputs), loaded(**inputs, **{key: not value for key, value in asked.items()})
            unsaid = loaded(**inputs, **dict.fromkeys(("output_hidden_states", "output_attentions", "return_dict")))
        if "return_dict" in asked:
            assert isinstance(silent, tuple)
            assert isinstance(unsaid, tuple)
            assert list(overruled) == list(plain)
            continue
        kind = next(iter(asked)).removeprefix("output_")
        assert len(silent[kind]) == SMALL["num_hidden_layers"] + (kind == "hidden_states")
        assert list(unsaid) == list(silent)
        assert list(overruled) == list(plain)
        with_argument = model(**inputs, **asked)
        for expected, actual in zip(with_argument[kind], silent[kind], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("older", [False, True])
def test_a_sentence_transformers_folder_is_warned_of(saved: Path, tmp_path: Path, older: bool) -> None:
    inner = tmp_path / "st" / "0_Transformer" if older else tmp_path / "st"
    shutil.copytree(saved, inner)
    names = ["Transformer", "Pooling", "Normalize"]
    paths = ["0_Transformer" if older else "", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "st" / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": 48, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (tmp_path / "st" / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"sentence-transformers folder: Pooling \(cls_token\), Normalize of its"):
        ALBERTModel.from_pretrained(inner)
