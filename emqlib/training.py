"""One training loop for every scheme: a scheme is a plan, which says what child sees which batch in each step."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

from . import checkpoints, checks, devices
from .checkpoints import Deadline, OutOfTime
from .config import TrainConfig, learning_rate
from .data import Dataset
from .evaluation import logits_of
from .files import alone
from .finite import LossWatch, check_weights
from .loading import Batch, FileLoader, MemoryLoader, loader
from .multibit import quantized_layers, set_bits, step_weights
from .ranks import Ranks, current, synchronized
from .sampling import Sampler, Selection, generator


@dataclass(frozen=True)
class Step:
    """One optimizer step: samples (B,) that enter it, children, highest bit-width first, loss weights (N,) of all."""

    indices: Tensor
    bits: tuple[int, ...]
    weights: Tensor | None = None


def _chunks(indices: Tensor, batch_size: int, gen: torch.Generator) -> tuple[Tensor, ...]:
    """`indices`, shuffled, in parts of near-equal size: a last part of one image is nothing batch norm can take."""
    shuffled = indices[torch.randperm(len(indices), generator=gen)]
    return shuffled.tensor_split(-(-len(indices) // batch_size))


def plan(selection: Selection, config: TrainConfig, epoch: int, device: torch.device | str = "cpu") -> list[Step]:
    """The steps of one epoch over what was selected for it, loss weights on `device`."""
    subsets, bits = selection.subsets, tuple(sorted(selection.subsets, reverse=True))
    weights = {b: w.to(device) for b, w in selection.weights.items()}
    if selection.scheme == "joint":
        chunks = _chunks(subsets[bits[0]], config.batch_size, generator(config.seed, "shuffle", epoch))
        return [Step(chunk, bits, weights[bits[0]] if weights else None) for chunk in chunks]
    queues = {b: _chunks(subsets[b], config.batch_size, generator(config.seed, "shuffle", epoch, b)) for b in bits}
    rounds = max(len(queue) for queue in queues.values())
    turns = [(queues[b][i], b) for i in range(rounds) for b in bits if i < len(queues[b])]
    return [Step(chunk, (b,), weights[b] if weights else None) for chunk, b in turns]


def _count(sampler: Sampler, config: TrainConfig, epoch: int) -> int:
    """How many steps `plan` will have in `epoch`."""
    children = 1 if sampler.scheme_of(epoch) == "joint" else len(sampler.bits)
    return children * -(-sampler.size(epoch) // config.batch_size)


def optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD or AdamW over all parameters; weight decay on convolution and linear weights alone."""
    layers = (m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear)))
    decayed = {id(m.weight) for m in layers}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in decayed], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr)
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)


@dataclass
class _Run:
    """What one call of `train` works with."""

    model: nn.Module
    wrapped: nn.Module  # the model, or what averages its gradients over ranks
    forward: Callable[[Tensor], Tensor]  # that, compiled or not
    data: Dataset
    config: TrainConfig
    place: Ranks
    device: torch.device
    loader: MemoryLoader | FileLoader
    memory_format: torch.memory_format
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    sampler: Sampler
    path: Path | None = None  # of its checkpoint
    deadline: Deadline = field(default_factory=lambda: Deadline(None))
    history: list[dict[str, Any]] = field(default_factory=list)
    paused: dict[str, Any] | None = None  # where `_pause` stopped the epoch at hand

    @property
    def epoch(self) -> int:
        """The epoch at hand, from 0."""
        return len(self.history)


