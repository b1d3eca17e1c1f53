"""`albert-fast convert`: Google's checkpoints compute in Hugging Face's layout what Google's code computes from its variables."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import albert_fast
from albert_fast.cli import build_app
from albert_fast.tasks.convert import convert_checkpoint
from albert_fast.testing.google_checkpoints import (
    CONFIGS,
    PRETRAINING,
    SHARED,
    V2,
    Variables,
    drawn_variables,
    googles_outputs,
    numpy_outputs,
    release,
    with_training,
)
from albert_fast.testing.tolerances import assert_close_calibrated
from albert_fast.text.tokenizer import load_tokenizer, train_tokenizer

transformers = pytest.importorskip("transformers")

# task -> head above -> its field of our and transformers' outputs; "order" of ALBERT is sop_logits
HEADS: dict[str, dict[str, str]] = {
    "ForPreTraining": {"words": "prediction_logits", "order": "seq_relationship_logits"},
    "ForMaskedLM": {"words": "logits"},
    "ForSequenceClassification": {"classes": "logits"},
    "ForQuestionAnswering": {"starts": "start_logits", "ends": "end_logits"},
}
# configuration, heads, the class that config.json must name
CASES = [
    *((name, PRETRAINING, "ForPreTraining") for name in CONFIGS),
    *((name, ("predictions",), "ForMaskedLM") for name in ("albert-v2", "bert")),
    *((name, ("classifier",), "ForSequenceClassification") for name in ("albert-v1", "bert")),
    *((name, ("answers",), "ForQuestionAnswering") for name in ("albert-groups", "bert")),
    *((name, (), "Model") for name in ("albert-groups", "bert")),
]
IDS = ["-".join((name, *heads)) for name, heads, _ in CASES]


def drawn_batch() -> list[Any]:
    random = np.random.default_rng(3)
    mask = np.array([[1] * 11, [1] * 7 + [0] * 4])
    return [random.integers(1, 61, (2, 11)), mask, random.integers(0, 2, (2, 11))]


def outputs_of(library: ModuleType, start: str, task: str, folder: Path, batch: list[Any]) -> dict[str, Any]:
    """The outputs of the encoder alone, and of the class with its heads, under Google's names."""
    inputs = dict(zip(("input_ids", "attention_mask", "token_type_ids"), map(torch.from_numpy, batch), strict=True))
    with torch.no_grad():
        out = library.AutoModel.from_pretrained(folder).eval()(**inputs, output_hidden_states=True)
        found = {key: out[key] for key in ("last_hidden_state", "pooler_output")}
        found |= {f"hidden_states.{at}": state for at, state in enumerate(out.hidden_states)}
        if task != "Model":
            head = getattr(library, start + task).from_pretrained(folder).eval()(**inputs)
            found |= {name: head[key] if key in head else head["sop_logits"] for name, key in HEADS[task].items()}
    return found


def compare(actual: dict[str, Any], same: dict[str, Any], exact: dict[str, Any], mask: Any) -> None:
    """Checks every output at the tokens that are there."""
    assert sorted(actual) == sorted(exact)
    real = torch.from_numpy(mask.astype(bool))
    for name, value in exact.items():
        three = [torch.as_tensor(np.asarray(one)) for one in (actual[name], same[name], value)]
        if three[2].shape[:2] == real.shape:
            three = [one[real] for one in three]
        assert_close_calibrated(*three, what=name)


class Held:
    """A checkpoint in memory, in place of TensorFlow's reader."""

    def __init__(self, variables: Variables) -> None:
        self.variables = variables
        self.shapes = {name: np.shape(value) for name, value in variables.items()}

    def array(self, name: str) -> Any:
        return self.variables[name]

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def convert(variables: Variables, sizes: Mapping[str, Any], folder: Path, **arguments: Any) -> Any:
    """Converts variables in memory with the files of `folder`/google, which are made if need be, to `folder`/out."""
    if not (folder / "google").exists():
        release(folder / "google", sizes)
    return convert_checkpoint(folder / "google", folder / "out", reader=lambda prefix: Held(variables), **arguments)


