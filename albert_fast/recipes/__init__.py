"""Whole trainings, from raw files to models and figures: a module each, run with `python -m`."""
