"""Saving: a kill at any moment leaves the old checkpoint or the new one, whole; a failure leaves the old one."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from albert_fast.models import reference
from albert_fast.models.config import ALBERTConfig
from albert_fast.testing.model_pairs import SMALL

OLD = SMALL | {"hidden_act": "relu"}
# One differs in every shape, one in the configuration alone, one in nothing but its weights.
NEW = {"sizes": SMALL | {"hidden_size": 64, "num_labels": 5}, "configuration": SMALL, "weights": OLD}


class Killed(BaseException):
    """What follows in the code never happened on disk."""


class Disk:
    """Lets `steps` operations on the disk pass; the next one stops half-way, and after it nothing reaches the disk."""

    def __init__(self, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left = steps
        steps_of = {os: ("replace", "fsync", "rmdir"), shutil: ("copymode", "rmtree"), Path: ("mkdir", "unlink")}
        for owner, name in ((owner, name) for owner, names in steps_of.items() for name in names):
            monkeypatch.setattr(owner, name, self.dying(getattr(owner, name), None))
        monkeypatch.setattr(Path, "write_text", self.dying(Path.write_text, lambda path, *_: path))
        save_file = safetensors.torch.save_file
        monkeypatch.setattr(safetensors.torch, "save_file", self.dying(save_file, lambda _, path: path))

    def dying(self, function: Any, path_of: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == -1 and path_of is not None:
                function(*args, **kwargs)
                os.truncate(path_of(*args), path_of(*args).stat().st_size // 2)
            if self.left < 0:
                raise Killed
            return function(*args, **kwargs)

        return call


def model_of(fields: dict[str, Any], seed: int) -> reference.ALBERTForTokenClassification:
    torch.manual_seed(seed)
    return reference.ALBERTForTokenClassification(ALBERTConfig(**fields)).eval()


def same(actual: torch.nn.Module, expected: torch.nn.Module) -> bool:
    states, others = actual.state_dict(), expected.state_dict()
    fits = all(states[key].shape == others[key].shape for key in others)
    configs = [dict(model.config.to_dict()) for model in (actual, expected)]
    for config in configs:
        config.pop("architectures", None), config.pop("dtype", None)
    return fits and configs[0] == configs[1] and all(torch.equal(states[key], others[key]) for key in others)


def litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in ("config.json", "model.safetensors"))


@pytest.mark.parametrize("what", NEW)
def test_a_kill_at_any_step(what: str, tmp_path: Path) -> None:
    old, new, later = model_of(OLD, 0), model_of(NEW[what], 1), model_of(SMALL, 2)
    found = []
    for steps in range(100):
        folder = tmp_path / str(steps)
        old.save_pretrained(folder)
        try:
            with pytest.MonkeyPatch.context() as patch:
                Disk(steps, patch)
                new.save_pretrained(folder)
            finished = True
        except Killed:
            finished = False
        loaded = reference.ALBERTForTokenClassification.from_pretrained(folder)
        assert same(loaded, old) != same(loaded, new), f"neither the old nor the new model after {steps} steps"
        found.append(same(loaded, new))
        later.save_pretrained(folder)
        assert same(reference.ALBERTForTokenClassification.from_pretrained(folder), later)
        assert litter(folder) == []
        if finished:
            break
    assert finished
    assert found == sorted(found), "once the new model is there it stays"
    assert not found[0]
    assert len(found) > 6
    assert found.count(True) >= 3, "killed before the configuration was renamed, after the weights were"


def test_a_kill_while_a_killed_save_is_tidied_up(tmp_path: Path) -> None:
    """Every state that one kill leaves, then every state that a second one leaves."""
    old, new, third = model_of(OLD, 0), model_of(NEW["sizes"], 1), model_of(SMALL, 2)
    for first in range(15):
        for second in range(first % 2, 19, 2):
            folder = tmp_path / f"{first}-{second}"
            old.save_pretrained(folder)
            for model, steps in ((new, first), (third, second)):
                with pytest.MonkeyPatch.context() as patch:
                    Disk(steps, patch)
                    try:
                        model.save_pretrained(folder)
                    except Killed:
                        continue
            loaded = reference.ALBERTForTokenClassification.from_pretrained(folder)
            assert sum(same(loaded, model) for model in (old, new, third)) == 1, f"steps {first}, {second}"
            shutil.rmtree(folder)


def test_a_real_kill(tmp_path: Path) -> None:
    """Children save one model and another in turn until SIGKILL comes."""
    script = """
        import os, random, signal, sys, time
        import torch
        from albert_fast.models import reference
        from albert_fast.models.config import ALBERTConfig

        torch.set_num_threads(1)
        fields = dict(vocab_size=2000, embedding_size=32, hidden_size=64, num_attention_heads=2, intermediate_size=64)
        models = [reference.ALBERTModel(ALBERTConfig(**fields, num_hidden_layers=n)) for n in (1, 2)]
        folder, seen, rounds = sys.argv[1], set(), 0
        start = time.monotonic()
        for model in models:
            model.save_pretrained(folder)
        span = time.monotonic() - start
        while rounds < 20 or (len(seen) < 2 and rounds < 500):
            rounds += 1
            child = os.fork()
            if child == 0:
                while True:
                    for model in models[::-1]:
                        model.save_pretrained(folder)
            time.sleep(random.uniform(0, 3 * span))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            loaded = reference.ALBERTModel.from_pretrained(folder)
            expected = models[loaded.config.num_hidden_layers - 1].state_dict()
            assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
            seen.add(loaded.config.num_hidden_layers)
        models[0].save_pretrained(folder)
        print(sorted(seen), sorted(os.listdir(folder)))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("[1, 2]"), "no child was killed before, or none after, it had saved"
    assert run.stdout.endswith("] ['config.json', 'model.safetensors']\n"), (
        "the next save removes what the killed ones left"
    )


@pytest.mark.parametrize("failing", ["save_file", "write_text"])
def test_a_full_disk(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = model_of(OLD, 0)
    old.save_pretrained(tmp_path)

    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((safetensors.torch, "save_file") if failing == "save_file" else (Path, "write_text")), full)
    with pytest.raises(OSError, match="No space left"):
        model_of(SMALL, 1).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert same(reference.ALBERTForTokenClassification.from_pretrained(tmp_path), old)
    assert litter(tmp_path) == []


def test_the_folder(tmp_path: Path) -> None:
    """It is made if need be, other files in it stay, and who may read config.json may read the weights."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "vocabulary.txt").write_text("kept")
    before = os.umask(0o027)
    try:
        model_of(SMALL, 0).save_pretrained(folder)
        model_of(SMALL, 0).save_pretrained(tmp_path / "new" / "folder")
    finally:
        os.umask(before)
    assert litter(folder) == ["vocabulary.txt"]
    for name in ("config.json", "model.safetensors"):
        assert stat.S_IMODE((tmp_path / "new" / "folder" / name).stat().st_mode) == 0o640
