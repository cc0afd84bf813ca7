"""Program -> lowered graph: one operator of `lowering.ops` for every quantized layer, a mark on every layer's output.

    linear(fake_quantize(x), dequantize(...), b)            -> linear(fake_quantize(x), codes, ..., integer=True)
    linear(fake_quantize_dynamic(x), dequantize(...), b)    -> linear(x, codes, ..., token_bits=8, integer=True)
    linear(any(x), dequantize(... in blocks), b)            -> linear(x, codes, ..., integer=False)
    conv(fake_quantize(x), view(dequantize(...)), b)        -> conv(fake_quantize(x), conv_weight(codes, ...), b)
    embedding(dequantize(...), i)                           -> embedding(codes, ..., i)

A block-wise weight has no integer kernel that takes quantized activations: its own kernel quantizes them, so the
graph's quantizer is taken off (allowed by `BlockActivations`), or the combination is refused.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import fx

from exporter.lowering.ops import CONV_WEIGHT, EMBEDDING, LINEAR, MARK
from passes.base import Program
from passes.graph import Layer, add_tensor, call_before, copy_graph, find_layers, get_tensor, set_argument, tidy
from passes.ops import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The dequantize node behind a layer's weight, read out."""

    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node | None
    bits: int
    group_size: int


@dataclasses.dataclass(frozen=True)
class Fused:
    """A lowered graph, and what could not be lowered with the reason."""

    graph: fx.GraphModule
    refused: dict[str, str]


def quantized_weight(layer: Layer) -> Quantized | None:
    """How the layer's weight is quantized, or None when it is float."""
    node = layer.weight
    while node.target is not DEQUANTIZE:
        if node.op != "call_function" or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    codes, scale, zero_point, bits, group_size = node.args
    assert isinstance(codes, fx.Node)
    assert isinstance(scale, fx.Node)
    assert zero_point is None or isinstance(zero_point, fx.Node)
    assert isinstance(bits, int)
    assert isinstance(group_size, int)
    return Quantized(codes, scale, zero_point, bits, group_size)


def fuse(program: Program, *, block_quantizes_input: bool, narrow_conv_input: bool = False) -> Fused:
    """The lowered graph of a program, in a graph of its own.

    block_quantizes_input  the target's kernel for block-wise weights quantizes its own input
    narrow_conv_input      its integer convolutions also take activations of fewer than 8 bits, clamped before
    """
    graph = copy_graph(program.graph)
    refused: dict[str, str] = {}
    for layer in find_layers(graph):
        weight = quantized_weight(layer)
        if weight is not None and layer.kind == "linear":
            reason = _fuse_linear(graph, layer, weight, block_quantizes_input)
            if reason:
                refused[layer.name] = reason
        elif weight is not None and layer.kind == "embedding":
            _fuse_embedding(graph, layer, weight)
        elif weight is not None and layer.kind == "conv":
            _fuse_conv(graph, layer, weight, narrow_conv_input)
    for name, node in layer_outputs(graph).items():
        mark = call_before(graph, node.next, MARK, (node, name))
        mark.meta["val"] = node.meta.get("val")
        for user in list(node.users):
            if user is not mark:
                user.replace_input_with(node, mark)
    tidy(graph)
    return Fused(graph, refused)


def layer_outputs(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """{layer: the node that computes its output}, lowered or not."""
    outputs = {layer.name: layer.node for layer in find_layers(graph)}
    for node in graph.graph.nodes:
        if node.target in (LINEAR, EMBEDDING):
            outputs[str(node.args[-1])] = node
    return outputs


def is_block_wise(graph: fx.GraphModule, weight: Quantized) -> bool:
    """True when a row of the weight has more than one scale."""
    return get_tensor(graph, weight.scale).shape[1] > 1


def _fuse_linear(graph: fx.GraphModule, layer: Layer, weight: Quantized, block_quantizes_input: bool) -> str:
    """Replace the layer by LINEAR; returns why not, if it cannot be."""
    source, token_bits = layer.input, 0
    static = source.target is FAKE_QUANTIZE
    if source.target is FAKE_QUANTIZE_DYNAMIC:
        source, token_bits = _first(source), int(str(source.args[1]))
    integer = static or token_bits > 0
    if integer and is_block_wise(graph, weight):
        if not block_quantizes_input:
            return "a block-wise weight does not run on quantized activations here; use group_size=-1"
        if token_bits == 4 or (static and not _is_eight_bits(layer.input)):
            return "4-bit activations do not run on a block-wise weight here; use group_size=-1 or bits=8"
        source, token_bits, integer = (_first(source) if static else source), 0, False
    args = (
        source,
        weight.codes,
        weight.scale,
        weight.zero_point,
        layer.bias,
        weight.bits,
        weight.group_size,
        token_bits,
        integer,
        layer.name,
    )
    _replace(graph, layer.node, call_before(graph, layer.node, LINEAR, args))
    return ""


def _fuse_embedding(graph: fx.GraphModule, layer: Layer, weight: Quantized) -> None:
    args = (weight.codes, weight.scale, weight.zero_point, layer.input, weight.bits, layer.name)
    _replace(graph, layer.node, call_before(graph, layer.node, EMBEDDING, args))


def _fuse_conv(graph: fx.GraphModule, layer: Layer, weight: Quantized, narrow_input: bool) -> None:
    """Give a convolution on quantized activations its integer weight; others keep the plain dequantize."""
    source = layer.input
    if source.target is not FAKE_QUANTIZE or is_block_wise(graph, weight):
        return
    if not narrow_input and not _is_eight_bits(source):
        return
    shape = layer.weight.args[1]
    assert isinstance(shape, Sequence)
    codes = get_tensor(graph, weight.codes).view(torch.Size([int(str(size)) for size in shape]))
    name = str(weight.codes.target)
    new = add_tensor(graph, name, codes, layer.node)
    scale = add_tensor(graph, f"{layer.name}.scale", get_tensor(graph, weight.scale).flatten(), layer.node)
    zero_point = weight.zero_point
    if zero_point is not None:
        flat = get_tensor(graph, zero_point).flatten()
        zero_point = add_tensor(graph, f"{layer.name}.zero_point", flat, layer.node)
    args = (new, scale, zero_point, weight.bits, 0, layer.name)
    set_argument(layer.node, layer.weight_arg, call_before(graph, layer.node, CONV_WEIGHT, args))


def _is_eight_bits(quantizer: fx.Node) -> bool:
    return tuple(quantizer.args[3:5]) in ((-128, 127), (0, 255))


def _first(node: fx.Node) -> fx.Node:
    value = node.args[0]
    assert isinstance(value, fx.Node)
    return value


def _replace(graph: fx.GraphModule, old: fx.Node, new: fx.Node) -> None:
    new.meta = dict(old.meta)
    old.replace_all_uses_with(new)
    graph.graph.erase_node(old)


def simulated_block(columns: int, group_size: int) -> int:
    """The block in which a block-wise kernel quantizes its input when a weight has groups of `group_size` columns."""
    return columns if group_size <= 0 else math.gcd(group_size, columns)
