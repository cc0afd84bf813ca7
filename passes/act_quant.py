"""Activation fake-quant nodes: where the integer kernels of a target need them, with ranges from calibration.

Static: one range for a tensor. Placement, by TargetRules:
 1. the input of every layer that runs on integers is quantized for that layer;
 2. conv_outputs: a convolution's output, taken after its ReLU or cap, is quantized for all its readers; a cap per
    channel behind that ReLU is quantized too, and both get the cap's range, so that only one of them rounds;
 3. integer_elementwise: so is the output of an add, concat or average pooling whose inputs are all quantized; an
    operator that only moves values (max pooling, reshape) hands the range of its input on, which changes no value;
 4. quantized_skip: where a convolution's output is added to something, that something is quantized and the
    convolution's output is not: the add then rides in the convolution's kernel.
Dynamic ("token"): every linear layer's input is quantized row by row with the range it has at run time.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from passes.base import Pass, PassError, PassResult, Program, Skip
from passes.calibration import watch_values
from passes.graph import Layer, add_tensor, aten, call_before, constant_root, single_user
from passes.ops import E4M3_MAX, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.output_moments import See, watch_gradients
from passes.ranges import Observer, QuantRange, choose_range
from passes.rtn import Format, require_float8

DRAWS = 4
TOGETHER = 32

QUANTIZERS = frozenset({FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC})
ACTIVATIONS = frozenset({aten.relu.default, aten.hardtanh.default, aten.clamp.default, aten.clamp_min.default})
MOVES = frozenset(
    {
        aten.max_pool1d.default,
        aten.max_pool2d.default,
        aten.max_pool3d.default,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.squeeze.dims,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.transpose.int,
        aten.permute.default,
    }
)
ELEMENTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.cat.default,
        aten.avg_pool2d.default,
        aten.adaptive_avg_pool2d.default,
    }
)


@dataclasses.dataclass
class Point:
    """A value to be quantized: for which readers (all of them if None), and with whose range."""

    value: fx.Node
    readers: list[fx.Node] | None
    range_of: fx.Node


@dataclasses.dataclass(frozen=True)
class ActQuant(Pass):
    """Options: bits 4 or 8; mode static or token; method minmax, percentile, mse, output; percentile of values kept.

    method   how a static range is chosen, see passes.ranges; output: as mse, but that errors count for what they cost
             at the network's outputs, which takes gradients of the whole network, 32 samples at a time
    format   int; fp8: static 8-bit floats E4M3, whose largest is the largest observed value, whatever the method
    """

    bits: int = 8
    mode: Literal["static", "token"] = "static"
    method: Literal["minmax", "percentile", "mse", "output"] = "mse"
    percentile: float = 99.99
    symmetric: bool = False
    format: Format = "int"

    name: ClassVar[str] = "act-quant"
    summary: ClassVar[str] = "activation fake-quant nodes: static per tensor, or dynamic per token"
    paper: ClassVar[str] = "arXiv 1806.08342"
    prerequisites: ClassVar[tuple[str, ...]] = ("fold-bn",)

    def requires(self, program: Program) -> None:
        """The width must be 4 or 8, the target must know per-token ranges if asked for, static ones need data."""
        if self.bits not in (4, 8):
            raise PassError(f"act-quant has no {self.bits}-bit activations", fix="use bits=8 or bits=4")
        if self.format == "fp8":
            require_float8(program, "act-quant")
            if self.bits != 8 or self.mode != "static":
                raise PassError("act-quant: format=fp8 has 8 bits and static ranges", fix="use act-quant:format=fp8")
        if self.mode == "token" and not program.rules.dynamic_activations:
            raise PassError(
                f"target {program.rules.name} has no per-token activations", fix="use act-quant:mode=static"
            )
        if self.method == "output" and any(node.target in QUANTIZERS for node in program.graph.graph.nodes):
            raise PassError(
                "act-quant: method=output needs gradients, and quantized values have none",
                fix="quantize activations first, or use method=mse",
            )
        if self.mode == "static" and not program.calibration.batches:
            raise PassError("act-quant needs calibration data", fix="give --calib, or use act-quant:mode=token")

    def run(self, program: Program) -> PassResult:
        """Insert the nodes."""
        skipped: list[Skip] = []
        layers: list[Layer] = []
        for layer in program.layers():
            if program.is_skipped(layer.name):
                skipped.append(Skip(layer.name, "left in float by the recipe"))
            elif layer.kind == "embedding":
                continue  # its input is an index
            elif layer.kind not in program.rules.integer_kinds:
                skipped.append(Skip(layer.name, f"{program.rules.name} has no integer kernel for {layer.kind}"))
            elif self.mode == "token" and layer.kind != "linear":
                skipped.append(Skip(layer.name, "a convolution has no per-token ranges: it needs mode=static"))
            elif layer.input.target in QUANTIZERS:
                skipped.append(Skip(layer.name, "its input is quantized already"))
            else:
                layers.append(layer)
        changed = self._token(program, layers) if self.mode == "token" else self._static(program, layers)
        return PassResult(tuple(changed), tuple(skipped))

    def _token(self, program: Program, layers: list[Layer]) -> list[str]:
        done: dict[fx.Node, fx.Node] = {}
        for layer in layers:
            value = layer.input
            if value not in done:
                done[value] = call_before(program.graph, value.next, FAKE_QUANTIZE_DYNAMIC, (value, self.bits, -1))
            layer.node.replace_input_with(value, done[value])
        return [layer.name for layer in layers]

    def _static(self, program: Program, layers: list[Layer]) -> list[str]:
        points = place(program, layers)
        ranges = self._ranges(program, points)
        for point in points:
            insert(program.graph, point, ranges[point.range_of])
        return [point.value.name for point in points]

    def _ranges(self, program: Program, points: list[Point]) -> dict[fx.Node, QuantRange]:
        seen = {point.range_of: Observer() for point in points}

        def see(node: fx.Node, value: Tensor) -> None:
            if node in seen:
                seen[node].see(value)

        watch_values(program.graph, program.calibration.batches, see)
        for node, observer in seen.items():
            if not (math.isfinite(observer.low) and math.isfinite(observer.high)):
                raise PassError("its values on the calibration data are not finite", node=node.name)
        if self.format == "fp8":
            return {node: float8_range(observer) for node, observer in seen.items()}
        if self.method == "output":
            count_costs(program, seen)
        if self.method != "minmax":
            count_values(program, {node: observer for node, observer in seen.items() if not observer.has_counts})
        symmetric = self.symmetric or program.rules.symmetric_activations
        method = "mse" if self.method == "output" else self.method
        return {
            node: choose_range(observer, self.bits, symmetric, method, self.percentile, ceiling_of(node))
            for node, observer in seen.items()
        }


def count_values(program: Program, seen: Mapping[fx.Node, Observer]) -> None:
    """Let each observer count its node's values."""

    def count(node: fx.Node, value: Tensor) -> None:
        if node in seen:
            seen[node].count(value)

    if seen:
        watch_values(program.graph, program.calibration.batches, count)


