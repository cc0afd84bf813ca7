"""Weights that no pass can quantize, because the operator that multiplies them is no layer to passes.

Recurrent cells, products of stacked matrices and the like keep their weights in float. A report says so, as a size or a
speed that is missing would else have no reason.
"""

import math

from torch import Tensor, fx

from passes.base import Program
from passes.graph import constant_root, find_layers

PRODUCTS = frozenset(
    {
        "_grouped_mm",
        "addmm",
        "baddbmm",
        "bilinear",
        "bmm",
        "einsum",
        "embedding_bag",
        "gru",
        "gru_cell",
        "lstm",
        "lstm_cell",
        "matmul",
        "mm",
        "rnn_relu",
        "rnn_relu_cell",
        "rnn_tanh",
        "rnn_tanh_cell",
    }
)
"""ATen operators that may multiply by weights, by their names; linear, convolutions and embedding always are layers."""


def left_in_float(program: Program) -> tuple[str, ...]:
    """A warning that says which part of the weights such operators hold, if there are any."""
    layers = {layer.node for layer in find_layers(program.graph)}
    held: dict[str, set[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and node not in layers and _name(node) in PRODUCTS:
            roots = {constant_root(value) for value in node.all_input_nodes}
            matrices = {root for root in roots if root is not None and root.meta["val"].dim() > 1}
            if matrices:
                held.setdefault(_name(node), set()).update(matrices)
    if not held:
        return ()
    named = {node for node in program.reference.graph.nodes if node.op == "get_attr"}
    total = sum(_size(node) for node in named)
    part = sum(_size(node) for node in set().union(*held.values()))
    what = ", ".join(sorted(held))
    return (f"{part / total:.0%} of the model's parameters stay in float: no pass quantizes weights of {what}",)


def _name(node: fx.Node) -> str:
    """The operator's name without its overload."""
    return str(getattr(getattr(node.target, "overloadpacket", None), "__name__", ""))


def _size(node: fx.Node) -> int:
    value = node.meta.get("val")
    return math.prod(value.shape) if isinstance(value, Tensor) else 0
