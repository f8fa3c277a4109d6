"""What to ask of a converted network: `evaluate` at any bit-width, and `adapt_norm`, which gives one its statistics."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import bit_widths, choice, flag, integer, invalid
from ..convert import at_bits, networks, trained_bits
from ..layers import InputQuantizer
from ..norms import MultiBitBatchNorm
from .data import Dataset, Streamed, as_dataset, augment, loader, normalize
from .distributed import enough_memory

ADAPTATION_SAMPLES = 5000  # images that batch-norm adaptation takes, at each bit-width

Batches = Iterable[tuple[Tensor, Tensor]]
Logits = Callable[[Any], Tensor]  # from what a network gives


def batches(
    data: Dataset | Batches, split: str, device: torch.device, batch_size: int, limit: int | None = None
) -> Batches:
    """Inputs (B, ...) as floats and labels (B,) on `device`: of a data set's split, or of an iterable.

    Images of "train" are augmented as in training, the same way each time: statistics of plain images are not what the
    network was trained under, and cost it points. There are at most `limit` samples.
    ValueError: an iterator, which a second bit-width would find empty; pairs that are none.
    """
    choice("split", split, ("train", "test"))
    integer("batch_size", batch_size, 1)
    integer("limit", 1 if limit is None else limit, 1)
    if not isinstance(data, Dataset):
        if not isinstance(data, Iterable) or isinstance(data, (Iterator, str, Tensor)):
            expected = "a Dataset, a map-style dataset, or an iterable of (images, labels) to go over again"
            raise invalid("data", type(data).__name__, expected)
        return ((images.to(device), labels.to(device)) for images, labels in map(_pair, data))
    generator, whole = torch.Generator().manual_seed(0), getattr(data, split)
    if len(whole) == 0:
        raise invalid("data", "no images", f"at least one image in {split}")
    chosen = torch.arange(len(whole))
    if limit is not None and limit < len(whole):  # the same random images each time: data sets lie class by class
        chosen = torch.randperm(len(whole), generator=generator)[:limit]
    count = -(-len(chosen) // batch_size)  # parts of near-equal size: batch norm cannot take a last part of one image
    if isinstance(whole, Streamed):
        stream = loader(data, split, device, live=False)
        found = stream.epoch(chosen.tensor_split(count), generator if split == "train" else None)
        return ((images, labels) for images, labels, _ in found)
    part = whole.take(chosen.to(whole.labels.device)) if len(chosen) < len(whole) else whole
    images = augment(part.images, data, generator) if split == "train" else part.images
    parts = zip(images.tensor_split(count), part.labels.tensor_split(count), strict=True)
    return ((normalize(x.to(device), data), y.to(device)) for x, y in parts)


def _pair(given: Any) -> tuple[Tensor, Tensor]:
    pair = given if isinstance(given, (tuple, list)) and len(given) == 2 else (None, None)
    if not all(isinstance(x, Tensor) and x.dim() for x in pair) or len(pair[0]) != len(pair[1]):
        raise invalid("data", given, "an iterable of (images, labels), two tensors (B, ...) and (B,)")
    return tuple(pair)


def logits_of(output: Any, own: Logits | None = None) -> Tensor:
    """The logits (B, C) in a network's output: itself, its attribute or entry "logits", or the first of a tuple.

    own: a function that finds them elsewhere. ValueError: they are not there.
    """
    found = output if own is None else own(output)
    if own is None and not isinstance(found, Tensor):
        first = next(iter(found), None) if isinstance(found, (tuple, list)) else None
        entry = found.get("logits") if isinstance(found, Mapping) else first
        found = getattr(found, "logits", entry)
    if isinstance(found, Tensor) and found.dim() >= 2:
        return found
    got = f"{type(output).__name__} with {', '.join(map(repr, output))}" if isinstance(output, Mapping) else output
    expected = 'an output that is logits (B, C), or has them as .logits, as ["logits"] or as the first of a tuple;'
    raise invalid("logits", got, f"{expected} else a function that takes the output and gives them")


def soft_targets(model: nn.Module, x: Tensor) -> Tensor:
    """What a lower bit-width may learn from, for knowledge distillation: p (B, C) of the highest trained one on x.

    The softmax of its logits in evaluation mode, without gradient. Bit-widths and modes are afterwards as they were.
    `F.cross_entropy(logits, emq.soft_targets(model, x))` is a loss. Of a compiled network, ask for them before the
    forward pass that learns from them. x: the network's input (B, ...). ValueError: not a converted network, no logits.
    """
    with ExitStack() as highest, _evaluating(model, always=True, statistics=False):
        for network in networks(model):
            highest.enter_context(at_bits(network, trained_bits(network)[-1]))
        return logits_of(_inner(model, nn.parallel.DistributedDataParallel)(x)).float().softmax(1)


def evaluate(
    model: nn.Module,
    data: Any,
    bits: Iterable[int] = range(1, 9),
    adapt_norm: bool = False,
    batch_size: int = 500,
    logits: Logits | None = None,
) -> pd.DataFrame:
    """Accuracy by bit-width, on test data. The model is left as it was, training mode included.

    Args:
        model: a converted network, a part of one, or any module that holds converted networks, all of which run at the
            same bit-width.
        data: a `Dataset`, whose test split is taken, a map-style dataset as `Dataset.from_dataset` takes it, or an
            iterable of (inputs, labels).
        adapt_norm: re-estimate the batch-norm statistics at each bit-width first, and put them back afterwards.
        logits: takes the network's output and gives the logits (B, C); by default see `logits_of`.

    Returns:
        One row a bit-width: bits, top1 (%), loss (mean cross entropy, nats), trained (whether `bits` took gradient
        steps), n (samples).

    Raises:
        ValueError: as `set_bits`; no images; no logits, or fewer than classes; adapt_norm without a batch norm, or
            without a `Dataset` to take training images from.
        FloatingPointError: a loss that is not finite.
        MemoryError: names the batch size to try.
    """
    wanted = bit_widths("bits", bits)
    flag("adapt_norm", adapt_norm)
    integer("batch_size", batch_size, 1)
    if logits is not None and not callable(logits):
        raise invalid("logits", logits, "a function that takes the network's output and gives logits (B, C), or None")
    trained = set.intersection(*(set(trained_bits(network)) for network in networks(model)))
    if adapt_norm and not (isinstance(data, Dataset) and _norms(model)):
        raise invalid("adapt_norm", True, "a Dataset as data, whose training images to adapt to")
    if not adapt_norm:
        for b in wanted:
            with at_bits(model, b):  # refuses what the network does not serve
                pass
    data, smaller = as_dataset(data), f"batch_size={max(1, batch_size // 2)}"
    with enough_memory(batch_size, smaller), undisturbed(model, data, batch_size) as device:
        if adapt_norm:
            _adapt(model, data, wanted, ADAPTATION_SAMPLES, batch_size)
        rows = _scores(model, batches(data, "test", device, batch_size), wanted, logits)
    table = pd.DataFrame(rows).assign(trained=lambda t: t.bits.isin(trained))
    return table[["bits", "top1", "loss", "trained", "n"]]


def _scores(model: nn.Module, pairs: Batches, wanted: tuple[int, ...], own: Logits | None) -> list[dict[str, float]]:
    """One row a bit-width, of a single pass over the images: those of ImageNet take longer to decode than to run."""
    model = _inner(model, nn.parallel.DistributedDataParallel)  # of which each rank would wait for all others
    n, correct, loss = 0, dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0.0)
    for images, labels in pairs:
        kind, labels = labels.dtype, labels.long()
        lowest, highest = map(int, labels.aminmax()) if labels.numel() else (0, -1)
        if kind.is_floating_point or lowest < 0:
            raise invalid("labels", f"{kind}, {lowest} at least", "integers >= 0, the numbers of classes")
        n, classes = n + len(labels), highest + 1
        for b in wanted:
            with at_bits(model, b):
                logits = logits_of(model(images), own).float()
            if logits.dim() != 2 or labels.dim() != 1:
                found = f"outputs {tuple(logits.shape)} for labels {tuple(labels.shape)}"
                raise invalid("model", found, "one row of logits (B, C) and one label (B,) a sample")
            if logits.shape[1] < classes:
                raise invalid("model", f"{logits.shape[1]} outputs", f"{classes} or more, one a class")
            correct[b] += int((logits.argmax(1) == labels).sum())
            loss[b] += float(F.cross_entropy(logits, labels, reduction="sum"))
    if n == 0:
        raise invalid("data", "no images", "at least one image to evaluate on")
    for b in wanted:
        if not math.isfinite(loss[b]):
            raise FloatingPointError(f"loss={loss[b]} at {b} bits: weights, norms or images are not finite")
    return [{"bits": b, "top1": 100 * correct[b] / n, "loss": loss[b] / n, "n": n} for b in wanted]


@contextmanager
def _evaluating(model: nn.Module, always: bool, statistics: bool = True) -> Iterator[torch.device]:
    """Within the block the model is in evaluation mode, without gradients; afterwards each module's own mode is back.

    Norm statistics and not yet started input ranges go back to what they were: always, or after an exception.
    statistics: False if the block leaves those of norms alone. A backward pass that is still to come may need them, and
    refuses what was written to since.
    """
    norms = batch_norms(model)  # refuses what is no network
    training = {module: module.training for module in model.modules()}
    starting = [m for m in model.modules() if isinstance(m, InputQuantizer) and not m.started]
    kept = [*norms, *starting] if statistics else starting
    before = [copy.deepcopy(m.state_dict()) for m in kept]
    restore = True
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
        restore = always
    finally:
        for module, mode in training.items():  # parents first; some have a method of their own, as LoRA's layers do
            if module.training != mode:
                module.train(mode)
        for module, mode in training.items():
            module.training = mode
        if restore:
            for m, state in zip(kept, before, strict=True):
                m.load_state_dict(state)


@contextmanager
def undisturbed(model: nn.Module, data: Dataset | Batches, batch_size: int) -> Iterator[torch.device]:
    """Evaluation mode without gradients, input ranges started; afterwards norms, ranges and modes are as before."""
    with _evaluating(model, always=True) as device:
        _start_ranges(model, data, batch_size)
        yield device


def _inner(model: nn.Module, *wrappers: type[nn.Module]) -> nn.Module:
    """What `model` wraps, where it is one of PyTorch's `wrappers`."""
    while isinstance(model, wrappers):
        model = model.module
    return model


