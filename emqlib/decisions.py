"""What `convert` decides on a network before it changes anything, and which networks it refuses."""

import copy
import fnmatch
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from .checks import choice, invalid
from .layers import QuantSpec
from .signs import walk

QUANTIZABLE = (nn.Conv2d, nn.Linear)
READ = "its weight is read outside the layer"
_CHANGED = (*QUANTIZABLE, nn.MultiheadAttention, _BatchNorm)  # what `convert` puts something else in the place of
_REMEDIES = {WeightNorm: "remove_weight_norm", SpectralNorm: "remove_spectral_norm", BasePruningMethod: "prune.remove"}


@dataclass(frozen=True)
class Decisions:
    """What becomes of a network's modules, each by its name. ValueError names the field that is not so.

    signed: of each layer that is quantized, whether its input can be negative. kept: of each layer that stays in full
    precision, why. absorbed: the ReLUs that are left to the quantizers after them. activation_range: as in QuantSpec,
    but for "auto".
    """

    signed: dict[str, bool]
    kept: dict[str, str]
    absorbed: tuple[str, ...]
    activation_range: str

    def __post_init__(self) -> None:
        choice("activation_range", self.activation_range, ("unit", "tracked"))
        for field, kind in (("signed", bool), ("kept", str)):
            told = getattr(self, field)
            if not isinstance(told, dict) or not all(isinstance(value, kind) for value in told.values()):
                raise invalid(field, told, f"a {kind.__name__} for each layer")
        if not isinstance(self.absorbed, (list, tuple)) or not all(isinstance(name, str) for name in self.absorbed):
            raise invalid("absorbed", self.absorbed, "names of modules")
        object.__setattr__(self, "absorbed", tuple(self.absorbed))

    def refuse_another(self, net: nn.Module) -> None:
        """ValueError if the modules that these are about are not those of `net`."""
        modules = dict(net.named_modules())
        told = self.signed.keys() | self.kept.keys()
        differing = sorted(told.symmetric_difference(quantizable(net)))
        differing += [name for name in self.absorbed if type(modules.get(name)) is not nn.ReLU]
        if differing:
            found = type(modules[differing[0]]).__name__ if differing[0] in modules else "missing"
            raise invalid("net", type(net).__name__, f"the layers that were converted: {differing[0]!r} is {found}")


def quantizable(net: nn.Module) -> list[str]:
    """The names of the layers of `net` that can be quantized, as they were registered."""
    return [name for name, module in net.named_modules() if type(module) in QUANTIZABLE]


def decide(net: nn.Module, spec: QuantSpec) -> Decisions:
    """The decisions on a plain `net` in evaluation mode, whatever mode it is in.

    The walk in training mode only adds readers: of a ReLU whose output goes elsewhere while it trains, and of weights.
    """
    # copies, because a forward that stores what it meets would store tracing proxies
    found, training = (walk(copy.deepcopy(net).train(mode)) for mode in (False, True))
    layers = quantizable(net)
    called = [name for name in found.order if name in layers]
    never_called = [name for name in layers if name not in called]
    names = [*called[:-1], *never_called, *called[-1:]]  # neither the first nor the last, such as an auxiliary head
    kept = _full_precision(names, spec) if names else {}
    read = found.read | training.read
    kept |= {name: READ for name in names if name not in kept and f"{name}.weight" in read}
    signed = {name: found.signed[name] for name in names if name not in kept}
    if not signed:
        raise invalid("net", type(net).__name__, f"a Conv2d or Linear besides those kept in full precision ({kept})")
    unsigned = {name for name in signed if not signed[name] and spec.activation != "none"}
    readers = {name: found.readers[name] | training.readers.get(name, {""}) for name in found.readers}
    absorbed = tuple(name for name in readers if readers[name] <= unsigned)
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
    """ "unit" is for networks still to be trained under DoReFa's clip: those whose batch norms have seen no data."""
    if spec.activation_range != "auto":
        return spec.activation_range
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    return "unit" if norms and all(map(_is_fresh, norms)) else "tracked"


def _is_fresh(norm: _BatchNorm) -> bool:
    """By the statistics themselves: published weights from before `num_batches_tracked` existed load with it at 0."""
    mean, var = norm.running_mean, norm.running_var
    return mean is None or mean.is_meta or not bool(mean.any() or (var - 1).any())


def refuse_derived(net: nn.Module) -> None:
    """ValueError that names the layer whose weight is not there yet, or is computed from others, and what to do."""
    for name, module in net.named_modules():
        remedy = None
        if any(map(is_lazy, (*module.parameters(recurse=False), *module.buffers(recurse=False)))):
            remedy = "run one batch through the network first: its parameters have no shape yet"
        elif parametrize.is_parametrized(module) and isinstance(module, _CHANGED):
            tensor = next(iter(module.parametrizations))
            remedy = f'call torch.nn.utils.parametrize.remove_parametrizations(layer, "{tensor}") first'
        for hook in module._forward_pre_hooks.values():
            function = next((function for kind, function in _REMEDIES.items() if isinstance(hook, kind)), None)
            if function:
                tensor = getattr(hook, "name", None) or hook._tensor_name
                remedy = f'call torch.nn.utils.{function}(layer, "{tensor}") first'
        if remedy:
            raise invalid("net", name or type(module).__name__, f"a layer whose weight is a parameter ({remedy})")
