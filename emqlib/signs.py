"""Which inputs can be negative: a walk over a network's graph, from each layer back to what its input went through."""

import operator
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import fx, nn

# Modules, functions and methods (by name) whose output is never negative ...
_NONNEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus)
_NONNEGATIVE_NAMES = {"relu", "relu_", "relu6", "sigmoid", "sigmoid_", "softmax", "softplus", "hardsigmoid", "abs", "exp"}
# ... and those whose output is negative only if an input is.
_KEEPING = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.Flatten,
    nn.Identity,
    nn.Unflatten,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d,
    nn.PixelShuffle,
    nn.ChannelShuffle,
)
_KEEPING_NAMES = {"flatten", "view", "reshape", "contiguous", "permute", "transpose", "squeeze", "unsqueeze", "clone"}
_KEEPING_NAMES |= {"dropout", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "sum"}
_KEEPING_NAMES |= {"cat", "concat", "stack", "add", "add_", "iadd", "mul", "mul_", "imul", "getitem", "chunk", "split"}


def input_signs(net: nn.Module) -> tuple[dict[str, bool], list[str]]:
    """(whether the module's input can be negative, by name; the modules' names in the order they are called).

    A network that torch.fx cannot trace counts as signed everywhere, in the order its modules were registered: a
    signed quantizer wastes half a range where a wrong unsigned one would lose every negative input.
    """
    names = [name for name, _ in net.named_modules()]
    try:
        graph = fx.Tracer().trace(net)
    except Exception:  # whatever a network's own forward raises when it meets a proxy instead of a tensor
        return dict.fromkeys(names, True), names
    modules = dict(net.named_modules(remove_duplicate=False))
    nonnegative: dict[fx.Node, bool] = {}
    signs: dict[str, bool] = {}
    for node in graph.nodes:
        sources = [nonnegative[n] for n in node.all_input_nodes]
        nonnegative[node] = _is_nonnegative(node, modules, bool(sources) and all(sources))
        if node.op == "call_module":
            name = _first_name(names, modules, modules[node.target])
            signs[name] = signs.get(name, False) or not all(sources)
    never_called = [name for name in names if name not in signs]
    return dict.fromkeys(never_called, True) | signs, [*signs, *never_called]


def _first_name(names: list[str], modules: dict[str, nn.Module], module: nn.Module) -> str:
    return next(name for name in names if modules[name] is module)


def _is_nonnegative(node: fx.Node, modules: dict[str, nn.Module], sources: bool) -> bool:
    if node.op == "call_module":
        module = modules[node.target]
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return module.min_val >= 0
        return isinstance(module, _NONNEGATIVE) or (isinstance(module, _KEEPING) and sources)
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else _name(node.target)
    numbers = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, (int, float))]
    scaled = name in {"add", "add_", "iadd", "mul", "mul_", "imul"} and any(a < 0 for a in numbers)
    return name in _NONNEGATIVE_NAMES or (name in _KEEPING_NAMES and sources and not scaled)


def _name(function: Callable) -> str:
    """The function's name, if it is one of torch's or Python's own; another library's `relu` may be anything."""
    home = getattr(function, "__module__", "") or ""
    known = home.startswith(("torch", "_operator", "operator")) or function in (operator.getitem, F.relu, torch.relu)
    return function.__name__ if known else ""
