"""Triton kernels and their launchers, one file an operator; installed as `albert_fast.kernels`.

A launcher takes the operator's forward arguments as tensors on one GPU (or on the CPU under TRITON_INTERPRET=1), trusts
them, allocates its outputs and starts the kernel. Checks of shapes and dtypes belong to `albert_fast.ops`, which
imports these modules when they are first needed: triton is optional.
"""
