"""One training loop for every scheme, over the steps of `Coresets`: which child models see which batch."""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

from .. import checks
from ..convert import converted, set_bits, step_weights
from ..files import alone, load_state
from . import checkpoint as checkpoints
from . import distributed
from .checkpoint import Deadline, OutOfTime
from .config import TrainConfig, learning_rate
from .coresets import Coresets, generator
from .data import Batch, Dataset, as_dataset, loader
from .distributed import Place
from .evaluate import batch_norms, logits_of, soft_targets

STOPPED = "training stopped; the last checkpoint stays"
SMALLEST_SCALE = 2.0**-24  # of a loss in float16: reached after 40 steps in a row without a finite gradient


class LossWatch:
    """The mean loss of an epoch, which stops the run at the first loss that is not finite.

    On CUDA it looks at losses at the end of an epoch, or a thousand at a time, so that no step waits for the device.
    """

    def __init__(self, place: Place, model: nn.Module, device: torch.device) -> None:
        self.pending: list[tuple[Tensor, float, str]] = []
        self.place, self.model, self.lag = place, model, 1000 if device.type == "cuda" else 0
        self.total, self.weight = 0.0, 0.0

    def see(self, loss: Tensor, weight: float, where: str) -> None:
        """Take in a scalar loss, its weight in the mean and where it was. FloatingPointError: one is not finite."""
        self.pending.append((loss.detach(), weight, where))
        if len(self.pending) > self.lag:
            self._check()

    def mean(self) -> float:
        """The weighted mean of all losses of all processes."""
        self._check()
        totals, weights = zip(*self.place.collect((self.total, self.weight)), strict=True)
        return sum(totals) / sum(weights)

    def _check(self) -> None:
        values = torch.stack([loss for loss, *_ in self.pending]).tolist() if self.pending else []
        for value, (_, weight, where) in zip(values, self.pending, strict=True):
            if not math.isfinite(value):
                broken = None if self.lag else _not_finite(self.model)  # later this very loss may have broken weights
                cause = f"{broken} was not finite before it, so a gradient of the step before was not; "
                raise FloatingPointError(f"loss={value} at {where}: {cause if broken else ''}{STOPPED}")
            self.total, self.weight = self.total + value * weight, self.weight + weight
        self.pending.clear()


def check_weights(model: nn.Module, scaler: torch.amp.GradScaler, where: str) -> None:
    """FloatingPointError: a parameter or every gradient is not finite; `where` names the step before, in words."""
    broken = _not_finite(model)  # a step can break weights although its loss was finite
    if broken:
        raise FloatingPointError(f"{broken} is not finite after {where}: {STOPPED}")
    if scaler.is_enabled() and scaler.get_scale() < SMALLEST_SCALE:
        text = "no gradient is finite in float16, however small the loss is scaled, and no step is made"
        raise FloatingPointError(f"{text}, up to {where}: {STOPPED}")


def _not_finite(model: nn.Module) -> str | None:
    return next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)


def optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD or AdamW over all parameters, with weight decay on convolution and linear weights alone."""
    layers = (m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)))
    decayed = {id(m.weight) for m in layers}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    fused = True if next(model.parameters()).is_cuda else None  # one kernel for all parameters
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, fused=fused)
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=fused)


class _Run:
    """What one call of `train` works with."""

    def __init__(self, model: nn.Module, data: Dataset, config: TrainConfig, bits: tuple[int, ...]) -> None:
        self.model, self.config, self.place = model, config, distributed.current(config.device)
        self.device = self.place.device(config.device)
        same = {"epochs": config.epochs, "seed": config.seed, "scheme": config.scheme}
        self.coresets = Coresets(data, bits, config.coreset, **same)
        _check_parts(self.coresets, config, self.place)
        distributed.autocast_used(config.autocast, self.device)  # warns before there is a progress bar
        self.memory_format = distributed.memory_format(model, config.channels_last, self.device)
        model.to(self.device, memory_format=self.memory_format)
        self.wrapped, self.data = self.place.wrap(model), data.to(self.device)  # it averages gradients over processes
        passes = len(bits) * sum(-(-self.coresets.size(e) // config.batch_size) for e in range(config.epochs))
        self.forward = distributed.compiled(self.wrapped, config.compile, passes)
        if config.compile == "graphs" and self.device.type == "cuda" and self.place.count == 1:
            self.forward = distributed.Graphed(model)
        self.loader = loader(self.data, "train", self.device, self.place)
        self.optimizer = optimizer(model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.autocast == "float16")
        self.history: list[dict[str, Any]] = []

    @property
    def epoch(self) -> int:
        """The epoch at hand, from 0."""
        return len(self.history)


def train(
    model: nn.Module,
    data: Any,
    config: TrainConfig,
    checkpoint: str | Path | None = None,
    progress: bool | str = True,
    observe: Callable[[nn.Module], Any] | None = None,
    budget: float | Deadline | None = None,
) -> pd.DataFrame:
    """Train a converted `model` in place, at the end of which it runs at its highest bit-width, in evaluation mode.

    Several processes that a launcher started all call this with the same arguments and share each batch. Gradients,
    batch-norm statistics and tracked ranges are those of the whole batch, so that training ends with the weights of
    one process; only dropout and output correction's means differ. The main process shows progress and writes files.

    Args:
        data: a `Dataset`, or a map-style dataset as `Dataset.from_dataset` takes it.
        checkpoint: a file that is written after each epoch, atomically. If it is there, training goes on from it, and
            on a CPU ends with exactly the weights of an undisturbed run.
        progress: whether to show a bar, on stderr or in a notebook; a text is its label.
        observe: called with the model after each epoch. What it returns, of JSON's types, is kept in "observed".
        budget: seconds after which training stops at the end of an epoch, or a `Deadline` that several calls share.

    Returns:
        The history, one row for each epoch: epoch, lr (of its last step), loss (mean over its child models' steps, in
        nats), steps (of the optimizer), sample_passes (of one sample at one bit-width), scoring_passes (those in the
        scoring phase), seconds, damaged (files of streamed data skipped so far) and observed. attrs["coresets"] has a
        row for each draw and bit-width: size, union and overlap with others (fractions), drift since the last draw,
        rank correlation with others' scores, images of each class. attrs["damaged"] names damaged files.

    Raises:
        ValueError: names the argument that is wrong, such as a checkpoint of another run.
        FloatingPointError: a loss or weight is not finite; names step, bit-width and learning rate.
        MemoryError: names the batch size to try.
        files.Busy: another process trains with the checkpoint.
        OutOfTime: the budget is spent and epochs are left; the same call goes on from the checkpoint.
    """
    label = progress if isinstance(progress, str) else checks.flag("progress", progress) and "training"
    if observe is not None and not callable(observe):
        raise checks.invalid("observe", observe, "a function of the network, or None")
    data = as_dataset(data)
    bits, path, deadline = _check(model, data, config), checkpoints.checked(checkpoint), Deadline.of(budget)
    if path is None and deadline.end is not None:
        raise checks.invalid("budget", budget, "None without a checkpoint, from which the next call goes on")
    run = _Run(model, data, config, bits)
    own = {} if path is None else checkpoints.identity(model, run.data, config)  # now: `observe` may change the network
    with run.place.joined(f"the checkpoint {path}" if path else "the beginning"), _safe(run, path):
        if run.place.share(path is not None and path.exists()):
            _resume(run, path, own)
        with _bar(run, label) as bar:
            while run.epoch < config.epochs:
                row = _epoch(run, bar)
                run.history.append(row | ({"observed": _observed(observe, model)} if observe else {}))
                _save(run, path, own)
                if run.epoch < config.epochs and deadline.passed(run.place):
                    raise OutOfTime(f"epoch {run.epoch} of {config.epochs}")
        set_bits(model, bits[-1])
        model.emq.data = data.about()  # what `save` tells of it
    history = pd.DataFrame(run.history)
    history.attrs["coresets"] = run.coresets.rows
    history.attrs["damaged"] = [str(data.train.path(i)) for i in sorted(run.loader.damaged)]
    return history


def _observed(observe: Callable[[nn.Module], Any], model: nn.Module) -> Any:
    """What `observe` gives, as a checkpoint will give it back; ValueError: JSON has no such type."""
    found = observe(model)
    with checks.expecting("observe", found, "a function that returns JSON's types, such as numbers of Python"):
        return json.loads(json.dumps(found))


def _check(model: nn.Module, data: Dataset, config: TrainConfig) -> tuple[int, ...]:
    """The trained bit-widths of `model`, where all three are what they should be."""
    spec = converted(model).emq.spec
    checks.instance("config", config, TrainConfig, 'a TrainConfig, for example TrainConfig(scheme="joint", epochs=10)')
    checks.instance("data", data, Dataset, "a Dataset, as of load_dataset('cifar10'), or a map-style dataset")
    if len(data.train) == 0:
        raise checks.invalid("data", "no images", "at least one image to train on")
    if config.scheme == "dedicated" and len(spec.bits) != 1:
        raise checks.invalid("scheme", "dedicated", f"one trained bit-width a network, not {spec.bits}")
    return spec.bits


def _check_parts(coresets: Coresets, config: TrainConfig, place: Place) -> None:
    """Batch norm needs two images at least in each part of a step."""
    parts = place.count * config.accumulate
    for size in {coresets.size(epoch) for epoch in range(config.epochs)}:
        smallest = size // -(-size // config.batch_size)
        if parts > 1 and smallest < 2 * parts:
            expected = f"two images at least for each of {config.accumulate} parts on {place.count} processes in a step"
            raise checks.invalid("batch_size", config.batch_size, f"{expected}, where some have {smallest}")


@contextmanager
def _safe(run: _Run, path: Path | None) -> Iterator[None]:
    """Within the block no other process writes the checkpoint, and running out of memory says what to try.

    However it ends, the network is in evaluation mode afterwards and holds no gradients. On CUDA the fastest
    convolutions are looked for.
    """
    config = run.config
    halved = f"batch_size={config.batch_size // 2}" if config.batch_size > 1 else "smaller images"
    advice = f"{halved}, or accumulate={2 * config.accumulate}, for the same steps in smaller parts"
    with (
        alone(path) if path is not None and run.place.main else nullcontext(),
        distributed.fastest_convolutions(run.device),
        # a compiled network notices hooks that come or go, or a second training would run the graph of the first
        torch._dynamo.config.patch(skip_nnmodule_hook_guards=False) if config.compile else nullcontext(),
        distributed.blocks_compiled(run.model, config.compile),
        distributed.views_explained(run.memory_format),
        distributed.enough_memory(config.batch_size, f"{advice}; the last checkpoint stays"),
    ):
        try:
            yield
        finally:
            run.model.eval()
            run.optimizer.zero_grad()


def _bar(run: _Run, label: str | bool) -> tqdm:
    """The progress bar, in steps; hidden where there is no label, and in all processes but the main one."""
    total = sum(run.coresets.count(epoch, run.config.batch_size) for epoch in range(run.epoch, run.config.epochs))
    if label and run.place.count > 1:
        label = f"{label}, {run.place.count} processes"
    # JupyterLab puts stderr on a red strip, which stays when the bar is gone.
    file = sys.stdout if type(sys.stderr).__module__ == "ipykernel.iostream" else sys.stderr
    hidden = not (label and run.place.main)
    return tqdm(total=total, disable=hidden, desc=label, unit="step", leave=False, mininterval=1, file=file)


def _epoch(run: _Run, bar: tqdm) -> dict[str, Any]:
    """One epoch; returns its row of the history."""
    run.model.train()
    for norm in batch_norms(run.model):
        norm.forget_adaptation()
    epoch, watch, start = run.epoch, LossWatch(run.place, run.model, run.device), perf_counter()
    steps = run.coresets.steps(epoch, run.config.batch_size)
    batches = run.loader.epoch([indices for _, indices in steps], generator(run.config.seed, "augment", epoch))
    with (
        _seeded(run, epoch),
        run.coresets.watching(run.model),
        distributed.synchronized(run.model, run.place, run.config.accumulate),
    ):
        for i, ((bits, indices), batch) in enumerate(zip(steps, batches, strict=True), start=1):
            lr, where = learning_rate(epoch + (i - 0.5) / len(steps), run.config), f"epoch {epoch + 1}, step {i}"
            _step(run, bits, len(indices), batch, lr, watch, where)
            bar.update()
    loss = watch.mean()
    check_weights(run.model, run.scaler, f"{where}, {bits} bits, lr {lr:.3g}")
    damaged = run.loader.all_damaged()
    bar.set_postfix(loss=f"{loss:.3f}")
    passes = sum(len(indices) * len(bits) for bits, indices in steps)
    row = {"epoch": epoch + 1, "lr": lr, "loss": loss, "steps": len(steps), "sample_passes": passes}
    row |= {"scoring_passes": passes if run.coresets.scoring else 0, "seconds": perf_counter() - start}
    return row | ({} if damaged is None else {"damaged": damaged})


@contextmanager
def _seeded(run: _Run, epoch: int) -> Iterator[None]:
    """Within the block the global generators, which dropout draws from, are seeded; afterwards they are as before."""
    forked = [run.device] if run.device.type == "cuda" else []
    own = [run.place.index] if run.place.index else []
    seed = generator(run.config.seed, "dropout", epoch, *own).initial_seed()
    with torch.random.fork_rng(devices=forked):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices that are not put back
        for device in forked:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _step(run: _Run, bits: tuple[int, ...], size: int, batch: Batch, lr: float, watch: LossWatch, where: str) -> None:
    """One optimizer step of the child models `bits` on this process's part of `size` samples, in `accumulate` parts."""
    config, images = run.config, batch[0]
    if images.dim() == 4:
        images = images.contiguous(memory_format=run.memory_format)
    # a captured graph gives every gradient in the same memory (PyTorch issue 181723), so a sum needs memory of its own
    summed = isinstance(run.forward, distributed.Graphed) and config.accumulate * len(bits) > 1
    run.optimizer.zero_grad(set_to_none=not summed)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    parts = zip(*(x.tensor_split(config.accumulate) for x in (images, *batch[1:])), strict=True)
    lower = config.distillation and bits[0] < run.coresets.bits[-1]  # the highest child has no part in this step
    with distributed.autocast(config.autocast, run.device):
        for k, part in enumerate(parts, start=1):
            teacher = soft_targets(run.model, part[0]) if lower else None
            for b in bits:
                last = k == config.accumulate and b == bits[-1]
                logits = _child(run, b, size, part, teacher, last, watch, f"{where}, {b} bits, lr {lr:.3g}")
                teacher = logits.softmax(1) if config.distillation else None
    if config.clip_grad_norm:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()


