"""Which inputs can be negative: a walk over a network's graph, from each layer back to what its input went through."""

from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .attention import MultiheadAttention

# Modules, functions and methods (by name) whose output is never negative ...
_NONNEGATIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus)
_NONNEGATIVE_NAMES = {"relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "softmax", "softplus"}
_NONNEGATIVE_NAMES |= {"abs", "exp", "size", "shape"}
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
_KEEPING_NAMES |= {"cat", "concat", "stack", "getitem", "chunk", "split"}
_ARITHMETIC_NAMES = {"add", "add_", "iadd", "mul", "mul_", "imul", "div", "div_", "truediv", "floordiv"}
_KEEPING_NAMES |= _ARITHMETIC_NAMES  # unless a number is negative, as in x + (-1)

_ABOUT_NAMES = {"dtype", "device", "shape", "size", "dim", "ndim", "numel"}  # what says nothing of a tensor's values


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:  # its forward asks for the shapes of its inputs
        return isinstance(module, MultiheadAttention) or super().is_leaf_module(module, name)


@dataclass(frozen=True)
class Walk:
    """What the graph of a network tells of its modules, by their names.

    signed: whether a module's input can be negative. order: those called, in the order of the calls. read: parameters
    that are read past their modules, as in `linear(x, self.qkv.weight)`. readers: of each ReLU, the modules that its
    output goes to; "" among them stands for anything else.
    """

    signed: dict[str, bool]
    order: list[str]
    read: set[str] = field(default_factory=set)
    readers: dict[str, set[str]] = field(default_factory=dict)


def walk(net: nn.Module) -> Walk:
    """The walk over `net`'s graph.

    A network that torch.fx cannot trace counts as signed everywhere, in the order its modules were registered: a
    signed quantizer wastes half a range where a wrong unsigned one would lose every negative input.
    """
    names = [name for name, _ in net.named_modules()]
    try:
        graph = _Tracer().trace(net)
    except Exception:  # whatever a network's own forward raises when it meets a proxy instead of a tensor
        return Walk(dict.fromkeys(names, True), names)
    modules = dict(net.named_modules(remove_duplicate=False))
    nonnegative: dict[fx.Node, bool] = {}
    signs: dict[str, bool] = {}
    for node in graph.nodes:
        sources = [nonnegative[n] for n in node.all_input_nodes]
        nonnegative[node] = _is_nonnegative(node, modules, bool(sources) and all(sources))
        if _target_name(node).endswith("_") and not nonnegative[node]:
            # x.sub_(1): whoever reads x, or what x is a view of, from here on reads the new values
            nonnegative = dict.fromkeys(nonnegative, False)
        if node.op == "call_module":
            name = _first_name(names, modules, modules[node.target])
            signs[name] = signs.get(name, False) or not all(sources)
            for inner in modules[node.target].modules():  # such as a transformer layer's, which is not traced into
                signs.setdefault(_first_name(names, modules, inner), True)
    return Walk(dict.fromkeys(names, True) | signs, list(signs), read(graph, net), _readers(graph, names, modules))


def read(graph: fx.Graph, net: nn.Module) -> set[str]:
    """All names of the parameters of `net` that its graph reads, or views of, for more than a shape or a type."""
    found = set()
    for node in graph.nodes:
        if node.op == "get_attr" and not all(_target_name(user) in _ABOUT_NAMES for user in node.users):
            module, _, name = node.target.rpartition(".")
            tensor = getattr(net.get_submodule(module), name)
            base = getattr(tensor, "_base", None)
            found.add(id(tensor if base is None else base))
    return {name for name, p in net.named_parameters(remove_duplicate=False) if id(p) in found}


def _readers(graph: fx.Graph, names: list[str], modules: dict[str, nn.Module]) -> dict[str, set[str]]:
    """See `Walk.readers`."""

    def name(node: fx.Node) -> str:
        return _first_name(names, modules, modules[node.target]) if node.op == "call_module" else ""

    readers: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) is nn.ReLU:
            found = readers.setdefault(name(node), set())
            found |= {name(user) for user in node.users}
            if modules[node.target].inplace and not _is_only_reader(node, modules):
                found.add("")
    return readers


def _is_only_reader(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether nothing else can read the values that a module in place overwrites."""
    (source,) = node.all_input_nodes
    fresh = source.op == "call_module" and isinstance(modules[source.target], (_ConvNd, _BatchNorm, nn.Linear))
    return fresh and len(source.users) == 1


def _first_name(names: list[str], modules: dict[str, nn.Module], module: nn.Module) -> str:
    return next(name for name in names if modules[name] is module)


def _is_nonnegative(node: fx.Node, modules: dict[str, nn.Module], sources: bool) -> bool:
    if node.op == "call_module":
        module = modules[node.target]
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return module.min_val >= 0
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
