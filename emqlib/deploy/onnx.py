"""ONNX files: one child model with integer weights, for runtimes other than PyTorch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import file_name, integer, invalid
from ..convert import Bits, replaced
from ..files import write_atomic
from .pack import FixedQuantizer, PackedConv2d, PackedLinear, pack

OPSET = 25  # the first with integers of two bits
NATIVE = (2, 4, 8)  # the integers that ONNX has


def native(bits: int) -> int:
    """The bits of the smallest ONNX integer that holds `bits` (1 to 8) of them.

    Examples:
        >>> [native(b) for b in (1, 2, 3, 4, 5, 8)]
        [2, 2, 4, 4, 8, 8]
    """
    return next(size for size in NATIVE if size >= integer("bits", bits, 1, 8))


def export_onnx(model: nn.Module, path: str | Path, bits: Bits, example_inputs: Tensor | Sequence[Tensor]) -> None:
    """Write one child model as an ONNX file, atomically, for any size of batch.

    `pack` makes the integers. Weights are int2, int4 or int8, the smallest that holds them; DequantizeLinear and their
    channel's offset bring them back to floating point. The inputs of quantized layers go through QuantizeLinear, as
    uint8 clipped to their bit-width, and DequantizeLinear. Every number is one that training used, so that the file
    computes what the network does but for rounding. Whether a runtime computes in integers is its own choice.

    Args:
        model: a converted network.
        path: the file.
        bits: as for `pack`.
        example_inputs: what the network takes, one tensor (B, ...) or several. The file's inputs are named "images",
            or "input_0", "input_1" and so on if there are several; its output is named "logits".

    Raises:
        ValueError: as `pack`; the path is a folder; the network does not take these inputs.
        ImportError: onnx or onnxscript is missing; the message says what to install.
    """
    onnx = _library()
    path, inputs = file_name("path", path), _batches(example_inputs)
    network = pack(model, bits).cpu()
    _try(network, inputs)
    network = _spelled_out(network)
    names = ["images"] if len(inputs) == 1 else [f"input_{i}" for i in range(len(inputs))]
    batch, *others = torch.export.Dim("batch"), *[torch.export.Dim.AUTO for _ in inputs[1:]]
    program = torch.onnx.export(
        network,
        inputs,
        input_names=names,
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes=tuple({0: size} for size in (batch, *others)),
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto
    proto.ir_version = onnx.helper.find_min_ir_version_for(proto.opset_import)
    _narrow(onnx, proto, {f"{name}.codes": m.bits for name, m in network.named_modules() if isinstance(m, _Layer)})
    _strip(proto)
    onnx.checker.check_model(proto, full_check=True)
    write_atomic(path, lambda file: file.write(proto.SerializeToString(deterministic=True)))


def _library() -> Any:
    try:
        import onnx
        import onnxscript  # noqa: F401, what torch.onnx.export is built on
    except ImportError as error:
        raise ImportError('ONNX files need more libraries: pip install "emqlib[deploy]"') from error
    return onnx


def _batches(inputs: Any) -> tuple[Tensor, ...]:
    """The inputs with two samples each, since the exporter takes a batch of one for a constant."""
    given = (inputs,) if isinstance(inputs, Tensor) else inputs
    expected = "a tensor (B, ...) that the network takes, or several"
    if not isinstance(given, Sequence) or not given or not all(isinstance(x, Tensor) and x.dim() for x in given):
        raise invalid("example_inputs", type(inputs).__name__, expected)
    if not all(len(x) for x in given):
        raise invalid("example_inputs", [tuple(x.shape) for x in given], f"{expected}, not empty")
    return tuple(x[:1].cpu().expand(2, *x.shape[1:]) for x in given)


def _try(network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Run the network once, because the exporter's own error for inputs that do not fit comes late and says little."""
    try:
        with torch.no_grad():
            network(*inputs)
    except Exception as error:  # a network's forward may raise anything
        shapes = [(tuple(x.shape), x.dtype) for x in inputs]
        raise invalid("example_inputs", shapes, f"what the network takes ({error})") from error


