"""Pre-training under torchrun: two processes have the losses of one, replicated and sharded, and continue each other's state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from albert_fast import ALBERTForPreTraining
from albert_fast.testing.tolerances import assert_close_calibrated
from albert_fast.training import load_config, pretrain
from albert_fast.training.checkpointing import STATE_NAME

pytest.importorskip("tokenizers", reason="the text extra is not installed")
pytest.importorskip("omegaconf", reason="the pretrain extra is not installed")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.skipif(sys.platform != "linux", reason="torchrun with gloo is tested on Linux"),
]
CONFIG = """
data: {{files: [{corpus}], max_length: 24, held_out_share: 0.1}}
vocabulary: {{size: 90}}
model: {{hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 24, embedding_size: 8,
  classifier_dropout_prob: 0.0}}
optimizer: {{name: {optimizer}, learning_rate: 0.005}}
steps: 5
batch_tokens: 200
log_steps: 1
evaluate_steps: 5
"""


# The command twice in one process; argv: an option for the first time, one for the second, and what both have in common.
CHILD = """
import sys
from albert_fast.cli import build_app

first, then, *common = sys.argv[1:]
for options in ([first], [then, "steps=9", "--resume"]):
    build_app()(["pretrain", *common, *options, "--device", "cpu"], standalone_mode=False)
"""


def start_and_resume(folder: Path, first: str, then: str, *common: str) -> None:
    """Runs the command twice in two processes: five steps with the option `first`, four more with `then`."""
    (folder / "child.py").write_text(CHILD)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(folder / "child.py"), first, then, *common]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2, "the first process prints, and no other"


def losses(folder: Path) -> torch.Tensor:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()[1:]]
    names = ("masked_loss", "order_loss", "held_out_loss", "masked_accuracy")
    return torch.tensor([record[name] for record in records for name in names if name in record])


@pytest.mark.parametrize(
    ("optimizer", "first", "then"),
    [
        ("adamw", "sharded=true", "sharded=false"),
        pytest.param("lamb", "sharded=false", "sharded=true", marks=pytest.mark.thorough),
    ],
)
def test_two_processes_have_the_losses_of_one(optimizer: str, first: str, then: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in "bdgklm" for b in ("a", "en", "ist", "o", "ur")]
    sentences = [" ".join(rng.choice(words, rng.integers(2, 9))) + "." for _ in range(400)]
    (tmp_path / "corpus.txt").write_text("\n\n".join(" ".join(sentences[at : at + 5]) for at in range(0, 400, 5)))
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG.format(corpus=tmp_path / "corpus.txt", optimizer=optimizer))
    # One process, and one that adds up two micro-batches as two processes do: rounding alone sets the two apart.
    for name, accumulation in (("one", 1), ("micro", 2)):
        overrides = [f"output={tmp_path / name}", f"accumulation={accumulation}"]
        pretrain(load_config(file, overrides), progress=False)
        pretrain(load_config(file, [*overrides, "steps=9"]), resume=True, progress=False)
    two = tmp_path / "two"
    start_and_resume(tmp_path, first, then, str(file), f"output={two}")
    # One process opens what two have saved.
    assert torch.load(two / STATE_NAME, weights_only=True)["step"] == 9
    exact, same, actual = (losses(tmp_path / name) for name in ("one", "micro", "two"))
    assert len(actual) == 2 * 9 + 2 * 2
    assert_close_calibrated(actual, same, exact, "losses", slack=2e-6)
    ours, theirs = (ALBERTForPreTraining.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one"))
    other = ALBERTForPreTraining.from_pretrained(tmp_path / "micro").state_dict()
    for name, value in ours.items():
        if name.endswith("key.bias"):  # its gradient is rounding alone, which Adam makes as large as the others
            continue
        assert_close_calibrated(value, other[name], theirs[name], name, slack=1e-3)
