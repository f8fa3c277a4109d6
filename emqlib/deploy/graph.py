"""Puts integers into the graph of a network that was exported without any."""

from math import inf
from typing import Any

import numpy as np
import torch

from .integers import Grid, byte_codes, int8_weight, largest_weight
from .pack import FixedQuantizer, PackedConv2d, PackedLinear

Layer = PackedConv2d | PackedLinear
Range = tuple[float, float]


def with_integers(model: Any, layers: dict[str, Layer], ranges: dict[Layer, Range]) -> None:
    """Change a graph in place: packed layers become what runtimes compute in integers.

    Args:
        model: the model of `onnx_ir`.
        layers: the packed layers, by the names of their weights in the graph.
        ranges: the smallest and the largest output of each.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    editor = _Editor(model.graph)
    convolutions = []
    for node in list(model.graph):
        name = node.inputs[1].name if node.op_type in ("Conv", "MatMul") else None
        if name in layers and editor.quantize(node, layers[name], name) and node.op_type == "Conv":
            convolutions.append((node, ranges[layers[name]]))
    for node, reached in convolutions:
        editor.quantize_output(node, *reached)
    editor.clip()
    RemoveUnusedNodesPass()(model)


class _Editor:
    """A graph, and what was put into it."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.constants: dict[str, Any] = {}
        self.inputs: dict[tuple[Any, Grid], Any] = {}  # what was quantized on each grid
        self.weights: dict[str, list[Any]] = {}  # weight and, of a convolution, bias
        self.codes: dict[Any, tuple[Grid, int, int]] = {}  # for each QuantizeLinear, the codes that it may give

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

    def round_trip(self, before: Any, x: Any, grid: Grid) -> Any:
        """A value through QuantizeLinear and DequantizeLinear."""
        operands = self.number(np.float32, grid.scale), self.number(np.uint8, grid.zero)
        q = self.put(before, "QuantizeLinear", x, *operands)
        self.codes[q.producer()] = grid, 0, grid.most
        return self.put(before, "DequantizeLinear", q, *operands)

    def quantize(self, node: Any, layer: Layer, name: str) -> bool:
        """Give a node the weight of `layer`, and input and bias; returns whether they are integers."""
        fixed = layer.input_quantizer
        if not isinstance(fixed, FixedQuantizer):
            if name not in self.weights:
                self.weights[name] = [self.floating(node, layer, name)]
            node.replace_input_with(1, *self.weights[name])
            return False
        grid, x = Grid.of(fixed), node.inputs[0]
        if (x, grid) not in self.inputs:
            y = x
            if grid.offset is not None:
                offset = self.number(np.float32, grid.offset)
                y = self.put(node, "Add", self.round_trip(node, self.put(node, "Sub", y, offset), grid), offset)
            self.inputs[x, grid] = self.round_trip(node, y, grid.with_zero())
        if name not in self.weights:
            self.weights[name] = self.integers(node, layer, name, grid.with_zero())
        for i, value in enumerate([self.inputs[x, grid], *self.weights[name]]):
            node.replace_input_with(i, value)
        return True

    def integers(self, node: Any, layer: Layer, name: str, grid: Grid) -> list[Any]:
        """Weight, int8, and of a convolution the bias, int32, through DequantizeLinear."""
        codes, bits = (layer.integers() + 2 ** (layer.bits - 1)).flatten(1), layer.bits
        scale, offset, *bias = layer.affine.double()
        levels = scale.unsqueeze(1) * (torch.arange(2.0**bits) - 2 ** (bits - 1) + 0.5) + offset.unsqueeze(1)
        counts = torch.zeros_like(levels).scatter_add_(1, codes, torch.ones_like(codes, dtype=levels.dtype))
        least = torch.full_like(scale, 1e-20)
        for b in bias:  # has to fit 32 bits, in steps of the products
            least = torch.maximum(b.abs() / (grid.scale * 2**30), least)
        table, step = int8_weight(levels, counts, largest_weight(grid.most), least)
        w, (rows, count) = None, codes.shape
        if rows * 2**bits + byte_codes(codes, bits)[0].numel() < codes.numel():
            first = self.constant(f"rows_{rows}_{bits}", np.arange(rows, dtype=np.int32)[:, None] * 2**bits)
            place = self.put(node, "Add", self.unpacked(node, codes, bits, name), first)
            w = self.put(node, "Gather", self.constant(f"{name}.levels", table.to(torch.int8).flatten()), place)
            w = self.shaped(node, w, layer)
        else:
            q = table.gather(1, codes).to(torch.int8).view(layer.shape)
            w = self.constant(f"{name}.integers", q if isinstance(layer, PackedConv2d) else q.T.contiguous())
        axis = 0 if isinstance(layer, PackedConv2d) else 1
        step_constant = self.constant(f"{name}.step", step.float())
        found = [self.put(node, "DequantizeLinear", w, step_constant, axis=axis)]
        if bias and isinstance(layer, PackedConv2d):
            product = step * grid.scale
            integers = self.constant(f"{name}.bias", (bias[0] / product).round().to(torch.int32))
            product = self.constant(f"{name}.bias.step", product.float())
            found.append(self.put(node, "DequantizeLinear", integers, product, axis=0))
        return found

    def floating(self, node: Any, layer: Layer, name: str) -> Any:
        """The weight in floating point: scale (integers + 1/2) + offset."""
        codes, half = (layer.integers() + 2 ** (layer.bits - 1)).flatten(1), 2 ** (layer.bits - 1) - 0.5
        scale, offset = layer.affine.double()[:2].unsqueeze(2)
        w = self.put(node, "Cast", self.unpacked(node, codes, layer.bits, name), to=1)
        w = self.put(node, "Mul", w, self.constant(f"{name}.scale", scale.float()))
        w = self.put(node, "Add", w, self.constant(f"{name}.offset", (offset - half * scale).float()))
        return self.shaped(node, w, layer)

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

    def shaped(self, node: Any, w: Any, layer: Layer) -> Any:
        """A weight (O, K) as its node takes it."""
        if isinstance(layer, PackedConv2d):
            return self.put(node, "Reshape", w, self.number(np.int64, list(layer.shape)))
        return self.put(node, "Transpose", w, perm=[1, 0])

    def quantize_output(self, conv: Any, low: float, high: float) -> None:
        """Round what a convolution gives: on the next layer's grid, if nothing else reads it, or over a range."""
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
        grid = Grid.over(min(max(low, bounds[0]), 0.0), max(min(high, bounds[1]), 0.0))
        nodes = list(self.graph)
        rounded = self.round_trip(nodes[nodes.index(conv) + 1], conv.outputs[0], grid)
        for node, i in uses:
            node.replace_input_with(i, rounded)

    def limits(self, y: Any) -> Range | None:
        """The bounds between which the only reader of y cuts off; None if it is anything else."""
        uses = list(y.uses())
        node = uses[0].node if len(uses) == 1 and not y.is_graph_output() else None
        if node is None or node.op_type not in ("Relu", "Clip"):
            return None
        ends = [None if v is None else v.const_value for v in node.inputs[1:]]
        return (0.0, inf) if node.op_type == "Relu" else tuple(float(v.numpy()) for v in ends)

    def clip(self) -> None:
        """Put a Clip after each QuantizeLinear that may not give all of uint8."""
        for node, (_, first, last) in self.codes.items():
            q = node.outputs[0]
            if (first, last) != (0, 255):
                (reader, _), *_ = q.uses()
                clipped = self.put(reader, "Clip", q, self.number(np.uint8, first), self.number(np.uint8, last))
                reader.replace_input_with(0, clipped)
