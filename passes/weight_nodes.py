"""A quantized weight in a graph: the nodes that turn codes into the float weight a layer reads, written and read back.

    AffineWeight    dequantize(codes, scale, zero_point, ...)         scale, zero_point: a tensor, or, when they are
                                                                      quantized too, view(dequantize(their codes, ...))
    CodebookWeight  dequantize_codebook(codes, codebooks, scales, ...)

and then what brings the matrix [out, in] into the layer's own shape.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from passes.graph import (
    Layer,
    add_tensor,
    aten,
    call_before,
    copy_graph,
    find_layers,
    get_tensor,
    set_argument,
    set_weight,
    slot,
    tidy,
    weight_of,
)
from passes.memory import Memory
from passes.ops import DEQUANTIZE, DEQUANTIZE_CODEBOOK
from passes.weights import AffineWeight, CodebookWeight, QuantWeight

SOURCES = (DEQUANTIZE, DEQUANTIZE_CODEBOOK)


def write_weight(graph: fx.GraphModule, layer: Layer, weight: QuantWeight, memory: Memory | None = None) -> None:
    """Have the layer read `weight`, kept in `memory`, instead of its float one; its dtype and shape stay."""
    original = weight_of(graph, layer)
    before, name = layer.node, f"{slot(layer)}.weight"
    weight = dataclasses.replace(weight, codes=(memory or Memory()).keep(weight.codes))
    if isinstance(weight, CodebookWeight):
        node = _write_codebooks(graph, name, weight, original.dtype, before)
    else:
        node = _write_affine(graph, name, weight, original.dtype, before)
    shape = list(original.shape)
    if layer.kind == "linear" and layer.transposed:
        node = call_before(graph, before, aten.t.default, (node,))
    elif layer.kind == "conv":
        node = call_before(graph, before, aten.view.default, (node, shape))
    elif layer.kind == "conv_transpose":
        per_group = [layer.groups, shape[1], shape[0] // layer.groups, *shape[2:]]
        node = call_before(graph, before, aten.view.default, (node, per_group))
        node = call_before(graph, before, aten.transpose.int, (node, 1, 2))
        node = call_before(graph, before, aten.reshape.default, (node, shape))
    node.meta["val"] = torch.empty(shape, dtype=original.dtype, device="meta")
    set_argument(layer.node, layer.weight_arg, node)


def _write_affine(
    graph: fx.GraphModule, name: str, weight: AffineWeight, dtype: torch.dtype, before: fx.Node
) -> fx.Node:
    codes = add_tensor(graph, f"{name}_codes", weight.codes, before)
    scale = _write_values(graph, f"{name}_scale", weight.scale, weight.scale_codes, dtype, before)
    zero_point = None
    if weight.zero_point is not None:
        zero_point = _write_values(graph, f"{name}_zero_point", weight.zero_point, weight.zero_codes, dtype, before)
    args = (codes, scale, zero_point, weight.bits, weight.group_size)
    return call_before(graph, before, DEQUANTIZE, args if weight.axis == 1 else (*args, weight.axis))


def _write_values(
    graph: fx.GraphModule, name: str, values: Tensor, quantized: AffineWeight | None, dtype: torch.dtype, at: fx.Node
) -> fx.Node:
    """Scales or zero points: as they are, or from their own codes."""
    if quantized is None:
        return add_tensor(graph, name, values.to(dtype), at)
    node = _write_affine(graph, name, quantized, dtype, at)
    return call_before(graph, at, aten.view.default, (node, list(values.shape)))


def _write_codebooks(
    graph: fx.GraphModule, name: str, weight: CodebookWeight, dtype: torch.dtype, before: fx.Node
) -> fx.Node:
    codes = add_tensor(graph, f"{name}_codes", weight.codes, before)
    codebooks = add_tensor(graph, f"{name}_codebooks", weight.codebooks.to(dtype), before)
    scales = add_tensor(graph, f"{name}_scales", weight.scales.to(dtype), before)
    args = (codes, codebooks, scales, weight.scale_bits, weight.codebook_value_bits)
    groups = weight.codebook_value_groups
    return call_before(graph, before, DEQUANTIZE_CODEBOOK, (*args, groups) if groups else args)


def source_of(layer: Layer) -> fx.Node | None:
    """The node that yields the layer's matrix from codes; None when its weight is float."""
    node = layer.weight
    while node.target not in SOURCES:
        if node.op != "call_function" or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    return node


def is_quantized(layer: Layer) -> bool:
    """True when the layer's weight comes from codes."""
    return source_of(layer) is not None


def read_weight(graph: fx.GraphModule, layer: Layer) -> QuantWeight | None:
    """The layer's quantized weight, or None when it is float."""
    source = source_of(layer)
    if source is None:
        return None
    return _read_affine(graph, source) if source.target is DEQUANTIZE else _read_codebooks(graph, source)


def float_copy(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own, as copy_graph makes it, whose quantized weights are the float ones they stand for."""
    copy = copy_graph(graph)
    for layer in find_layers(copy):
        weight = read_weight(copy, layer)
        if weight is not None:
            original = layer.weight.meta["val"]
            set_weight(copy, layer, layer.from_matrix(weight.dequantize(), original.shape).to(original.dtype))
    tidy(copy)
    return copy


def _read_affine(graph: fx.GraphModule, node: fx.Node) -> AffineWeight:
    codes, scale, zero_point, bits, group_size, *axis = node.args
    scales, scale_codes = _read_values(graph, scale)
    zeros, zero_codes = (None, None) if zero_point is None else _read_values(graph, zero_point)
    return AffineWeight(
        get_tensor(graph, _node(codes)),
        scales,
        zeros,
        _integer(bits),
        _integer(group_size),
        axis=_integer(axis[0]) if axis else 1,
        scale_codes=scale_codes,
        zero_codes=zero_codes,
    )


def _read_values(graph: fx.GraphModule, argument: object) -> tuple[Tensor, AffineWeight | None]:
    node = _node(argument)
    if node.op == "get_attr":
        return get_tensor(graph, node), None
    quantized = _read_affine(graph, _node(node.args[0]))
    shape = node.args[1]
    assert isinstance(shape, Sequence)
    return quantized.dequantize().view([_integer(size) for size in shape]), quantized


def _read_codebooks(graph: fx.GraphModule, node: fx.Node) -> CodebookWeight:
    codes, codebooks, scales = (get_tensor(graph, _node(argument)) for argument in node.args[:3])
    return CodebookWeight(codes, codebooks, scales, *(_integer(argument) for argument in node.args[3:]))


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def _integer(value: object) -> int:
    assert isinstance(value, int)
    return value
