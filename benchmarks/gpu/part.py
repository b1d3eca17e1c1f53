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

# Part -> the module that has a function of its name; none is imported before it is wanted, for one installs the package.
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


# Exit status of a part that a kernel took the GPU from: the suite lets another process go on with it.
LOST = 75


@dataclass
class Part:
    """What a part knows of its run, and how it tells: every record is a line of JSON, on disk at once.

    Kinds of records: "row" (a figure), "failure" (fails the part), "peer failure" (does not), "skipped", "begun", and others
    that the part names itself. Of records with one `key` the latest counts. What is recorded already was by the process
    before this one: it asked what it had begun, and this one asks the rest.
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
        """Seconds until nothing more should be begun."""
        return self.started + self.seconds - time.monotonic()

    def add(self, kind: str, **fields: Any) -> None:
        self.failed = self.failed or kind == "failure"
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")
        if kind != "begun":
            shown = {name: value for name, value in fields.items() if name not in ("seconds_by_round", "error")}
            print(f"[{time.monotonic() - self.started:6.1f} s] {kind}: {shown}", flush=True)

    def fail(self, what: str, error: BaseException | str, kind: str = "failure") -> None:
        """Note that `what` failed; the traceback goes to the log."""
        if isinstance(error, BaseException):
            traceback.print_exception(error)
            error = f"{type(error).__name__}: {error}"
        self.add(kind, what=what, error=error[-2000:])

    def begin(self, what: str) -> bool:
        """Whether `what` is to be asked: False where the process before this one had begun it."""
        if what in self.begun:
            return False
        self.begun.append(what)
        self.add("begun", key="begun", what=self.begun)
        return True

    def attempt(self, what: str, run: Callable[[], None], needs: float = 0.0) -> None:
        """`run()`, or a note that it was skipped where less than `needs` seconds are left; it may fail on its own."""
        if self.left() < needs:
            self.add("skipped", what=what, why=f"{max(0.0, self.left()):.0f} s were left of about {needs:.0f}")
        elif self.begin(what):
            try:
                run()
            except Exception as error:  # the next case may still work
                self.fail(what, error)
            self.check_gpu(what)

    def check_gpu(self, what: str) -> None:
        """End this process where a kernel of `what` has broken its CUDA context: nothing that follows would run."""
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            self.fail(f"the GPU after {what}", error)
            sys.stderr.flush()
            os._exit(LOST)  # to take down a broken context may hang, or abort


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
