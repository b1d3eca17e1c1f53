"""Builds, proves and measures everything on one GPU with one command, in seven minutes and without a network.

    python benchmarks/gpu/suite.py [--out DIR] [--name MACHINE] [--only PART ...] [--minutes 7]

Every part is a process with a limit in time; a part that fails, hangs or is killed is noted, and the others continue.
OUT/NAME.json and OUT/NAME.md are rewritten with every new record, and OUT/NAME.log has what the parts print: a kill of the
suite loses nothing. `--device cpu --quick` is a rehearsal on small shapes, whose figures mean nothing.
This file uses only the standard library, since it installs the package.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as gpu.<name>

from gpu.part import LOST
from gpu.processes import end
from gpu.report import markdown

ROOT = Path(__file__).resolve().parents[2]
# Part -> its share of the time; later parts get what earlier ones leave over.
PARTS = {
    "build": 26,
    "machine": 8,
    "parity": 30,
    "model": 28,
    "operators": 20,
    "training": 10,
    "sanitizer": 13,
    "tiles": 4,
}
_GRACE = 0.1  # share of a part's limit that is kept for finishing what has begun
_AGAIN = 10.0  # least seconds left for another process to continue after one lost the GPU


@dataclass
class Outcome:
    """How a part ended, and what it recorded."""

    part: str
    command: list[str]
    limit: float  # seconds
    status: str = "running"  # then "passed", "failed", "timed out" or "killed"
    why: str = ""
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)

    def read(self, path: Path) -> bool:
        """Read the records in `path`, the latest of each key; returns whether any changed."""
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # the last one may still be half written
        records: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(lines):
            record = json.loads(line)
            records[record.get("key", str(number))] = record
        changed = list(records.values()) != self.records
        self.records = list(records.values())
        return changed

    def begun(self) -> list[str]:
        """The questions that the part has begun."""
        return next((record["what"] for record in self.records if record["kind"] == "begun"), [])


def run_part(
    part: str,
    command: Callable[[float], Sequence[str]],
    limit: float,
    log: Path,
    records: Path,
    publish: Callable[[Outcome], None],
) -> Outcome:
    """Run a part for at most `limit` seconds, together with every process that it starts.

    Where a kernel breaks the GPU's context or kills the process, another process continues with what was not begun.

    Args:
        command: seconds left -> the command. log: the file that its output is appended to. records: the file of JSON lines
            that it writes.
        publish: called whenever there are new records, and when the part has ended.
    """
    started = time.monotonic()
    outcome, begun = Outcome(part, ["python", *command(limit)[1:]], limit), 0
    while True:
        left = limit - (time.monotonic() - started)
        status = _run_process(command(left), left, log, records, outcome, publish)
        outcome.seconds = time.monotonic() - started
        outcome.read(records)
        broken = status is not None and (status == LOST or status < 0)
        if not broken or len(outcome.begun()) == begun or limit - outcome.seconds < _AGAIN:
            break
        begun = len(outcome.begun())
        _note_end(records, outcome.begun()[-1], _said(status, log))
    if status is None:
        outcome.status, outcome.why = "timed out", f"it was ended after its limit of {limit:.0f} s"
    elif status:
        outcome.status, outcome.why = "killed" if status < 0 else "failed", _said(status, log)
    else:
        outcome.status = "passed"
    publish(outcome)
    return outcome


def _said(status: int, log: Path) -> str:
    return f"by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}; {_last_line(log)}"


def _note_end(records: Path, what: str, why: str) -> None:
    """Record that the process ended during `what`, instead of a line that it left half written."""
    lines = records.read_bytes().split(b"\n")[:-1]
    lines.append(json.dumps({"kind": "failure", "what": what, "error": f"its process ended: {why}"}).encode())
    records.write_bytes(b"\n".join(lines) + b"\n")


def _run_process(
    command: Sequence[str], limit: float, log: Path, records: Path, outcome: Outcome, publish: Callable[[Outcome], None]
) -> int | None:
    """The exit status of `command`; None where it did not end within `limit` seconds."""
    deadline = time.monotonic() + limit
    with log.open("a") as output:
        output.write(f"\n== {outcome.part}: {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},  # without a network, transformers would ask and wait
        )
        try:
            publish(outcome)
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.25)
                if outcome.read(records):
                    publish(outcome)
            return process.poll()
        finally:
            end(process)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


class Suite:
    """Holds the outcomes so far and writes the files that show them."""

    def __init__(self, out: Path, name: str, header: dict[str, Any]) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.json, self.markdown, self.log = (out / f"{name}.{kind}" for kind in ("json", "md", "log"))
        self.log.write_text("")
        self.header, self.outcomes = header, dict.fromkeys(header["parts_asked_for"])
        self.started = time.monotonic()

    def publish(self, outcome: Outcome) -> None:
        self.outcomes[outcome.part] = vars(outcome)
        content = {
            **self.header,
            "seconds": time.monotonic() - self.started,
            "parts": [done for done in self.outcomes.values() if done],
            "not_run": [part for part, done in self.outcomes.items() if done is None],
        }
        _replace(self.json, json.dumps(content, indent=1) + "\n")
        _replace(self.markdown, markdown(content))


def _replace(path: Path, text: str) -> None:
    aside = path.with_suffix(".new")
    aside.write_text(text)
    os.replace(aside, path)


def _machine_name(device: str) -> str:
    if device == "cpu":
        return "rehearsal"
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0]
        return re.sub(r"[^a-z0-9]+", "-", said.lower()).strip("-")
    return "gpu"


def _with_seconds(command: Sequence[str], seconds: float) -> list[str]:
    return [*command, "--seconds", f"{seconds * (1 - _GRACE):.1f}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where every part passed."""
    parser = argparse.ArgumentParser("suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results")
    parser.add_argument("--name", help="of the machine, and so of the files (default: the GPU's)")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART", help=str(PARTS))
    parser.add_argument("--minutes", type=float, default=7, help="for everything (default 7)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal, no figures")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: a rehearsal, no figures")
    options = parser.parse_args(argv)
    parts = [part for part in PARTS if part in options.only]
    header = {
        "name": options.name or _machine_name(options.device),
        "rehearsal": options.device == "cpu" or options.quick,
        "command": ["python", *sys.argv],
        "began": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "parts_asked_for": parts,
    }
    suite = Suite(options.out.resolve(), header["name"], header)
    deadline = suite.started + 60 * options.minutes
    # A plain kill would leave the part that is running behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    with tempfile.TemporaryDirectory() as folder:
        for number, part in enumerate(parts):
            share = PARTS[part] / sum(PARTS[later] for later in parts[number:])
            limit = max(2.0, (deadline - time.monotonic()) * share)
            records = Path(folder, f"{part}.jsonl")
            fixed = [sys.executable, "benchmarks/gpu/part.py", part, "--records", str(records)]
            fixed += ["--device", options.device, *(["--quick"] if options.quick else [])]
            outcome = run_part(part, partial(_with_seconds, fixed), limit, suite.log, records, suite.publish)
            print(f"{part}: {outcome.status} in {outcome.seconds:.0f} s {outcome.why}".rstrip(), flush=True)
    print(suite.markdown.read_text())
    return int(any(done is None or done["status"] != "passed" for done in suite.outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