class _Quantizer(nn.Module):
    """A FixedQuantizer as QuantizeLinear and DequantizeLinear."""

    def __init__(self, fixed: FixedQuantizer) -> None:
        super().__init__()
        scale, q_min, q_max, _ = fixed.numbers.tolist()
        self.low, self.high = q_min * scale, q_max * scale
        self.clips = q_max - q_min < 255  # else the grid ends where uint8 does
        self.register_buffer("scale", fixed.numbers[0].clone())
        self.register_buffer("zero_point", torch.tensor(-int(q_min), dtype=torch.uint8))
        self.register_buffer("offset", fixed.numbers[3].clone() if fixed.shifted else None)

    def forward(self, x: Tensor) -> Tensor:
        """x (any shape) on the grid."""
        x = x if self.offset is None else x - self.offset
        x = x.clamp(self.low, self.high) if self.clips else x
        grid = (self.scale, self.zero_point)
        q = torch.onnx.ops.symbolic("QuantizeLinear", (x, *grid), dtype=torch.uint8, shape=x.shape)
        x = torch.onnx.ops.symbolic("DequantizeLinear", (q, *grid), dtype=x.dtype, shape=x.shape)
        return x if self.offset is None else x + self.offset


class _Layer(nn.Module):
    """A packed layer whose weight is integers that DequantizeLinear reads; `channel`: the dimension of its outputs."""

    channel = 0

    def __init__(self, packed: PackedConv2d | PackedLinear) -> None:
        super().__init__()
        self.bits, self.packed, fixed = packed.bits, packed, packed.input_quantizer
        self.input_quantizer = _Quantizer(fixed) if isinstance(fixed, FixedQuantizer) else fixed
        codes, (scale, offset) = packed.integers().movedim(0, self.channel), packed.affine[:2]
        shape = [-1 if d == self.channel else 1 for d in range(codes.dim())]
        self.register_buffer("codes", codes.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.clone())
        self.register_buffer("offset", (offset.double() + scale.double() / 2).to(scale.dtype).view(shape))
        self.register_buffer("bias", packed.bias)

    @property
    def weight(self) -> Tensor:
        """The packed layer's (O, ...), for a network that asks for its type."""
        return self.packed.weight

    def dequantized(self) -> Tensor:
        """The weight as DequantizeLinear gives it."""
        operands, axis = (self.codes, self.scale), {"axis": self.channel}
        name, kind, shape = "DequantizeLinear", self.scale.dtype, self.codes.shape
        return torch.onnx.ops.symbolic(name, operands, axis, dtype=kind, shape=shape) + self.offset


class _Conv2d(_Layer):
    def forward(self, x: Tensor) -> Tensor:
        """(N, I, H, W) -> (N, O, H', W')."""
        return self.packed._conv_forward(self.input_quantizer(x), self.dequantized(), self.bias)


class _Linear(_Layer):
    channel = 1  # MatMul takes (I, O)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        x = self.input_quantizer(x) @ self.dequantized()
        return x if self.bias is None else x + self.bias


def _spelled_out(network: nn.Module) -> nn.Module:
    """A packed `network`, changed in place: its layers become operators of ONNX."""
    twins = {PackedConv2d: _Conv2d, PackedLinear: _Linear}
    return replaced(network, {m: twins[type(m)](m) for m in network.modules() if type(m) in twins})


def _narrow(onnx: Any, proto: Any, bits: dict[str, int]) -> None:
    """Store the initializers that `bits` names in the smallest integers of ONNX that hold so many bits."""
    types = {2: onnx.TensorProto.INT2, 4: onnx.TensorProto.INT4}
    for tensor in proto.graph.initializer:
        kind = types.get(native(bits.get(tensor.name, 8)))
        if kind is not None:
            values = onnx.numpy_helper.to_array(tensor).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _strip(proto: Any) -> None:
    """Remove the exporter's own notes: places in source files, and the history of each node."""
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.value_info[:]
