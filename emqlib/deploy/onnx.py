"""ONNX files: one child model in integers, for runtimes other than PyTorch."""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import file_name, invalid
from ..convert import Bits, converted, replaced
from ..files import canonical_json, write_atomic
from .graph import Seen, with_integers
from .pack import PackedLayer, PackedLinear, pack

OPSET = 20
PART = 64  # samples that ranges are measured on at a time


def export_onnx(model: nn.Module, path: str | Path, bits: Bits, example_inputs: Tensor | Sequence[Tensor]) -> None:
    """Write one child model as an ONNX file, atomically, for any size of batch.

    The file's convolutions and matrix products are those that runtimes compute in integers. The input of a layer goes
    through QuantizeLinear, to uint8 clipped to its bit-width, on the grid of training. The weight is int8, with a step
    for each output channel and no offset: see `integers.int8_weight`, which says how far it is off. Where the input
    takes all 256 codes, as at 8 bits, weights stay within -64 to 64, so that no processor's kernel overflows. The
    output of a convolution is rounded to the next layer's grid; where another operation reads it, such as an addition,
    it is rounded to the uint8 that covers what it reached on `example_inputs`. All the rest, such as additions, stays
    in floating point, as does a layer whose inputs are not quantized.

    The file says in its metadata, as JSON under "emqlib", which network it is of, at which bit-width, trained on which
    data of which mean and deviation. `python -m emqlib.deploy FILE IMAGES...` answers from it.

    Up to 4 bits, weights take as few bits in the file as fit a byte without rest, so 4 at 3 bits; above that they
    take 8. The runtime unpacks them once, when it loads the file.

    Args:
        model: a converted network.
        path: the file.
        bits: as for `pack`.
        example_inputs: what the network takes, one tensor (B, ...) or several: some hundred images of those that it is
            made for, from which ranges are taken. The file's inputs are named "images", or "input_0", "input_1" and so
            on if there are several; its output is named "logits".

    Raises:
        ValueError: as `pack`; the path is a folder; the network does not take these inputs, or what one of its layers
            gives is used nowhere.
        ImportError: onnx or onnxscript is missing; the message says what to install.
    """
    onnx, onnx_ir = _libraries()
    path, inputs = file_name("path", path), _batches(example_inputs)
    network = pack(model, bits).cpu().float()
    seen = _measured(network, inputs)
    named = network.named_modules(remove_duplicate=False)  # the exporter takes any of a layer's names
    layers = {f"{name}.dense".removeprefix("."): m for name, m in named if m in seen}
    graph = _exported(network, tuple(x[:1].expand(2, *x.shape[1:]) for x in inputs))
    with_integers(graph, layers, seen)
    proto = onnx_ir.to_proto(graph)
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    _strip(proto)
    onnx.helper.set_model_props(proto, {"emqlib": canonical_json(_about(model, network, bits))})
    onnx.checker.check_model(proto, full_check=True)
    write_atomic(path, lambda file: file.write(proto.SerializeToString(deterministic=True)))


def _libraries() -> tuple[Any, Any]:
    try:
        import onnx
        import onnx_ir
        import onnxscript  # noqa: F401, what torch.onnx.export is built on
    except ImportError as error:
        raise ImportError('ONNX files need more libraries: pip install "emqlib[deploy]"') from error
    return onnx, onnx_ir


def _about(model: nn.Module, network: nn.Module, bits: Bits) -> dict[str, Any]:
    """What a file says of itself."""
    known = network.emq
    name = (known.network or {}).get("name", type(converted(model)).__name__)
    width = bits if isinstance(bits, int) else " ".join(map(str, sorted(set(known.packed.values()))))
    version = sys.modules["emqlib"].__version__  # not imported above, since emqlib imports this module
    return {"network": name, "bits": width, "data": known.data, "version": version}


def _batches(inputs: Any) -> tuple[Tensor, ...]:
    given = (inputs,) if isinstance(inputs, Tensor) else inputs
    expected = "a tensor (B, ...) that the network takes, or several"
    if not isinstance(given, Sequence) or not given or not all(isinstance(x, Tensor) and x.dim() for x in given):
        raise invalid("example_inputs", type(inputs).__name__, expected)
    if not all(len(x) for x in given):
        raise invalid("example_inputs", [tuple(x.shape) for x in given], f"{expected}, not empty")
    return tuple(x.cpu().float() if x.is_floating_point() else x.cpu() for x in given)


def _measured(network: nn.Module, inputs: tuple[Tensor, ...]) -> dict[nn.Module, Seen]:
    """What passes through each packed layer of `network` on `inputs`."""
    found: dict[nn.Module, Seen] = {}

    def measure(layer: nn.Module, given: tuple[Tensor], y: Tensor) -> None:
        x = layer.input_quantizer(given[0])
        new = Seen(float(y.amin()), float(y.amax()), x.double().sum(0), len(x))
        found[layer] = new.joined(found[layer]) if layer in found else new

    packed = [m for m in network.modules() if isinstance(m, PackedLayer)]
    hooks = [m.register_forward_hook(measure, prepend=True) for m in packed]  # before any that change the output
    try:
        with torch.no_grad():
            for part in zip(*(x.split(PART) for x in inputs), strict=True):
                network(*part)
    except Exception as error:  # a network's forward may raise anything, and the exporter's own error says little
        shapes = [(tuple(x.shape), x.dtype) for x in inputs]
        raise invalid("example_inputs", shapes, f"what the network takes ({error})") from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


class _Product(nn.Module):
    """A packed Linear in the form that MatMul takes: weight (I, O), and always a bias.

    Its numbers only serve to find the constants of the graph that have to be replaced.
    """

    def __init__(self, packed: PackedLinear) -> None:
        super().__init__()
        self.register_buffer("dense", packed.dense.T.contiguous())
        self.register_buffer("bias", torch.full_like(packed.dense[:, 0], float(packed.dense[0, 0])))
        self.packed = packed

    @property
    def weight(self) -> Tensor:
        """The packed layer's (O, I), for a network that asks for its type."""
        return self.packed.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        product = x @ self.dense
        return product + self.bias if x.dim() > 2 else product - self.bias  # onnxruntime makes a Gemm of x W + b


def _exported(network: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """What PyTorch's exporter makes of a packed network without its quantizers.

    inputs: two samples each, since the exporter takes a batch of one for a constant.
    """
    from onnxscript.optimizer import optimize_ir

    network = copy.deepcopy(network)
    layers = [m for m in network.modules() if isinstance(m, PackedLayer)]
    for i, layer in enumerate(layers):
        layer.input_quantizer = nn.Identity()
        layer.dense = torch.full_like(layer.dense, i + 0.5)  # the exporter would merge equal ones, and their names
    network = replaced(network, {m: _Product(m) for m in layers if isinstance(m, PackedLinear)})
    names = ["images"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    batch, *others = torch.export.Dim("batch"), *[torch.export.Dim.AUTO for _ in inputs[1:]]
    exported = torch.onnx.export(
        network,
        inputs,
        input_names=names,
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes=tuple({0: size} for size in (batch, *others)),
        dynamo=True,
        verbose=False,
        optimize=False,
    ).model
    # a layer of a constant, such as a learned token, stays in the graph: its numbers are still placeholders
    optimize_ir(exported, should_fold=lambda node: False if node.op_type in ("Conv", "MatMul", "Gemm") else None)
    return exported


def _strip(proto: Any) -> None:
    """Remove the exporter's own notes: places in source files, and the history of each node."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]
