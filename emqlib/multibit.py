"""From a plain network to one that runs at any bit-width: `convert`, `set_bits`, `at_bits`, `summary`."""

import copy
import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from threading import Lock, get_ident
from weakref import WeakKeyDictionary

import pandas as pd
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attention import open_attention
from .checks import bit_width, invalid
from .decisions import READ, Decisions, decide, refuse_derived
from .devices import fails_channels_last
from .layers import InputQuantizer, QuantConv2d, QuantLinear, QuantSpec, SafeConv2d
from .norms import MultiBitBatchNorm
from .quantizers import levels

_LAYERS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Bits = int | Mapping[str, int]

_ENTERING = Lock()
_INSIDE: WeakKeyDictionary[nn.Module, list[int]] = WeakKeyDictionary()  # the threads inside `at_bits`, once an entry


def convert(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of `net` that runs at any bit-width, set to the highest of `spec.bits`; `net` stays as it is.

    Every Conv2d and Linear becomes its quantized twin, but those `spec.full_precision` keeps, those inside
    `nn.MultiheadAttention` too (see `attention`); every batch norm becomes a `MultiBitBatchNorm`, layer norms stay as
    they are. A layer whose input can be negative, as seen in evaluation mode, gets a signed input quantizer; where the
    network cannot be traced to find out, all do. An unsigned one clips at zero, at 32 bits too: a ReLU whose output
    goes to none but such becomes an Identity. A layer whose weight the network reads past it, as Swin does, stays in
    full precision, with a UserWarning. `summary` shows what became of each layer. Images (N, 3, H, W) or whatever `net`
    takes go in, and what it gives comes out.
    ValueError: not a plain module, nothing left to quantize, a pattern that matches no layer, a batch norm without
    running statistics, or of a kind that is not known; a layer whose weight is parametrized, pruned or not there yet.
    """
    model = _opened(net, spec)
    decided = decide(model, spec)
    read = [name for name, why in decided.kept.items() if why == READ]
    if read:
        names = ", ".join(read)
        warnings.warn(f"kept in full precision, as the network reads their weights outside: {names}", stacklevel=2)
    return _applied(model, spec, decided)


def convert_as(net: nn.Module, spec: QuantSpec, decided: Decisions) -> nn.Module:
    """`convert`, by what was decided on this network once. ValueError also: `decided` is on another network."""
    model = _opened(net, spec)
    decided.refuse_another(model)
    return _applied(model, spec, decided)


def _opened(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of `net` in which every layer is a module of its own."""
    if not isinstance(net, nn.Module) or any(True for _ in _settable(net)):
        raise invalid("net", type(net).__name__, "a plain nn.Module that is not converted yet")
    if not isinstance(spec, QuantSpec):
        raise invalid("spec", spec, "a QuantSpec, for example QuantSpec(bits=(2, 4, 8))")
    refuse_derived(net)
    try:
        model = copy.deepcopy(net)
    except Exception as error:  # whatever a network's own parts raise
        raise invalid("net", type(net).__name__, f"a network that copy.deepcopy can copy ({error})") from error
    return open_attention(model)


def _applied(model: nn.Module, spec: QuantSpec, decided: Decisions) -> nn.Module:
    spec, modules = replace(spec, activation_range=decided.activation_range), dict(model.named_modules())
    signed = {id(modules[name]): signed for name, signed in decided.signed.items()}
    absorbed = {id(modules[name]): nn.Identity().train(modules[name].training) for name in decided.absorbed}
    return _ready(_replace(model, signed, spec, absorbed), spec, decided)


def _ready(model: nn.Module, spec: QuantSpec, decided: Decisions) -> nn.Module:
    model.quant_spec, model.decided, model.kept = spec, decided, decided.kept
    set_bits(model, spec.bits[-1])
    return model


def _replace(module: nn.Module, signed: dict[int, bool], spec: QuantSpec, done: dict[int, nn.Module]) -> nn.Module:
    """`module`, or its twin, with all that is below it replaced; a module used twice gets one twin."""
    if id(module) in done:
        return done[id(module)]
    twin = module
    if id(module) in signed:
        twin = _LAYERS[type(module)].from_float(module, spec, signed[id(module)])
    elif isinstance(module, _BatchNorm):
        twin = _norm_twin(module, spec)
    elif type(module) is nn.Conv2d and fails_channels_last(module):  # which stays in full precision
        module.__class__ = SafeConv2d
    done[id(module)] = twin
    if twin is module:  # not named_children(), which leaves out the second name of a module used twice
        for name, child in module._modules.items():
            module._modules[name] = child if child is None else _replace(child, signed, spec, done)
    return twin


def _norm_twin(norm: _BatchNorm, spec: QuantSpec) -> nn.Module:
    if norm.running_mean is None or norm.momentum is None:
        raise invalid("net", repr(norm), "batch norms with running statistics and a momentum")
    twin = MultiBitBatchNorm(norm, spec).train(norm.training)
    if type(norm) in _BATCH_NORMS:
        return twin
    if isinstance(getattr(norm, "drop", None), nn.Module) and isinstance(getattr(norm, "act", None), nn.Module):
        wrapped = nn.Sequential(twin, norm.drop, norm.act)  # timm's BatchNormAct2d
        wrapped.training = norm.training
        return wrapped
    raise invalid("net", repr(norm), "batch norms of PyTorch's own types, or timm's with an activation")


def quantized_layers(model: nn.Module) -> dict[str, QuantConv2d | QuantLinear]:
    """The quantized layers of `model`, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (QuantConv2d, QuantLinear))}


@contextmanager
def step_weights(model: nn.Module) -> Iterator[None]:
    """Quantize all weights now, for the forward and the backward pass of a training step, which the block holds.

    One by one, between activations, they take twice as long: small tensors leave the cache there. And the second pass
    of activation checkpointing meets the very tensors of the first. No bit-width may be set within the block.
    """
    layers, step = quantized_layers(model).values(), Lock()
    try:
        with step:  # even if the rest of this is interrupted, nothing uses what was prepared once it is unlocked
            for layer in layers:
                layer.prepare(step)
            yield
    finally:
        for layer in layers:
            layer.prepared = None


def _settable(model: nn.Module) -> Iterator[tuple[str, QuantConv2d | QuantLinear | MultiBitBatchNorm]]:
    """What `set_bits` sets: quantized layers and batch norms, by name."""
    for name, module in model.named_modules():
        if isinstance(module, (QuantConv2d, QuantLinear, MultiBitBatchNorm)):
            yield name, module


def networks(model: nn.Module) -> list[nn.Module]:
    """The converted networks inside `model`: itself, those that it wraps or holds, or itself as a part of one.

    ValueError: there are none.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    # not getattr, by which torch.compile's wrapper answers for what it wraps
    found = [module for module in modules if isinstance(vars(module).get("quant_spec"), QuantSpec)]
    if not found and modules and any(True for _ in _settable(model)):
        return [model]
    if not found:
        raise invalid(
            "model", type(model).__name__, "a network made by emqlib.convert, what holds one, or a part of it"
        )
    return found


def trained_bits(network: nn.Module) -> tuple[int, ...]:
    """The bit-widths, ascending, that one of `networks` was converted for."""
    return next(m.trained if isinstance(m, MultiBitBatchNorm) else m.spec.bits for _, m in _settable(network))


def set_bits(model: nn.Module, bits: Bits) -> None:
    """Run `model` at a bit-width from now on: all of it, or by name patterns, of which the first match counts.

    model: a converted network, a part of one, or any module that holds converted networks, such as
    DistributedDataParallel or AveragedModel, of which each is set. bits: 1 to 8 or 32, trained or not; or for mixed
    precision a dict such as {"layer3.*": 2, "*": 4}, of names as they are inside the converted network, or inside the
    part of it that is given. All or nothing: on a ValueError (not converted, no such bit-width, a switchable norm not
    built for it, a layer no pattern matches, a pattern no layer matches) nothing has changed.
    """
    for network, plan in [(network, _checked(network, bits)) for network in networks(model)]:
        _switch(network, plan)


def _checked(network: nn.Module, bits: Bits) -> dict[nn.Module, int]:
    """The bit-width of each of a network's modules, which it can run at."""
    modules = dict(_settable(network))
    plan = _plan(modules, bits)
    for name, module in modules.items():
        if isinstance(module, MultiBitBatchNorm) and not module.serves(plan[name]):
            built = f"one of {sorted(module.own)}, which the switchable norm {name} was built for or adapted to"
            raise invalid("bits", plan[name], built)
        if plan[name] == 1 and not isinstance(module, MultiBitBatchNorm) and module.spec.zero_level:
            raise invalid("bits", 1, "2 or more with zero_level, since one level cannot be both zero and not")
    return {module: plan[name] for name, module in modules.items()}


def _switch(network: nn.Module, plan: Mapping[nn.Module, int]) -> None:
    """Run each module of a network at its bit-width; if all layers have one, they share the tensor of its levels.

    A part of a network leaves that tensor to the rest.
    """
    layers = [module for module in plan if not isinstance(module, MultiBitBatchNorm)]
    alike = "quant_spec" in vars(network) and len({plan[layer] for layer in layers}) == 1
    shared = layers[0].levels if alike else None
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
    """`with at_bits(model, 2): ...` runs the block at `bits` (see `set_bits`) and restores on exit, come what may.

    The bit-width belongs to the network, not to the thread: while one thread is inside such a block, another that
    enters one of the same network gets a RuntimeError. Give each thread a copy of its own (`copy.deepcopy`).
    """
    found = {network: [module for _, module in _settable(network)] for network in networks(model)}
    with _alone([module for modules in found.values() for module in modules]):
        before = {network: {module: module.bits for module in modules} for network, modules in found.items()}
        try:
            set_bits(model, bits)
            yield model
        finally:
            for network, plan in before.items():
                _switch(network, plan)


@contextmanager
def _alone(modules: list[nn.Module]) -> Iterator[None]:
    """Within the block no other thread can enter one with any of `modules`."""
    own = get_ident()
    with _ENTERING:
        if any(thread != own for module in modules for thread in _INSIDE.get(module, ())):
            text = "another thread is inside at_bits with this network, whose bit-width is one for all threads"
            raise RuntimeError(f"{text}: use a copy of it (copy.deepcopy) in each thread")
        for module in modules:
            _INSIDE[module] = [*_INSIDE.get(module, ()), own]
    try:
        yield
    finally:
        with _ENTERING:
            for module in modules:
                _INSIDE[module].pop()


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

    bits is 32 for a layer in full precision, and note says why it is. model: as for `set_bits`, whose patterns match
    these names.
    """
    columns = ["name", "type", "bits", "weight", "activation", "signed", "range", "correction", "note"]
    return pd.DataFrame([row for network in networks(model) for row in _rows(network)], columns=columns)


def _rows(network: nn.Module) -> Iterator[dict[str, object]]:
    kept = vars(network).get("kept", {})  # a part of a network does not know the reason
    for name, module in network.named_modules():
        row = {"name": name, "type": type(module).__name__, "bits": 32, "note": ""}
        if isinstance(module, (QuantConv2d, QuantLinear)):
            x: InputQuantizer = module.input_quantizer
            span = x.extra_repr().split("range=")[1]
            row |= {"bits": module.bits, "weight": module.spec.weight, "activation": x.method, "signed": x.signed}
            yield row | {"range": span, "correction": module.spec.correction}
        elif isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            note = "full precision" if type(module) in _LAYERS else "not a plain Conv2d or Linear"
            yield row | {"note": f"full precision: {kept[name]}" if name in kept else note}
