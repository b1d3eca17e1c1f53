"""train and test: every head and plain modules, modes, means, metrics, optimiser and averaged weights."""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import albert_fast
from albert_fast import ALBERTConfig
from albert_fast.models import heads
from albert_fast.runtime.dispatch import BackendUnavailableError
from albert_fast.training import progress, train
from albert_fast.training import test as evaluate_epoch
from albert_fast.training.metrics import compute_metrics, confidence_interval
from albert_fast.training.optimization import WeightAverage, linear_schedule, make_optimizer

CONFIG = ALBERTConfig(
    vocab_size=40,
    embedding_size=16,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=64,
    num_hidden_layers=2,
    max_position_embeddings=16,
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
)
quietly = {"device": "cpu", "progress": False}


def batch_of(head: str, generator: torch.Generator, rows: int = 4, columns: int = 6) -> dict[str, Tensor]:
    """A random batch with padding for the model class `head`."""
    integers = partial(torch.randint, generator=generator)
    shape = (rows, 3, columns) if head == "ALBERTForMultipleChoice" else (rows, columns)
    mask = torch.ones(shape, dtype=torch.long)
    mask[0, ..., -2:] = 0
    batch = {"input_ids": integers(5, 40, shape), "attention_mask": mask}
    if head == "ALBERTForQuestionAnswering":
        return batch | {"start_positions": integers(0, 4, (rows,)), "end_positions": integers(0, 4, (rows,))}
    if head in ("ALBERTForMaskedLM", "ALBERTForPreTraining"):
        batch["labels"] = integers(5, 40, shape)
    elif head == "ALBERTForTokenClassification":
        batch["labels"] = integers(0, 2, shape)
    else:
        batch["labels"] = integers(0, 2, (rows,))
    if "labels" in batch and batch["labels"].dim() == 2:
        batch["labels"][:, 1] = -100
    if head == "ALBERTForPreTraining":
        batch["sentence_order_label"] = integers(0, 2, (rows,))
    return batch


HEADS = [
    "ALBERTForMaskedLM",
    "ALBERTForPreTraining",
    "ALBERTForSequenceClassification",
    "ALBERTForTokenClassification",
    "ALBERTForQuestionAnswering",
    "ALBERTForMultipleChoice",
]


