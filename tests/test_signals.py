"""What ends a call of the C++ kernels early: no memory, and Ctrl-C. The process goes on, and so do later calls."""

import os
import subprocess
import sys

import pytest

from albert_fast.runtime import dispatch

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="limits memory and sends signals as Linux does"),
    pytest.mark.skipif(not dispatch.has_extension(), reason="needs the C++ extension"),
]

# What a call may take grows from nothing to enough. On the way there is memory for what the call takes at first, and none
# for what its threads take inside a parallel region.
WITHOUT_MEMORY = """
import re, resource, sys, torch
from albert_fast import ALBERTConfig, ALBERTModel, ops
from albert_fast.quantization.calibration import quantize

torch.set_num_threads(2)
what, _, way = sys.argv[1].partition(" ")
if what == "attention":
    q, k = torch.randn(64, 16), torch.randn(60_000, 16)
    cu_q, cu_k = torch.tensor([0, 64], dtype=torch.int32), torch.tensor([0, 60_000], dtype=torch.int32)
    call = lambda: ops.attention(q, k, k, cu_q, cu_k, 64, 60_000, 2)
    ops.attention(q, q, q, cu_q, cu_q, 64, 64, 2)
else:
    config = ALBERTConfig(vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2, num_hidden_layers=1,
                          intermediate_size=16, max_position_embeddings=12_000)
    model = ALBERTModel(config, add_pooling_layer=False).eval().requires_grad_(False)
    if what != "fp32":
        quantize(model, what)
    ids = torch.randint(1, 50, (2 if way == "groups" else 1, 12_000))
    call = lambda: model(ids).last_hidden_state
    model(ids[:, :64])  # starts the second thread

size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits, ends = resource.getrlimit(resource.RLIMIT_AS), []
while True:
    resource.setrlimit(resource.RLIMIT_AS, (size + (1 + len(ends)) * 2**20, limits[1]))
    try:
        out = call()
    except MemoryError:
        ends.append("ours")
    except RuntimeError as error:  # torch's own allocations
        assert "allocate memory" in str(error)
        ends.append("torch's")
    else:
        break
resource.setrlimit(resource.RLIMIT_AS, limits)
assert torch.equal(out, call())
print("MemoryError" if "ours" in ends else "none", ends)
"""


@pytest.mark.parametrize("what", ["attention", "fp32 groups", "fp32 together", "int8 together"])
def test_without_memory_in_a_parallel_region_is_a_memory_error(what):
    # Large arrays come from the system and go back to it, and no arena keeps addresses: the limit is felt.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_MEMORY, what], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split(" ")[0]) == (0, "MemoryError"), done.stdout + done.stderr


# Each long call takes minutes where it is not interrupted.
INTERRUPTED = """
import os, signal, sys, threading, torch
from albert_fast import ALBERTConfig, ALBERTModel, ops
from albert_fast.quantization.calibration import quantize

torch.set_num_threads(int(sys.argv[2]))
torch.manual_seed(1)

def encoder(rows):
    config = ALBERTConfig(vocab_size=50, embedding_size=16, hidden_size=512, num_attention_heads=8, num_hidden_layers=2,
                          intermediate_size=2048)
    model = ALBERTModel(config, add_pooling_layer=False).eval()
    if sys.argv[1].startswith("int8"):
        quantize(model, "int8")
    # After the calibration, which runs all of them.
    model.encoder.group_indices, model.encoder.layer_indices = (0,) * 400, [0] * 400
    def call(long):
        ids = torch.ones(rows if long else 1, 500 if long else 3, dtype=torch.long)
        with torch.no_grad():
            return model(ids).last_hidden_state
    return call

def attention(long):
    q = torch.ones(40_000 if long else 3, 512)
    cu = torch.tensor([0, len(q)], dtype=torch.int32)
    return ops.attention(q, q, q, cu, cu, len(q), len(q), 8)

call = attention if sys.argv[1] == "attention" else encoder(24 if sys.argv[1].endswith("groups") else 3)
before = call(False)
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    call(True)
    print("not interrupted")
except KeyboardInterrupt:
    print("KeyboardInterrupt")
assert torch.equal(call(False), before)
"""


@pytest.mark.parametrize(
    ("what", "threads"),
    [
        *[("attention", "1"), ("fp32 groups", "2")],
        *(
            pytest.param(what, threads, marks=pytest.mark.thorough)
            for what, threads in [
                ("attention", "2"),
                ("fp32 groups", "1"),
                *[("fp32 together", "1"), ("fp32 together", "2")],
                *[("int8 together", "1"), ("int8 together", "2")],
            ]
        ),
    ],
)
def test_ctrl_c_ends_a_long_call(what, threads):
    # The limit is far below what the whole call takes, and far above what one that asks for signals does.
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, what, threads], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, "KeyboardInterrupt"), done.stderr
