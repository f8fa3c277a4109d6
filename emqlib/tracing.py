"""What the graph of a network tells: which inputs can be negative, the order of calls, what else reads a weight."""

import copy
import inspect
from dataclasses import dataclass, field
from functools import partialmethod
from itertools import product
from typing import Any

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .attention import MultiheadAttention
from .layers import QuantLinear, SafeConv2d
from .norms import MultiBitBatchNorm

# Modules, functions and methods (by name) whose output is never negative ...
_NONNEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus)
_NONNEGATIVE_NAMES = {"relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "softmax", "softplus"}
_NONNEGATIVE_NAMES |= {"abs", "exp", "size", "shape"}
# ... and those whose output is negative only if an input is.
_KEEPING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten, nn.Identity, nn.ZeroPad2d)
_KEEPING += (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d)
_KEEPING += (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.PixelShuffle, nn.ChannelShuffle)
_KEEPING_NAMES = {"flatten", "view", "reshape", "contiguous", "permute", "transpose", "squeeze", "unsqueeze", "clone"}
_KEEPING_NAMES |= {"dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum"}
_KEEPING_NAMES |= {"cat", "concat", "stack", "getitem", "chunk", "split"}
_ARITHMETIC_NAMES = {"add", "add_", "mul", "mul_", "div", "div_", "truediv", "floordiv"}
_KEEPING_NAMES |= _ARITHMETIC_NAMES  # unless a number is negative, as in x + (-1)

_ABOUT_NAMES = {"dtype", "device", "shape", "size", "dim", "ndim", "numel"}  # what says nothing of a tensor's values


