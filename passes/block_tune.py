"""Tune what is continuous in quantized layers (passes.tunable), block by block.

As AQLM does after a block's layers (arXiv 2401.06118, section 3.4): Adam on the squared distance between the block's
output in the quantized network, fed by what the quantized network feeds it, and the float network's. A block is what
lies under one module path that ends in a number, such as layers.3, and has one output.

A block keeps its values when tuning did not bring its output closer on the calibration data.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from passes.base import Program
from passes.calibration import Stream
from passes.tunable import Tunable, Values

BLOCK = re.compile(r"((?:.*?\.)?\d+)(?:\.|$)")


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
        block = Tunable(program.graph, nodes)
        if len(ends) != 1 or ends[0].name not in counterparts or not block.offsets:
            continue
        fed = {value for node in nodes for value in node.all_input_nodes if value not in inside}
        inputs = [value for value in fed if value.op != "get_attr"]
        if any(value > nodes[0] for value in inputs):
            continue
        quantized.advance(nodes[0])
        end = counterparts[ends[0].name]
        floats.advance(end.next)
        feeds = [dict(zip(inputs, values, strict=True)) for values in zip(*map(quantized.values, inputs), strict=True)]
        ratios[path] = _tune(block, ends[0], feeds, floats.values(end), steps, learning_rate)
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


def _tune(
    block: Tunable,
    end: fx.Node,
    feeds: Sequence[Values],
    targets: Sequence[Tensor],
    steps: int,
    learning_rate: float,
) -> float:
    """Tune one block; the distance after as a part of that before."""

    def distance(index: int, values: Values) -> Tensor:
        (found,) = block.run([end], {**values, **feeds[index]})
        return F.mse_loss(found.float(), targets[index].float())

    def total(values: Values) -> float:
        with torch.no_grad():
            return sum(float(distance(index, values)) for index in range(len(feeds)))

    before = total({})
    optimizer = torch.optim.Adam(block.offsets.values(), lr=learning_rate)
    for step in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            distance(step % len(feeds), block.moved()).backward()
        optimizer.step()
    values = block.stored()
    after = total(values)
    if not after < before:
        return 1.0
    block.put(values)
    return after / before