@pytest.mark.filterwarnings("ignore:.*no vocabulary there")
@pytest.mark.parametrize(("name", "heads", "task"), CASES, ids=IDS)
def test_outputs_are_googles(name: str, heads: tuple[str, ...], task: str, tmp_path: Path) -> None:
    config, batch = CONFIGS[name], drawn_batch()
    variables = drawn_variables(config, heads)
    ours, theirs = ("BERT", "Bert") if name == "bert" else ("ALBERT", "Albert")
    done = convert(with_training(variables), config, tmp_path)
    assert done.class_name == theirs + task
    assert done.weights == sum(value.size for value in variables.values()) + (24 * 25 if name == "albert-square" else 0)
    same, exact = (numpy_outputs(variables, config, batch, dtype) for dtype in (np.float32, np.float64))
    for library, start in ((albert_fast, ours), (transformers, theirs)):
        compare(outputs_of(library, start, task, tmp_path / "out", batch), same, exact, batch[1])
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == [theirs + task]
    assert written["hidden_dropout_prob"] == config["hidden_dropout_prob"]
    assert len(written.get("id2label", "12")) == (5 if heads == ("classifier",) else 2)


@pytest.mark.filterwarnings("ignore:.*no vocabulary there")
def test_a_bert_that_was_trained_with_the_tanh_form(tmp_path: Path) -> None:
    config, batch = CONFIGS["bert"], drawn_batch()
    variables = drawn_variables(config)
    convert(variables, config, tmp_path, hidden_act="gelu_new")
    trained = config | {"hidden_act": "gelu_new"}
    same, exact = (numpy_outputs(variables, trained, batch, dtype) for dtype in (np.float32, np.float64))
    compare(outputs_of(albert_fast, "BERT", "ForPreTraining", tmp_path / "out", batch), same, exact, batch[1])


@pytest.mark.filterwarnings("ignore:.*no vocabulary there")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bert/pooler/dense/bias": None}, "bert/pooler/dense/bias is missing"),
        ({"cls/predictions/output_bias": None}, "cls/predictions/output_bias is missing"),
        ({"bert/pooler/dense/bias": np.ones(23)}, r"bert/pooler/dense/bias has the shape \(23,\), .* asks for \(24,\)"),
        ({"bert/encoder/new/kernel": np.ones(3)}, "bert/encoder/new/kernel is no variable of a model with this conf"),
        (
            {"bert/embeddings/word_embeddings": np.ones((61, 8), np.int32)},
            "word_embeddings must hold floats, got int32",
        ),
        ({"output_bias": np.ones(2)}, "heads of several tasks: cls/predictions/.*, cls/seq_.*, output_bias"),
    ],
    ids=["missing", "head", "shape", "unknown", "integers", "tasks"],
)
def test_variables_that_do_not_fit_are_named(change: Variables, message: str, tmp_path: Path) -> None:
    variables = with_training(drawn_variables(V2)) | change
    with pytest.raises(ValueError, match=message):
        convert({name: value for name, value in variables.items() if value is not None}, V2, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["google"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (V2 | {"vocab_size": 60}, r"word_embeddings has the shape \(61, 8\), the configuration asks for \(60, 8\)"),
        (V2 | {"num_hidden_groups": 2}, "group_1/inner_group_0/attention_1/self/query/kernel is missing"),
        (V2 | {"hidden_act": "tanh"}, "albert_config.json: config: hidden_act 'tanh' is not supported"),
        (V2 | {"num_attention_heads": 5}, "albert_config.json: config: hidden_size 24 is not a multiple of"),
        (V2 | {"num_hidden_layers": 18, "num_hidden_groups": 14}, "Google's code runs group"),
        (SHARED | {"embedding_size": 9}, "embedding_hidden_mapping_in/kernel has the shape"),
    ],
    ids=["size", "groups", "activation", "heads", "order", "embeddings"],
)
def test_configurations_that_do_not_fit_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert(drawn_variables(V2), config, tmp_path)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="the first is _CHECKPOINTABLE_OBJECT_GRAPH; TensorFlow 2 wrote it for an object"
    ):
        convert({"_CHECKPOINTABLE_OBJECT_GRAPH": b"", "model/.ATTRIBUTES/VARIABLE_VALUE": np.ones(2)}, V2, tmp_path)
    shared = {"bert/encoder/layer_shared/attention/self/query/kernel": np.ones((2, 2))}
    with pytest.raises(ValueError, match="no variable begins as Google's ALBERT or BERT names its layers"):
        convert(shared, V2, tmp_path)