def train(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    checkpoint: str | Path | None = None,
    progress: bool | str = True,
    observe: Callable[[nn.Module], Any] | None = None,
    budget: float | Deadline | None = None,
) -> pd.DataFrame:
    """Train a converted `model` in place; returns the history, one row an epoch.

    Columns: epoch, lr (at its end), loss (mean over its children's steps, nats), steps (optimizer steps), sample_passes
    (forward and backward passes of one sample at one bit-width), scoring_passes (those in the scoring phase) and
    seconds, these four of the epoch alone. Its attrs["coresets"] holds a row a draw and bit-width: size, union and
    overlap (fractions), drift since the last draw, rank correlation with other bit-widths' scores, images a class.
    checkpoint: a file, written after each epoch, atomically; if it is there, training goes on from it, and on a CPU
    ends with the very weights of an undisturbed run. progress: a bar, on stderr or in a notebook; a text is its label.
    observe: called with the model after each epoch; what it returns, of JSON's types, goes into the history's column
    "observed", and so into the checkpoint. budget: seconds after which training stops at the next step, by OutOfTime,
    with a checkpoint of that step, from which the next call goes on as exactly; each call makes one step at least.
    Afterwards the bit-width is the highest trained one and the network in evaluation mode: calls change nothing.
    Damaged files of streamed data are skipped; column damaged counts them up to each epoch, attrs["damaged"] names
    them. Several processes, which a launcher started and which all call this with the same arguments, share each batch:
    gradients, batch-norm statistics and tracked ranges are those of all of it, so that they end with the weights of one
    process (dropout and output correction's means are of each part). The first shows progress and writes checkpoints.
    ValueError: not a converted network, a scheme that does not fit its bit-widths, fewer outputs than classes, a place
    where no checkpoint can be, a budget without one, or a checkpoint of another configuration, network or data.
    FloatingPointError: a loss or weight that is not finite, named with step, bit-width and learning rate; the last
    checkpoint stays. MemoryError: names the batch size to try. files.Busy: another process trains with the checkpoint.
    """
    label = progress if isinstance(progress, str) else checks.flag("progress", progress) and "training"
    if observe is not None and not callable(observe):
        raise checks.invalid("observe", observe, "a function of the network, or None")
    run = _prepare(model, data, config, checkpoint, budget)
    with run.place.joined(f"the checkpoint {run.path}" if run.path else "the beginning"), _safe(run):
        found = run.place.share(str(run.path) if run.path is not None and run.path.exists() else "")
        if found:
            _resume(run, Path(found))
        _finish(run, label, observe)
    return _history(run)


@contextmanager
def _safe(run: _Run) -> Iterator[None]:
    """Within the block no other process writes the checkpoint, and running out of memory says what to try.

    However it ends, the network is in evaluation mode afterwards and holds no gradients.
    """
    config, own = run.config, run.path is not None and run.place.main
    halved = f"batch_size={config.batch_size // 2}" if config.batch_size > 1 else "smaller images"
    advice = f"{halved}, or accumulate={2 * config.accumulate}, for the same steps in smaller parts"
    with (
        alone(run.path) if own else nullcontext(),
        devices.enough_memory("batch_size", config.batch_size, f"{advice}; the last checkpoint stays"),
    ):
        try:
            yield
        finally:
            run.model.eval()
            run.optimizer.zero_grad()


def _history(run: _Run) -> pd.DataFrame:
    history = pd.DataFrame(run.history)
    history.attrs["coresets"] = run.sampler.rows
    history.attrs["damaged"] = [str(run.data.train.path(i)) for i in sorted(run.loader.damaged)]
    return history


