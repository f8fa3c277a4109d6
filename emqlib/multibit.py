"""From a plain network to one that runs at any bit-width: `convert`, `set_bits`, `at_bits`, and what to ask of it."""

import copy
import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attention import open_attention
from .checks import bit_width, bit_widths, flag, integer, invalid
from .data import Dataset, augment, normalize
from .images import ImageFiles
from .layers import InputQuantizer, QuantConv2d, QuantLinear, QuantSpec
from .loading import loader
from .norms import MultiBitBatchNorm
from .signs import input_signs

_LAYERS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
ADAPTATION_SAMPLES = 5000  # images that batch-norm adaptation takes, at each bit-width

Bits = int | Mapping[str, int]
Batches = Iterable[tuple[Tensor, Tensor]]


def convert(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of `net` that runs at any bit-width, set to the highest of `spec.bits`; `net` stays as it is.

    Every Conv2d and Linear becomes its quantized twin, but those `spec.full_precision` keeps, those inside
    `nn.MultiheadAttention` too (see `attention`); every batch norm becomes a `MultiBitBatchNorm`, layer norms stay as
    they are. A layer whose input can be negative gets a signed input quantizer; where the network cannot be traced to
    find out, all do. `summary` shows what became of each layer. Images (N, 3, H, W) or whatever `net` takes go in, and
    what it gives comes out.
    ValueError: not a plain module, nothing left to quantize, a pattern that matches no layer, a batch norm without
    running statistics, or of a kind that is not known; a weight that the network reads past its layer.
    """
    if not isinstance(net, nn.Module) or any(True for _ in _switchable(net)):
        raise invalid("net", type(net).__name__, "a plain nn.Module that is not converted yet")
    if not isinstance(spec, QuantSpec):
        raise invalid("spec", spec, "a QuantSpec, for example QuantSpec(bits=(2, 4, 8))")
    model = open_attention(copy.deepcopy(net))
    # a copy, because a forward that stores what it meets would store tracing proxies
    signs, order, read = input_signs(copy.deepcopy(model))
    layers = [name for name, module in model.named_modules() if type(module) in _LAYERS]
    called = [name for name in order if name in layers]
    never_called = [name for name in layers if name not in called]
    names = [*called[:-1], *never_called, *called[-1:]]  # neither the first nor the last, such as an auxiliary head
    kept = _full_precision(names, spec) if names else {}
    escaped = next((name for name in names if name not in kept and f"{name}.weight" in read), None)
    if escaped:
        expected = f'a pattern for {escaped} too, whose weight the network reads past its layer, for example "*.qkv"'
        raise invalid("full_precision", spec.full_precision, expected)
    if len(kept) == len(names):
        raise invalid("net", type(net).__name__, f"a Conv2d or Linear besides those kept in full precision ({kept})")
    spec = replace(spec, activation_range=_activation_range(net, spec))
    new = {id(model.get_submodule(name)): (name, signs[name]) for name in names if name not in kept}
    model = _replace(model, new, spec, {})
    model.quant_spec, model.kept = spec, kept
    return model


def _full_precision(names: list[str], spec: QuantSpec) -> dict[str, str]:
    """The layers that stay in full precision, each with the entry of `spec.full_precision` that keeps it."""
    ends = {"first": names[:1], "last": names[-1:]}
    kept: dict[str, str] = {}
    for entry in spec.full_precision:
        matches = ends[entry] if entry in ends else fnmatch.filter(names, entry)
        if not matches:
            raise invalid("full_precision", entry, f"first, last, or a pattern that matches one of {names}")
        kept |= {name: entry for name in matches if name not in kept}
    return kept


def _activation_range(net: nn.Module, spec: QuantSpec) -> str:
    """ "unit" is for networks still to be trained under DoReFa's clip: those whose batch norms have seen no data."""
    if spec.activation_range != "auto":
        return spec.activation_range
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    return "unit" if norms and all(map(_is_fresh, norms)) else "tracked"


def _is_fresh(norm: _BatchNorm) -> bool:
    """By the statistics themselves: published weights from before `num_batches_tracked` existed load with it at 0."""
    mean, var = norm.running_mean, norm.running_var
    return mean is None or mean.is_meta or not bool(mean.any() or (var - 1).any())


def _replace(
    module: nn.Module, new: dict[int, tuple[str, bool]], spec: QuantSpec, done: dict[int, nn.Module]
) -> nn.Module:
    """`module`, or its twin, with all that is below it replaced; a module used twice gets one twin."""
    if id(module) in done:
        return done[id(module)]
    twin = module
    if id(module) in new:
        twin = _LAYERS[type(module)].from_float(module, spec, new[id(module)][1])
    elif isinstance(module, _BatchNorm):
        twin = _norm_twin(module, spec)
    done[id(module)] = twin
    if twin is module:  # not named_children(), which leaves out the second name of a module used twice
        for name, child in module._modules.items():
            module._modules[name] = child if child is None else _replace(child, new, spec, done)
    return twin


def _norm_twin(norm: _BatchNorm, spec: QuantSpec) -> nn.Module:
    if norm.running_mean is None or norm.momentum is None:
        raise invalid("net", repr(norm), "batch norms with running statistics and a momentum")
    twin = MultiBitBatchNorm(norm, spec).train(norm.training)
    if type(norm) in _BATCH_NORMS:
        return twin
    if isinstance(getattr(norm, "drop", None), nn.Module) and isinstance(getattr(norm, "act", None), nn.Module):
        return nn.Sequential(twin, norm.drop, norm.act)  # timm's BatchNormAct2d
    raise invalid("net", repr(norm), "batch norms of PyTorch's own types, or timm's with an activation")


def _switchable(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear | MultiBitBatchNorm]]:
    for name, module in model.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear, MultiBitBatchNorm)):
            yield name, module