def count_costs(program: Program, seen: Mapping[fx.Node, Observer]) -> None:
    """Let each observer count its node's values by what an error there costs at the network's outputs.

    A cost is the mean over the samples that run together, and over DRAWS of passes.output_moments, of the gradient's
    square at that place of the value. Values that no gradient reaches are not counted.
    """

    def counter(observer: Observer) -> See:
        return lambda value, gradient: observer.count(value, gradient.square().mean(0, keepdim=True))

    watched = {node: counter(observer) for node, observer in seen.items()}
    generator = torch.Generator().manual_seed(program.seed)
    batches = program.in_parts(program.calibration.batches, TOGETHER)
    for _ in range(DRAWS):
        watch_gradients(program.graph, watched, batches, "mse", generator)


def float8_range(observer: Observer) -> QuantRange:
    """The largest observed value is the largest number: 8-bit floats lose no precision to a wide range."""
    largest = max(-observer.low, observer.high)
    return QuantRange(largest / E4M3_MAX or 1.0, 0, -E4M3_MAX, E4M3_MAX)


def ceiling_of(node: fx.Node) -> float:
    """What the value of a cap cannot pass; infinity for other operators."""
    if node.target not in (aten.hardtanh.default, aten.clamp.default):
        return math.inf
    top = node.args[2] if len(node.args) > 2 else (1.0 if node.target is aten.hardtanh.default else None)
    return float(top) if isinstance(top, int | float) and top > 0 else math.inf


