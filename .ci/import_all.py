"""Imports every module of the installed package, so that a module which this Python cannot compile is found."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from importlib.util import find_spec

import albert_fast


def main() -> None:
    names = [module.name for module in pkgutil.walk_packages(albert_fast.__path__, "albert_fast.")]
    without_triton = find_spec("triton") is None
    needs_triton = ("albert_fast.kernels.", "albert_fast.testing.")
    for name in names:
        if not (without_triton and name.startswith(needs_triton)):
            importlib.import_module(name)
    print(f"{len(names)} modules on Python {sys.version.split()[0]}")


if __name__ == "__main__":
    main()
