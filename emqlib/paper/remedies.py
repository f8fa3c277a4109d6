"""Ways to serve bit-widths that were never calibrated: each gives one trained network other statistics, none trains it.

All start from a network with norm="shared_affine", whose batch norms hold the statistics of each trained bit-width.
Beyond the paper; `studies.remedies` measures them beside what training itself can keep.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..checks import BIT_WIDTHS, bit_widths, integer, invalid
from ..convert import at_bits, quantized_layers
from ..correction import output_shift
from ..layers import QuantConv2d, QuantLinear, nearest
from ..norms import MultiBitBatchNorm, interpolation
from ..quantizers import levels
from ..train.data import Dataset
from ..train.evaluate import batches, evaluate, undisturbed
from .measure import Moments

Statistics = tuple[Tensor, Tensor]  # mean and variance of each channel, (C,) each
_QUANTILES = 2000


def gaussian_moments(mean: Tensor, var: Tensor, f: Callable[[Tensor], Tensor]) -> Statistics:
    """Mean and variance (C,) of f(x), x normal with `mean` and `var` (C,) in each channel; f: (K, C) to (K, C).

    By the mid-quantiles of the normal distribution, to about 1e-3 standard deviations for any quantizer.
    """
    p = (torch.arange(_QUANTILES, device=mean.device) + 0.5) / _QUANTILES
    y = f(mean + var.sqrt() * torch.special.ndtri(p.double()).to(mean.dtype)[:, None])
    return y.mean(0), y.var(0, correction=0)


class _Tracer(fx.Tracer):
    """Looks no further into our own layers than into PyTorch's."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = isinstance(m, (QuantConv2d, QuantLinear, MultiBitBatchNorm))
        return own or super().is_leaf_module(m, module_qualified_name)


def gaussian_inputs(model: nn.Module) -> tuple[dict[str, Statistics], dict[str, str]]:
    """What batch norm's scale and shift say of each layer's input before its quantizer, with no data.

    Returns the mean and variance (C,) of a normal input by the name of the layer, and the layer that each batch norm
    reads. A batch norm's output is normal with its shift as mean and its squared scale as variance; a sum's moments are
    the sums of independent ones; a ReLU before a quantizer that clips at 0 changes nothing. A layer that reads
    anything else is left out. ValueError: a network that torch.fx cannot trace.
    """
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # whatever a network's own forward raises when it meets a proxy
        raise invalid("model", type(model).__name__, f"a network that torch.fx can trace ({error})") from error
    modules, known, inputs, reads = dict(model.named_modules()), {}, {}, {}
    for node in graph.nodes:
        module = modules.get(node.target) if node.op == "call_module" else None
        sources = node.all_input_nodes
        if isinstance(module, MultiBitBatchNorm):
            weight, bias = module.weight, module.bias
            mean = torch.zeros_like(module.running_mean[0]) if bias is None else bias.detach()[0]
            known[node] = mean, torch.ones_like(mean) if weight is None else weight.detach()[0].square()
            reads[node.target] = sources[0].target
        elif isinstance(module, (QuantConv2d, QuantLinear)) and sources[0] in known:
            relu = isinstance(modules.get(sources[0].target), nn.ReLU)
            inputs[node.target] = known[sources[0].all_input_nodes[0] if relu else sources[0]]
        elif all(s in known for s in sources) and sources:
            known |= _passed_on(node, module, [known[s] for s in sources])
    layers = (nn.Conv2d, nn.Linear)
    return inputs, {norm: layer for norm, layer in reads.items() if isinstance(modules.get(layer), layers)}


def _passed_on(node: fx.Node, module: nn.Module | None, sources: list[Statistics]) -> dict[fx.Node, Statistics]:
    if isinstance(module, nn.ReLU):
        return {node: gaussian_moments(*sources[0], F.relu)}
    if isinstance(module, nn.Identity):
        return {node: sources[0]}
    if (
        node.op == "call_function"
        and node.target.__name__ in ("add", "iadd")
        and len(sources) == len(node.args)
        and not node.kwargs
    ):
        return {node: (sum(mean for mean, _ in sources), sum(var for _, var in sources))}
    return {}


