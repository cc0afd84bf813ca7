"""Layers whose weights and biases are constants of the graph, as passes expect of a layer.

What a model computes from its parameters at every call (weight norm and other parametrizations, a scaled or transposed
parameter) is computed once. A bias that depends on the input, as in addmm(x, a, w), is added behind the product.
"""

import torch
from torch import fx

from passes.graph import aten, constant_root, find_layers, set_bias, set_weight, value_of


def make_weights_constant(graph: fx.GraphModule) -> None:
    """Rewrite the graph's products with constant weights so that `find_layers` finds them as described above."""
    for node in list(graph.graph.nodes):
        _separate_bias(graph.graph, node)
    with torch.no_grad():
        for layer in find_layers(graph):
            if layer.weight.op != "get_attr":
                set_weight(graph, layer, value_of(graph, layer.weight))
            if layer.bias is not None and layer.bias.op != "get_attr":
                set_bias(graph, layer, value_of(graph, layer.bias))


def _separate_bias(graph: fx.Graph, node: fx.Node) -> None:
    """product + bias in place of linear(x, w, bias) and addmm(bias, x, w) whose bias depends on the input."""
    if node.target is aten.linear.default and len(node.args) == 3:
        x, weight, bias = node.args
        product, operands = aten.linear.default, (x, weight)
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, x, weight = node.args
        product, operands = aten.mm.default, (x, weight)
    else:
        return
    given = isinstance(weight, fx.Node) and constant_root(weight) is not None
    if not given or not isinstance(bias, fx.Node) or constant_root(bias) is not None:
        return
    with graph.inserting_before(node):
        multiplied = graph.call_function(product, operands)
    multiplied.meta = dict(node.meta)
    node.target, node.args = aten.add.Tensor, (multiplied, bias)
