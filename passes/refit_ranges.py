"""Static activation ranges re-fitted after the weights are quantized, each by the output error of its layers.

Fake-quant nodes are taken in the graph's order, on what the network in front of them delivers by then. For a node with
range [lo, hi] that is read by layers only (linear, convolution), X being a layer's input in the float network,

    error(lo, hi) = sum over its layers of ||X W^T - fake_quant(Xq; lo, hi) Wq^T||^2 / ||X W^T||^2

is lowered by scaling both ends, then the lower one, then the upper one, each by the best of FACTORS, ROUNDS times. The
range it had is among the candidates, so the error on the rows looked at never grows. Nodes that feed anything else
(adds, pooling) keep theirs: there is no layer whose output would tell.
"""

import dataclasses

import torch
from torch import Tensor, fx

from passes.base import Program
from passes.calibration import Stream
from passes.graph import Layer, add_tensor, find_layers, get_tensor, weight_of
from passes.layer_inputs import layer_rows
from passes.ops import DEQUANTIZE, E4M3_MAX, FAKE_QUANTIZE, fake_quantize
from passes.ranges import QuantRange, as_range

FACTORS = (1.0, 0.7, 0.8, 0.87, 0.94, 1.07, 1.15, 1.25)
ROUNDS = 2
MAX_ROWS = 2048
"""Rows of a layer's input that are looked at, drawn at random."""


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A layer behind a fake-quant node: rows Xq and X W^T of its input and float output, [groups, n, in or out]."""

    rows: Tensor
    wanted: Tensor
    weight: Tensor  # [groups, out, in], as quantized

    def error(self, chosen: QuantRange) -> float:
        scale, zero_point = torch.tensor(chosen.scale), torch.tensor(chosen.zero_point, dtype=torch.int32)
        rows: Tensor = fake_quantize(self.rows, scale, zero_point, chosen.quant_min, chosen.quant_max)
        return float((rows @ self.weight.mT - self.wanted).square().sum() / self.wanted.square().sum().clamp_min(1e-30))


def refit_ranges(program: Program) -> tuple[str, ...]:
    """Re-fit every static range that only layers read; returns the names of the values whose range moved."""
    assert program.float_twin is not None  # the pipeline made it in front of the first pass that quantizes
    twins = {layer.name: layer for layer in find_layers(program.float_twin)}
    layers = {layer.node: layer for layer in program.layers()}
    batches = program.calibration.batches
    stream, floats = Stream(program.graph, batches), Stream(program.float_twin, batches)
    moved = []
    for node in list(program.graph.graph.nodes):
        readers = [layers[user] for user in node.users if user in layers]
        if node.target is not FAKE_QUANTIZE or not readers or len(readers) < len(node.users):
            continue
        if node.args[4] == E4M3_MAX:
            continue  # 8-bit floats lose nothing to a wide range
        stream.advance(node)
        inputs = stream.values(node.args[0])
        # All its layers read the same value of the twin too. Their own order in the graph may be any.
        floats.advance(twins[readers[0].name].input.next)
        seen = [
            _reader(program, layer, twin, inputs, floats.values(twin.input))
            for layer, twin in ((layer, twins[layer.name]) for layer in readers)
        ]
        before = range_of(program.graph, node)
        chosen = _search(before, seen)
        if chosen != before:
            _set_range(program.graph, node, chosen)
            moved.append(str(node.args[0].name))
    return tuple(moved)


def range_of(graph: fx.GraphModule, node: fx.Node) -> QuantRange:
    """The range of a static fake-quant node."""
    scale, zero_point = (get_tensor(graph, argument) for argument in node.args[1:3])  # type: ignore[arg-type]
    return QuantRange(float(scale), int(zero_point), int(node.args[3]), int(node.args[4]))  # type: ignore[arg-type]


def _set_range(graph: fx.GraphModule, node: fx.Node, chosen: QuantRange) -> None:
    value = node.args[0]
    name = f"quantizers.{value.name}"  # type: ignore[union-attr]  # a fake-quant node's first argument is a node
    scale = add_tensor(graph, f"{name}.scale", torch.tensor(chosen.scale, dtype=torch.float32), node)
    zero_point = add_tensor(graph, f"{name}.zero_point", torch.tensor(chosen.zero_point, dtype=torch.int32), node)
    node.args = (value, scale, zero_point, chosen.quant_min, chosen.quant_max)


def _search(chosen: QuantRange, seen: list[_Reader]) -> QuantRange:
    symmetric = chosen.quant_min < 0
    bits = (chosen.quant_max - chosen.quant_min + 1).bit_length() - 1
    low, high = ((code - chosen.zero_point) * chosen.scale for code in (chosen.quant_min, chosen.quant_max))
    if symmetric:
        low = -high  # as_range takes the larger of the two
    one_sided = symmetric or low == 0 or high == 0
    moves = ((1, 1),) if one_sided else ((1, 1), (1, 0), (0, 1))
    least = sum(reader.error(chosen) for reader in seen)
    for _ in range(ROUNDS):
        for low_moves, high_moves in moves:
            start = low, high
            for factor in FACTORS[1:]:
                ends = start[0] * factor**low_moves, start[1] * factor**high_moves
                candidate = as_range(*ends, bits, symmetric)
                error = sum(reader.error(candidate) for reader in seen)
                if error < least:
                    least, chosen, (low, high) = error, candidate, ends
    return chosen


def _reader(program: Program, layer: Layer, twin: Layer, inputs: list[Tensor], floats: list[Tensor]) -> _Reader:
    assert program.float_twin is not None
    float_weight = twin.to_matrix(weight_of(program.float_twin, twin)).float().unflatten(0, (twin.groups, -1))
    weight = _matrix(program.graph, layer).float().unflatten(0, (layer.groups, -1))
    return _Reader(_some_rows(layer, inputs), _some_rows(twin, floats) @ float_weight.mT, weight)


def _matrix(graph: fx.GraphModule, layer: Layer) -> Tensor:
    """The layer's weight as its matrix [out, in], quantized or not."""
    node = layer.weight
    while node.target is not DEQUANTIZE and node.op != "get_attr":
        node = node.all_input_nodes[0]
    if node.op == "get_attr":
        return layer.to_matrix(get_tensor(graph, node))
    codes, scale, zero_point, bits, group_size = node.args
    values = [get_tensor(graph, value) if isinstance(value, fx.Node) else None for value in (codes, scale, zero_point)]
    matrix: Tensor = DEQUANTIZE(*values, bits, group_size)
    return matrix


def _some_rows(layer: Layer, values: list[Tensor]) -> Tensor:
    """At most MAX_ROWS rows [groups, n, in] of the layer's input, the same ones for inputs of the same shape."""
    rows = torch.cat([part for value in values for part in layer_rows(layer, value)], dim=1)
    count = rows.shape[1]
    # Not every k-th: k may divide an image's width, and then all rows are of one column.
    return rows[:, torch.randperm(count, generator=torch.Generator().manual_seed(0))[:MAX_ROWS]]
