"""What a recipe has done, in a file: figures, seconds, machine and versions of each stage, so that no stage is done twice."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..inspect.info import describe
from ..runtime.files import replacing


class Report:
    """The stages of a recipe that are done, kept in `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.stages: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def stage(self, name: str, work: Callable[[], Any], **settings: Any) -> Any:
        """The result of `work`, for JSON: from the file where that stage is done, or computed and written down.

        Raises:
            ValueError: the stage was done with other settings.
        """
        if (done := self.stages.get(name)) is not None:
            if done["settings"] != json.loads(json.dumps(settings)):
                raise ValueError(
                    f"{self.path}: {name!r} was done with {done['settings']}, not {settings}; choose another folder"
                )
            return done["result"]
        print(f"{name} ...", file=sys.stderr, flush=True)
        started, about = time.monotonic(), describe()
        result = work()
        self.stages[name] = {
            "result": result,
            "settings": settings,
            "seconds": round(time.monotonic() - started),  # of the last run, where an earlier one was interrupted
            "threads": torch.get_num_threads(),
            **{key: about[key] for key in ("cpu", "memory_gib", "system", "python", "libraries")},
        }
        with replacing(self.path) as file:
            file.write(json.dumps(self.stages, indent=1).encode() + b"\n")
        print(f"{name}: {json.dumps(result)}", file=sys.stderr, flush=True)
        return result


__all__ = ["Report"]