def _prepare(
    model: nn.Module, data: Dataset, config: TrainConfig, checkpoint: Any, budget: float | Deadline | None
) -> _Run:
    bits, path, deadline = _check(model, data, config), checkpoints.checked(checkpoint), Deadline.of(budget)
    if path is None and deadline.end is not None:
        raise checks.invalid("budget", budget, "None without a checkpoint, from which the next call goes on")
    place = current(config.device)
    device = place.device(config.device)
    devices.autocast_used(config.autocast, device)  # what it warns of is told before the progress bar is there
    memory_format = devices.memory_format(model, config.channels_last, device)
    model.to(device, memory_format=memory_format)
    sampler = Sampler(config.coreset, config.scheme, config.seed, bits, data.train.labels, config.epochs, place)
    _check_parts(sampler, config, place)
    wrapped, data = place.wrap(model), data.to(device)
    forwards = len(bits) * sum(-(-sampler.size(epoch) // config.batch_size) for epoch in range(config.epochs))
    forward = devices.compiled(wrapped, config.compile, forwards)
    if config.compile == "graphs" and device.type == "cuda" and place.count == 1:
        layer = next(iter(quantized_layers(model).values()))
        forward = devices.Graphed(model, lambda: layer.bits)
    batches = loader(data, "train", device, place)
    scaler = torch.amp.GradScaler(device.type, enabled=config.autocast == "float16")
    parts = (batches, memory_format, optimizer(model, config), scaler, sampler, path, deadline)
    return _Run(model, wrapped, forward, data, config, place, device, *parts)


def _check_parts(sampler: Sampler, config: TrainConfig, place: Ranks) -> None:
    """Batch norm needs two images at least in each part of a step."""
    parts = place.count * config.accumulate
    sizes = {sampler.size(epoch) for epoch in range(config.epochs)} if parts > 1 else ()
    for size in sizes:
        smallest = size // -(-size // config.batch_size)
        if smallest < 2 * parts:
            expected = f"two images at least for each of {config.accumulate} parts on {place.count} ranks in a step"
            raise checks.invalid("batch_size", config.batch_size, f"{expected}, where some have {smallest}")


def _finish(run: _Run, label: str | bool, observe: Callable[[nn.Module], Any] | None) -> None:
    epochs, done = run.config.epochs, run.paused["steps"] if run.paused else 0
    total = sum(_count(run.sampler, run.config, epoch) for epoch in range(run.epoch, epochs))
    if label and run.place.count > 1:
        label = f"{label}, {run.place.count} processes"
    # JupyterLab puts stderr on a red strip, which stays when the bar is gone.
    file = sys.stdout if type(sys.stderr).__module__ == "ipykernel.iostream" else sys.stderr
    shown = {"desc": label, "unit": "step", "leave": False, "mininterval": 1, "file": file}
    with tqdm(total=total, initial=done, disable=not (label and run.place.main), **shown) as bar:
        while run.epoch < epochs:
            row = _epoch(run, bar)
            run.history.append(row | ({"observed": observe(run.model)} if observe else {}))
            _save(run)
            if run.epoch < epochs and run.deadline.passed(run.place):
                raise OutOfTime(f"epoch {run.epoch} of {epochs}")
    set_bits(run.model, run.sampler.bits[-1])
    run.model.trained_on = run.data.about()  # for `saving.save`


def _check(model: nn.Module, data: Dataset, config: TrainConfig) -> tuple[int, ...]:
    spec = getattr(model, "quant_spec", None)
    if spec is None:
        raise checks.invalid("model", type(model).__name__, "a network made by emqlib.convert")
    if not isinstance(config, TrainConfig):
        raise checks.invalid("config", config, 'a TrainConfig, for example TrainConfig(scheme="joint", epochs=10)')
    if not isinstance(data, Dataset):
        raise checks.invalid("data", type(data).__name__, "a Dataset, for example load_dataset('cifar10')")
    if len(data.train) == 0:
        raise checks.invalid("data", "no images", "at least one image to train on")
    if config.scheme == "dedicated" and len(spec.bits) != 1:
        raise checks.invalid("scheme", "dedicated", f"one trained bit-width a network, not {spec.bits}")
    return spec.bits


def _epoch(run: _Run, bar: tqdm) -> dict[str, Any]:
    run.model.train()
    epoch, watch, start = run.epoch, LossWatch(run.place, run.model, run.device), perf_counter()
    selection = run.sampler.selection(epoch)
    steps = plan(selection, run.config, epoch, run.device)
    pixels = generator(run.config.seed, "augment", epoch)
    with (
        _seeded(run, epoch),
        run.sampler.recording(run.model, selection),
        synchronized(run.model, run.place, run.config.accumulate),
    ):
        done, before = _go_on(run, watch, pixels)
        batches = run.loader.epoch([step.indices for step in steps], pixels, done)
        for i, (step, batch) in enumerate(zip(steps[done:], batches, strict=True), start=done + 1):
            lr = learning_rate(epoch + (i - 0.5) / len(steps), run.config)
            where = f"epoch {epoch + 1}, step {i}"
            _step(run, step, batch, lr, watch, where)
            where += f", {step.bits} bits, lr {lr:.3g}"
            bar.update()
            if i < len(steps) and run.deadline.passed(run.place):
                _pause(run, watch, pixels, i, before + perf_counter() - start, where)
                raise OutOfTime(f"epoch {epoch + 1}, step {i} of {len(steps)}")
    loss = watch.mean()
    check_weights(run.model, run.scaler, where)
    damaged = run.loader.all_damaged()
    bar.set_postfix(loss=f"{loss:.3f}")
    passes = sum(len(step.indices) * len(step.bits) for step in steps)
    row = {"epoch": epoch + 1, "lr": lr, "loss": loss, "steps": len(steps), "sample_passes": passes}
    row |= {"scoring_passes": passes if selection.scored else 0, "seconds": before + perf_counter() - start}
    return row | ({} if damaged is None else {"damaged": damaged})


def _pause(run: _Run, watch: LossWatch, pixels: torch.Generator, done: int, seconds: float, where: str) -> None:
    """Write a checkpoint in the middle of an epoch, `done` steps and `seconds` after its beginning."""
    watch.flush()
    check_weights(run.model, run.scaler, where)
    run.loader.all_damaged()  # of all ranks, one of which writes
    own = {"noise": devices.noise(run.device), "losses": [watch.total, watch.weight]}
    run.paused = {"steps": done, "seconds": seconds, "pixels": pixels.get_state(), "ranks": run.place.collect(own)}
    _save(run)


def _go_on(run: _Run, watch: LossWatch, pixels: torch.Generator) -> tuple[int, float]:
    """The steps and the seconds after which `_pause` stopped the epoch at hand, and all as it was there; else none."""
    if run.paused is None:
        return 0, 0.0
    paused, run.paused = run.paused, None
    own = paused["ranks"][run.place.rank]
    watch.total, watch.weight = own["losses"]
    devices.set_noise(run.device, own["noise"])
    pixels.set_state(paused["pixels"])
    return paused["steps"], paused["seconds"]


@contextmanager
def _seeded(run: _Run, epoch: int) -> Iterator[None]:
    """Dropout and its like draw from the global generator: an epoch seeds it, and puts it back afterwards."""
    forked = [run.device] if run.device.type == "cuda" else []
    own = [run.place.rank] if run.place.rank else []
    seed = generator(run.config.seed, "dropout", epoch, *own).initial_seed()
    with torch.random.fork_rng(devices=forked):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reach devices that are not put back
        for device in forked:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _step(run: _Run, step: Step, batch: Batch, lr: float, watch: LossWatch, where: str) -> None:
    """One optimizer step on this rank's part of the samples of `step`, itself in `accumulate` parts."""
    config, images = run.config, batch[0].contiguous(memory_format=run.memory_format)
    run.optimizer.zero_grad(set_to_none=True)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    parts = zip(*(x.tensor_split(config.accumulate) for x in (images, *batch[1:])), strict=True)

    def see(b: int, loss: Tensor, weight: float) -> None:
        watch.see(loss, weight, f"{where}, {b} bits, lr {lr:.3g}")

    with devices.autocast(config.autocast, run.device):
        for k, part in enumerate(parts, start=1):
            _children(run, step, part, k == config.accumulate, see)
    if config.clip_grad_norm:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), config.clip_grad_norm)
    run.scaler.step(run.optimizer)
    run.scaler.update()