def _child(
    run: _Run, b: int, size: int, part: Batch, teacher: Tensor | None, last: bool, watch: LossWatch, where: str
) -> Tensor:
    """Child model `b`'s forward pass, loss and backward pass on a part of `size` samples; returns its logits (B, C).

    Gradients are averaged over processes after the last pass of a step.
    """
    images, labels, indices = part
    set_bits(run.model, b)
    waits = nullcontext() if last or run.place.count == 1 else run.wrapped.no_sync()
    # a compiled or captured network quantizes weights in an order of its own
    eager = run.forward is run.wrapped and run.config.compile != "blocks"
    with waits, step_weights(run.model) if eager else nullcontext():
        logits = logits_of(run.forward(images)).float()
        if logits.shape[1] < run.data.num_classes:
            raise checks.invalid("model", f"{logits.shape[1]} outputs", f"{run.data.num_classes} or more, one a class")
        weights = run.coresets.weights(b, indices) if run.coresets.loss_weights else None
        loss = _loss(logits, labels if teacher is None else teacher, weights, run.config)
        weight = len(labels) * run.place.count / size
        watch.see(loss, weight, where)
        run.scaler.scale(loss if weight == 1 else loss * weight).backward()
    run.coresets.observe(b, indices, logits, labels)  # on a CPU the loss is known to be finite by now
    return logits.detach()


def _loss(logits: Tensor, target: Tensor, weights: Tensor | None, config: TrainConfig) -> Tensor:
    """The mean cross entropy, with `weights` (B,) or without; a teacher's probabilities (B, C) are not smoothed."""
    smoothing = 0.0 if target.is_floating_point() else config.label_smoothing
    if weights is None:
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    losses = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    return (losses * weights.to(losses)).mean()


def _save(run: _Run, path: Path | None, own: dict[str, Any]) -> None:
    if path is None or not run.place.main:
        return
    state = {name: getattr(run, name).state_dict() for name in ("model", "optimizer", "scaler")}
    state |= {"sampler": run.coresets.state_dict(), "damaged": run.loader.damaged}
    checkpoints.save(path, own, run.history, state)


def _resume(run: _Run, path: Path, own: dict[str, Any]) -> None:
    run.history, state = checkpoints.load(path, own)
    with checks.expecting("checkpoint", str(path), "a whole state of this run"):
        load_state(run.model, state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.coresets.load_state_dict(state["sampler"], run.device)
        run.loader.damaged = state["damaged"]