def test_files_are_found_or_asked_for(tmp_path: Path) -> None:
    for name in ("none", "none/model.ckpt-1"):
        with pytest.raises(FileNotFoundError, match="no such folder or checkpoint"):
            convert_checkpoint(tmp_path / name, tmp_path / "out")
    source = release(tmp_path / "google", V2)
    variables = drawn_variables(V2)
    for ending in ("", ".index", ".meta", ".data-00000-of-00001"):
        name = f"model.ckpt-best{ending}"
        with pytest.warns(UserWarning, match="google: no vocabulary there; --vocab"):
            convert_checkpoint(source / name, tmp_path / "out", overwrite=True, reader=lambda _: Held(variables))
    (source / "model.ckpt-7.index").touch()
    with pytest.raises(ValueError, match=r"several checkpoints; name one of .*model\.ckpt-7, .*model\.ckpt-best"):
        convert(variables, V2, tmp_path, overwrite=True)
    (source / "model.ckpt-7.index").unlink()
    for name in ("vocab.txt", "vocab_chinese.txt"):
        (source / name).touch()
    with pytest.raises(ValueError, match="several vocabularies; --vocab"):
        convert(variables, V2, tmp_path, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"none\.txt: no vocabulary: a file that ends in \.model or \.txt"):
        convert(variables, V2, tmp_path, overwrite=True, vocab=tmp_path / "none.txt")
    (source / "albert_config.json").rename(tmp_path / "albert.json")
    with pytest.raises(FileNotFoundError, match=r"holds none of albert_config\.json.*--config"):
        convert(variables, V2, tmp_path, overwrite=True)
    done = convert(variables, V2, tmp_path, overwrite=True, config=tmp_path / "albert.json", vocab=source / "vocab.txt")
    assert done.vocabulary == str(source / "vocab.txt")
    with pytest.raises(FileNotFoundError, match="holds no checkpoint of TensorFlow"):
        convert_checkpoint(tmp_path / "out", tmp_path / "again")
    # A module of TensorFlow Hub
    hub = tmp_path / "hub"
    release(hub / "variables", V2)
    (hub / "assets").mkdir()
    (source / "vocab.txt").rename(hub / "assets" / "vocab.txt")
    (hub / "variables" / "albert_config.json").rename(hub / "assets" / "albert_config.json")
    done = convert_checkpoint(hub, tmp_path / "again", reader=lambda _: Held(variables))
    assert done.vocabulary == str(hub / "assets" / "vocab.txt")


@pytest.mark.parametrize("kind", ["30k-clean.model", "vocab_chinese.txt", "cased"])
def test_the_vocabulary_comes_along(kind: str, tmp_path: Path) -> None:
    source = release(tmp_path / "google", V2)
    text = ["ein Haus am See", "Das Haus ist alt"] if kind == "cased" else ["一个 好 人 story", "好 一个 story"]
    if kind == "30k-clean.model":
        sentencepiece = pytest.importorskip("sentencepiece")
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(["a house by a lake", "the house is old"] * 20), model_prefix=str(source / "30k-clean"),
            vocab_size=40, hard_vocab_limit=False, minloglevel=2, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
            control_symbols=["[CLS]", "[SEP]", "[MASK]"],
        )  # fmt: skip
        text = ["The House by a lake"]
    else:
        trained = train_tokenizer(text * 9, 61, kind="wordpiece", lower_case=kind != "cased", at_most=True)
        pieces = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
        name = kind if kind.endswith(".txt") else "vocab.txt"
        (source / name).write_text("\n".join([*pieces, "<S>"]) + "\n")
    convert(drawn_variables(V2), V2, tmp_path)
    ours, theirs = load_tokenizer(tmp_path / "out"), transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for line in text:
        ids = ours(line)["input_ids"]
        assert ids == theirs(line)["input_ids"]
        assert ours.convert_tokens_to_ids(ours.unk_token) not in ids
    assert ours.model_max_length == V2["max_position_embeddings"]
    assert (ours("Haus")["input_ids"] == ours("haus")["input_ids"]) == (kind != "cased")
    convert(drawn_variables(V2), V2, tmp_path, overwrite=True, lower_case=False)
    assert load_tokenizer(tmp_path / "out").settings["do_lower_case"] is False