@pytest.mark.parametrize("head", HEADS)
def test_every_head_learns_and_a_plain_criterion_equals_the_own_loss(head: str) -> None:
    torch.manual_seed(0)
    model = getattr(albert_fast, head)(CONFIG).eval()
    loader = [batch_of(head, torch.Generator().manual_seed(i)) for i in range(2)]
    own = evaluate_epoch(model, loader, None, **quietly)
    plain = evaluate_epoch(model, loader, nn.CrossEntropyLoss(), **quietly)
    assert plain == pytest.approx(own, rel=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = train(model, loader, nn.CrossEntropyLoss(), optimizer, **quietly)
    for _ in range(14):
        last = train(model, loader, None, optimizer, **quietly)
    assert last < 0.9 * first
    assert not model.training
    _, values = evaluate_epoch(model, loader, None, metrics=["accuracy"], **quietly)
    assert 0 <= values["accuracy"] <= 1


def test_wanted_tokens_give_the_same_loss_and_accuracy() -> None:
    model = albert_fast.ALBERTForMaskedLM(CONFIG).eval()
    batch = batch_of("ALBERTForMaskedLM", torch.Generator().manual_seed(0))
    batch["labels"][:, ::2] = -100
    short = batch | {"wanted_tokens": batch["labels"] != -100}
    full = evaluate_epoch(model, [batch], nn.CrossEntropyLoss(), metrics=["accuracy"], **quietly)
    few = evaluate_epoch(model, [short], nn.CrossEntropyLoss(), metrics=["accuracy"], **quietly)
    assert few[0] == pytest.approx(full[0], rel=1e-5)
    assert few[1] == full[1]


@pytest.mark.parametrize(
    ("head", "short"), [("ALBERTForMaskedLM", False), ("ALBERTForMaskedLM", True), ("ALBERTForPreTraining", False)]
)
def test_language_models_train_without_logits(head: str, short: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    without = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"), 0.0)
    model = getattr(albert_fast, head)(CONFIG.replace(**without))
    batch = batch_of(head, torch.Generator().manual_seed(0))
    if short:
        batch["wanted_tokens"] = batch["labels"] != -100
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with_logits, _ = evaluate_epoch(model, [batch], None, metrics=["accuracy"], **quietly)
    monkeypatch.setattr(heads.MLMHead, "forward", None)
    steps: list[tuple[float, int]] = []
    train(model, [batch], None, optimizer, after_step=lambda *step: steps.append(step), **quietly)
    real = (batch["labels"] != -100) & (batch["attention_mask"] == 1)
    assert steps == [(pytest.approx(with_logits, rel=1e-5), int(real.sum()))]
    assert evaluate_epoch(model, [batch], None, **quietly) == pytest.approx(with_logits, rel=1e-5)


class Bag(nn.Module):
    """A plain module: no attention_mask, no dataclass; its argument has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(40, 2)
        self.frozen = nn.Dropout(0.5).eval()

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) + 0 * self.frozen(self.table(ids))


def toy_loader(batches: int = 4) -> list[dict[str, Tensor]]:
    """The label says whether token 7 is there."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(batches):
        ids = torch.randint(8, 40, (16, 6), generator=generator)
        labels = torch.randint(0, 2, (16,), generator=generator)
        ids[labels == 1, 3] = 7
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def test_plain_module_learns_and_keeps_the_modes_of_its_parts() -> None:
    model = Bag().train()
    model.frozen.eval()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.3)
    for _ in range(20):
        loss = train(model, toy_loader(), nn.CrossEntropyLoss(), optimizer, **quietly)
    mean, values = evaluate_epoch(model, toy_loader(), nn.CrossEntropyLoss(), metrics=["accuracy", "f1"], **quietly)
    assert loss < 0.1
    assert mean < 0.1
    assert values == {"accuracy": 1.0, "f1": 1.0}
    assert model.training
    assert not model.frozen.training


def test_classifier_learns_a_toy_task() -> None:
    torch.manual_seed(0)
    model = albert_fast.ALBERTForSequenceClassification(CONFIG)
    optimizer = make_optimizer(model, 3e-3, 0.01)
    for _ in range(25):
        train(model, toy_loader(), nn.CrossEntropyLoss(), optimizer, max_grad_norm=1.0, **quietly)
    _, values = evaluate_epoch(model, toy_loader(), None, metrics=["accuracy"], **quietly)
    assert values["accuracy"] > 0.95


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_restored_when_an_exception_flies(training: bool) -> None:
    model = Bag().train(training)

    def failing(outputs: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("no loss today")

    with pytest.raises(RuntimeError, match="no loss today"):
        train(model, toy_loader(1), failing, torch.optim.SGD(model.parameters(), lr=1.0), **quietly)
    assert all(module.training == training for module in model.modules())
    with pytest.raises(RuntimeError, match="no loss today"):
        evaluate_epoch(model, toy_loader(1), failing, **quietly)
    assert all(module.training == training for module in model.modules())
    assert torch.is_grad_enabled()


def test_mean_is_over_examples_and_not_over_batches() -> None:
    class Given(nn.Module):
        def forward(self, input_ids: Tensor) -> Tensor:
            return input_ids.float()

    batches = [
        {"input_ids": torch.tensor([1, 1, 1]), "labels": torch.zeros(3)},
        {"input_ids": torch.tensor([3]), "labels": torch.zeros(1)},
    ]
    assert evaluate_epoch(Given(), batches, nn.MSELoss(), **quietly) == pytest.approx((1 + 1 + 1 + 9) / 4)
    model = albert_fast.ALBERTForSequenceClassification(CONFIG.replace(num_labels=1)).eval()
    whole = batch_of("", torch.Generator().manual_seed(0), rows=5) | {"labels": torch.arange(5.0)}
    parts = [{key: value[a:b] for key, value in whole.items()} for a, b in ((0, 2), (2, 5))]
    expected = evaluate_epoch(model, [whole], None, **quietly)
    assert evaluate_epoch(model, parts, nn.MSELoss(), **quietly) == pytest.approx(expected, rel=1e-5)


def test_scheduler_and_gradient_norm_and_hook() -> None:
    model = Bag()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = linear_schedule(optimizer, 4, 0.5)
    seen: list[tuple[float, int]] = []
    before = model.table.weight.detach().clone()
    train(
        model,
        toy_loader(4),
        lambda outputs, labels: 1e6 * nn.functional.cross_entropy(outputs, labels),
        optimizer,
        scheduler=schedule,
        max_grad_norm=1e-3,
        after_step=lambda *step: seen.append(step),
        **quietly,
    )
    assert [examples for _, examples in seen] == [16] * 4
    assert schedule.get_last_lr() == [0.0]
    assert 0 < (model.table.weight - before).norm() < 4e-3


def test_wrong_batches_are_named() -> None:
    model, criterion = Bag(), nn.CrossEntropyLoss()
    run = partial(evaluate_epoch, model, criterion=criterion, **quietly)
    with pytest.raises(TypeError, match="must be a dict"):
        run(data_loader=[(torch.ones(1, 2), torch.ones(1))])
    with pytest.raises(ValueError, match="needs labels"):
        run(data_loader=[{"input_ids": torch.ones(1, 2, dtype=torch.long)}])
    with pytest.raises(ValueError, match="no examples"):
        run(data_loader=[])
    with pytest.raises(ValueError, match="scalar"):
        evaluate_epoch(model, toy_loader(1), nn.CrossEntropyLoss(reduction="none"), **quietly)
    with pytest.raises(ValueError, match="returned none"):
        evaluate_epoch(model, toy_loader(1), None, **quietly)
    with pytest.raises(ValueError, match="reduction='sum'"):
        run(data_loader=toy_loader(1), criterion=nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(ValueError, match="used up before"):
        run(data_loader=iter(()))
    with pytest.raises(ValueError, match="-100"):
        run(data_loader=[batch | {"labels": torch.full((16,), -100)} for batch in toy_loader(1)])


def test_wrong_arguments_are_named_before_the_first_batch() -> None:
    model, other, criterion = Bag(), Bag(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def untouched():
        pytest.fail("a batch was drawn")
        yield

    with pytest.raises(ValueError, match="none of the model's parameters"):
        train(other, untouched(), criterion, optimizer, **quietly)
    with pytest.raises(TypeError, match="criterion must be a function"):
        train(model, untouched(), optimizer, criterion, **quietly)
    with pytest.raises(TypeError, match="optimizer must be"):
        train(model, untouched(), criterion, None, **quietly)
    with pytest.raises(TypeError, match="must be an nn"):
        evaluate_epoch("a folder", untouched(), criterion, **quietly)
    with pytest.raises(ValueError, match="unknown metric 'beauty'"):
        evaluate_epoch(model, untouched(), criterion, metrics=["accuracy", "beauty"], **quietly)
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailableError, match="device='cpu'"):
            train(model, untouched(), criterion, optimizer, "cuda", progress=False)


@pytest.mark.parametrize("wrong", [2, 7, -1])
def test_labels_outside_the_classes_are_named(wrong: int) -> None:
    batch = batch_of("", torch.Generator().manual_seed(0))
    batch["labels"] = torch.tensor([0, 1, wrong, -100])
    model = albert_fast.ALBERTForSequenceClassification(CONFIG)
    with pytest.raises(IndexError, match=f"label {wrong} is outside the 2 classes 0 to 1"):
        evaluate_epoch(model, [batch], nn.CrossEntropyLoss(), **quietly)
    with pytest.raises(IndexError, match=f"{wrong} is out of bounds.*labels from -100 to {max(wrong, 1)}"):
        evaluate_epoch(model, [batch], None, **quietly)
    batch["labels"][2] = -9  # the criterion's own mark of what is left out
    batch["labels"][3] = 0
    evaluate_epoch(model, [batch], nn.CrossEntropyLoss(ignore_index=-9), **quietly)


def test_whole_numbers_are_predicted_with_a_plain_criterion() -> None:
    torch.manual_seed(0)
    model = albert_fast.ALBERTForSequenceClassification(CONFIG.replace(num_labels=1))
    batch = batch_of("", torch.Generator().manual_seed(0)) | {"labels": torch.tensor([1, 4, 2, 5])}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = [train(model, [batch], nn.MSELoss(), optimizer, **quietly) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    _, values = evaluate_epoch(model, [batch], nn.MSELoss(), metrics=["mse"], **quietly)
    assert values["mse"] == pytest.approx(evaluate_epoch(model, [batch], None, **quietly), rel=1e-5)
    with pytest.raises(ValueError, match="accuracy counts classes"):
        evaluate_epoch(model, [batch], nn.MSELoss(), metrics=["accuracy"], **quietly)


def test_progress_goes_to_standard_error_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    evaluate_epoch(Bag(), toy_loader(1), nn.CrossEntropyLoss(), "cpu", progress=True)
    assert "test" in capsys.readouterr().err
    evaluate_epoch(Bag(), toy_loader(1), nn.CrossEntropyLoss(), "cpu", progress=False)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")


WITHOUT_LIBRARIES = """
import sys
sys.modules["sklearn"] = sys.modules["scipy"] = None  # as if they were not installed
import numpy as np
from albert_fast.training.metrics import compute_metrics
labels, guesses = np.array([0, 2, 1, 1, 0]), np.array([0, 2, 1, 0, 1])
print(compute_metrics(["accuracy", "mse"], labels, guesses))
for name in ("f1", "precision", "recall", "matthews", "pearson", "spearman"):
    try:
        compute_metrics(["accuracy", name], labels, guesses)
    except ImportError as error:
        print(error)
"""


def test_accuracy_and_mse_need_no_library() -> None:
    ran = subprocess.run([sys.executable, "-c", WITHOUT_LIBRARIES], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    figures, *refused = ran.stdout.splitlines()
    assert figures == "{'accuracy': 0.6, 'mse': 0.4}"
    assert len(refused) == 6
    for line, name in zip(refused, ("f1", "precision", "recall", "matthews", "pearson", "spearman"), strict=True):
        library = "SciPy" if name in ("pearson", "spearman") else "scikit-learn"
        assert line.startswith(f"the metric '{name}' needs {library}: pip install 'albert-fast[train]'")


def test_accuracy_and_mse_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="the train extra is not installed")
    generator = np.random.default_rng(0)
    labels, guesses = generator.integers(0, 5, (2, 997))
    values = compute_metrics(["accuracy", "mse"], labels, guesses)
    assert values["accuracy"] == pytest.approx(metrics.accuracy_score(labels, guesses), rel=1e-12)
    assert values["mse"] == pytest.approx(metrics.mean_squared_error(labels, guesses), rel=1e-12)
    numbers, near = generator.normal(3, 1, (2, 997)).astype(np.float32)
    assert compute_metrics(["mse"], numbers, near)["mse"] == pytest.approx(metrics.mean_squared_error(numbers, near))


def test_metrics_against_their_definitions() -> None:
    labels, guesses = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    wanted = ["accuracy", "precision", "recall", "f1", "matthews", lambda truth, guess: float(len(truth))]
    values = list(compute_metrics(wanted, labels, guesses).values())
    expected = [3 / 5, 2 / 3, 2 / 3, 2 / 3, (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2), 5.0]
    assert values == pytest.approx(expected)
    low, high = confidence_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    with pytest.raises(ValueError, match="3 in 2"):
        confidence_interval(3, 2)


def test_span_accuracy_needs_both_ends() -> None:
    class Reader(nn.Module):
        def forward(self, input_ids: Tensor) -> SimpleNamespace:
            logits = 9 * torch.eye(4)[[1, 1, 1]]
            return SimpleNamespace(start_logits=logits, end_logits=logits)

    ends = {"start_positions": torch.tensor([1, 1, 9]), "end_positions": torch.tensor([1, 2, 9])}
    batch = {"input_ids": torch.ones(3, 4)} | ends
    _, values = evaluate_epoch(Reader(), [batch], nn.CrossEntropyLoss(), metrics=["accuracy"], **quietly)
    assert values["accuracy"] == 0.5  # the third answer lies outside the sequence


def test_weight_average_and_optimizer_groups() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    start = [p.detach().clone() for p in model.parameters()]
    average = WeightAverage(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    average.update(model)  # the first update weighs the past by 2 / 11
    with average.applied(model):
        for p, old in zip(model.parameters(), start, strict=True):
            torch.testing.assert_close(p.detach(), old + 9 / 11)
    for p, old in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), old + 1)
    groups = make_optimizer(model, 1e-3, 0.1).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]


def kept_and_gradients(model, batch, what: str) -> tuple[int, list[Tensor]]:
    """Bytes that a training step keeps for its backward, parameters apart, and the gradients."""
    model.execution.recompute = what
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(5)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    total = sum(kept.values())
    return total, list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing_saves_memory_and_changes_no_gradient(compiled):
    torch.manual_seed(1)
    model = albert_fast.ALBERTForMaskedLM(CONFIG).train()  # with dropout, which is replayed
    batch = batch_of("ALBERTForMaskedLM", torch.Generator().manual_seed(2))
    kept, gradients = {}, {}
    for what in ("nothing", "activations", "layers"):
        kept[what], gradients[what] = kept_and_gradients(model, batch, what)
    for what in ("activations", "layers"):
        for expected, actual in zip(gradients["nothing"], gradients[what], strict=True):
            assert torch.equal(expected, actual)
    tokens, layers = int(batch["attention_mask"].sum()), CONFIG.num_hidden_layers
    assert kept["nothing"] - kept["activations"] == 4 * tokens * CONFIG.intermediate_size * layers
    assert kept["layers"] < kept["activations"] / 2
    with pytest.raises(ValueError, match="recompute must be one of nothing, activations, layers"):
        model.execution.recompute = "everything"
    if compiled:
        model.execution.recompute = "layers"
        model.eval()
        forward = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = forward(**batch).loss
        torch.testing.assert_close(loss, model(**batch).loss)
        loss.backward()
