"""Opens Hugging Face data sets that `datasets.Dataset.save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FILES = ("dataset_info.json", "state.json", "dataset_dict.json")


def open_saved_dataset(folder: str | Path) -> Any:
    """The rows of a saved data set.

    Raises:
        ValueError: a folder without one, or with several splits. ImportError: the library `datasets` is not installed.
    """
    if not any((Path(folder) / file).is_file() for file in FILES):
        raise ValueError(f"{folder}: a folder without a saved data set ({FILES[0]}); expected a file, or such a folder")
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{folder}: a saved data set needs datasets: pip install 'albert-fast[datasets]'") from error
    return one_split(datasets.load_from_disk(str(folder)), str(folder))


def one_split(rows: Any, name: str) -> Any:
    """`rows`, which must not be several splits by name.

    Raises:
        ValueError: they are; `name` is what messages call them.
    """
    if isinstance(rows, Mapping):
        raise ValueError(f"{name}: has the splits {', '.join(map(str, rows))}; give one of them")
    return rows


__all__ = ["one_split", "open_saved_dataset"]
