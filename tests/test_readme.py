"""Runs README.md's Python in order in one session, as a new user types it, and checks its commands and options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from albert_fast.cli import build_app

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHIPPED = "albert_fast/data/sst2-small"
ACTIVATION = "source .venv/bin/activate"


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def commands() -> list[tuple[int, list[str]]]:
    """(position in the text, words from the program's name on) of every albert-fast command."""
    found = []
    for match in re.finditer(r"```\n(.*?)```|`([^`\n]+)`", TEXT, re.DOTALL):
        for part in re.split(r"&&|\||\n", match[1] or match[2]):
            if re.match(r"\s*(\S*/)?albert-fast(\s|$)", part):
                found.append((match.start(), shlex.split(part)))
    return found


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    if not (ROOT / SHIPPED).is_dir():
        pytest.skip("this checkout has no shipped model")
    monkeypatch.chdir(tmp_path)  # what they write
    blocks = python_blocks()
    assert len(blocks) >= 5
    assert SHIPPED in blocks[0]
    session: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        if "cuda()" in block and not torch.cuda.is_available():
            compile(block, f"README.md, Python block {number}", "exec")
            continue
        exec(compile(block.replace(SHIPPED, str(ROOT / SHIPPED)), f"README.md, Python block {number}", "exec"), session)
    assert capsys.readouterr().out.startswith("torch.Size([2, ")


def test_commands_exist_with_their_options() -> None:
    program = typer.main.get_command(build_app())
    assert isinstance(program, typer.core.TyperGroup)
    used = set()
    for _, (_, *words) in commands():
        if not words:
            continue
        assert words[0] in program.commands, words
        used.add(words[0])
        known = {
            name
            for parameter in program.commands[words[0]].params
            for name in parameter.opts + parameter.secondary_opts
        }
        assert {word.partition("=")[0] for word in words[1:] if word.startswith("-") and word != "-"} <= known, words
    assert {"classify", "encode", "fill-mask", "train", "demo"} <= used


def test_commands_name_the_environment_until_it_is_activated() -> None:
    activated = TEXT.index(ACTIVATION)
    early = [words for place, words in commands() if place < activated and words[0] != ".venv/bin/albert-fast"]
    assert early == []
