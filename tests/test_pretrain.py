"""Pre-training runs: killed and resumed bit for bit, against Hugging Face, errors before the first step, the command."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from albert_fast import ALBERTForPreTraining
from albert_fast.cli import build_app
from albert_fast.runtime.locking import LockedError
from albert_fast.training import DataConfig, OptimizerConfig, PretrainConfig, VocabularyConfig, load_config, pretrain
from albert_fast.training.checkpointing import STATE_NAME, claimed

pytest.importorskip("tokenizers", reason="the text extra is not installed")
pytest.importorskip("omegaconf", reason="the pretrain extra is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "embedding_size": 8,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
# argv: the configuration, and the number of the save to die in; 0: in none, but every line takes a while.
CHILD = """
import os, signal, sys, time, torch
from albert_fast.training import load_config, pretrain

torch.set_num_threads(1)
write, saves = torch.save, []

def save(state, file):
    saves.append(file)
    if len(saves) == int(sys.argv[2]):
        file.write(bytes(1000))
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    write(state, file)

def report(line):
    print(line, file=sys.stderr, flush=True)
    if sys.argv[2] == "0":
        time.sleep(0.2)

torch.save = save
pretrain(load_config(sys.argv[1]), resume=True, report=report)
"""


@pytest.fixture
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    words = np.array([f"{a}{b}" for a in "bdgklm" for b in ("a", "en", "ist", "o", "ur")])
    sentences = [" ".join(rng.choice(words, rng.integers(2, 9))) + "." for _ in range(400)]
    return [" ".join(sentences[at : at + rng.integers(1, 9)]) for at in range(0, 400, 5)]


@pytest.fixture
def corpus(texts: list[str], tmp_path: Path) -> Path:
    (tmp_path / "corpus.txt").write_text("\n\n".join(texts))
    return tmp_path / "corpus.txt"


def configuration(output: Path, *files: Path, **fields) -> PretrainConfig:
    data = DataConfig([str(file) for file in files], max_length=24, held_out_share=0.1)
    made = PretrainConfig(str(output), data, VocabularyConfig(size=90), MODEL, steps=14, batch_tokens=600)
    made.log_steps, made.evaluate_steps, made.save_steps = 1, 7, 4
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def write_config(config: PretrainConfig, file: Path) -> Path:
    from omegaconf import OmegaConf

    OmegaConf.save(OmegaConf.structured(config), file)
    return file


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return ALBERTForPreTraining.from_pretrained(folder).state_dict()


def test_a_killed_run_goes_on_with_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    whole = pretrain(configuration(tmp_path / "whole", corpus), progress=False)
    assert len(whole.history) == 14 + 2
    assert [record["step"] for record in whole.history if "masked_accuracy" in record] == [7, 14]

    killed = tmp_path / "killed"
    file = write_config(configuration(killed, corpus), tmp_path / "config.yaml")
    command = [sys.executable, "-c", CHILD, str(file)]
    # In the middle of the first save, when there is no state yet, and of the third one, which replaces the second.
    for save, left in (("1", False), ("3", True)):
        done = subprocess.run([*command, save], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert (killed / STATE_NAME).exists() == left
        assert list(killed.glob(".*.part"))
    # Between two saves, wherever it is then.
    process = subprocess.Popen([*command, "0"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr as lines:
        assert any("step 10 of" in line for line in lines)
        process.kill()
    assert process.wait() == -signal.SIGKILL
    resumed = pretrain(configuration(killed, corpus), resume=True, progress=False)
    assert resumed.history == whole.history
    assert [record["epoch"] for record in resumed.history if "epoch" in record][7::6] == [1, 2]  # it crossed an epoch
    for name, value in weights(tmp_path / "whole").items():
        assert torch.equal(weights(killed)[name], value), name
    logs = [(folder / "log.jsonl").read_text() for folder in (killed, tmp_path / "whole")]
    assert logs[0] == logs[1]
    assert not list(killed.glob(".*.part"))


def test_a_run_killed_behind_its_last_state_still_gets_its_model(corpus: Path, tmp_path: Path) -> None:
    config, out = configuration(tmp_path / "out", corpus, steps=3), tmp_path / "out"
    whole = pretrain(config, progress=False)
    last, state = weights(out), (out / STATE_NAME).read_bytes()
    for name in ("model.safetensors", "config.json", "log.jsonl", "curves.png"):
        (out / name).unlink()
    resumed = pretrain(config, resume=True, progress=False)
    assert resumed.history == whole.history
    for name, value in weights(out).items():
        assert torch.equal(last[name], value), name
    assert (out / "log.jsonl").exists()
    assert (out / "curves.png").exists()
    assert len((out / STATE_NAME).read_bytes()) == len(state)


def test_ctrl_c_saves_and_goes_on(corpus: Path, tmp_path: Path) -> None:
    whole = pretrain(configuration(tmp_path / "whole", corpus), progress=False)

    def interrupt(line: str) -> None:
        if line.startswith("step 6 of"):
            os.kill(os.getpid(), signal.SIGINT)

    config = configuration(tmp_path / "out", corpus)
    with pytest.raises(KeyboardInterrupt, match="after step 6 of 14"):
        pretrain(config, report=interrupt)
    again = pretrain(config, resume=True, progress=False)
    assert again.history == whole.history


def test_a_full_disk_in_a_save_leaves_the_last_state(corpus: Path, tmp_path: Path) -> None:
    whole = pretrain(configuration(tmp_path / "whole", corpus), progress=False)
    size = (tmp_path / "whole" / STATE_NAME).stat().st_size
    config, limits = configuration(tmp_path / "out", corpus), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(line: str) -> None:
        if line.startswith("step 9 of"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises((OSError, RuntimeError)):
            pretrain(config, report=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(tmp_path / "out" / STATE_NAME, weights_only=True)["step"] == 8
    assert pretrain(config, resume=True, progress=False).history == whole.history


def test_two_runs_do_not_share_a_folder(corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "out", corpus, steps=2)
    with claimed(tmp_path / "out", resume=False), pytest.raises(LockedError, match="another run is writing there"):
        pretrain(config, progress=False)
    pretrain(config, progress=False)
    with pytest.raises(FileExistsError, match="resume it"):
        pretrain(config, progress=False)


def test_a_resumed_run_has_the_same_settings_or_says_which_differ(corpus: Path, tmp_path: Path) -> None:
    config = configuration(tmp_path / "out", corpus, steps=4)
    pretrain(config, progress=False)
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay was 0\.01, now 0\.5"):
        pretrain(configuration(tmp_path / "out", corpus, optimizer=OptimizerConfig(weight_decay=0.5)), resume=True)
    with pytest.raises(ValueError, match="4 steps are done, so the run cannot end after 3"):
        pretrain(configuration(tmp_path / "out", corpus, steps=3), resume=True)
    corpus.write_text(corpus.read_text() + " More.")
    with pytest.raises(ValueError, match="corpora was"):
        pretrain(configuration(tmp_path / "out", corpus, steps=4), resume=True)


def test_micro_batches_and_workers_do_not_change_the_losses(texts: list[str], tmp_path: Path) -> None:
    fixed = {name: value for name, value in MODEL.items() if "dropout" not in name} | {"classifier_dropout_prob": 0.0}
    losses = []
    for name, accumulation, workers in (("one", 1, 0), ("four", 4, 2)):
        config = configuration(tmp_path / name, steps=6, model=fixed, accumulation=accumulation)
        config.data.workers = workers
        result = pretrain(config, documents=texts, progress=False)
        losses.append([record["loss"] for record in result.history if "loss" in record])
    # Each mean is rounded once more in float32, and six steps of Adam carry that on.
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", ["adamw", pytest.param("lamb", marks=pytest.mark.thorough)])
def test_a_run_learns_and_other_libraries_load_the_model(name: str, corpus: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    how = OptimizerConfig(name, 2e-2 if name == "lamb" else 5e-3, schedule="cosine")
    sizes = {key: value for key, value in MODEL.items() if "dropout" not in key}
    config = configuration(tmp_path / "out", corpus, steps=60, optimizer=how, precision="bfloat16", model=sizes)
    config.evaluate_steps = 30
    result = pretrain(config, progress=False)
    first, last = (
        np.mean([record["masked_loss"] for record in result.history if "loss" in record][part])
        for part in (slice(5), slice(-5, None))
    )
    assert last < first - 0.2
    assert set(result.figures) == {"held_out_loss", "held_out_masked_loss", "masked_accuracy", "order_accuracy"}
    theirs = transformers.AlbertForPreTraining.from_pretrained(tmp_path / "out")
    for key, value in theirs.state_dict().items():
        assert torch.equal(weights(tmp_path / "out")[key], value), key
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1
    again = PretrainConfig(
        str(tmp_path / "more"), config.data, init_from=str(tmp_path / "out"), steps=2, batch_tokens=200
    )
    assert pretrain(again, progress=False).history[0]["masked_loss"] < first - 0.1


@pytest.mark.parametrize(("size", "millions"), [("base", 12), ("large", 18), ("xlarge", 60), ("xxlarge", 223)])
def test_parameter_counts_are_the_papers(size: str, millions: int) -> None:
    """Table 1 rounds; it counts 235 million for xxlarge, where the paper's own formula gives 223."""
    transformers = pytest.importorskip("transformers")
    config = PretrainConfig(model={"size": size}).new_model()
    with torch.device("meta"):
        ours = ALBERTForPreTraining(config)
        theirs = transformers.AlbertForPreTraining(transformers.AlbertConfig(**config.to_dict()))
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.albert.num_parameters() / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.nam=sgd"], "optimizer.nam=sgd: .*Key 'nam' not in 'OptimizerConfig'"),
        (["optimizer.name=sgd"], "optimizer.name must be one of adamw, lamb, got 'sgd'"),
        (["steps=many"], "steps=many: .*could not be converted to Integer"),
        (["steps"], "steps: an override has the form field=value"),
        (["seed=-1"], "seed must lie in"),
        (["batch_tokens=20"], "batch_tokens must hold a sequence of data.max_length = 24"),
        (["model.hidden_sice=3"], "model.hidden_sice is no size of a model; known: size, "),
        (["model.size=huge"], "model.size must be one of small, base, large, xlarge, xxlarge, got 'huge'"),
        (["model.num_attention_heads=3"], "hidden_size"),
        (["model.max_position_embeddings=9"], "max_position_embeddings 9 is less than data.max_length 24"),
        (["init_from=somewhere"], "init_from has its own sizes and vocabulary"),
        (["data.files=[none.txt]"], "none.txt: no such file"),
        (["data.files=[]"], "give data.files or documents"),
        (["output=''"], "output is missing"),
        (["sharded=true"], "sharded=true shares weights among the processes of torchrun"),
    ],
)
def test_a_wrong_setting_is_one_line_before_any_work(
    overrides: list[str], message: str, corpus: Path, tmp_path: Path
) -> None:
    file = write_config(configuration(tmp_path / "out", corpus), tmp_path / "config.yaml")
    result = CliRunner().invoke(build_app(), ["pretrain", str(file), *overrides])
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    with pytest.raises((ValueError, OSError), match=message):
        pretrain(load_config(file, overrides), progress=False)
    assert not (tmp_path / "out").exists()


def test_the_command_trains_and_prints_its_figures(corpus: Path, tmp_path: Path) -> None:
    file = write_config(configuration(tmp_path / "out", corpus), tmp_path / "config.yaml")
    result = CliRunner().invoke(build_app(), ["pretrain", str(file), "steps=3", "--threads", "1"])
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert (printed["steps"], printed["output"]) == (3, str(tmp_path / "out"))
    assert 0 <= printed["masked_accuracy"] <= 1
    assert "step 3 of 3: " in result.stderr
    assert "tokens/s" in result.stderr