def _children(run: _Run, step: Step, part: Batch, last: bool, see: Callable[[int, Tensor, float], None]) -> None:
    """Each child's forward and backward pass on a part of a step's samples, highest bit-width first.

    last: whether no other part follows, so that gradients are averaged over ranks after the last child. see: takes in
    each bit-width, its loss and the part's weight in the step, before the backward pass.
    """
    images, labels, indices = part
    teacher, weight = None, len(labels) * run.place.count / len(step.indices)
    for b in step.bits:
        set_bits(run.model, b)
        waits = nullcontext() if last and b == step.bits[-1] else run.place.alone(run.wrapped)
        eager = run.forward is run.wrapped  # a compiled or captured network has an order of its own
        with waits, step_weights(run.model) if eager else nullcontext():
            logits = logits_of(run.forward(images)).float()
            if logits.shape[1] < run.data.num_classes:
                raise checks.invalid(
                    "model", f"{logits.shape[1]} outputs", f"{run.data.num_classes} or more, one a class"
                )
            target = labels if teacher is None else teacher
            loss = _loss(logits, target, step, indices, run.config, teacher is not None)
            see(b, loss, weight)
            run.scaler.scale(loss if weight == 1 else loss * weight).backward()
        run.sampler.observe(b, run.epoch, indices, logits, labels)  # only now is the loss known to be finite
        teacher = logits.detach().softmax(1) if run.config.distillation else None


def _loss(logits: Tensor, target: Tensor, step: Step, indices: Tensor, config: TrainConfig, distilled: bool) -> Tensor:
    smoothing = 0.0 if distilled else config.label_smoothing
    if step.weights is None:
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    losses = F.cross_entropy(logits, target, label_smoothing=smoothing, reduction="none")
    return (losses * step.weights[indices].to(losses)).mean()


def _save(run: _Run) -> None:
    """Write the run's checkpoint, if it is to have one and this is the rank that writes."""
    if run.path is None or not run.place.main:
        return
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "sampler": run.sampler.state(),
        "damaged": run.loader.damaged,
        "paused": run.paused,
    }
    checkpoints.save(run.path, checkpoints.identity(run.model, run.data, run.config), run.history, state)


def _resume(run: _Run, path: Path) -> None:
    own = checkpoints.identity(run.model, run.data, run.config)
    run.history, state = checkpoints.load(path, own, run.place.count)
    try:
        run.model.load_state_dict(state["model"])
        run.optimizer.load_state_dict(state["optimizer"])
        run.scaler.load_state_dict(state["scaler"])
        run.sampler.load(state["sampler"], run.device)
        run.loader.damaged, run.paused = state["damaged"], state["paused"]
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise checks.invalid("checkpoint", str(path), f"a whole state of this run ({error!r})") from error
