"""Runs one part of the suite in a process of its own: `python part.py PART --records FILE --device D --seconds S`."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: modules are imported as gpu.<name>

# Part -> the module with the function of its name. Imported when the part runs: the part `build` installs the package first.
MODULES = {
    "build": "gpu.proofs",
    "parity": "gpu.proofs",
    "sanitizer": "gpu.proofs",
    "machine": "gpu.measures",
    "operators": "gpu.measures",
    "model": "gpu.measures",
    "training": "gpu.measures",
    "tiles": "gpu.measures",
}


# Exit status of a part whose CUDA context a kernel broke: the suite continues the part in another process.
LOST = 75


@dataclass
class Part:
    """A part's options, its clock, and its records: lines of JSON, each on disk at once.

    Kinds of records: "row" (a figure), "failure" (fails the part), "peer failure" (does not), "skipped", "begun", and others
    that the part names itself. Of records with one `key` the latest counts. Where there are records already, they
    are from an earlier process of this part, and this one continues after what that one had begun.
    """

    device: str
    quick: bool
    seconds: float
    path: Path
    failed: bool = field(init=False)
    begun: list[str] = field(init=False)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        records = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.failed = any(record["kind"] == "failure" for record in records)
        self.begun = next((record["what"] for record in reversed(records) if record["kind"] == "begun"), [])

    def left(self) -> float:
        """Seconds until the part should begin nothing more."""
        return self.started + self.seconds - time.monotonic()

    def add(self, kind: str, **fields: Any) -> None:
        self.failed = self.failed or kind == "failure"
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")
        if kind != "begun":
            shown = {name: value for name, value in fields.items() if name not in ("seconds_by_round", "error")}
            print(f"[{time.monotonic() - self.started:6.1f} s] {kind}: {shown}", flush=True)

    def fail(self, what: str, error: BaseException | str, kind: str = "failure") -> None:
        """Record that `what` failed; the traceback goes to the log."""
        if isinstance(error, BaseException):
            traceback.print_exception(error)
            error = f"{type(error).__name__}: {error}"
        self.add(kind, what=what, error=error[-2000:])

    def begin(self, what: str) -> bool:
        """Whether to run `what`: False where an earlier process had begun it."""
        if what in self.begun:
            return False
        self.begun.append(what)
        self.add("begun", key="begun", what=self.begun)
        return True

    def attempt(self, what: str, run: Callable[[], None], needs: float = 0.0) -> None:
        """Call `run`, or record that it was skipped where less than `needs` seconds are left; its failure fails nothing else."""
        if self.left() < needs:
            self.add("skipped", what=what, why=f"{max(0.0, self.left()):.0f} s were left of about {needs:.0f}")
        elif self.begin(what):
            try:
                run()
            except Exception as error:  # the next case may still work
                self.fail(what, error)
            self.check_gpu(what)

    def check_gpu(self, what: str) -> None:
        """End this process where a kernel of `what` broke its CUDA context: no later call would run."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.fail(f"the GPU after {what}", error)
            sys.stderr.flush()
            os._exit(LOST)  # a regular end would take down the broken context, which may hang or abort


def main() -> int:
    parser = argparse.ArgumentParser("part")
    parser.add_argument("part", choices=MODULES)
    parser.add_argument("--records", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    part = Part(options.device, options.quick, options.seconds, options.records)
    run = getattr(importlib.import_module(MODULES[options.part]), options.part)
    try:
        run(part)
    except Exception as error:
        part.fail(options.part, error)
    return int(part.failed)


if __name__ == "__main__":
    sys.exit(main())