def set_bits(model: nn.Module, bits: Bits) -> None:
    """Run `model` at a bit-width from now on: all of it, or by name patterns, of which the first match counts.

    bits: 1 to 8 or 32, trained or not; or for mixed precision a dict such as {"layer3.*": 2, "*": 4}. All or nothing:
    on a ValueError (not converted, no such bit-width, a switchable norm not built for it, a layer no pattern matches,
    a pattern no layer matches) nothing has changed.
    """
    modules = dict(_switchable(_converted(model)))
    plan = _plan(modules, bits)
    for name, module in modules.items():
        if isinstance(module, MultiBitBatchNorm) and not module.serves(plan[name]):
            built = f"one of {sorted(module.own)}, which the switchable norm {name} was built for or adapted to"
            raise invalid("bits", plan[name], built)
        if plan[name] == 1 and getattr(model.quant_spec, "zero_level", False):
            raise invalid("bits", 1, "2 or more with zero_level, since one level cannot be both zero and not")
    for name, module in modules.items():
        module.set_bits(plan[name])


def _plan(modules: Mapping[str, nn.Module], bits: Bits) -> dict[str, int]:
    if not isinstance(bits, Mapping):
        return dict.fromkeys(modules, bit_width("bits", bits))
    if not all(isinstance(pattern, str) for pattern in bits):
        raise invalid("bits", dict(bits), 'name patterns as keys, for example {"layer3.*": 2, "*": 4}')
    wanted = {pattern: bit_width(f"bits[{pattern!r}]", b) for pattern, b in bits.items()}
    plan = {name: next((b for p, b in wanted.items() if fnmatch.fnmatchcase(name, p)), None) for name in modules}
    missed = [name for name, b in plan.items() if b is None]
    idle = [p for p in wanted if p != "*" and not fnmatch.filter(list(modules), p)]
    if missed or idle:
        trouble = f"a pattern for {missed[0]}" if missed else f"patterns that match a layer, unlike {idle[0]!r}"
        raise invalid("bits", dict(bits), f'{trouble}, for example {{"layer3.*": 2, "*": 4}}')
    return plan


@contextmanager
def at_bits(model: nn.Module, bits: Bits) -> Iterator[nn.Module]:
    """`with at_bits(model, 2): ...` runs the block at `bits` (see `set_bits`) and restores on exit, come what may."""
    before = {module: module.bits for _, module in _switchable(_converted(model))}
    set_bits(model, bits)
    try:
        yield model
    finally:
        for module, b in before.items():
            module.set_bits(b)


