"""Rounding of weights to int16, int8 and float8, and its calibration."""
