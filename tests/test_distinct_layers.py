"""The Triton encoder on layers that differ: one launch for all of them, through a table of their weights' addresses."""

import gc

import pytest
import torch

from albert_fast.testing import ALL_CASES
from albert_fast.testing.parity import check_forward, device_of, make_inputs

pytest.importorskip("triton")
from albert_fast.kernels import _encoder_weights
from albert_fast.kernels import encoder as encoder_kernel

CASE = ALL_CASES["encoder"]
SHAPE = ((6, 0, 5), 32, 2, 48, 3, 3)  # lengths, H, heads, I, distinct layers, steps


def by_kernel(inputs, layer_indices, step_programs=0):
    """The kernel's result, and how many times it was launched."""
    launches, kernel = [], encoder_kernel._encoder_fwd_kernel

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return kernel[grid]

    names = ("cu_seqlens", "wanted_rows", "cu_wanted", "num_heads", "softmax_scale", "eps", "act")
    call = [inputs.get(name) for name in names]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_kernel, "_encoder_fwd_kernel", Counted())
        out = encoder_kernel.encoder_fwd(
            inputs["hidden"], inputs["weights"], layer_indices, *call, step_programs=step_programs
        )
    return out, len(launches)


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_torch(dtype, wanted):
    check_forward(CASE, SHAPE, {"wanted": wanted}, dtype, "triton")


@pytest.mark.parametrize("layer_indices", [[0, 1, 2], [2, 0], [1, 1, 0, 2, 2]])
@pytest.mark.parametrize("wanted", [False, True])
def test_one_launch_gives_what_a_launch_for_each_layer_gives(monkeypatch, layer_indices, wanted):
    inputs = make_inputs(CASE, SHAPE, {"wanted": wanted}, torch.float32, "triton")
    together, launches = by_kernel(inputs, layer_indices)
    assert launches == 1
    assert torch.equal(by_kernel(inputs, layer_indices, step_programs=3)[0], together)
    monkeypatch.setattr(encoder_kernel, "distinct_layers", lambda *_: None)
    apart, launches = by_kernel(inputs, layer_indices)
    assert launches == len([i for i, n in enumerate(layer_indices) if i == 0 or layer_indices[i - 1] != n])
    # In 16 bits, states are rounded once more between launches.
    torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)


def test_weights_at_odd_addresses_take_a_launch_each():
    inputs = make_inputs(CASE, SHAPE, {}, torch.float32, "triton")
    expected, _ = by_kernel(inputs, [0, 1, 2])
    odd = torch.cat([inputs["weights"][5].new_zeros(1), inputs["weights"][5]])[1:]
    assert odd.data_ptr() % 16
    inputs["weights"][5] = odd
    out, launches = by_kernel(inputs, [0, 1, 2])
    assert launches == 3
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_tables_live_as_long_as_the_weights_and_are_not_made_during_a_capture(monkeypatch):
    gc.collect()
    before = len(_encoder_weights._TABLES)
    weights = [torch.zeros(4, device=device_of("triton")) for _ in range(32)]
    monkeypatch.setattr(_encoder_weights, "capturing", lambda: True)
    assert _encoder_weights.distinct_layers(weights, [0, 1]) is None
    monkeypatch.setattr(_encoder_weights, "capturing", lambda: False)
    made = _encoder_weights.distinct_layers(weights, [0, 1])
    assert made.addresses_ptr.tolist() == [[w.data_ptr() for w in weights[i : i + 16]] for i in (0, 16)]
    assert made.indices_ptr.tolist() == [0, 1]
    monkeypatch.setattr(_encoder_weights, "capturing", lambda: True)
    assert _encoder_weights.distinct_layers(weights, [0, 1]) is made
    assert _encoder_weights.distinct_layers(weights, [1, 0]) is None
    del weights, made
    gc.collect()
    assert len(_encoder_weights._TABLES) == before