# With TensorFlow


@pytest.fixture
def tensorflow() -> Any:
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401 (it crashes in a process that has imported TensorFlow)
    return pytest.importorskip("tensorflow", reason="the extra tensorflow is not installed")


def save(tensorflow: Any, variables: Variables, prefix: Path) -> None:
    """Writes the variables as the Saver of TensorFlow 1 does."""
    tensorflow.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=[tensorflow.constant(value) for value in variables.values()],
    )


@pytest.mark.filterwarnings("ignore:.*no vocabulary there")
@pytest.mark.parametrize("name", CONFIGS)
def test_files_of_tensorflow(name: str, tensorflow: Any, tmp_path: Path) -> None:
    config, batch = CONFIGS[name], drawn_batch()
    variables = drawn_variables(config)
    source = release(tmp_path / "google", config)
    save(
        tensorflow,
        with_training({f"module/{key}": value for key, value in variables.items()}),
        source / "model.ckpt-best",
    )
    result = CliRunner().invoke(build_app(), ["convert", str(source), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    actual = outputs_of(albert_fast, "BERT" if name == "bert" else "ALBERT", "ForPreTraining", tmp_path / "out", batch)
    tnp = pytest.importorskip("tensorflow.experimental.numpy")

    @tensorflow.function
    def graph() -> dict[str, Any]:
        given = {key: tensorflow.constant(value) for key, value in variables.items()}
        ids, mask, types = map(tensorflow.constant, batch)
        return googles_outputs(
            given, config, [ids, tensorflow.cast(mask, tensorflow.float32), types], tnp, tensorflow.math.erf
        )

    same = {key: value.numpy() for key, value in graph().items()}
    assert {value.dtype.name for value in same.values()} == {"float32"}
    compare(actual, same, numpy_outputs(variables, config, batch, np.float64), batch[1])


def test_broken_files_of_tensorflow(tensorflow: Any, tmp_path: Path) -> None:
    source = release(tmp_path / "google", V2)
    save(tensorflow, with_training(drawn_variables(V2)), source / "model.ckpt-best")
    data = source / "model.ckpt-best.data-00000-of-00001"
    whole = data.read_bytes()
    for content, message in (
        (whole[:3000], r"model\.ckpt-best: bert/[\w/]+ cannot be read: "),
        (bytes([whole[0] ^ 1]) + whole[1:], r"model\.ckpt-best: [\w/]+ cannot be read: .*[Cc]hecksum"),
        (None, r"model\.ckpt-best: [\w/]+ cannot be read: .*data-00000-of-00001"),
    ):
        data.unlink()
        if content is not None:
            data.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            convert_checkpoint(source, tmp_path / "out")
    index = source / "model.ckpt-best.index"
    index.write_bytes(index.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"model\.ckpt-best: not a readable checkpoint of TensorFlow"):
        convert_checkpoint(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["google"]


def test_without_tensorflow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tensorflow.py").write_text("raise ImportError('No module named tensorflow')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = release(tmp_path / "google", V2)
    result = CliRunner().invoke(build_app(), ["convert", str(source), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "pip install 'albert-fast[tensorflow]'" in result.output


def test_no_code_beside_a_checkpoint_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = release(tmp_path / "google", V2)
    for name in ("numpy", "json", "tensorflow"):
        (source / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(source)
    with pytest.raises((ImportError, ValueError), match=r"TensorFlow|not a readable checkpoint"):
        convert_checkpoint(".", tmp_path / "out")
    assert not (tmp_path / "ran").exists()
