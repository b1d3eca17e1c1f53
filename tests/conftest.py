"""Fixtures and settings that all tests share."""

import os

# Set before torch starts its threads: threads of several test processes would wait for each other's cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Set before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption("--thorough", action="store_true", help="also run the tests marked thorough")


def pytest_collection_modifyitems(config, items):
    """Deselects tests marked thorough, unless --thorough is given or their whole names are."""
    if config.getoption("--thorough", default=False):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough") and item.nodeid not in config.args]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = set(items) - set(left_out)
        items[:] = [item for item in items if item in kept]


@pytest.fixture(autouse=True)
def _seed_torch():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """A function that sets torch's number of threads; it is restored after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """Runs the test on one thread, for models that are too small for more."""
    threads(1)


@pytest.fixture
def warn_again():
    """Lets what `accelerate` says once in a process be said again, so that a filter that makes it an error sees it."""
    from albert_fast.accelerate import forward

    forward.warn_of_original.cache_clear()
    forward.warn_of_floats.cache_clear()
