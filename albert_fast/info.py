"""`python -m albert_fast.info`: what runs on this machine, what does not, why, and how to get it."""

from .inspect.info import describe as describe
from .inspect.info import main as main
from .inspect.info import operators as operators

if __name__ == "__main__":
    raise SystemExit(main())