@contextmanager
def _measuring(model: nn.Module) -> Iterator[nn.Module]:
    """`model` as it is called where layers measure what they see: in one process, on one device, and not compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield _inner(model, nn.DataParallel, nn.parallel.DistributedDataParallel)


def batch_norms(model: nn.Module) -> list[MultiBitBatchNorm]:
    """The batch norms of converted networks; none in a transformer, whose layer norms keep no statistics."""
    return [m for network in networks(model) for m in network.modules() if isinstance(m, MultiBitBatchNorm)]


def _norms(model: nn.Module) -> list[MultiBitBatchNorm]:
    norms = batch_norms(model)
    if not norms:
        raise invalid("model", type(model).__name__, "a network with batch norm to adapt")
    return norms


def _start_ranges(model: nn.Module, data: Dataset | Batches, batch_size: int) -> None:
    """Start input ranges that have seen no data at the highest trained bit-width: a low one would distort them."""
    if all(m.started or m.provisional for m in model.modules() if isinstance(m, InputQuantizer)):
        return
    with ExitStack() as highest, _measuring(model) as forward:
        for network in networks(model):
            highest.enter_context(at_bits(network, trained_bits(network)[-1]))
        for images, _ in batches(data, "train", next(model.parameters()).device, batch_size, batch_size):
            forward(images)
            break


def adapt_norm(
    model: nn.Module, data: Any, bits: Iterable[int], samples: int = ADAPTATION_SAMPLES, batch_size: int = 500
) -> None:
    """Batch-norm adaptation: give each of `bits` running statistics of its own, re-estimated by forward passes.

    They are the mean over batches, weighted by their sizes. Trained parameters and the statistics of other bit-widths
    stay as they are. A switchable norm gains the bit-widths it was not built for, with the affine of the nearest
    trained one. Input ranges that have seen no data yet start from the first batch. The model stays in the mode,
    training or evaluation, that it is in. On an exception all is as it was.
    Source: Li et al. 2016 (arXiv 1603.04779), Schneider et al. 2020 (arXiv 2006.16971).

    Args:
        model: as for `evaluate`; its output may be anything.
        data: as for `evaluate`, but training samples are taken, augmented as in training.
        samples: the number of random training samples for each bit-width; all samples of an iterable are used.

    Raises:
        ValueError: not a converted network, bad bits, no batch norm, no images.
        FloatingPointError: images or weights that are not finite.
        MemoryError: names the batch size to try.
    """
    wanted = bit_widths("bits", bits)
    integer("samples", samples, 2)
    integer("batch_size", batch_size, 2)
    _norms(model)
    data, smaller = as_dataset(data), f"batch_size={max(2, batch_size // 2)}"
    with enough_memory(batch_size, smaller), _evaluating(model, always=False):
        _start_ranges(model, data, batch_size)
        _adapt(model, data, wanted, samples, batch_size)


def _adapt(model: nn.Module, data: Dataset | Batches, bits: tuple[int, ...], samples: int, batch_size: int) -> None:
    """`adapt_norm`'s work, in evaluation mode."""
    norms = _norms(model)
    momentum = [m.momentum for m in norms]
    seen: Counter[nn.Module] = Counter()

    def cumulative(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # a norm that is used twice counts two batches
        seen[norm] += len(inputs[0])
        norm.momentum = len(inputs[0]) / seen[norm]

    hooks = [m.train().register_forward_pre_hook(cumulative) for m in norms]
    try:
        for b in bits:
            seen.clear()
            for m in norms:
                m.own_statistics(b)
            with at_bits(model, b), _measuring(model) as forward:
                for images, _ in batches(data, "train", next(model.parameters()).device, batch_size, samples):
                    forward(images)
            if not seen:
                raise invalid("data", "no images", "at least one batch of images to adapt to")
        if not all(bool(x.isfinite().all()) for m in norms for x in m.buffers()):
            raise FloatingPointError("statistics of a batch norm: weights or images are not finite")
    finally:
        for m, hook, value in zip(norms, hooks, momentum, strict=True):
            hook.remove()
            m.momentum = value
            m.eval().set_bits(m.bits)
