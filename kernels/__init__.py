"""Triton kernels and their launchers, one file per operator; installed as `albert_fast.kernels`.

A launcher takes the operator's arguments as tensors on one GPU (or on the CPU under TRITON_INTERPRET=1), does not check them,
allocates its outputs and starts the kernel. `albert_fast.ops` checks shapes and dtypes, and imports these modules when they are
first needed, because triton is optional.

Named tuples group a kernel's arguments. Many tensors travel as one tuple, which costs a launch no more than single arguments.
Numbers that change with every call stay single arguments: Triton compiles a kernel again when a number in a tuple becomes 1 or
a multiple of 16, whatever `do_not_specialize` says. Inside kernels, tuples also group what helper functions need.
"""
