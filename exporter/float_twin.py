"""The same network in float, from a quantized ONNX file: what `qexport bench` runs beside it.

    nodes of constants, a weight's DequantizeLinear among them   their values, as initializers
    DequantizeLinear(QuantizeLinear(x))                          x
    Mul(Mul(Cast(MatMulInteger(rows of x, codes)), ..))          MatMul(x, float weight)      (per-token activations)
    Sum(MatMul(x, W), MatMul(sums of x by groups, R))            MatMul(x, W + R)         (zero points between codes)

Embedding tables stay as they are stored: their rows are decoded one by one in both networks.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from runtimes.base import Artifact
from runtimes.ort import OnnxRuntime

Float = NDArray[np.float32]

ROWS = ("Cast", "Add", "Round", "Div")
"""From the uint8 rows of a per-token product back to the float input."""


EXTERNAL_DATA_ABOVE = 1 << 30
"""Bytes of constants above which the file that computes them keeps them beside it."""


def make_float(model: ir.Model) -> int:
    """Turn `model` into its float twin, in place; how many layers were quantized."""
    layers = _compute_constants(model)
    for node in list(model.graph):
        if node.op_type == "MatMulInteger":
            layers += _restore_product(model, node)
        elif node.op_type == "DequantizeLinear":
            producer = node.inputs[0].producer() if node.inputs[0] is not None else None
            if producer is not None and producer.op_type == "QuantizeLinear" and producer.inputs[0] is not None:
                _replace(node.outputs[0], producer.inputs[0])
        elif node.op_type == "Sum":
            _join_products(model, node)
    RemoveUnusedNodesPass()(model)
    return layers


def _compute_constants(model: ir.Model) -> int:
    """Put initializers in place of nodes that depend on constants only; how many weights that made of codes."""
    constant = {value for value in model.graph.initializers.values() if not value.is_graph_input()}
    nodes = []
    for node in model.graph:
        if node.inputs and all(value is None or value in constant for value in node.inputs):
            nodes.append(node)
            constant.update(node.outputs)
    computed = [
        value
        for node in nodes
        for value in node.outputs
        if value.is_graph_output() or any(use.node not in nodes for use in value.uses())
    ]
    if not computed:
        return 0
    for value, array in zip(computed, _values(model, nodes, computed), strict=True):
        _replace(value, _constant(model, f"{value.name}/computed", array))
    return sum(node.op_type == "DequantizeLinear" and not _is_bias(node) for node in nodes)


def _is_bias(node: ir.Node) -> bool:
    codes = node.inputs[0]
    return codes is not None and codes.dtype == ir.DataType.INT32


def _values(model: ir.Model, nodes: list[ir.Node], wanted: list[ir.Value]) -> list[NDArray[np.generic]]:
    """The values, computed by onnxruntime."""
    proto = ir.to_proto(ir.external_data.load_to_model(model))
    names = {str(node.name) for node in nodes}
    kept = [node for node in proto.graph.node if node.name in names]
    del proto.graph.node[:], proto.graph.input[:], proto.graph.output[:], proto.graph.value_info[:]
    proto.graph.node.extend(kept)
    outputs = tuple(str(value.name) for value in wanted)
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "constants.onnx"
        onnx.save(proto, path, save_as_external_data=proto.ByteSize() > EXTERNAL_DATA_ABOVE)
        found = OnnxRuntime(optimize=False).load(Artifact("onnxruntime", path, (), outputs)).run({})
    return [found[name] for name in outputs]


def _join_products(model: ir.Model, node: ir.Node) -> None:
    """Sum(MatMul(x, W), MatMul(ReduceSum(Reshape(x)), R), ...): R goes into W."""
    products = [value.producer() for value in node.inputs if value is not None]
    if len(products) < 2 or any(product is None or product.op_type != "MatMul" for product in products[:2]):
        return
    (first, second) = (product for product in products[:2] if product is not None)
    sums = second.inputs[0].producer() if second.inputs[0] is not None else None
    weight, rest = first.inputs[1], second.inputs[1]
    if sums is None or sums.op_type != "ReduceSum" or weight is None or rest is None:
        return
    if weight.const_value is None or rest.const_value is None:
        return
    whole = weight.const_value.numpy()
    groups = rest.const_value.numpy()
    whole = whole + np.repeat(groups, len(whole) // len(groups), axis=0)
    first.replace_input_with(1, _constant(model, f"{first.name}/whole", whole))
    joined = ir.node(
        "Sum", [value for index, value in enumerate(node.inputs) if index != 1], name=f"{node.name}/joined"
    )
    joined.outputs[0].name = f"{node.name}/joined:0"
    model.graph.insert_before(node, joined)
    _replace(node.outputs[0], joined.outputs[0])


def _restore_product(model: ir.Model, node: ir.Node) -> int:
    """Put a float MatMul in place of a per-token integer one; 0 when it does not stand as this compiler writes it."""
    x, codes = _before(node.inputs[0]), node.inputs[1]
    zero = node.inputs[3] if len(node.inputs) > 3 else None
    product = _after(node.outputs[0], ("Cast", "Mul", "Mul"))
    if x is None or product is None or codes is None or codes.const_value is None:
        return 0
    scale = next((value for value in product.inputs if value is not None and value.const_value is not None), None)
    if scale is None or scale.const_value is None:
        return 0
    weight = codes.const_value.numpy().astype(np.float32)
    if zero is not None and zero.const_value is not None:
        weight -= zero.const_value.numpy().astype(np.float32)
    weight *= scale.const_value.numpy().astype(np.float32)
    matmul = ir.node("MatMul", [x, _constant(model, f"{node.name}/float_weight", weight)], name=f"{node.name}/float")
    matmul.outputs[0].name = f"{node.name}/float:0"
    model.graph.insert_before(product, matmul)
    _replace(product.outputs[0], matmul.outputs[0])
    return 1


def _before(value: ir.Value | None) -> ir.Value | None:
    for kind in ROWS:
        producer = value.producer() if value is not None else None
        if producer is None or producer.op_type != kind:
            return None
        value = producer.inputs[0]
    return value


def _after(value: ir.Value, kinds: tuple[str, ...]) -> ir.Node | None:
    node: ir.Node | None = None
    for kind in kinds:
        uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != kind:
            return None
        node = uses[0].node
        value = node.outputs[0]
    return node


def _constant(model: ir.Model, name: str, array: NDArray[np.generic]) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Give the readers of `old` the value `new`, which takes the name along where it is an output of the graph."""
    name = old.name
    is_output = old.is_graph_output()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if is_output:
        old.name, new.name = f"{name}/quantized", name
