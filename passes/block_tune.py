"""Tune what is continuous in blocks of quantized layers: codebooks, scales, biases and norms. Codes stay as they are.

As AQLM does after a block's layers (arXiv 2401.06118, section 3.4): Adam on the squared distance between the block's
output in the quantized network, fed by what the quantized network feeds it, and the float network's. A block is what
lies under one module path that ends in a number, such as layers.3, and has one output. Each tensor p moves as
p + rms(p) t, with the step on t, so that one learning rate serves all.

A block keeps its values when tuning did not bring its output closer on the calibration data.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from passes.base import Program
from passes.calibration import Stream
from passes.graph import add_tensor, get_tensor
from passes.half import half_codebooks, half_scales
from passes.ops import DEQUANTIZE, DEQUANTIZE_CODEBOOK, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC, spread_scales

BLOCK = re.compile(r"((?:.*?\.)?\d+)(?:\.|$)")
SMALLEST_RMS = 1e-3
"""What a tensor of zeros, such as an unused bias, is moved by."""

STORED: Mapping[int, Callable[[Tensor], Tensor]] = {1: half_codebooks, 2: half_scales}
"""How the arguments of dequantize_codebook are rounded in the end, as a file holds them."""

Values = Mapping[fx.Node, Tensor]


def tune_blocks(program: Program, steps: int, learning_rate: float) -> dict[str, float]:
    """Tune every block with codebooks, in the graph's order: {its path: squared distance after / before}."""
    twin = program.float_twin
    assert twin is not None  # the pipeline made one in front of the first pass that quantizes
    counterparts = {node.name: node for node in twin.graph.nodes}
    quantized, floats = (Stream(graph, program.calibration.batches) for graph in (program.graph, twin))
    ratios = {}
    blocks = find_blocks(program.graph)
    for done, (path, nodes) in enumerate(blocks.items()):
        program.on_step(f"tuning {path}", done, len(blocks))
        inside = set(nodes)
        ends = [node for node in nodes if any(user not in inside for user in node.users)]
        if len(ends) != 1 or ends[0].name not in counterparts or not _tunable(nodes):
            continue
        fed = {value for node in nodes for value in node.all_input_nodes if value not in inside}
        inputs = [value for value in fed if value.op != "get_attr"]
        if any(value > nodes[0] for value in inputs):
            continue
        quantized.advance(nodes[0])
        end = counterparts[ends[0].name]
        floats.advance(end.next)
        feeds = [dict(zip(inputs, values, strict=True)) for values in zip(*map(quantized.values, inputs), strict=True)]
        ratios[path] = _tune(program.graph, nodes, ends[0], feeds, floats.values(end), steps, learning_rate)
    return ratios


def find_blocks(graph: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """The nodes that compute under each module path ending in a number, in the graph's order."""
    blocks: dict[str, list[fx.Node]] = {}
    for node in graph.graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        match = BLOCK.match(stack[-1][0].removeprefix("L['self'].")) if stack else None
        if node.op == "call_function" and match:
            blocks.setdefault(match[1], []).append(node)
    return blocks


def _tunable(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The get_attr nodes to tune, if there are codebooks: tensors that tables hold stay."""
    if not any(node.target is DEQUANTIZE_CODEBOOK for node in nodes):
        return []
    found: dict[fx.Node, None] = {}
    for node in nodes:
        values: Sequence[object] = node.args
        if node.target is DEQUANTIZE_CODEBOOK:
            _, codebooks, scales, scale_bits, value_bits, *_ = node.args
            values = [codebooks] * (not value_bits) + [scales] * (not scale_bits)
        elif node.target in (DEQUANTIZE, FAKE_QUANTIZE):
            continue
        for value in values:
            if not isinstance(value, fx.Node) or value.op != "get_attr":
                continue
            if node.target is DEQUANTIZE_CODEBOOK or _is_trained_vector(value):
                found[value] = None
    return list(found)


def _is_trained_vector(node: fx.Node) -> bool:
    """True for a norm's or bias's numbers, known by their names: a capture keeps no parameters apart."""
    value, leaf = node.meta.get("val"), str(node.target).rpartition(".")[2]
    is_vector = isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point()
    return is_vector and leaf.startswith(("weight", "bias"))


def _tune(
    graph: fx.GraphModule,
    nodes: Sequence[fx.Node],
    end: fx.Node,
    feeds: Sequence[Values],
    targets: Sequence[Tensor],
    steps: int,
    learning_rate: float,
) -> float:
    """Tune one block; the distance after as a part of that before."""
    attributes = {value for node in nodes for value in node.all_input_nodes if value.op == "get_attr"}
    constants = {value: get_tensor(graph, value) for value in attributes}
    tuned = _tunable(nodes)
    sizes = {value: constants[value].float().square().mean().sqrt().clamp_min(SMALLEST_RMS) for value in tuned}
    offsets = {value: torch.zeros_like(constants[value], dtype=torch.float32, requires_grad=True) for value in tuned}

    decoding = [node for node in nodes if node.target is DEQUANTIZE_CODEBOOK]
    stored = {node.args[at]: rounded for node in decoding for at, rounded in STORED.items()}

    def moved() -> dict[fx.Node, Tensor]:
        return {
            value: (constants[value].float() + sizes[value] * offset).to(constants[value].dtype)
            for value, offset in offsets.items()
        }

    def distance(index: int, values: Values) -> Tensor:
        return F.mse_loss(_run(nodes, end, {**constants, **values, **feeds[index]}).float(), targets[index].float())

    def total(values: Values) -> float:
        with torch.no_grad():
            return sum(float(distance(index, values)) for index in range(len(feeds)))

    before = total({})
    optimizer = torch.optim.Adam(offsets.values(), lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            distance(step % len(feeds), moved()).backward()
        optimizer.step()
    values = {value: stored.get(value, Tensor.detach)(tensor.detach()) for value, tensor in moved().items()}
    after = total(values)
    if not after < before:
        return 1.0
    inside = set(nodes)
    for value, tensor in values.items():
        new = add_tensor(graph, str(value.target), tensor, nodes[0])
        for user in list(value.users):
            if user in inside:
                user.replace_input_with(value, new)
    return after / before


def _run(nodes: Sequence[fx.Node], end: fx.Node, known: Values) -> Tensor:
    """What the nodes compute for `end`, differentiably."""
    values: dict[fx.Node, Any] = dict(known)
    for node in nodes:
        args = fx.node.map_arg(node.args, lambda value: values[value])
        kwargs = fx.node.map_arg(node.kwargs, lambda value: values[value])
        assert callable(node.target)
        if node.target is DEQUANTIZE_CODEBOOK:
            codes, codebooks, scales = (values[value] for value in node.all_input_nodes)
            values[node] = _decode(codes, codebooks, scales)
        elif node.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC):
            with torch.no_grad():
                rounded = node.target(*args, **kwargs)
            values[node] = args[0] + (rounded - args[0]).detach()  # straight through
        else:
            values[node] = node.target(*args, **kwargs)
    result: Tensor = values[end]
    return result


def _decode(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """passes.ops.dequantize_codebook, which has no gradient."""
    blocks = sum((book[codes[..., m].long()] for m, book in enumerate(codebooks)), torch.zeros(()))
    matrix: Tensor = (blocks * spread_scales(scales, codes.shape)[:, :, None, None]).transpose(1, 2)
    return matrix.flatten(0, 1).flatten(1)