def _converted(model: nn.Module) -> nn.Module:
    """The converted network itself, also of torch.compile's wrapper, which would put a prefix before every name."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "quant_spec", None), QuantSpec):
        raise invalid("model", type(model).__name__, "a network made by emqlib.convert")
    return model


def summary(model: nn.Module) -> pd.DataFrame:
    """One row a Conv2d or Linear: name, type, bits, weight, activation, signed, range, correction, note.

    bits is 32 for a layer in full precision, and note says why it is.
    """
    rows = []
    for name, module in _converted(model).named_modules():
        row = {"name": name, "type": type(module).__name__, "bits": 32, "note": ""}
        if isinstance(module, (QuantConv2d, QuantLinear)):
            x: InputQuantizer = module.input_quantizer
            span = x.extra_repr().split("range=")[1]
            row |= {"bits": module.bits, "weight": module.spec.weight, "activation": x.method, "signed": x.signed}
            rows.append(row | {"range": span, "correction": module.spec.correction})
        elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            note = f"full precision: {model.kept[name]}" if name in model.kept else "not a plain Conv2d or Linear"
            rows.append(row | {"note": note})
    columns = ["name", "type", "bits", "weight", "activation", "signed", "range", "correction", "note"]
    return pd.DataFrame(rows, columns=columns)


def batches(
    data: Dataset | Batches, split: str, device: torch.device, batch_size: int, limit: int | None = None
) -> Batches:
    """(images (B, 3, H, W) float, labels (B,)) on `device`: of a data set's split, or an iterable's.

    split: "test", or "train", whose images are augmented as in training, the same way each time: statistics of plain
    images are not what the network was trained under, and cost it points. limit: at most this many samples.
    ValueError: an iterator, which a second bit-width would find empty.
    """
    if not isinstance(data, Dataset):
        if not isinstance(data, Iterable) or isinstance(data, Iterator):
            raise invalid("data", type(data).__name__, "a Dataset, or an iterable of (images, labels) to go over again")
        return ((images.to(device), labels.to(device)) for images, labels in data)
    generator, whole = torch.Generator().manual_seed(0), getattr(data, split)
    chosen = torch.arange(len(whole))
    if limit is not None and limit < len(whole):  # the same random images each time: data sets lie class by class
        chosen = torch.randperm(len(whole), generator=generator)[:limit]
    count = -(-len(chosen) // batch_size)  # parts of near-equal size: batch norm cannot take a last part of one image
    if isinstance(whole, ImageFiles):
        files = loader(data, split, device, live=False)
        found = files.epoch(chosen.tensor_split(count), generator if split == "train" else None)
        return ((images, labels) for images, labels, _ in found)
    part = whole.take(chosen.to(whole.labels.device)) if len(chosen) < len(whole) else whole
    images = augment(part.images, data, generator) if split == "train" else part.images
    parts = zip(images.tensor_split(count), part.labels.tensor_split(count), strict=True)
    return ((normalize(x.to(device), data), y.to(device)) for x, y in parts)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; afterwards each module's own mode is back."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, mode in training.items():
            module.training = mode


def evaluate(
    model: nn.Module,
    data: Dataset | Batches,
    bits: Iterable[int] = range(1, 9),
    adapt_norm: bool = False,
    batch_size: int = 500,
) -> pd.DataFrame:
    """Accuracy by bit-width on the test split (or on an iterable of (images, labels)): one row a bit-width.

    Columns: bits, top1 (%), loss (mean cross entropy, nats), trained (whether `bits` took gradient steps), n (images).
    adapt_norm: re-estimate the batch-norm statistics at each bit-width first, and put them back afterwards. The model
    is left as it was. ValueError: as `set_bits`; no images; adapt_norm without a batch norm, or without a Dataset to
    take training images from.
    """
    wanted = bit_widths("bits", bits)
    flag("adapt_norm", adapt_norm)
    integer("batch_size", batch_size, 1)
    network = _converted(model)
    if adapt_norm and not (isinstance(data, Dataset) and _norms(network)):
        raise invalid("adapt_norm", True, "a Dataset as data, whose training images to adapt to")
    if not adapt_norm:
        _refuse_unserved(network, wanted)
    with undisturbed(network, data, batch_size) as device:
        if adapt_norm:
            _adapt(network, data, wanted, ADAPTATION_SAMPLES, batch_size)
        rows = _scores(model, batches(data, "test", device, batch_size), wanted)
    table = pd.DataFrame(rows).assign(trained=lambda t: t.bits.isin(network.quant_spec.bits))
    return table[["bits", "top1", "loss", "trained", "n"]]


def _refuse_unserved(model: nn.Module, wanted: tuple[int, ...]) -> None:
    for b in wanted:
        with at_bits(model, b):
            pass


def _scores(model: nn.Module, pairs: Batches, wanted: tuple[int, ...]) -> list[dict[str, float]]:
    """One row a bit-width, of a single pass over the images: those of ImageNet take longer to decode than to run."""
    n, correct, loss = 0, dict.fromkeys(wanted, 0), dict.fromkeys(wanted, 0.0)
    for images, labels in pairs:
        n += len(labels)
        for b in wanted:
            with at_bits(model, b):
                logits = model(images).float()
            correct[b] += int((logits.argmax(1) == labels).sum())
            loss[b] += float(F.cross_entropy(logits, labels, reduction="sum"))
    if n == 0:
        raise invalid("data", "no images", "at least one image to evaluate on")
    return [{"bits": b, "top1": 100 * correct[b] / n, "loss": loss[b] / n, "n": n} for b in wanted]


@contextmanager
def _restored(model: nn.Module, always: bool) -> Iterator[None]:
    """Norm statistics and not yet started input ranges go back to what they were: always, or after an exception."""
    norms = [m for m in model.modules() if isinstance(m, MultiBitBatchNorm)]
    kept = norms + [m for m in _input_quantizers(model) if not m.started]
    before = [copy.deepcopy(m.state_dict()) for m in kept]
    restore = True
    try:
        yield
        restore = always
    finally:
        for m, state in zip(kept, before, strict=True) if restore else ():
            m.load_state_dict(state)


@contextmanager
def undisturbed(model: nn.Module, data: Dataset | Batches, batch_size: int) -> Iterator[torch.device]:
    """Evaluation mode without gradients, input ranges started; afterwards norms, ranges and modes are as before."""
    network = _converted(model)
    with _restored(network, always=True), _evaluating(network) as device:
        _start_ranges(network, data, batch_size)
        yield device


def _input_quantizers(model: nn.Module) -> list[InputQuantizer]:
    return [m for m in model.modules() if isinstance(m, InputQuantizer)]


def batch_norms(model: nn.Module) -> list[MultiBitBatchNorm]:
    """The batch norms of a converted network; none in a transformer, whose layer norms keep no statistics."""
    return [m for m in _converted(model).modules() if isinstance(m, MultiBitBatchNorm)]


def _norms(model: nn.Module) -> list[MultiBitBatchNorm]:
    norms = batch_norms(model)
    if not norms:
        raise invalid("model", type(model).__name__, "a network with batch norm to adapt")
    return norms


def _start_ranges(model: nn.Module, data: Dataset | Batches, batch_size: int) -> None:
    """Start input ranges that have seen no data at the highest trained bit-width: a low one would distort them."""
    if all(m.started for m in _input_quantizers(model)):
        return
    with at_bits(model, model.quant_spec.bits[-1]):
        for images, _ in batches(data, "train", next(model.parameters()).device, batch_size, batch_size):
            model(images)
            break


def adapt_norm(
    model: nn.Module,
    data: Dataset | Batches,
    bits: Iterable[int],
    samples: int = ADAPTATION_SAMPLES,
    batch_size: int = 500,
) -> None:
    """Batch-norm adaptation: give each of `bits` running statistics of its own, re-estimated by forward passes.

    The cumulative mean over the batches of `samples` random training images, augmented as in training, or of an
    iterable of (images, labels). Trained parameters stay untouched, and so do other bit-widths' statistics; a
    switchable norm gains the bit-widths it was not built for, with the affine of the nearest trained one. Cost:
    samples forward passes a bit-width. Source: Li et al. 2016 (arXiv 1603.04779), Schneider et al. 2020 (arXiv
    2006.16971).
    Input ranges that have seen no data yet start from the first batch. On an exception all is as it was.
    ValueError: not a converted network, bad bits, no batch norm, no images.
    """
    wanted = bit_widths("bits", bits)
    integer("samples", samples, 2)
    integer("batch_size", batch_size, 2)
    _norms(model)
    model = _converted(model)
    with _restored(model, always=False), _evaluating(model):
        _start_ranges(model, data, batch_size)
        _adapt(model, data, wanted, samples, batch_size)


def _adapt(model: nn.Module, data: Dataset | Batches, bits: tuple[int, ...], samples: int, batch_size: int) -> None:
    """`adapt_norm`'s work, in evaluation mode."""
    norms = _norms(model)
    momentum = [m.momentum for m in norms]
    calls: Counter[nn.Module] = Counter()

    def cumulative(norm: nn.Module, _: object) -> None:  # a norm that is used twice counts two batches
        calls[norm] += 1
        norm.momentum = 1 / calls[norm]

    hooks = [m.train().register_forward_pre_hook(cumulative) for m in norms]
    try:
        for b in bits:
            calls.clear()
            for m in norms:
                m.own_statistics(b)
            with at_bits(model, b):
                for images, _ in batches(data, "train", next(model.parameters()).device, batch_size, samples):
                    model(images)
            if not calls:
                raise invalid("data", "no images", "at least one batch of images to adapt to")
    finally:
        for m, hook, value in zip(norms, hooks, momentum, strict=True):
            hook.remove()
            m.momentum = value
            m.eval().set_bits(m.bits)
