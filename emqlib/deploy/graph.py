"""Puts integers into the graph of a network that was exported without any."""

from dataclasses import dataclass, replace
from math import inf
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import invalid
from .integers import ByteGrid, byte_codes, int8_weight, largest_weight
from .pack import FixedQuantizer, PackedConv2d, PackedLayer, PackedLinear


@dataclass(frozen=True)
class Seen:
    """What passed through a layer: its lowest and highest output, and the sum of its quantized inputs over samples."""

    low: float
    high: float
    total: Tensor  # (I, H, W), or (..., I) of a Linear
    count: int

    def joined(self, other: "Seen") -> "Seen":
        """Both together."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        if self.total.shape != other.total.shape:  # a layer that is called twice
            return replace(self, low=low, high=high)
        return Seen(low, high, self.total + other.total, self.count + other.count)

    def shift(self, layer: PackedLayer, error: Tensor) -> Tensor:
        """By how much an error (O, ...) of a layer's weight raises the mean output of each channel: (O,)."""
        mean = (self.total / self.count).unsqueeze(0)
        if isinstance(layer, PackedConv2d):
            return layer._conv_forward(mean, error, None).mean((0, 2, 3))
        return (mean @ error.T).flatten(0, -2).mean(0)


def with_integers(model: Any, layers: dict[str, PackedLayer], seen: dict[PackedLayer, Seen]) -> None:
    """Change a graph in place: packed layers become what runtimes compute in integers.

    Args:
        model: the model of `onnx_ir`.
        layers: the packed layers, by the names of their weights in the graph.
        seen: what passed through each of them, from which ranges and biases follow.

    Raises:
        ValueError: a layer is not in the graph.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    editor, convolutions, found_layers = _Editor(model.graph), [], set()
    for node in list(model.graph):
        name = node.inputs[1].name if node.op_type in ("Conv", "MatMul") else None
        if name not in layers:
            continue
        layer = layers[name]
        found_layers.add(layer)
        in_integers = editor.quantize(node, name, layer, seen[layer])
        if in_integers and node.op_type == "Conv":
            convolutions.append((node, seen[layer]))
    missing = [name.removesuffix(".dense") for name, layer in layers.items() if layer not in found_layers]
    if missing:
        raise invalid("model", missing[0], "a network in whose output every layer that it calls takes part")
    for node, found in convolutions:
        editor.quantize_output(node, found.low, found.high)
    editor.clip()
    editor.add_channels_last({node for node, _ in convolutions})
    RemoveUnusedNodesPass()(model)


class _Editor:
    """A graph, and what was put into it."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.constants: dict[str, Any] = {}
        self.inputs: dict[tuple[Any, ByteGrid], Any] = {}  # what was quantized on each grid
        self.operands: dict[str, tuple[Any, Any]] = {}  # weight and bias of each layer, which may be called twice
        self.codes: dict[Any, tuple[ByteGrid, int, int]] = {}  # for each QuantizeLinear, the codes that it may give

    def constant(self, name: str, array: Any) -> Any:
        """A constant of the graph, made once for each name."""
        import onnx_ir as ir

        if name not in self.constants:
            self.constants[name] = ir.val(name, const_value=ir.tensor(np.asarray(array), name=name))
            self.graph.register_initializer(self.constants[name])
        return self.constants[name]

    def number(self, kind: type, value: Any) -> Any:
        """A constant of numbers that says in its name what it is."""
        text = "_".join(str(v) for v in np.atleast_1d(np.asarray(value, kind)).tolist())
        return self.constant(f"{kind.__name__}_{text}", np.asarray(value, kind))

    def put(self, before: Any, operator: str, *inputs: Any, **attributes: Any) -> Any:
        """The output of a new node before another one."""
        import onnx_ir as ir

        node = ir.node(operator, inputs, attributes)
        self.graph.insert_before(before, node)
        return node.outputs[0]

    def round_trip(self, before: Any, x: Any, grid: ByteGrid) -> Any:
        """A value through QuantizeLinear and DequantizeLinear."""
        operands = self.number(np.float32, grid.scale), self.number(np.uint8, grid.zero)
        q = self.put(before, "QuantizeLinear", x, *operands)
        self.codes[q.producer()] = grid, 0, grid.most
        return self.put(before, "DequantizeLinear", q, *operands)

    def quantize(self, node: Any, name: str, layer: PackedLayer, seen: Seen) -> bool:
        """Give a node the weight and the bias of `layer`, and quantize its input.

        Returns whether the node now computes in integers.
        """
        fixed = layer.input_quantizer
        grid = ByteGrid.of(fixed) if isinstance(fixed, FixedQuantizer) else None
        if name not in self.operands:
            made = self.integers(node, name, layer, seen, grid) if grid else self.floating(node, name, layer)
            self.operands[name] = made
        weight, bias = self.operands[name]
        node.replace_input_with(1, weight)
        if node.op_type == "Conv":
            node.resize_inputs(3)
            node.replace_input_with(2, bias)
        else:  # the bias of a MatMul is added after it, or its negative is subtracted: see `_Product`
            ((after, place),) = node.outputs[0].uses()
            sign = -1 if after.op_type == "Sub" else 1
            after.replace_input_with(1 - place, self.constant(f"{name}.bias.{after.op_type}", (sign * bias).float()))
        if grid:
            node.replace_input_with(0, self.on_grid(node, grid))
        return grid is not None

    def on_grid(self, node: Any, grid: ByteGrid) -> Any:
        """The input of a node, through QuantizeLinear and DequantizeLinear."""
        x = node.inputs[0]
        if (x, grid) not in self.inputs:
            y = x
            if grid.offset is not None:
                offset = self.number(np.float32, grid.offset)
                y = self.put(node, "Add", self.round_trip(node, self.put(node, "Sub", y, offset), grid), offset)
            self.inputs[x, grid] = self.round_trip(node, y, grid.with_zero())
        return self.inputs[x, grid]

    def integers(self, node: Any, name: str, layer: PackedLayer, seen: Seen, grid: ByteGrid) -> tuple[Any, Any]:
        """Weight, int8, and bias: of a convolution int32, through DequantizeLinear, and of a Linear its numbers."""
        grid, bits, axis = grid.with_zero(), layer.bits, int(isinstance(layer, PackedLinear))
        codes = (layer.integers() + 2 ** (bits - 1)).flatten(1)
        scale, offset = layer.affine[:2].double().unsqueeze(2)
        levels = scale * (torch.arange(2.0**bits) - 2 ** (bits - 1) + 0.5) + offset
        counts = torch.zeros_like(levels).scatter_add_(1, codes, torch.ones_like(codes, dtype=levels.dtype))
        bias = torch.zeros_like(scale[:, 0]) if layer.bias is None else layer.affine[2].double()
        least = (bias.abs() / (grid.scale * 2**30)).clamp_min(1e-20)  # the bias has to fit 32 bits
        table, step = int8_weight(levels, counts, largest_weight(grid.most), least)
        error = (table * step.unsqueeze(1) - levels).gather(1, codes).view(layer.shape)
        bias = bias - seen.shift(layer, error)
        if table.numel() + byte_codes(codes, bits)[0].numel() < codes.numel():
            place = self.put(node, "Add", self.unpacked(node, codes, bits, name), self.rows(len(codes), 2**bits))
            w = self.put(node, "Gather", self.constant(f"{name}.levels", table.to(torch.int8).flatten()), place)
            w = self.shaped(node, w, layer)
        else:
            q = table.gather(1, codes).to(torch.int8).view(layer.shape)
            w = self.constant(f"{name}.integers", q.T.contiguous() if axis else q)
        w = self.put(node, "DequantizeLinear", w, self.constant(f"{name}.step", step.float()), axis=axis)
        if axis:
            return w, bias
        step = step * grid.scale
        integers = self.constant(f"{name}.bias", (bias / step).round().to(torch.int32))
        step = self.constant(f"{name}.bias.step", step.float())
        return w, self.put(node, "DequantizeLinear", integers, step, axis=0)

    def rows(self, count: int, length: int) -> Any:
        """Where each of `count` rows begins in a flat table: (count, 1)."""
        return self.constant(f"rows_{count}_{length}", np.arange(count, dtype=np.int32)[:, None] * length)

    def floating(self, node: Any, name: str, layer: PackedLayer) -> tuple[Any, Any]:
        """Weight, scale (integers + 1/2) + offset, and bias in floating point: of a Linear its numbers."""
        codes, half = (layer.integers() + 2 ** (layer.bits - 1)).flatten(1), 2 ** (layer.bits - 1) - 0.5
        scale, offset = layer.affine[:2].double().unsqueeze(2)
        w = self.put(node, "Cast", self.unpacked(node, codes, layer.bits, name), to=1)
        w = self.put(node, "Mul", w, self.constant(f"{name}.scale", scale.float()))
        w = self.put(node, "Add", w, self.constant(f"{name}.offset", (offset - half * scale).float()))
        bias = torch.zeros(len(scale)) if layer.bias is None else layer.bias.float()
        if isinstance(layer, PackedLinear):
            return self.shaped(node, w, layer), bias
        return self.shaped(node, w, layer), self.constant(f"{name}.bias", bias)

    def unpacked(self, node: Any, codes: torch.Tensor, bits: int, name: str) -> Any:
        """Codes (O, K), of which the file holds several in a byte."""
        packed, divisors = byte_codes(codes, bits)
        x = self.put(node, "Cast", self.constant(f"{name}.codes", packed), to=6)
        if len(divisors) > 1:
            x = self.put(node, "Div", x, self.number(np.int32, divisors))
            x = self.put(node, "Mod", x, self.number(np.int32, 2**bits))
        if packed.numel() * len(divisors) > codes.numel():
            x = self.put(node, "Reshape", x, self.number(np.int64, [-1]))
            x = self.put(node, "Slice", x, self.number(np.int64, [0]), self.number(np.int64, [codes.numel()]))
        return self.put(node, "Reshape", x, self.number(np.int64, list(codes.shape)))

    def shaped(self, node: Any, w: Any, layer: PackedLayer) -> Any:
        """A weight (O, K) as its node takes it."""
        if isinstance(layer, PackedConv2d):
            return self.put(node, "Reshape", w, self.number(np.int64, list(layer.shape)))
        return self.put(node, "Transpose", w, perm=[1, 0])

    def quantize_output(self, conv: Any, low: float, high: float) -> None:
        """Round the output of a convolution.

        If a QuantizeLinear alone reads it, that one rounds, and a ReLU or Clip between the two becomes bounds on its
        codes. Otherwise the output is rounded to the uint8 that covers what was seen.
        """
        y, bounds = conv.outputs[0], (-inf, inf)
        while (limits := self.limits(y)) is not None:
            bounds = max(bounds[0], limits[0]), min(bounds[1], limits[1])
            y = y.uses()[0].node.outputs[0]
        uses = list(y.uses())
        readers = [use.node for use in uses]
        if y.is_graph_output():
            return
        if len(readers) == 1 and readers[0] in self.codes:
            grid, first, last = self.codes[readers[0]]
            readers[0].replace_input_with(0, conv.outputs[0])
            self.codes[readers[0]] = grid, max(first, grid.code(bounds[0])), min(last, grid.code(bounds[1]))
            return
        grid = ByteGrid.over(min(max(low, bounds[0]), 0.0), max(min(high, bounds[1]), 0.0))
        nodes = list(self.graph)
        rounded = self.round_trip(nodes[nodes.index(conv) + 1], conv.outputs[0], grid)
        for node, i in uses:
            node.replace_input_with(i, rounded)

    def limits(self, y: Any) -> tuple[float, float] | None:
        """The bounds between which the only reader of y cuts off; None if it does anything else.

        It is None too if zero lies outside of the bounds, since a grid always reaches to zero.
        """
        uses = list(y.uses())
        node = uses[0].node if len(uses) == 1 and not y.is_graph_output() else None
        if node is None or node.op_type not in ("Relu", "Clip"):
            return None
        if node.op_type == "Relu":
            return 0.0, inf
        ends = [*node.inputs[1:], None, None][:2]  # one that is not there bounds nothing
        if any(v is not None and v.const_value is None for v in ends):
            return None  # a bound that is computed
        low, high = (None if v is None else float(v.const_value.numpy()) for v in ends)
        low, high = -inf if low is None else low, inf if high is None else high
        return (low, high) if low <= 0 <= high else None

    def add_channels_last(self, convolutions: set[Any]) -> None:
        """Make onnxruntime add to the output of integer convolutions in channels-last, as it computes those.

        Otherwise it transposes before and after each addition. An operand that comes from floating point alone is
        transposed to channels-last and back here. The Reshape between keeps its shape; it only keeps onnxruntime from
        removing the two at once. If the output of a convolution reaches a multiplication, as in a batch norm that is
        not folded, the graph stays as it is, because onnxruntime multiplies channels more slowly in channels-last.
        """
        after: set[Any] = set()  # values that come from an integer convolution
        for node in self.graph:
            if node in convolutions or after.intersection(node.inputs):
                after.update(node.outputs)
        reading = [node for node in self.graph if after.intersection(node.inputs)]
        if any(node.op_type == "Mul" for node in reading):
            return
        added = [v for node in reading if node.op_type == "Add" for v in node.inputs]
        floating = (v for v in added if v not in after and v.const_value is None)
        for x in dict.fromkeys(v for v in floating if v.shape is not None and len(v.shape) == 4):
            uses = list(x.uses())
            readers = {use.node for use in uses}
            first = next(node for node in self.graph if node in readers)
            y = self.put(first, "Transpose", x, perm=[0, 2, 3, 1])
            y = self.put(first, "Reshape", y, self.number(np.int64, [-1, 0, 0, 0]))
            y = self.put(first, "Transpose", y, perm=[0, 3, 1, 2])
            for node, i in uses:
                node.replace_input_with(i, y)

    def clip(self) -> None:
        """Put a Clip after each QuantizeLinear that may not give all of uint8."""
        for node, (_, first, last) in self.codes.items():
            q = node.outputs[0]
            if (first, last) != (0, 255):
                (reader, _), *_ = q.uses()
                clipped = self.put(reader, "Clip", q, self.number(np.uint8, first), self.number(np.uint8, last))
                reader.replace_input_with(0, clipped)