class _Network:
    """A trained network's statistics, and what can be said of those at another bit-width."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.trained = model, model.emq.spec.bits
        self.norms = {name: m for name, m in model.named_modules() if isinstance(m, MultiBitBatchNorm)}
        self.kept = {name: {b: self._statistics(m, b) for b in BIT_WIDTHS} for name, m in self.norms.items()}
        self.inputs, self.reads = gaussian_inputs(model)

    @staticmethod
    def _statistics(norm: MultiBitBatchNorm, bits: int) -> Statistics:
        before = norm.bits
        norm.set_bits(bits)
        statistics = norm.statistics()
        norm.set_bits(before)
        return statistics

    def shared(self, name: str) -> Statistics:
        """What one table for all bit-widths would hold: the mean over the trained ones."""
        means, variances = zip(*(self.kept[name][b] for b in self.trained), strict=True)
        return torch.stack(means).mean(0), torch.stack(variances).mean(0)

    def predicted(self, name: str, bits: int) -> Statistics | None:
        """The moments at `bits` of what norm `name` reads, for independent normal inputs, its layer's bias left out.

        None where unknown.
        """
        read = self.reads.get(name)
        if read not in self.inputs:
            return None
        layer = self.model.get_submodule(read)
        with at_bits(self.model, bits), torch.no_grad():
            n = levels(bits)
            quantizer = layer.input_quantizer
            part = F.relu if not quantizer.signed else nn.Identity()  # without a sign, a ReLU stands before it
            mean, var = gaussian_moments(*self.inputs[read], lambda x: quantizer(part(x), n))
            w = layer.quantized_weight()
        nothing = torch.zeros_like(w)
        return output_shift(w, nothing, mean), output_shift(w.square(), nothing, var)


def _shared(net: _Network, name: str, bits: int) -> Statistics:
    return net.shared(name)


def _nearest(net: _Network, name: str, bits: int) -> Statistics:
    return net.kept[name][nearest(net.trained, bits)]


def _closed_form(net: _Network, name: str, bits: int) -> Statistics:
    """The shared statistics, moved by what normal inputs say sets `bits` apart from the trained bit-widths."""
    mean, var = net.shared(name)
    predicted = {b: net.predicted(name, b) for b in (*net.trained, bits)}
    if predicted[bits] is None:
        return mean, var
    means, variances = (torch.stack([predicted[b][i] for b in net.trained]).mean(0) for i in (0, 1))
    return mean + predicted[bits][0] - means, var * predicted[bits][1] / variances.clamp_min(1e-12)


def _interpolated_closed_form(net: _Network, name: str, bits: int) -> Statistics:
    """`QuantSpec`'s output correction with means that normal inputs have, in place of running ones."""
    mean, var = net.kept[name][bits]
    shares = interpolation(net.trained, bits)
    predicted = {b: net.predicted(name, b) for b in (*shares, bits)}
    if predicted[bits] is None:
        return mean, var
    return mean + predicted[bits][0] - sum(share * predicted[b][0] for b, share in shares.items()), var


RULES: dict[str, Callable[[_Network, str, int], Statistics]] = {
    "shared": _shared,
    "own, nearest": _nearest,
    "shared, closed form": _closed_form,
    "own, closed form": _interpolated_closed_form,
}
ACTIVATIONS = "activations corrected"


