"""The models on fake CUDA tensors: traces the code for GPUs, from packing to outputs, without a GPU."""

import ctypes
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import albert_fast
from albert_fast import ALBERTConfig

CONFIG = ALBERTConfig(
    vocab_size=301,
    embedding_size=64,
    hidden_size=192,
    num_attention_heads=3,
    intermediate_size=384,
    num_hidden_layers=3,
    max_position_embeddings=64,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
LAYER = {"embedding_projection_fwd", "attention_fwd", "linear_gelu_fwd", "add_layer_norm_fwd"}


@pytest.fixture(autouse=True, scope="module")
def device_guard():
    """Lets a torch without CUDA make a CUDA device the current one, with meta's guard; fake tensors need no more."""
    if torch.backends.cuda.is_built():
        yield  # torch has such a guard for fake tensors itself
        return
    path = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not path.exists():
        pytest.skip("neither CUDA tensors nor a libc10.so to lend them a guard in")
    cuda, meta = (getattr(torch._C._autograd.DeviceType, name).value for name in ("CUDA", "Meta"))
    library = ctypes.CDLL(str(path))
    guards = (ctypes.c_void_p * (meta + 1)).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    guards[cuda] = guards[meta]
    yield
    guards[cuda] = None


@pytest.fixture(autouse=True)
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def fake(name, dtype=torch.float32):
    """(model, ids (4, 37), fake mode), on a GPU that does not exist."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    torch.set_default_dtype(dtype)
    with mode, torch.device("cuda"):
        return getattr(albert_fast, name)(CONFIG), torch.zeros(4, 37, dtype=torch.int64), mode


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("name", ["ALBERTModel", "ALBERTForMaskedLM", "ALBERTForSequenceClassification"])
def test_eager(name, dtype, training):
    model, ids, mode = fake(name, dtype)
    with mode:
        output = model.train(training)(ids, None, **({"labels": ids} if name == "ALBERTForMaskedLM" else {}))
    for tensor in output.to_tuple():
        assert tensor.device.type == "cuda"
    assert output[-1].dtype == dtype


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_exported(masked):
    model, ids, mode = fake("ALBERTModel")
    with mode:
        mask = torch.ones_like(ids)
    program = torch.export.export(model.eval(), (ids, mask) if masked else (ids,))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    names = {str(node.target).removesuffix(".default") for graph in graphs for node in graph.nodes}
    assert {name.partition(".")[2] for name in names if name.startswith("albert_fast.")} == LAYER | (
        {"pack_indices"} if masked else set()
    )
    # Only on a GPU, ragged sequences start in order of their lengths.
    assert any("sort" in name for name in names) == masked
