"""Fetches the files of a repository on the Hugging Face hub, or of its local cache, through huggingface_hub."""

from __future__ import annotations

import difflib
import inspect
from pathlib import Path
from typing import Any

# Seconds to wait for the hub's first answer. huggingface_hub itself would retry for half a minute.
TIMEOUT = 5.0


class Repository:
    """The files of one repository.

    Asks the hub once whether it answers. If it does not, files come from the local cache only.

    Args:
        name: `model` or `owner/model`.
        arguments: revision, cache_dir, token, subfolder and others, as huggingface_hub takes them.

    Raises:
        ImportError: huggingface_hub is not installed.
        TypeError: `proxies` with a huggingface_hub that reads them from the environment.
    """

    def __init__(self, name: str, **arguments: Any) -> None:
        try:
            import huggingface_hub
            from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
        except ImportError as error:
            raise ImportError(
                f"{name}: no such folder here; to look on the hub: pip install albert-fast[hub]"
            ) from error
        if not arguments.get("proxies"):
            arguments.pop("proxies", None)
        elif "proxies" not in inspect.signature(huggingface_hub.hf_hub_download).parameters:
            raise TypeError("this huggingface_hub takes no proxies: set HTTPS_PROXY in the environment")
        self.name, self.arguments = name, arguments
        self.unreachable: Exception | None = None
        self._hub, self._absent = huggingface_hub, EntryNotFoundError
        if arguments.get("local_files_only"):
            return
        where = {key: arguments[key] for key in ("subfolder", "revision") if arguments.get(key)}
        try:
            url = huggingface_hub.hf_hub_url(name, "config.json", **where)
            huggingface_hub.get_hf_file_metadata(url, token=arguments.get("token"), timeout=TIMEOUT)
        except (HfHubHTTPError, EntryNotFoundError, ValueError):
            pass  # it answered; `fetch` reports the error
        except Exception as error:  # any error of the HTTP library that huggingface_hub uses
            self.unreachable = error
            self.arguments["local_files_only"] = True

    def fetch(self, file: str) -> Path | None:
        """Returns the local copy of a file; None if the repository has no such file.

        Raises:
            FileNotFoundError: there is no such repository, or the hub refuses access.
        """
        try:
            return Path(self._hub.hf_hub_download(self.name, file, **self.arguments))
        except self._absent:
            return None
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.name}: no such folder here{near(self.name)}, and the hub answers: {error}"
            ) from error

    def missing(self, what: str) -> FileNotFoundError:
        """The error for a repository without `what`, which a checkpoint needs."""
        if self.unreachable is not None:
            return FileNotFoundError(
                f"{self.name}: no such folder here{near(self.name)}; as a name on the hub it is not in the local cache, and "
                f"the hub cannot be reached: {self.unreachable}. Check the path, or the network"
            )
        source = (
            "the local cache holds" if self.arguments.get("local_files_only") else "this repository of the hub holds"
        )
        return FileNotFoundError(f"{self.name}: no such folder here{near(self.name)}; {source} none of {what}")


def near(name: str) -> str:
    """ " (there is ...)" where a file or folder with a similar name exists, else ""."""
    path = Path(name).expanduser()
    try:
        found = difflib.get_close_matches(path.name, [entry.name for entry in path.parent.iterdir()], 1)
    except OSError:
        return f" (nor is there a folder {path.parent})"
    return f" (there is {path.parent / found[0]})" if found else ""
