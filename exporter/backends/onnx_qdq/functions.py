"""Nodes of constants as a local function of domain `qexport`: any ONNX runtime runs it without an extension.

Layers whose nodes are alike share one function; all that differs between them are its inputs, the constants.
"""

from collections.abc import Callable

import onnx_ir as ir

from exporter.lowering.ops import DOMAIN
from exporter.lowering.to_onnx import OPSET, Builder


def in_function(b: Builder, kind: str, write: Callable[[Builder], ir.Value]) -> ir.Value:
    """The value that `write` makes with the builder it is given, as a call of a function named after `kind`."""
    inner = Builder(b.model, b.scope, b.memory)
    result = write(inner)
    constants = inner.constants
    inputs = [ir.Value(name=f"x{index}") for index in range(len(constants))]
    replaced = dict(zip(constants, inputs, strict=True))
    for index, node in enumerate(inner.nodes):
        node.name = f"n{index}"
        node.outputs[0].name = f"y{index}"
        for position, value in enumerate(node.inputs):
            if value in replaced:
                node.replace_input_with(position, replaced[value])
    identifier = _function(b.model, kind, inputs, result, inner.nodes)
    b.constants += constants
    call = ir.node(identifier[1], list(constants), domain=DOMAIN, name=f"{b.scope}/{identifier[1]}")
    call.outputs[0].name = f"{call.name}:0"
    b.nodes.append(call)
    return call.outputs[0]


def _function(
    model: ir.Model, kind: str, inputs: list[ir.Value], result: ir.Value, nodes: list[ir.Node]
) -> tuple[str, str, str]:
    """The function of these nodes: one that the model has already, or a new one."""
    signature = _signature(inputs, nodes)
    count = 1
    while True:
        identifier = (DOMAIN, kind if count == 1 else f"{kind}{count}", "")
        present = model.functions.get(identifier)
        if present is None:
            break
        if _signature(list(present.inputs), list(present)) == signature:
            return identifier
        count += 1
    graph = ir.Graph(inputs, [result], nodes=nodes, opset_imports={"": OPSET})
    model.functions[identifier] = ir.Function(DOMAIN, identifier[1], graph=graph, attributes=[])
    model.opset_imports[DOMAIN] = 1
    return identifier


def _signature(inputs: list[ir.Value], nodes: list[ir.Node]) -> tuple[object, ...]:
    """What two functions must have in common to be one."""
    lines = [
        (
            node.op_type,
            tuple(value.name if value is not None else None for value in node.inputs),
            tuple((name, str(attribute.value)) for name, attribute in sorted(node.attributes.items())),
        )
        for node in nodes
    ]
    return (tuple(value.name for value in inputs), tuple(lines))
