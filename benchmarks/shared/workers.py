"""Processes of other environments that take part in a benchmark: one line of JSON asks, one line answers.

`Worker` starts a script with another Python, and the script calls `serve`. The process keeps what it loaded between requests,
so its calls can take turns with calls here. This module needs Python's own library alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LOG_TAIL = 2000  # characters


class Worker:
    """A process that answers requests until it is closed.

    Args:
        python: the interpreter of the other environment. script: a file that calls `serve`; arguments: its own.
    """

    def __init__(self, python: str | Path, script: Path, *arguments: str) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        command = [str(python), str(script), *arguments]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )

    def ask(self, **request: Any) -> Any:
        """The answer to a request, both of what JSON can hold.

        Raises:
            RuntimeError: the script raised, with its traceback; or its process ended, with the end of its log.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"the process ended with {self._process.wait()}: {self._log.read()[-_LOG_TAIL:]}")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply["answer"]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._log.close()


def serve(answer: Callable[..., Any]) -> None:
    """In the other process: answer each request with `answer(**request)` until there are no more."""
    # Libraries print to stdout; their lines go to the log.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            reply = {"answer": answer(**json.loads(line))}
        except Exception:
            reply = {"error": traceback.format_exc()}
        print(json.dumps(reply), file=replies, flush=True)
