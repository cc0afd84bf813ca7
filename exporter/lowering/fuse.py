"""Program -> lowered graph: one operator of `lowering.ops` for every quantized layer, a mark on every layer's output.

    linear(fake_quantize(x), W, b)            -> linear(fake_quantize(x), W, b, integer=True)
    linear(fake_quantize_dynamic(x), W, b)    -> linear(x, W, b, token_bits=8, integer=True)
    linear(any(x), W of no channel grid, b)   -> linear(x, W, b, integer=False)
    conv(fake_quantize(x), view(W), b)        -> conv(fake_quantize(x), conv_weight(view(W)), b)
    conv(x, view(W), b)                       -> conv(x, view(matrix(W)), b)
    embedding(W, i)                           -> embedding(W, i)

W are the nodes that make the float matrix of the codes; the weights themselves stand beside the graph, by layer.

A weight that is not on one grid a channel (groups, zero points between codes, codebooks) has no integer kernel that
takes quantized activations. The kernel that runs it may quantize its input by itself; then the graph's quantizer is
taken off. Otherwise the combination is refused.
"""

import dataclasses
from collections.abc import Mapping

from torch import fx

from exporter.lowering.ops import CONV_WEIGHT, EMBEDDING, LINEAR, MARK, MATRIX
from passes.base import Program
from passes.graph import Layer, call_before, copy_graph, find_layers, set_argument, tidy
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weight_nodes import read_weight, source_of
from passes.weights import AffineWeight, QuantWeight

NARROW = 4
"""Bits up to which a second rounding, to 8 bits, costs little beside the first one."""


@dataclasses.dataclass(frozen=True)
class Fused:
    """A lowered graph, the quantized weight of each of its layers, and what could not be lowered with the reason."""

    graph: fx.GraphModule
    weights: Mapping[str, QuantWeight]
    refused: Mapping[str, str]


def fuse(
    program: Program, *, block_quantizes_input: bool, narrow_conv_input: bool = False, requantize_conv: bool = False
) -> Fused:
    """The lowered graph of a program, in a graph of its own.

    block_quantizes_input  the target's kernel for weights of no channel grid quantizes its own input
    narrow_conv_input      its integer convolutions also take activations of fewer than 8 bits, clamped before
    requantize_conv        it rounds narrow weights of no channel grid to one, so that a convolution runs on integers
    """
    graph = copy_graph(program.graph)
    weights: dict[str, QuantWeight] = {}
    refused: dict[str, str] = {}
    for layer in find_layers(graph):
        weight, source = read_weight(graph, layer), source_of(layer)
        if weight is None or source is None:
            continue
        weights[layer.name] = weight
        if layer.kind == "linear":
            reason = _fuse_linear(graph, layer, source, weight, block_quantizes_input)
            if reason:
                refused[layer.name] = reason
        elif layer.kind == "embedding":
            _replace(graph, layer.node, EMBEDDING, (source, layer.input, layer.name))
        elif layer.kind == "conv" and _runs_on_integers(layer, weight, narrow_conv_input, requantize_conv):
            node = call_before(graph, layer.node, CONV_WEIGHT, (layer.weight, layer.name))
            set_argument(layer.node, layer.weight_arg, node)
        else:
            put_behind(graph, source, MATRIX, layer.name)
    for name, node in layer_outputs(graph).items():
        put_behind(graph, node, MARK, name).meta["val"] = node.meta.get("val")
    tidy(graph)
    return Fused(graph, weights, refused)


def put_behind(graph: fx.GraphModule, node: fx.Node, target: object, *args: object) -> fx.Node:
    """Call target(node, *args) behind the node; whoever read the node reads that. Returns it."""
    new = call_before(graph, node.next, target, (node, *args))
    for user in list(node.users):
        if user is not new:
            user.replace_input_with(node, new)
    return new


def layer_outputs(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """{layer: the node that computes its output}, lowered or not."""
    outputs = {layer.name: layer.node for layer in find_layers(graph)}
    for node in graph.graph.nodes:
        if node.target in (LINEAR, EMBEDDING):
            outputs[str(node.args[-1])] = node
    return outputs


def has_whole_zeros(weight: AffineWeight) -> bool:
    """True when the weight has no zero points but codes."""
    zeros = weight.zero_point
    top = 2**weight.bits - 1
    return zeros is None or bool(((zeros == zeros.round()) & (zeros >= 0) & (zeros <= top)).all())


def on_channel_grid(weight: QuantWeight) -> bool:
    """True when every output channel's codes count steps of one grid: what integer kernels multiply."""
    if not isinstance(weight, AffineWeight) or weight.axis != 1:
        return False
    return weight.scale.shape[1] == 1 and has_whole_zeros(weight)


def is_narrow(weight: QuantWeight) -> bool:
    """True when rounding the weight again, to 8 bits, costs little beside what its own codes cost."""
    return not isinstance(weight, AffineWeight) or weight.bits <= NARROW


def _fuse_linear(
    graph: fx.GraphModule, layer: Layer, matrix: fx.Node, weight: QuantWeight, block_quantizes_input: bool
) -> str:
    """Replace the layer by LINEAR; returns why not, if it cannot be."""
    source, token_bits = layer.input, 0
    static = source.target is FAKE_QUANTIZE
    if source.target is FAKE_QUANTIZE_DYNAMIC:
        source, token_bits = _first(source), int(str(source.args[1]))
    integer = static or token_bits > 0
    if integer and not on_channel_grid(weight):
        kind, way_out = _no_channel_grid(weight)
        if not block_quantizes_input:
            return f"{kind} does not run on quantized activations here; {way_out}"
        if token_bits == 4 or (static and not _is_eight_bits(layer.input)):
            return f"4-bit activations do not run on {kind} here; {way_out} or bits=8"
        source, token_bits, integer = (_first(source) if static else source), 0, False
    args = (source, matrix, layer.bias, token_bits, integer, layer.name)
    _replace(graph, layer.node, LINEAR, args)
    return ""


def _no_channel_grid(weight: QuantWeight) -> tuple[str, str]:
    """What the weight is, and the nearest that has one grid a channel."""
    if not isinstance(weight, AffineWeight):
        return "a codebook weight", "use gptq:bits=4:group_size=-1"
    if weight.scale.shape[1] > 1 or weight.axis != 1:
        return "a block-wise weight", "use group_size=-1"
    return "a weight with zero points between its codes", "use gptq:group_size=-1"


def _runs_on_integers(layer: Layer, weight: QuantWeight, narrow_input: bool, requantize: bool) -> bool:
    """True when the convolution's input is quantized and its weight is, or can be put, on one grid a channel."""
    source = layer.input
    if source.target is not FAKE_QUANTIZE or not (narrow_input or _is_eight_bits(source)):
        return False
    return on_channel_grid(weight) or (requantize and is_narrow(weight))


def _is_eight_bits(quantizer: fx.Node) -> bool:
    return tuple(quantizer.args[3:5]) in ((-128, 127), (0, 255))


def _first(node: fx.Node) -> fx.Node:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def _replace(graph: fx.GraphModule, old: fx.Node, target: object, args: tuple[object, ...]) -> None:
    new = call_before(graph, old, target, args)
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.graph.erase_node(old)
