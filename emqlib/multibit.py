"""From a plain network to one that runs at any bit-width: `convert`, `set_bits`, `at_bits`, `summary`."""

import copy
import fnmatch
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import pandas as pd
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attention import open_attention
from .checks import bit_width, invalid
from .devices import fails_channels_last
from .layers import InputQuantizer, QuantConv2d, QuantLinear, QuantSpec, SafeConv2d
from .norms import MultiBitBatchNorm
from .quantizers import levels
from .signs import walk

_LAYERS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Bits = int | Mapping[str, int]


def convert(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of `net` that runs at any bit-width, set to the highest of `spec.bits`; `net` stays as it is.

    Every Conv2d and Linear becomes its quantized twin, but those `spec.full_precision` keeps, those inside
    `nn.MultiheadAttention` too (see `attention`); every batch norm becomes a `MultiBitBatchNorm`, layer norms stay as
    they are. A layer whose input can be negative gets a signed input quantizer; where the network cannot be traced to
    find out, all do. An unsigned one clips at zero, at 32 bits too: a ReLU whose output goes to none but such becomes
    an Identity. `summary` shows what became of each layer. Images (N, 3, H, W) or whatever `net` takes go in, and what
    it gives comes out.
    ValueError: not a plain module, nothing left to quantize, a pattern that matches no layer, a batch norm without
    running statistics, or of a kind that is not known; a weight that the network reads past its layer.
    """
    if not isinstance(net, nn.Module) or any(True for _ in _settable(net)):
        raise invalid("net", type(net).__name__, "a plain nn.Module that is not converted yet")
    if not isinstance(spec, QuantSpec):
        raise invalid("spec", spec, "a QuantSpec, for example QuantSpec(bits=(2, 4, 8))")
    model = open_attention(copy.deepcopy(net))
    # a copy, because a forward that stores what it meets would store tracing proxies
    found = walk(copy.deepcopy(model))
    layers = [name for name, module in model.named_modules() if type(module) in _LAYERS]
    called = [name for name in found.order if name in layers]
    never_called = [name for name in layers if name not in called]
    names = [*called[:-1], *never_called, *called[-1:]]  # neither the first nor the last, such as an auxiliary head
    kept = _full_precision(names, spec) if names else {}
    escaped = next((name for name in names if name not in kept and f"{name}.weight" in found.read), None)
    if escaped:
        expected = f'a pattern for {escaped} too, whose weight the network reads past its layer, for example "*.qkv"'
        raise invalid("full_precision", spec.full_precision, expected)
    if len(kept) == len(names):
        raise invalid("net", type(net).__name__, f"a Conv2d or Linear besides those kept in full precision ({kept})")
    spec = replace(spec, activation_range=_activation_range(net, spec))
    new = {id(model.get_submodule(name)): (name, found.signed[name]) for name in names if name not in kept}
    unsigned = {name for name, signed in new.values() if not signed and spec.activation != "none"}
    absorbed = {
        id(model.get_submodule(name)): nn.Identity() for name, readers in found.readers.items() if readers <= unsigned
    }
    return _ready(_replace(model, new, spec, absorbed), spec, kept)


def _ready(model: nn.Module, spec: QuantSpec, kept: dict[str, str]) -> nn.Module:
    model.quant_spec, model.kept = spec, kept
    set_bits(model, spec.bits[-1])
    model.register_forward_pre_hook(_prepare)
    model.register_forward_hook(_forget, always_call=True)
    return model


def _prepare(model: nn.Module, _: object) -> None:
    """Quantize all weights of a training step at its start: one by one, between activations, they take twice as long.

    Small tensors leave the cache there. A compiled graph has an order of its own.
    """
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        for layer in quantized_layers(model).values():
            layer.prepare()


def _forget(model: nn.Module, *_: object) -> None:
    if not torch.compiler.is_compiling():
        for layer in quantized_layers(model).values():
            layer.prepared = None


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
    elif type(module) is nn.Conv2d and fails_channels_last(module):  # which stays in full precision
        module.__class__ = SafeConv2d
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


def quantized_layers(model: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    """The quantized layers of `model`, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}


def _settable(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear | MultiBitBatchNorm]]:
    """What `set_bits` sets: quantized layers and batch norms, by name."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear, MultiBitBatchNorm)):
            yield name, module


def set_bits(model: nn.Module, bits: Bits) -> None:
    """Run `model` at a bit-width from now on: all of it, or by name patterns, of which the first match counts.

    bits: 1 to 8 or 32, trained or not; or for mixed precision a dict such as {"layer3.*": 2, "*": 4}. All or nothing:
    on a ValueError (not converted, no such bit-width, a switchable norm not built for it, a layer no pattern matches,
    a pattern no layer matches) nothing has changed.
    """
    modules = dict(_settable(converted(model)))
    plan = _plan(modules, bits)
    for name, module in modules.items():
        if isinstance(module, MultiBitBatchNorm) and not module.serves(plan[name]):
            built = f"one of {sorted(module.own)}, which the switchable norm {name} was built for or adapted to"
            raise invalid("bits", plan[name], built)
        if plan[name] == 1 and getattr(model.quant_spec, "zero_level", False):
            raise invalid("bits", 1, "2 or more with zero_level, since one level cannot be both zero and not")
    _switch({module: plan[name] for name, module in modules.items()})


def _switch(plan: Mapping[nn.Module, int]) -> None:
    """Run each module at its bit-width; layers that all have one share the tensor of its levels."""
    layers = [module for module in plan if not isinstance(module, MultiBitBatchNorm)]
    shared = layers[0].levels if len({plan[layer] for layer in layers}) == 1 else None
    if shared is not None:
        shared.fill_(levels(plan[layers[0]]))
    for module, bits in plan.items():
        if isinstance(module, MultiBitBatchNorm):
            module.set_bits(bits)
        else:
            module.set_bits(bits, shared)


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
    before = {module: module.bits for _, module in _settable(converted(model))}
    set_bits(model, bits)
    try:
        yield model
    finally:
        _switch(before)


def converted(model: nn.Module, name: str = "model") -> nn.Module:
    """The converted network itself, also of torch.compile's wrapper, which would put a prefix before every name.

    ValueError, which gives the parameter by `name`: not a network made by `convert`.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "quant_spec", None), QuantSpec):
        raise invalid(name, type(model).__name__, "a network made by emqlib.convert")
    return model


def summary(model: nn.Module) -> pd.DataFrame:
    """One row a Conv2d or Linear: name, type, bits, weight, activation, signed, range, correction, note.

    bits is 32 for a layer in full precision, and note says why it is.
    """
    rows = []
    for name, module in converted(model).named_modules():
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