def place(program: Program, layers: list[Layer]) -> list[Point]:
    """The values to quantize, in the graph's order."""
    rules = program.rules
    points: dict[fx.Node, Point] = {}
    convs = {layer.node for layer in layers if layer.kind == "conv"}
    inputs: dict[fx.Node, list[fx.Node]] = {}
    for layer in layers:
        inputs.setdefault(layer.input, []).append(layer.node)
    for node in program.graph.graph.nodes:
        integer_add = node.target in ELEMENTWISE and rules.integer_elementwise and all_quantized(node, points)
        if (node in convs and rules.conv_outputs) or integer_add:
            end = after_activation(node)
            points[end] = Point(end, None, end)
        elif node.target in MOVES and node.args[0] in points and points[node.args[0]].readers is None:
            points[node] = Point(node, None, points[node.args[0]].range_of)
        elif is_cap(node) and node.args[0] in points:
            points[node] = Point(node, None, node)
            points[node.args[0]].range_of = node
        elif node.target is aten.add.Tensor and rules.quantized_skip:
            skip = skip_operand(node, convs)
            if skip is not None:
                inputs.setdefault(skip, []).append(node)
        if node in inputs and node not in points:
            points[node] = Point(node, inputs[node], node)
    for value, readers in inputs.items():  # a skip found after its value was passed
        if value not in points:
            points[value] = Point(value, readers, value)
    return list(points.values())


def after_activation(node: fx.Node) -> fx.Node:
    """The node behind the ReLU or cap that alone reads `node`, else the node itself."""
    user = single_user(node)
    return user if user is not None and user.target in ACTIVATIONS else node


def is_cap(node: fx.Node) -> bool:
    """True when the node is a minimum with a constant, and the only reader of its value."""
    if node.target is not aten.minimum.default:
        return False
    value, limit = node.all_input_nodes
    return single_user(value) is node and constant_root(limit) is not None


def all_quantized(node: fx.Node, points: dict[fx.Node, Point]) -> bool:
    """True when every tensor the node reads is quantized for all its readers."""
    return all(value in points and points[value].readers is None for value in node.all_input_nodes)


def skip_operand(node: fx.Node, convs: set[fx.Node]) -> fx.Node | None:
    """The operand of a residual add to quantize: the one that is not the (last) convolution's output."""
    left, right = node.args[0], node.args[1]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if constant_root(left) is not None or constant_root(right) is not None:
        return None
    fused = [value for value in (left, right) if value in convs and single_user(value) is node]
    if not fused:
        return None
    last = max(fused)
    return right if last is left else left


def insert(graph: fx.GraphModule, point: Point, chosen: QuantRange) -> None:
    """Put a fake_quantize node behind the value and give it to the point's readers."""
    following = point.value.next
    while following.op == "placeholder":
        following = following.next
    name = f"quantizers.{point.value.name}"
    scale = add_tensor(graph, f"{name}.scale", torch.tensor(chosen.scale, dtype=torch.float32), following)
    zero_point = add_tensor(graph, f"{name}.zero_point", torch.tensor(chosen.zero_point, dtype=torch.int32), following)
    args = (point.value, scale, zero_point, chosen.quant_min, chosen.quant_max)
    node = call_before(graph, following, FAKE_QUANTIZE, args)
    node.meta["val"] = point.value.meta.get("val")
    for reader in point.readers if point.readers is not None else list(point.value.users):
        if reader is not node:
            reader.replace_input_with(point.value, node)
