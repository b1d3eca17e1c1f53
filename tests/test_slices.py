"""Query, key and value as slices of one product: their gradients are one buffer too, and nothing concatenates them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from albert_fast import ALBERTConfig, ALBERTForSequenceClassification, ALBERTModel, dispatch, encoder, ops
from albert_fast.slices import beside, split_columns
from albert_fast.testing import poison_empty

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = [name for name in ("cpp", "triton") if dispatch.why_not("attention", DEVICE, name, torch.float32) is None]
TINY = ALBERTConfig(
    vocab_size=50, embedding_size=8, hidden_size=32, num_attention_heads=2, intermediate_size=48, num_hidden_layers=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.1,
)  # fmt: skip


class Counted(TorchDispatchMode):
    """How often each of torch's operators runs."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


def plain_split(x, width):
    return x.split(width, dim=1)


def attend(q, k, v, backend="auto", dropout_p=0.0):
    """Two sequences, of 3 and 4 tokens."""
    cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32, device=q.device)
    seed = torch.tensor(5) if dropout_p else None
    return ops.attention(q, k, v, cu_seqlens, cu_seqlens, 4, 4, 2, None, dropout_p, seed, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_are_those_of_a_plain_split(backend, dropout_p):
    qkv = torch.randn(7, 96, device=DEVICE)
    grad = torch.randn(7, 32, device=DEVICE)
    found = []
    for split in (split_columns, plain_split):
        x = qkv.clone().requires_grad_()
        with poison_empty(), Counted() as counted:
            attend(*split(x, 32), backend, dropout_p).backward(grad)
        found.append((x.grad, counted.calls[torch.ops.aten.cat]))
    (fused, fused_cats), (plain, plain_cats) = found
    assert torch.equal(fused, plain)
    assert (fused_cats, plain_cats) == (0, 1)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "kind", [ALBERTModel, ALBERTForSequenceClassification]
)  # all queries, and the first tokens' alone
def test_no_layer_concatenates_gradients(kind, autocast, monkeypatch):
    model = kind(TINY).to(DEVICE).train()
    ids = torch.randint(0, 50, (3, 7), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0

    def concatenations():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = model(ids, mask)[0].float().square().mean()
        with Counted() as counted:
            loss.backward()
        return counted.calls[torch.ops.aten.cat]

    fused = concatenations()
    monkeypatch.setattr(encoder, "split_columns", plain_split)
    assert concatenations() - fused == TINY.num_hidden_layers
    assert fused == 0


def test_gradients_that_lie_elsewhere_are_concatenated():
    x = torch.randn(5, 12, requires_grad=True)
    first, second, third = split_columns(x, 4)
    (first * 2 + third.flip(0)).sum().backward()
    assert torch.equal(x.grad, torch.tensor([2.0] * 4 + [0.0] * 4 + [1.0] * 4).expand(5, 12))
    assert second.shape == (5, 4)


@pytest.mark.parametrize("tokens", [0, 1, 6])
def test_which_tensors_are_neighbours(tokens):
    whole = torch.randn(tokens, 12)
    a, b, c = whole.split(4, dim=1)
    assert beside((a, b, c))
    assert beside((b, c))
    assert not beside((a, c))
    assert not beside((b, a))
    assert not beside((a, b.clone()))
    assert not beside((a, whole[:, 4:6]))
    assert not beside((a, whole.view(torch.int32)[:, 4:8]))
    rows = torch.randn(2 * tokens, 12)
    assert not beside((rows[:tokens, :4], rows[::2, 4:8])), "of every other row"
    assert not beside((rows[:tokens, 0:8:2], rows[:tokens, 4:12:2])), "of every other column"
    narrow = torch.randn(8 + 4 * tokens)
    assert not beside(tuple(narrow[first:].as_strided((tokens, 4), (4, 1)) for first in (0, 4, 8))), "rows overlap"


def test_a_compiled_graph_has_the_same_gradients():
    def run(x):
        return attend(*split_columns(x * 1.0, 32))

    found = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        x = torch.randn(7, 96, device=DEVICE, requires_grad=True)
        function(x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(*found)