def compare(model: nn.Module, data: Dataset, bits: Iterable[int] = range(1, 9), samples: int = 2000) -> pd.DataFrame:
    """Accuracy at each of `bits` under each of RULES, and with quantized activations corrected: one row each.

    Columns: remedy, bits, top1 (%), loss, trained, n. "activations corrected" gives each layer's quantized input the
    mean and variance, in each channel, that it has at the highest trained bit-width, whose statistics all bit-widths
    then take; moments at untrained ones are interpolated as `MultiBitBatchNorm` does. They are measured on `samples`
    training images at the trained bit-widths alone, in place of running ones, with no layer corrected, so that they are
    exact for the first quantized layer only. The model is left as it was. ValueError: not a network with
    norm="shared_affine", bad bits.
    """
    wanted = bit_widths("bits", bits)
    integer("samples", samples, 2)
    spec = getattr(getattr(model, "emq", None), "spec", None)
    if spec is None or spec.norm != "shared_affine" or spec.output_correction:
        expected = 'a converted network with norm="shared_affine" and without output_correction'
        raise invalid("model", spec or type(model).__name__, expected)
    tables = []
    with undisturbed(model, data, 500):
        net = _Network(model)
        for remedy, rule in RULES.items():
            for b in wanted:
                _set(net, b, {name: rule(net, name, b) for name in net.norms})
            tables.append(evaluate(model, data, wanted).assign(remedy=remedy))
        for b in wanted:
            _set(net, b, {name: net.kept[name][b] for name in net.norms})
        moments = {b: _input_moments(model, data, b, samples) for b in net.trained}
        for b in wanted:
            _set(net, b, {name: net.kept[name][net.trained[-1]] for name in net.norms})
            with _corrected(model, net, moments, b):
                tables.append(evaluate(model, data, (b,)).assign(remedy=ACTIVATIONS))
    return pd.concat(tables, ignore_index=True)


def _set(net: _Network, bits: int, statistics: dict[str, Statistics]) -> None:
    for name, (mean, var) in statistics.items():
        norm, row = net.norms[name], BIT_WIDTHS.index(bits)
        norm.own_statistics(bits)
        norm.running_mean[row], norm.running_var[row] = mean, var


def _input_moments(model: nn.Module, data: Dataset, bits: int, samples: int) -> dict[str, Statistics]:
    """Mean and variance (C,) of each layer's quantized input at `bits`."""
    seen, hooks = {}, ExitStack()
    for name, layer in quantized_layers(model).items():
        seen[name] = Moments()
        channel = 1 if isinstance(layer, nn.Conv2d) else -1
        hook = layer.input_quantizer.register_forward_hook(
            lambda _, __, x, to=seen[name], channel=channel: to.update(x.movedim(channel, 1))
        )
        hooks.enter_context(hook)
    with hooks, at_bits(model, bits):
        for images, _ in batches(data, "train", next(model.parameters()).device, 250, samples):
            model(images)
    return {name: (moments.mean.float(), moments.var().float()) for name, moments in seen.items()}


@contextmanager
def _corrected(model: nn.Module, net: _Network, moments: dict[int, dict[str, Statistics]], bits: int) -> Iterator[None]:
    """Within the block, quantized inputs have the moments of the highest trained bit-width's."""
    shares, hooks = interpolation(net.trained, bits), ExitStack()
    for name, layer in quantized_layers(model).items():
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        (mean, var), (wanted, wanted_var) = (
            [sum(share * moments[b][name][i].view(shape) for b, share in parts.items()) for i in (0, 1)]
            for parts in (shares, {net.trained[-1]: 1.0})
        )
        scale = (wanted_var / var.clamp_min(1e-12)).sqrt().where(var > 1e-12, 1.0)
        change = _Affine(mean, scale, wanted)
        hooks.enter_context(layer.input_quantizer.register_forward_hook(change))
    with hooks:
        yield


class _Affine:
    """A forward hook: scale (x - mean) + wanted."""

    def __init__(self, mean: Tensor, scale: Tensor, wanted: Tensor) -> None:
        self.mean, self.scale, self.wanted = mean, scale, wanted

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return (x - self.mean) * self.scale + self.wanted
