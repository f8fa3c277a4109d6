"""From a plain network to one that runs at any bit-width: `convert`, `set_bits`, `at_bits`, `summary`."""

import copy
import fnmatch
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from .attention import MultiheadAttention
from .checks import Own, bit_width, expecting, invalid
from .layers import QuantConv2d, QuantizedLayer, QuantLinear, QuantSpec, SafeConv2d, fails_channels_last, prepare
from .models import Record
from .norms import MultiBitBatchNorm
from .quantizers import levels
from .tracing import is_patched, walk

_OF_MODULES = vars(nn.Module()).keys()  # the attributes that every module has


def replaced(network: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """`network`, changed in place: every module that is a key of `new` becomes its value, under all its names.

    It does so in lists, tuples and dicts too that modules hold beside their children. Hooks stay with their layers.
    """
    seen: set[int] = set()
    for module in list(network.modules()):
        for name, child in module._modules.items():
            module._modules[name] = new.get(child, child)
        for name in vars(module).keys() - _OF_MODULES:
            vars(module)[name] = _renewed(vars(module)[name], new, seen)
    for old, module in new.items():
        for hooks in _HOOKS:
            vars(module)[hooks].update(vars(old)[hooks])
        module._is_full_backward_hook = old._is_full_backward_hook
    return new.get(network, network)


def _renewed(value: Any, new: Mapping[nn.Module, nn.Module], seen: set[int]) -> Any:
    """`value` with the modules of `new` in place of others, wherever it is a module or holds some."""
    if isinstance(value, nn.Module):
        return new.get(value, value)
    if id(value) in seen:
        return value
    if type(value) is tuple:
        return tuple(_renewed(each, new, seen) for each in value)
    if isinstance(value, (list, dict)):
        seen.add(id(value))  # it may hold itself
    if isinstance(value, list):
        value[:] = [_renewed(each, new, seen) for each in value]
    elif isinstance(value, dict):
        value.update({key: _renewed(each, new, seen) for key, each in value.items()})
    return value


_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks")
_HOOKS += ("_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after a module, forward or backward."""
    return any(vars(module)[hooks] for hooks in _HOOKS)


class _Replaced(nn.Module):
    """What was converted, and is still called where `replaced` could not find it."""

    def forward(self, *_: Any, **__: Any) -> None:
        """RuntimeError: always."""
        raise RuntimeError("the network calls a layer that was converted: keep it as an attribute or in a ModuleList")


_LAYERS = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
READ = "its weight is read outside the layer"
_PATCHED = "its forward is not that of its class"


@dataclass(frozen=True)
class Decisions:
    """What becomes of the modules of a network. A saved file holds it, so that loading needs no second decision."""

    signed: dict[str, bool]  # for each layer that is quantized, whether its input can be negative
    kept: dict[str, str]  # for each layer that stays in full precision, why
    absorbed: tuple[str, ...]  # ReLUs that become identities, because the quantizers after them clip at zero anyway
    activation_range: str  # as in QuantSpec, but never "auto"


def quantizable(net: nn.Module) -> list[str]:
    """The names of the layers of `net` that can be quantized, in the order of registration."""
    return [name for name, module in net.named_modules() if type(module) in _LAYERS]


def decide(net: nn.Module, spec: QuantSpec) -> Decisions:
    """Decide what becomes of the modules of a plain `net` in evaluation mode, whatever mode it is in.

    The graph of training mode only adds readers of a ReLU's output, and of weights.
    """
    found, training = walk(net), walk(net, training=True)
    layers = quantizable(net)
    called = [name for name in found.order if name in layers]
    never_called = [name for name in layers if name not in called]
    names = [*called[:-1], *never_called, *called[-1:]]  # an auxiliary head is no first or last layer
    kept = _full_precision(names, spec) if names else {}
    read = found.read | training.read
    kept |= {name: READ for name in names if name not in kept and f"{name}.weight" in read}
    patched = {name for name, module in net.named_modules() if is_patched(module)}
    kept |= {name: _PATCHED for name in names if name not in kept and name in patched}
    hooked = {name for name, module in net.named_modules() if has_hooks(module)}
    signed = {name: found.signed[name] or name in hooked for name in names if name not in kept}
    if not signed:
        raise invalid("net", type(net).__name__, f"a Conv2d or Linear besides those kept in full precision ({kept})")
    clips = spec.activation != "none" and not isinstance(spec.activation, Own)  # one's own need not clip at zero
    unsigned = {name for name in signed if not signed[name] and clips}
    readers = {name: found.readers[name] | training.readers.get(name, {""}) for name in found.readers}
    absorbed = tuple(name for name in readers if readers[name] <= unsigned and name not in hooked | patched)
    return Decisions(signed, kept, absorbed, _activation_range(net, spec))


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
    """The range "unit" is for networks still to be trained: those whose batch norms have seen no data."""
    if spec.activation_range != "auto":
        return spec.activation_range
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    # by the statistics themselves: published weights from before `num_batches_tracked` existed load with it at 0
    known = [m for m in norms if m.running_mean is not None and not m.running_mean.is_meta]
    seen = any(m.running_mean.any() or (m.running_var - 1).any() for m in known)
    return "unit" if norms and not seen else "tracked"


def _refuse_derived(net: nn.Module) -> None:
    """Raise a ValueError that names a layer whose weight is not there yet, or is computed from other parameters."""
    for name, module in net.named_modules():
        named, own = module._parameters, {"weight", "bias"}
        if isinstance(module, nn.MultiheadAttention):
            own = {"in_proj_weight", "in_proj_bias"}
        remedy = None
        if any(map(is_lazy, (*named.values(), *module._buffers.values()))):
            remedy = "run one batch through the network first: its parameters have no shape yet"
        elif isinstance(module, (*_LAYERS, nn.MultiheadAttention, _BatchNorm)) and not own <= named.keys():
            remedy = "first undo its parametrization, pruning, weight norm or spectral norm, by torch.nn.utils"
        if remedy:
            raise invalid("net", name or type(module).__name__, f"a layer whose weight is a parameter ({remedy})")
        if isinstance(module, (nn.MultiheadAttention, _BatchNorm)) and is_patched(module):
            raise invalid("net", name or type(module).__name__, "a layer whose forward is that of its class")


def _norm_twin(norm: _BatchNorm, spec: QuantSpec) -> nn.Module:
    if norm.running_mean is None or norm.momentum is None:
        raise invalid("net", repr(norm), "batch norms with running statistics and a momentum")
    twin = MultiBitBatchNorm(norm, spec).train(norm.training)
    if type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        return twin
    if isinstance(getattr(norm, "drop", None), nn.Module) and isinstance(getattr(norm, "act", None), nn.Module):
        wrapped = nn.Sequential(twin, norm.drop, norm.act)  # timm's BatchNormAct2d
        wrapped.training = norm.training
        return wrapped
    raise invalid("net", repr(norm), "batch norms of PyTorch's own types, or timm's with an activation")


def convert(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of `net` that runs at any bit-width, set to the highest of `spec.bits`; `net` stays as it is.

    Every Conv2d and Linear becomes a quantized layer, also inside `nn.MultiheadAttention`, except those that
    `spec.full_precision` keeps. Every batch norm becomes a `MultiBitBatchNorm`; layer norms stay as they are.
    The network is traced in evaluation mode to see which layers' inputs can be negative: those get a signed input
    quantizer. If it cannot be traced, all do, and a weight that it reads outside its layer is not noticed. An unsigned
    quantizer clips at zero, at 32 bits too, so a ReLU that only such quantizers read becomes an identity. Hooks stay
    with their layers; one that makes the output of a ReLU negative is not seen, nor is noise that does so in training
    alone. `summary` shows what became of each layer.

    Args:
        net: any plain module; images (N, 3, H, W) or whatever it takes go in, and what it gives comes out.
        spec: how to quantize it.

    Returns:
        The converted network.

    Raises:
        ValueError: not a plain module, nothing left to quantize, a pattern that matches no layer, a batch norm without
            running statistics or of an unknown kind, a weight that is parametrized, pruned or not there yet.

    Warns:
        UserWarning: a layer stays in full precision, because the network reads its weight outside, as Swin does; the
            network is trained already, and DoReFa, which changes the scale of weights, does not fit its batch norms.
    """
    model = _opened(net, spec)
    decided = decide(model, spec)
    read = [name for name, why in decided.kept.items() if why == READ]
    if read:
        names = ", ".join(read)
        warnings.warn(f"kept in full precision, as the network reads their weights outside: {names}", stacklevel=2)
    norms = any(isinstance(m, _BatchNorm) for m in model.modules())
    seen = norms and (spec.activation_range, decided.activation_range) == ("auto", "tracked")
    if spec.weight == "dorefa" and seen:
        told = "DoReFa changes the scale of weights, which the network's batch norms do not know, at 32 bits too"
        warnings.warn(f'{told}: train it, call adapt_norm, or convert it with weight="minmax"', stacklevel=2)
    return _applied(model, spec, decided)


def convert_as(net: nn.Module, spec: QuantSpec, decided: Decisions) -> nn.Module:
    """`convert`, by earlier decisions on this network. ValueError also: they are about another network."""
    model = _opened(net, spec)
    modules = dict(model.named_modules())
    differing = sorted((decided.signed.keys() | decided.kept.keys()).symmetric_difference(quantizable(model)))
    differing += [name for name in decided.absorbed if type(modules.get(name)) is not nn.ReLU]
    if differing:
        found = type(modules[differing[0]]).__name__ if differing[0] in modules else "missing"
        raise invalid("net", type(net).__name__, f"the layers that were converted: {differing[0]!r} is {found}")
    return _applied(model, spec, decided)


def _opened(net: nn.Module, spec: QuantSpec) -> nn.Module:
    """A copy of `net` in which every layer is a module of its own."""
    if not isinstance(net, nn.Module) or _settable(net):
        raise invalid("net", type(net).__name__, "a plain nn.Module that is not converted yet")
    if not isinstance(spec, QuantSpec):
        raise invalid("spec", spec, "a QuantSpec, for example QuantSpec(bits=(2, 4, 8))")
    _refuse_derived(net)
    with expecting("net", type(net).__name__, "a network that copy.deepcopy can copy"):
        model = copy.deepcopy(net)
    new = {m: MultiheadAttention(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
    model = replaced(model, new)
    for module in model.modules():  # turn off the fast paths of evaluation mode, which go past the layers
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def _applied(model: nn.Module, spec: QuantSpec, decided: Decisions) -> nn.Module:
    """`model`, changed in place as it was decided."""
    spec, modules = replace(spec, activation_range=decided.activation_range), dict(model.named_modules())
    new: dict[nn.Module, nn.Module] = {m: _norm_twin(m, spec) for m in model.modules() if isinstance(m, _BatchNorm)}
    for name, signed in decided.signed.items():
        new[modules[name]] = _LAYERS[type(modules[name])].from_float(modules[name], spec, signed)
    for name in decided.absorbed:
        new[modules[name]] = nn.Identity().train(modules[name].training)
    for module in modules.values():
        if type(module) is nn.Conv2d and module not in new and fails_channels_last(module):
            module.__class__ = SafeConv2d
    known = record(model) or Record()
    model = replaced(model, new)
    for old in new:
        old.__class__ = _Replaced
    model.emq = replace(known, spec=spec, decided=decided)
    set_bits(model, spec.bits[-1])
    return model


def record(module: nn.Module) -> Record | None:
    """What this library knows about a network, `module.emq`; None for any other module."""
    found = vars(module).get("emq")  # not getattr: the wrapper of torch.compile would answer for what it wraps
    return found if isinstance(found, Record) else None


def _is_converted(module: nn.Module) -> bool:
    known = record(module)
    return known is not None and known.spec is not None and known.packed is None


def converted(model: nn.Module) -> nn.Module:
    """The converted network itself, also out of torch.compile's wrapper. ValueError: it was not made by `convert`."""
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module) or not _is_converted(model):
        raise invalid("model", type(model).__name__, "a network made by emqlib.convert")
    return model


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """The quantized layers of `model`, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLayer)}


@contextmanager
def step_weights(model: nn.Module) -> Iterator[None]:
    """Quantize weights now, for the forward and the backward pass of a training step, which the block holds.

    Layers with hooks before their forward pass are left out, since these may change the weight.
    Quantizing them one by one, between activations, takes twice as long, because small tensors leave the cache. The
    second pass of activation checkpointing has to meet the same tensors as the first. Set no bit-width in the block.
    """
    layers, step = quantized_layers(model).values(), Lock()
    try:
        with step:  # once it is unlocked, nothing uses what was prepared, even if an interruption leaves some behind
            prepare(layers, step)
            yield
    finally:
        for layer in layers:
            layer.prepared = None


def _settable(model: nn.Module) -> dict[str, QuantizedLayer | MultiBitBatchNorm]:
    """The modules that `set_bits` sets, by name: quantized layers and batch norms."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (QuantizedLayer, MultiBitBatchNorm))}


def networks(model: nn.Module) -> list[nn.Module]:
    """The converted networks inside `model`: itself, those that it wraps or holds, or itself as a part of one.

    ValueError: there are none.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    found = [module for module in modules if _is_converted(module)]
    if not found and modules and _settable(model):
        return [model]
    if not found:
        expected = "a network made by emqlib.convert, what holds one, or a part of it"
        raise invalid("model", type(model).__name__, expected)
    return found


def trained_bits(network: nn.Module) -> tuple[int, ...]:
    """The bit-widths, ascending, that one of `networks` was converted for."""
    return next(m.trained if isinstance(m, MultiBitBatchNorm) else m.spec.bits for m in _settable(network).values())


Bits = int | Mapping[str, int]


def set_bits(model: nn.Module, bits: Bits) -> None:
    """Run `model` at a bit-width from now on. If a ValueError is raised, nothing has changed.

    Args:
        model: a converted network, a part of one, or any module that holds converted networks, such as
            DistributedDataParallel or AveragedModel; each of them is set.
        bits: 1 to 8 or 32, trained or not. For mixed precision a dict such as {"layer3.*": 2, "*": 4}, of which the
            first pattern that matches counts; names are those inside the converted network, or inside the given part.
            Under "shared_affine", a norm that no pattern but "*" matches follows the quantized layer that was
            registered before it.

    Raises:
        ValueError: not converted, no such bit-width, a switchable norm that was not built for it, a layer that no
            pattern matches, or a pattern that matches no layer; a network that FSDP2 has sharded before the learned
            ranges of its activations have seen a batch, since what is then written to them would be lost.
    """
    for network, plan in [(network, _checked(network, bits)) for network in networks(model)]:
        _switch(network, plan)


def _checked(network: nn.Module, bits: Bits) -> dict[nn.Module, int]:
    """The bit-width of each of a network's modules, which it can run at."""
    modules = _settable(network)
    plan = _plan(modules, bits)
    for name, module in modules.items():
        if isinstance(module, MultiBitBatchNorm):
            if not module.serves(plan[name]):
                built = f"one of {sorted(module.own)}, which the switchable norm {name} was built for or adapted to"
                raise invalid("bits", plan[name], built)
        elif plan[name] == 1 and module.spec.zero_level:
            raise invalid("bits", 1, "2 or more with zero_level, since one level cannot be both zero and not")
        elif module.input_quantizer.would_lose_its_start():
            expected = "one that has seen one batch in training mode before fully_shard"
            raise invalid("model", f"a network with sharded ranges in {name}, which start with a first batch", expected)
    return {module: plan[name] for name, module in modules.items()}


def _switch(network: nn.Module, plan: Mapping[nn.Module, int]) -> None:
    """Run each module of a network at its bit-width; if all layers have one, they share the tensor of its levels.

    A part of a network leaves that tensor to the rest.
    """
    layers = [module for module in plan if isinstance(module, QuantizedLayer)]
    shared = None
    if _is_converted(network) and len({plan[layer] for layer in layers}) == 1:
        shared = layers[0].levels
        shared.fill_(levels(plan[layers[0]]))
    for layer in layers:
        layer.set_bits(plan[layer], shared)
    for norm in plan.keys() - layers:
        norm.set_bits(plan[norm])


def _plan(modules: Mapping[str, nn.Module], bits: Bits) -> dict[str, int]:
    if not isinstance(bits, Mapping):
        return dict.fromkeys(modules, bit_width("bits", bits))
    if not all(isinstance(pattern, str) for pattern in bits):
        raise invalid("bits", dict(bits), 'name patterns as keys, for example {"layer3.*": 2, "*": 4}')
    wanted = {pattern: bit_width(f"bits[{pattern!r}]", b) for pattern, b in bits.items()}
    found = {name: next((p for p in wanted if fnmatch.fnmatchcase(name, p)), "*") for name in modules}
    plan, before = {}, wanted.get("*")  # the bit-width of the layer before
    for name, module in modules.items():
        follows = isinstance(module, MultiBitBatchNorm) and not module.switchable and found[name] == "*"
        plan[name] = before if follows else wanted.get(found[name])
        before = plan[name]
    missed = [name for name, b in plan.items() if b is None]
    idle = [p for p in wanted if p != "*" and not fnmatch.filter(list(modules), p)]
    if missed or idle:
        trouble = f"a pattern for {missed[0]}" if missed else f"patterns that match a layer, unlike {idle[0]!r}"
        raise invalid("bits", dict(bits), f'{trouble}, for example {{"layer3.*": 2, "*": 4}}')
    return plan


_ENTERING = Lock()
_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # of the modules that were ever inside `at_bits`


@contextmanager
def at_bits(model: nn.Module, bits: Bits) -> Iterator[nn.Module]:
    """`with at_bits(model, 2): ...` runs the block at `bits` (see `set_bits`) and restores on exit, come what may.

    The bit-width belongs to the network, not to the thread. While one thread is inside such a block, another thread
    that enters one with the same network gets a RuntimeError: give each thread a copy of its own (`copy.deepcopy`).
    """
    found = {network: _settable(network).values() for network in networks(model)}
    with ExitStack() as held:
        for module in (module for modules in found.values() for module in modules):
            with _ENTERING:
                lock = _LOCKS.setdefault(module, RLock())
            if not lock.acquire(blocking=False):
                text = "another thread is inside at_bits with this network, whose bit-width is one for all threads"
                raise RuntimeError(f"{text}: use a copy of it (copy.deepcopy) in each thread")
            held.callback(lock.release)
        before = {network: {module: module.bits for module in modules} for network, modules in found.items()}
        try:
            set_bits(model, bits)
            yield model
        finally:
            for network, plan in before.items():
                _switch(network, plan)


def summary(model: nn.Module) -> pd.DataFrame:
    """A table of all Conv2d and Linear layers of `model`, one row each, with the names that `set_bits` matches.

    Columns: name, type, bits, weight, activation, signed, range, correction, note. A layer in full precision has bits
    32, and note says why.
    """
    columns = ["name", "type", "bits", "weight", "activation", "signed", "range", "correction", "note"]
    return pd.DataFrame([row for network in networks(model) for row in _rows(network)], columns=columns)


def _rows(network: nn.Module) -> Iterator[dict[str, object]]:
    known = record(network)
    kept = known.decided.kept if known else {}  # a part of a network does not know the reason
    for name, module in network.named_modules():
        kind = nn.Conv2d if type(module) is SafeConv2d else type(module)  # as it was before `convert`
        row = {"name": name, "type": kind.__name__, "bits": 32, "note": ""}
        if isinstance(module, QuantizedLayer):
            x = module.input_quantizer
            row |= {"bits": module.bits, "weight": module.spec.weight, "activation": x.method, "signed": x.signed}
            yield row | {"range": x.range, "correction": module.spec.correction}
        elif isinstance(module, (_ConvNd, nn.Linear)):
            note = "full precision" if kind in _LAYERS else "not a plain Conv2d or Linear"
            yield row | {"note": f"full precision: {kept[name]}" if name in kept else note}