class _Proxy(fx.Proxy):
    """Tells x += y, which changes x itself, from x = x + y."""

    def _changed(self, method: str, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_method", method, (self, other), {})

    __iadd__, __isub__ = partialmethod(_changed, "add_"), partialmethod(_changed, "sub_")
    __imul__, __itruediv__ = partialmethod(_changed, "mul_"), partialmethod(_changed, "div_")


class _Tracer(fx.Tracer):
    """Looks into neither attention, which asks for the shapes of its inputs, nor the layers that `convert` makes."""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        own = (MultiheadAttention, SafeConv2d, QuantLinear, MultiBitBatchNorm)
        return isinstance(module, own) or super().is_leaf_module(module, name)


def trace(net: nn.Module, training: bool = False) -> list[tuple[fx.Graph, set[str]]]:
    """The graphs of `net`: as it is called without its optional arguments, and with all of them where it has some.

    Of two arguments that are False or True by default, each choice has a graph: `if features:` needs a value.
    With each come the parameters that it reads outside their modules, as in `linear(x, self.qkv.weight)`. It is traced
    in evaluation mode, or in that of `training`. Empty: torch.fx cannot trace it.
    """
    try:
        arguments = tuple(inspect.signature(net.forward).parameters.values())
    except (TypeError, ValueError):  # of a network that TorchScript has made
        return []
    optional = {argument.name: argument.default for argument in arguments if argument.default is not argument.empty}
    flags = [name for name, value in optional.items() if isinstance(value, bool)][:2]  # each doubles the graphs
    settings = [dict(zip(flags, values, strict=True)) for values in product((True, False), repeat=len(flags))]
    graphs = []
    for given in [*settings, optional] if optional else [None]:
        own = copy.deepcopy(net).train(training)  # a copy, since a forward pass may store the tracer's proxies in it
        try:
            graph = _Tracer().trace(own, given or None)
        except Exception:  # a network may raise anything when it meets a proxy instead of a tensor
            return graphs if given is optional else []
        graphs.insert(0, (graph, _read_parameters(graph, own)))
    return graphs


def _read_parameters(graph: fx.Graph, net: nn.Module) -> set[str]:
    """All names of the parameters that the graph reads, or views of, for more than a shape or a type."""
    found = set()
    for node in graph.nodes:
        if node.op == "get_attr" and not all(_target_name(user) in _ABOUT_NAMES for user in node.users):
            module, _, name = node.target.rpartition(".")
            tensor = getattr(net.get_submodule(module), name)
            base = getattr(tensor, "_base", None)
            found.add(id(tensor if base is None else base))
    return {name for name, p in net.named_parameters(remove_duplicate=False) if id(p) in found}


@dataclass(frozen=True)
class Walk:
    """What the graph of a network tells about its modules, by their names."""

    signed: dict[str, bool]  # whether the input of a module can be negative
    order: list[str]  # the modules that are called, in the order of the calls
    read: set[str] = field(default_factory=set)  # parameters that are read outside their modules
    readers: dict[str, set[str]] = field(default_factory=dict)  # the modules that read each ReLU's output; "": others


def walk(net: nn.Module, training: bool = False) -> Walk:
    """The walk over the graph of `net`, in evaluation or training mode.

    Where torch.fx cannot trace the network, every input counts as signed and the order is that of registration: a
    signed quantizer wastes half of its range, but a wrong unsigned one would lose every negative input.
    """
    names = {module: name for name, module in net.named_modules()}
    everything = dict.fromkeys(names.values(), True)
    graphs = trace(net, training)
    if not graphs:
        return Walk(everything, list(everything))
    modules = dict(net.named_modules(remove_duplicate=False))
    signs: dict[str, bool] = {}
    order: list[str] = []  # of the first graph: what only another one calls is no last layer
    readers: dict[str, set[str]] = {}
    for graph, _ in graphs:
        called = {node: modules[node.target] for node in graph.nodes if node.op == "call_module"}
        for module, signed in _signs(graph, called).items():
            signs[names[module]] = signed or signs.get(names[module], False)
        order = order or list(signs)
        for node, module in called.items():
            if type(module) is nn.ReLU:
                found = readers.setdefault(names[module], set())
                found |= {names[called[user]] if user in called else "" for user in node.users}
                if module.inplace and not _is_only_reader(node, called):
                    found.add("")
    return Walk(everything | signs, order, set().union(*(read for _, read in graphs)), readers)


def _signs(graph: fx.Graph, called: dict[fx.Node, nn.Module]) -> dict[nn.Module, bool]:
    """Whether the input of each called module can be negative, in the order of the calls."""
    nonnegative: dict[fx.Node, bool] = {}
    signs: dict[nn.Module, bool] = {}
    for node in graph.nodes:
        sources = [nonnegative[n] for n in node.all_input_nodes]
        nonnegative[node] = _is_nonnegative(node, called.get(node), bool(sources) and all(sources))
        if _target_name(node).endswith("_") and not nonnegative[node]:
            # x.sub_(1): from here on, whoever reads x, or what x is a view of, reads the new values
            nonnegative = dict.fromkeys(nonnegative, False)
        if node in called:
            signs[called[node]] = signs.get(called[node], False) or not all(sources)
            for inner in called[node].modules():  # such as those of a transformer layer, which is not traced into
                signs.setdefault(inner, True)
    return signs


def _is_only_reader(node: fx.Node, called: dict[fx.Node, nn.Module]) -> bool:
    """Whether nothing else can read what a module overwrites in place."""
    (source,) = node.all_input_nodes
    return isinstance(called.get(source), (_ConvNd, _BatchNorm, nn.Linear)) and len(source.users) == 1


def _is_nonnegative(node: fx.Node, module: nn.Module | None, sources: bool) -> bool:
    """Whether a node's output is never negative; sources: whether its inputs never are."""
    if module is not None and is_patched(module):
        return False
    if isinstance(module, nn.Hardtanh):  # ReLU6 is one
        return module.min_val >= 0
    if module is not None:
        return isinstance(module, _NONNEGATIVE) or (isinstance(module, _KEEPING) and sources)
    name = _target_name(node)
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float))]
    scaled = name in _ARITHMETIC_NAMES and any(a < 0 for a in numbers)
    return name in _NONNEGATIVE_NAMES or (name in _KEEPING_NAMES and sources and not scaled)


def _target_name(node: fx.Node) -> str:
    """The method's or function's name, if it is torch's or Python's own: another library's `relu` may be anything."""
    if node.op == "call_method":
        return node.target
    if node.op != "call_function":
        return ""
    if node.target is getattr:  # x.shape
        return node.args[1]
    home = (getattr(node.target, "__module__", None) or "").split(".")[0]
    return node.target.__name__ if home in ("torch", "_operator") else ""


def is_patched(module: nn.Module) -> bool:
    """Whether a method of this one module was replaced, as is done for circular padding."""
    return not {"forward", "_conv_forward"}.isdisjoint(vars(module))
