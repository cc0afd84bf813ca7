"""Put the codes of a foreign checkpoint in a captured program, in place of the float weights they stand for."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, fx

from exporter.errors import InputError
from exporter.foreign.base import ForeignWeight
from passes.base import Program
from passes.graph import Layer, add_tensor, aten, call_before, constant_root, set_argument, slot, tidy
from passes.weight_nodes import write_weight


def adopt(program: Program, weights: Mapping[str, ForeignWeight], path: Path) -> None:
    """Have the layers of program.graph read `weights` {path of the layer's module: its codes}; the reference stays.

    Where columns are in another order, the layer's input is brought into it; layers with one input and one order share
    that. Raises InputError when a weight is used by something that cannot read codes.
    """
    graph = program.graph
    ordered: dict[fx.Node, list[tuple[Tensor, fx.Node]]] = {}
    for layer in program.layers():
        root = constant_root(layer.weight)
        found = weights.get(str(root.target).removesuffix(".weight")) if root is not None else None
        if found is None:
            continue
        write_weight(graph, layer, found.weight)
        if found.columns is not None:
            _reorder_input(graph, layer, found.columns, ordered.setdefault(layer.input, []))
    tidy(graph)
    left = {str(node.target) for node in graph.graph.nodes if node.op == "get_attr"}
    for name in weights:
        if f"{name}.weight" in left:
            raise InputError(
                f"layer {name}: the model reads its weight elsewhere than in a layer", where=str(path), fix="untie it"
            )


def _reorder_input(graph: fx.GraphModule, layer: Layer, columns: Tensor, known: list[tuple[Tensor, fx.Node]]) -> None:
    """Give the layer its input in the order of its columns; `known` are those of this input that exist."""
    for order, node in known:
        if order.equal(columns):
            set_argument(layer.node, layer.input_arg, node)
            return
    source = layer.input
    index = add_tensor(graph, f"{slot(layer)}.columns", columns, layer.node)
    node = call_before(graph, layer.node, aten.index_select.default, (source, -1, index))
    node.meta["val"] = source.meta.get("val")
    set_argument(layer.node, layer.input_arg, node)
    known.append((columns, node))
