"""An adapter in a graph: two branches beside the quantized layer, y = base(x) + (x A^T) B'^T.

    the scales of the base's codes are one or more a row    they take the row factor f = m / |V| in,  B' = f s B
    any other base                                          y = f (x Wq^T + (x A^T) (s B)^T) + b, the bias last

so that the base stays one operator on codes, and what is added is two small float layers. A float layer takes its
adapter in altogether. The adapter's own weights may be rounded to 8 bits, one scale a row.
"""

import dataclasses

import torch
from torch import Tensor, fx

from passes.dora import Adapter
from passes.graph import Layer, add_tensor, aten, call_before, set_weight, slot, weight_of
from passes.rtn import RTN, quantize_weight
from passes.weight_nodes import read_weight, write_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight


def attach(graph: fx.GraphModule, layer: Layer, adapter: Adapter, bits: int = 0) -> None:
    """Give a linear layer its adapter, in `bits` bits (0: float); whoever reads the layer reads the sum."""
    quantized = read_weight(graph, layer)
    if quantized is None:
        weight = weight_of(graph, layer)
        matrix = adapter.weight(layer.to_matrix(weight).float())
        set_weight(graph, layer, layer.from_matrix(matrix, weight.shape).to(weight.dtype))
        return
    factor = adapter.row_factor(quantized.dequantize())  # [out]
    scaled = with_rows_scaled(quantized, factor)
    lora_b, source = adapter.lora_b * adapter.scaling, layer.input
    if scaled is not None:
        _rewrite_weight(graph, layer, scaled)
        total = _add_branch(graph, layer, source, adapter.lora_a, lora_b * factor[:, None], bits)
        total.meta["adapted"] = layer.name
        return
    bias = _take_bias(graph, layer)
    total = _add_branch(graph, layer, source, adapter.lora_a, lora_b, bits)
    dtype = layer.node.meta["val"].dtype
    total = _behind(
        graph, total, aten.mul.Tensor, add_tensor(graph, f"{slot(layer)}.dora", factor.to(dtype), total.next)
    )
    if bias is not None:
        total = _behind(graph, total, aten.add.Tensor, bias)
    total.meta["adapted"] = layer.name


def adapted_layers(graph: fx.GraphModule) -> dict[str, fx.Node]:
    """{layer: the node that yields its output, adapter included} of the layers that have adapters."""
    return {node.meta["adapted"]: node for node in graph.graph.nodes if "adapted" in node.meta}


def with_rows_scaled(weight: QuantWeight, factor: Tensor) -> QuantWeight | None:
    """The weight whose row o is factor[o] times this one's; None when its scales cannot say that."""
    if not bool((factor > 0).all()):
        return None
    if isinstance(weight, CodebookWeight):
        if weight.codebooks.shape[2] > 1 or weight.scale_bits:
            return None
        return dataclasses.replace(weight, scales=weight.block_scales * factor[:, None])
    if weight.axis != 1 or weight.scale_codes is not None or len(weight.scale) != len(factor):
        return None
    return dataclasses.replace(weight, scale=weight.scale * factor[:, None])


def _rewrite_weight(graph: fx.GraphModule, layer: Layer, weight: AffineWeight | CodebookWeight) -> None:
    """Have the layer read another quantized weight."""
    value = layer.weight.meta["val"]
    set_weight(graph, layer, torch.empty(value.shape, dtype=value.dtype))
    write_weight(graph, layer, weight)


def _add_branch(
    graph: fx.GraphModule, layer: Layer, source: fx.Node, lora_a: Tensor, lora_b: Tensor, bits: int
) -> fx.Node:
    """Two linear layers on the layer's input, `source`; returns the sum."""
    value = layer.node.meta["val"]
    following = layer.node.next
    for part, matrix in (("lora_A", lora_a), ("lora_B", lora_b)):
        weight = add_tensor(graph, f"{slot(layer)}.{part}.weight", matrix.to(value.dtype), following)
        source = call_before(graph, following, aten.linear.default, (source, weight))
        name = f"{layer.name}.{part}"
        source.meta = {"val": value.new_empty((*value.shape[:-1], len(matrix))), "layer_name": name}
        if bits:
            write_weight(graph, Layer(source, "linear", name, 0, 1, 2), quantize_weight(matrix, RTN(bits=bits)))
    return _behind(graph, layer.node, aten.add.Tensor, source)


def _behind(graph: fx.GraphModule, node: fx.Node, target: object, other: fx.Node) -> fx.Node:
    """target(node, other), read by all that read `node`."""
    last = node if node > other else other
    result = call_before(graph, last.next, target, (node, other))
    result.meta = {"val": node.meta["val"]}
    for user in list(node.users):
        if user is not result:
            user.replace_input_with(node, result)
    return result


def _take_bias(graph: fx.GraphModule, layer: Layer) -> fx.Node | None:
    """Take the layer's bias off it; the node that yields it."""
    bias = layer.bias
    if bias is None:
        return None
    if layer.node.target is aten.addmm.default:
        layer.node.target, layer.node.args = aten.mm.default, tuple(layer.node.args[1:3])
    else:
        assert layer.bias_arg is not None
        layer.node.args = layer.node.args[: layer.bias_arg]
    return bias
