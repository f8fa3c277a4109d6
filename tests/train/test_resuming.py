"""Runs that are stopped, killed or broken, and what they go on from."""

import copy
import json
import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from filelock import FileLock
from torch import nn
from training_cases import BITS, Stop, assert_same_history, assert_same_state, kept, quick, stopped_at, tiny, train

import emqlib as emq
from emqlib import CoresetConfig, Dataset, QuantSpec, TrainConfig
from emqlib import files as container
from emqlib.files import Busy
from emqlib.layers import QuantConv2d
from emqlib.train import checkpoint as checkpoints
from emqlib.train import loop as training
from emqlib.train.checkpoint import Deadline, OutOfTime
from emqlib.train.distributed import Place
from emqlib.train.loop import LossWatch

RUNS = {
    "sgd": ({}, {}),
    "joint distillation": ({"scheme": "joint", "distillation": True}, {}),
    "adamw": ({"optimizer": "adamw", "lr": 0.01, "clip_grad_norm": 1.0}, {"norm": "switchable"}),
    "learned scales": ({"scheme": "joint"}, {"weight": "lsq", "activation": "lsq"}),
    "learned clipping": ({"optimizer": "adamw", "lr": 0.01}, {"activation": "pact", "weight": "minmax"}),
    "tracked range": ({"autocast": "bfloat16"}, {"activation_range": "tracked", "norm": "switchable"}),
    "float16": ({"autocast": "float16"}, {}),
    "coreset": ({"coreset": CoresetConfig(pruning_rate=0.5, resample_every=2)}, {"correction": "none"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_where_the_undisturbed_one_does(
    name: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields, spec = RUNS[name]
    config, path = quick(epochs=3, warmup_epochs=0.5, **fields), tmp_path / "runs" / "deep" / "run.pt"
    undisturbed = tiny(dropout=0.3, **spec)
    history = train(undisturbed, digits, config, tmp_path / "undisturbed.pt")
    for number, where in enumerate(("epoch 1, step 1", "epoch 2, step 2", "epoch 3, step 1")):
        assert path.exists() == (number > 1)
        model = tiny(init=number if path.exists() else 0, dropout=0.3, **spec)
        torch.manual_seed(number)  # dropout must not depend on where the global generator stands
        with stopped_at(monkeypatch, where), pytest.raises(Stop):
            train(model, digits, config, path)
    resumed = tiny(init=9, dropout=0.3, **spec)
    assert_same_history(train(resumed, digits, config, path), history)
    assert_same_state(resumed, undisturbed)
    scalers = [kept(p)[1]["scaler"] for p in (path, tmp_path / "undisturbed.pt")]
    assert scalers[0] == scalers[1] and bool(scalers[0]) == (name == "float16")
    assert sorted(os.listdir(path.parent)) == [".run.pt.lock", "run.pt"]


SCORED = {
    "tdds": {"score": "tdds", "how": "sample", "unbiased": True},
    "forgetting": {"score": "forgetting", "scoring_epochs": 3, "candidates": 0.7},
    "moderate": {"score": "moderate", "scoring_epochs": 3, "scoring": "joint", "how": "sample"},
    "grand": {"score": "grand", "scoring_epochs": 3, "across_bits": "disjoint"},
}


@pytest.mark.parametrize("name", SCORED)
def test_a_run_stopped_while_scoring_and_between_draws_ends_with_the_same_coresets(
    name: str, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick(epochs=6, coreset=CoresetConfig(pruning_rate=0.5, **SCORED[name]))
    undisturbed, path = tiny(), tmp_path / "run.pt"
    history = train(undisturbed, digits, config)
    assert [row["epoch"] for row in history.attrs["coresets"]] == [4, 4, 4, 5, 5, 5, 6, 6, 6]
    for number, where in enumerate(("epoch 2, step 3", "epoch 5, step 3", "epoch 6, step 2")):
        with stopped_at(monkeypatch, where), pytest.raises(Stop):
            train(tiny(init=number), digits, config, path)
    resumed = tiny(init=9)
    found = train(resumed, digits, config, path)
    assert_same_history(found, history)
    assert found.attrs["coresets"] == history.attrs["coresets"]
    assert_same_state(resumed, undisturbed)


def test_what_is_observed_after_each_epoch_is_kept_in_the_checkpoint(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path, seen = quick(epochs=3), tmp_path / "run.pt", []

    def observe(model: nn.Module) -> dict[str, list[float]]:
        seen.append(float(model[0].weight.detach().norm()))
        return {"norm": seen[-1:]}

    with stopped_at(monkeypatch, "epoch 3, step 1"), pytest.raises(Stop):
        emq.train(tiny(), digits, config, path, progress=False, observe=observe)
    assert len(seen) == 2
    model = tiny(init=1)
    history = emq.train(model, digits, config, path, progress=False, observe=observe)
    assert len(seen) == len(set(seen)) == 3 and seen[-1] == float(model[0].weight.detach().norm())
    assert history.observed.tolist() == [{"norm": [value]} for value in seen]
    unobserved = tiny()
    assert "observed" not in train(unobserved, digits, config)
    assert_same_state(unobserved, model)


def test_what_is_observed_is_as_it_comes_back_from_a_file(digits: Dataset) -> None:
    history = emq.train(tiny(), digits, quick(epochs=1), progress=False, observe=lambda _: {2: (1.5, None)})
    assert history.observed.tolist() == [{"2": [1.5, None]}]
    with pytest.raises(ValueError, match=r"^observe=.*: expected a function that returns JSON's types"):
        emq.train(tiny(), digits, quick(epochs=1), progress=False, observe=lambda _: torch.ones(2))


def test_a_finished_run_is_returned_without_a_step(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path = quick(), tmp_path / "run.pt"
    trained = tiny()
    history = train(trained, digits, config, path)
    stamp = path.stat().st_mtime_ns
    monkeypatch.delattr(training, "_step")
    again = tiny(init=1)
    emq.set_bits(again, 2)
    pd.testing.assert_frame_equal(train(again, digits, config, path), history, check_exact=True)
    assert_same_state(again, trained)
    assert path.stat().st_mtime_ns == stamp and again[4].bits == 8


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lr": 0.1}, "lr: 0.05 there, 0.1 here"),
        ({"epochs": 3, "seed": 1}, "epochs: 2 there, 3 here; seed: 0 there, 1 here"),
        ({"scheme": "joint"}, "scheme: 'bitwise' there, 'joint' here"),
        ({"schedule": "step", "milestones": (1,)}, "milestones: [] there, [1] here"),
        ({"coreset": CoresetConfig(pruning_rate=0.5)}, "coreset: None there, {'score': 'random', 'pruning_rate': 0.5"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(fields: dict, named: str, digits: Dataset, tmp_path: Path) -> None:
    assert_refused(tiny(), digits, quick(**fields), named, digits, tmp_path)


def test_a_checkpoint_of_another_network_or_data_is_refused(digits: Dataset, tmp_path: Path) -> None:
    wider = emq.convert(emq.models.resnet8(width=4), QuantSpec(bits=BITS))
    assert_refused(wider, digits, quick(), "net: '", digits, tmp_path)
    assert_refused(
        tiny(correction="none"), digits, quick(), "spec.correction: 'mean_var' there, 'none' here", digits, tmp_path
    )
    assert_refused(tiny(bits=(2, 3)), digits, quick(), "spec.bits: [2, 4, 8] there, [2, 3] here", digits, tmp_path)
    assert_refused(tiny(), digits.subset(60, 20), quick(), f"data: '{digits.sha256}' there", digits, tmp_path)
    strided = tiny()
    next(m for m in strided.modules() if isinstance(m, QuantConv2d)).stride = (2, 2)
    assert_refused(strided, digits, quick(), "but modules: '", digits, tmp_path)
    mirrored = replace(digits, flip=True, std=(2.0,))
    assert_refused(tiny(), mirrored, quick(), "data.flip: False there, True here", digits, tmp_path)


def assert_refused(
    model: nn.Module, data: Dataset, config: TrainConfig, named: str, digits: Dataset, folder: Path
) -> None:
    path = folder / "run.pt"
    if not path.exists():
        train(tiny(), digits, quick(), path)
    content, before = path.read_bytes(), copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"^checkpoint=.*expected one of the same run, but ") as caught:
        train(model, data, config, path)
    assert named in str(caught.value) and str(path) in str(caught.value)
    assert path.read_bytes() == content
    assert_same_state(model, before)


def test_a_checkpoint_from_before_an_option_counts_as_at_its_default(digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    history = train(tiny(), digits, quick(), path)
    about, tensors = container.read(path, checkpoints.VERSION, "a checkpoint")
    identity = json.loads(about["identity"])
    del identity["spec.output_correction"], identity["clip_grad_norm"], identity["milestones"], identity["modules"]
    container.write(path, about | {"identity": json.dumps(identity)}, tensors)
    pd.testing.assert_frame_equal(train(tiny(init=1), digits, quick(), path), history)
    with pytest.raises(ValueError, match=r"but spec.output_correction: False there, True here$"):
        train(tiny(output_correction=True), digits, quick(), path)
    with pytest.raises(ValueError, match=r"but clip_grad_norm: 0.0 there, 1.0 here$"):
        train(tiny(), digits, quick(clip_grad_norm=1.0), path)


def test_a_checkpoint_of_a_later_version_is_refused(digits: Dataset, tmp_path: Path) -> None:
    """Of the format, or with an option that this one does not know and so cannot follow."""
    path = tmp_path / "run.pt"
    train(tiny(), digits, quick(), path)
    about, tensors = container.read(path, checkpoints.VERSION, "a checkpoint")
    container.write(path, about | {"identity": json.dumps(json.loads(about["identity"]) | {"depth": 2})}, tensors)
    with pytest.raises(ValueError, match=r"^checkpoint=.*one of the same run, but depth: 2 there, not known here$"):
        train(tiny(), digits, quick(), path)
    container.write(path, about | {"version": checkpoints.VERSION + 1}, tensors)
    with pytest.raises(ValueError, match=r"^checkpoint=.*, of version 3 of the format, not 4$"):
        train(tiny(), digits, quick(), path)


def test_a_device_is_no_difference(digits: Dataset, tmp_path: Path) -> None:
    history = train(tiny(), digits, quick(device="auto"), tmp_path / "run.pt")
    pd.testing.assert_frame_equal(train(tiny(init=1), digits, quick(device="cpu"), tmp_path / "run.pt"), history)


def broken_checkpoints(good: bytes, path: Path) -> Iterator[bytes]:
    yield from (b"", b"not a checkpoint", good[: len(good) // 2], pickle.dumps(3))  # others: core/test_container
    state = {"dict": [[name, {"dict": []}] for name in ("model", "optimizer", "scaler", "sampler")]}
    told = {"version": checkpoints.VERSION, "identity": "{}", "history": "[]", "state": state}
    for name, values in {"identity": [3, "{"], "history": [None], "state": ["eval", {}, {"tensor": "y"}]}.items():
        for wrong in values:
            container.write(path, told | {name: wrong}, {"x": torch.ones(3)})
            yield path.read_bytes()


def test_a_broken_checkpoint_is_refused(digits: Dataset, tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", tiny()
    train(tiny(), digits, quick(), path)
    for content in broken_checkpoints(path.read_bytes(), path):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^checkpoint='.*run\.pt': expected a whole checkpoint of this library"):
            train(model, digits, quick(), path)
        assert path.read_bytes() == content and sorted(os.listdir(tmp_path)) == [".run.pt.lock", "run.pt"]
    assert_same_state(model, tiny())


@pytest.mark.parametrize("part", ["model", "optimizer", "scaler", "sampler"])
@pytest.mark.parametrize("wrong", [{}, {"x": torch.ones(2)}, [], None])
def test_a_checkpoint_with_another_state_is_refused(part: str, wrong: Any, digits: Dataset, tmp_path: Path) -> None:
    """Of the right run and with the right checksum, as only somebody could make it who wants it to be taken."""
    path, model, config = tmp_path / "run.pt", tiny(), quick(autocast="float16")
    train(model, digits, config, path)
    history, state = kept(path)
    checkpoints.save(path, checkpoints.identity(model, digits, config), history, state | {part: wrong})
    with pytest.raises(ValueError, match=r"^checkpoint='.*run\.pt': expected a whole state of this run \("):
        train(tiny(), digits, config, path)


def test_a_checkpoint_that_another_process_writes_is_left_to_it(digits: Dataset, tmp_path: Path) -> None:
    path, model = tmp_path / "run.pt", tiny()
    with FileLock(tmp_path / ".run.pt.lock"), pytest.raises(Busy, match=r"run\.pt: another process is at work on it$"):
        train(model, digits, quick(), path)
    assert_same_state(model, tiny())
    assert not path.exists()
    assert len(train(model, digits, quick(), path)) == 2


# Stopped when time is up


def test_a_budget_ends_training_with_an_epoch_and_never_before_one(
    digits: Dataset, tmp_path: Path, clock: list[float]
) -> None:
    """Of three epochs of twelve steps of a second each; after the last there is nothing to come back for."""
    undisturbed = tiny(dropout=0.3)
    history = train(undisturbed, digits, quick(epochs=3))
    for budget, expected in ((0.01, [1, 2]), (12, [1, 2]), (12.5, [2]), (24.5, []), (1000, [])):
        said, found, path = [], None, tmp_path / f"{budget}.pt"
        while found is None:
            model = tiny(init=len(said), dropout=0.3)
            try:
                found = emq.train(model, digits, quick(epochs=3), path, progress=False, budget=budget)
            except OutOfTime as stop:
                said.append(str(stop))
        assert said == [f"epoch {done} of 3; time is up, call again to go on" for done in expected]
        assert_same_history(found, history)
        assert_same_state(model, undisturbed)


def test_a_deadline_is_for_several_calls_together(digits: Dataset, tmp_path: Path, clock: list[float]) -> None:
    deadline = Deadline(13)
    emq.train(tiny(), digits, quick(epochs=1), tmp_path / "first.pt", progress=False, budget=deadline)
    with pytest.raises(OutOfTime, match=r"^epoch 1 of 2; time is up, call again to go on$"):
        emq.train(tiny(), digits, quick(), tmp_path / "second.pt", progress=False, budget=deadline)
    assert Deadline.of(deadline) is deadline and not Deadline(None).passed(Place()) and deadline.passed(Place())


# Losses and weights that are not finite


def test_losses_that_are_looked_at_late_are_not_forgotten(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where a step does not wait for its loss."""
    history, see = train(tiny(), digits, quick()), LossWatch.see

    def late(self: LossWatch, *args: Any) -> None:
        self.lag = 16
        see(self, *args)

    monkeypatch.setattr(LossWatch, "see", late)
    again = train(tiny(), digits, quick())
    assert again.loss.tolist() == history.loss.tolist()


def test_a_loss_that_is_not_finite_stops_the_run(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, path, undisturbed, resumed = quick(epochs=3), tmp_path / "run.pt", tiny(), tiny(init=1)
    train(undisturbed, digits, config)
    lr = training.learning_rate(1 + 4.5 / 12, config)
    message = rf"^loss=nan at epoch 2, step 5, 4 bits, lr {lr:.3g}: training stopped; the last checkpoint stays"

    def spoil_images(run: Any) -> None:
        monkeypatch.setattr(training.F, "cross_entropy", lambda logits, *_, **__: logits.sum() * torch.nan)

    with stopped_at(monkeypatch, "epoch 2, step 5", spoil_images), pytest.raises(FloatingPointError, match=message):
        train(tiny(), digits, config, path)
    monkeypatch.undo()
    assert len(kept(path)[0]) == 1
    train(resumed, digits, config, path)
    assert_same_state(resumed, undisturbed)


@pytest.mark.parametrize("spec", [{}, {"weight": "lsq", "activation": "lsq"}])
def test_a_gradient_that_is_not_finite_is_named_by_the_step_it_broke(spec: dict, digits: Dataset) -> None:
    """The loss before it was finite, and in the first forward pass after it, which may be of another child, is not."""
    model, calls = tiny(**spec), []

    def fourth(grad: torch.Tensor) -> torch.Tensor | None:
        calls.append(grad)
        return grad * torch.nan if len(calls) == 4 else None

    model[4].weight.register_hook(fourth)
    message = r"^loss=nan at epoch 1, step 5, 4 bits, lr \S+: 4\.weight was not finite before it, so a gradient of"
    with pytest.raises(FloatingPointError, match=message):
        train(model, digits, quick())


def test_float16_without_a_finite_gradient_is_no_training(digits: Dataset, tmp_path: Path) -> None:
    """The scaler leaves such steps out, so that losses and weights stay finite, and nothing is learned."""
    model = tiny()
    model[4].weight.register_hook(lambda grad: grad * torch.inf)
    message = r"^no gradient is finite in float16, .* and no step is made, up to epoch 4, step 12, .* checkpoint"
    with pytest.raises(FloatingPointError, match=message):
        train(model, digits, quick(epochs=9, autocast="float16"), tmp_path / "run.pt")
    assert len(kept(tmp_path / "run.pt")[0]) == 3  # 40 steps in epochs of 12


def test_weights_that_break_in_the_last_step_do_not_reach_the_checkpoint(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of an epoch's last step is computed before that step changes the weights."""
    path, step = tmp_path / "run.pt", training._step

    def broken(run: Any, *args: Any) -> None:
        step(run, *args)
        if args[-1] == "epoch 2, step 12":
            run.model[4].weight.data[0, 0, 0, 0] = torch.nan

    monkeypatch.setattr(training, "_step", broken)
    message = r"^4\.weight is not finite after epoch 2, step 12, \(2,\) bits, lr "
    with pytest.raises(FloatingPointError, match=message):
        train(tiny(), digits, quick(epochs=3), path)
    history, state = kept(path)
    assert len(history) == 1 and all(tensor.isfinite().all() for tensor in state["model"].values())
