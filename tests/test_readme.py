"""README.md and docs/ as a new user types them: each page's Python in order in one session, the commands and their options."""

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
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]}
README = PAGES["README.md"]
SHIPPED = "albert_fast/data/sst2-small"
ACTIVATION = "source .venv/bin/activate"


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[tuple[int, list[str]]]:
    """(where it is in the text, its words from the program's name on) of every albert-fast command."""
    found = []
    for match in re.finditer(r"```\n(.*?)```|`([^`\n]+)`", text, re.DOTALL):
        for part in re.split(r"&&|\||\n", match[1] or match[2]):
            if re.match(r"\s*(\S*/)?albert-fast(\s|$)", part):
                found.append((match.start(), shlex.split(part)))
    return found


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if python_blocks(text)])
def test_python_blocks_run_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    pytest.importorskip("tokenizers", reason="the text extra is not installed")
    if not (ROOT / SHIPPED).is_dir():
        pytest.skip("this checkout has no shipped model")
    monkeypatch.chdir(tmp_path)  # what they write
    session: dict[str, Any] = {}
    for number, block in enumerate(python_blocks(PAGES[page])):
        if "cuda()" in block and not torch.cuda.is_available():
            compile(block, f"{page}, Python block {number}", "exec")
            continue
        exec(compile(block.replace(SHIPPED, str(ROOT / SHIPPED)), f"{page}, Python block {number}", "exec"), session)
    if page == "README.md":
        label, shapes, *_ = capsys.readouterr().out.splitlines()
        assert label.startswith("[{'label': 'positive'")
        assert shapes.startswith("torch.Size([2, ")


def test_readme_shows_code_early_and_stays_short() -> None:
    lines = README.splitlines()
    assert lines.index("```python") < 25
    assert len(lines) <= 120


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = re.findall(r"\]\(([^)#]+)", PAGES[page])
    assert [link for link in links if not link.startswith("http") and not (folder / link).exists()] == []


def test_commands_exist_with_their_options() -> None:
    program = typer.main.get_command(build_app())
    assert isinstance(program, typer.core.TyperGroup)
    used = set()
    for _, (_, *words) in (command for text in PAGES.values() for command in commands(text)):
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
    activated = README.index(ACTIVATION)
    early = [words for place, words in commands(README) if place < activated and words[0] != ".venv/bin/albert-fast"]
    assert early == []
