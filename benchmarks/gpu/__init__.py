"""The suite that builds, proves and measures everything on one GPU: `python benchmarks/gpu/suite.py`."""
