"""What the file rounds to 16 bits while a lowered graph computes in float32; the graphs it is held to say it too.

Plugins read, hold and yield 16 bits: the file of a float32 network casts activations to float16 in front of a plugin
and back behind it, and stores the weight's numbers in float16. The file of a network in 16 bits stores scales and zero
points in them.
"""

from collections.abc import Collection

import torch
from torch import fx

from exporter.backends.tensorrt.dialect import DECODED
from exporter.lowering.fuse import put_behind
from exporter.lowering.lowered import LoweredLayer
from exporter.lowering.ops import CONV_WEIGHT, EMBEDDING, LINEAR, MATRIX
from passes.graph import add_tensor, aten, call_before, copy_graph, get_tensor, tidy
from passes.ops import DEQUANTIZE, DEQUANTIZE_CODEBOOK

PLUGIN = "plugin "
META = "_meta"
"""The plugin whose weight has bytes for scales and zero points: these, and what they stand for, are not rounded."""


def rounded_in_plugins(graph: fx.GraphModule, layers: Collection[LoweredLayer], *, activations: bool) -> fx.GraphModule:
    """The float32 graph with float16 where layers of `layers` run in plugins: a copy, or itself if none does.

    Numbers of weights and biases are rounded; with `activations` also what plugins read and yield.
    """
    plugins = {layer.name: layer.format for layer in layers if layer.format.startswith(PLUGIN)}
    if not plugins:
        return graph
    graph = copy_graph(graph)
    for node in list(graph.graph.nodes):
        if node.target not in (LINEAR, MATRIX) or node.args[-1] not in plugins:
            continue
        if not plugins[node.args[-1]].endswith(META):
            _round_weight(graph, node, torch.float16)
        if node.target is LINEAR:
            value, weight, bias, *rest = node.args
            value = _rounded(graph, value, node, torch.float16) if activations else value
            bias = None if bias is None else _rounded(graph, bias, node, torch.float16)
            node.args = (value, weight, bias, *rest)
        if not activations:
            continue
        half = put_behind(graph, node, aten.to.dtype, torch.float16)
        put_behind(graph, half, aten.to.dtype, torch.float32)
    tidy(graph)
    return graph


def rounded_scales(graph: fx.GraphModule, layers: Collection[LoweredLayer], dtype: torch.dtype) -> fx.GraphModule:
    """A copy of the float32 graph with the scales and zero points in `dtype` that the file has as constants of it.

    The graph makes some of bytes of their own at every run, and so does the file where it decodes the weight then.
    """
    made = {layer.name for layer in layers if not layer.format.endswith((DECODED, META))}
    graph = copy_graph(graph)
    for node in list(graph.graph.nodes):
        if node.target in (LINEAR, MATRIX, CONV_WEIGHT, EMBEDDING) and node.args[-1] in made:
            _round_weight(graph, node, dtype)
    tidy(graph)
    return graph


def _round_weight(graph: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> None:
    """The numbers that the node's weight is made of; codes are none."""
    source = node.args[1] if node.target is LINEAR else node.args[0]
    assert isinstance(source, fx.Node)
    assert source.target in (DEQUANTIZE, DEQUANTIZE_CODEBOOK)
    for value in source.all_input_nodes[1:]:
        source.replace_input_with(value, _rounded(graph, value, source, dtype))


def _rounded(graph: fx.GraphModule, value: fx.Node, before: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The value in 16 bits, and float32 again; a constant is rounded here and now."""
    if value.op == "get_attr":
        return add_tensor(graph, f"{value.target}_16", get_tensor(graph, value).to(dtype).float(), before)
    half = call_before(graph, before, aten.to.dtype, (value, dtype))
    return call_before(graph, before, aten.to.dtype, (half, torch.float32))
