"""The same network in float, from a quantized ONNX file: what `qexport bench` runs beside it.

    DequantizeLinear(codes)                              the float weight, as an initializer
    DequantizeLinear(QuantizeLinear(x))                  x
    Mul(Mul(Cast(MatMulInteger(rows of x, codes)), ..))  MatMul(x, float weight)       (per-token activations)

What an engine folds when it loads a file (weights decoded by Cast and Mul) is float already. Embedding tables stay as
they are stored: their rows are decoded one by one in both networks.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

Float = NDArray[np.float32]

ROWS = ("Cast", "Add", "Round", "Div")
"""From the uint8 rows of a per-token product back to the float input."""


def make_float(model: ir.Model) -> int:
    """Turn `model` into its float twin, in place; how many layers were quantized."""
    layers = 0
    for node in list(model.graph):
        if node.op_type == "MatMulInteger":
            layers += _restore_product(model, node)
        elif node.op_type == "DequantizeLinear":
            layers += _restore_value(model, node)
    RemoveUnusedNodesPass()(model)
    return layers


def _restore_value(model: ir.Model, node: ir.Node) -> int:
    """Put float in place of a DequantizeLinear: a constant (1 if it is a weight), or what was quantized (0)."""
    source = node.inputs[0]
    assert source is not None
    if source.const_value is not None:
        weight = _constant(model, node, _dequantized(node))
        _replace(node.outputs[0], weight)
        return int(source.const_value.dtype != ir.DataType.INT32)  # int32 codes are a bias
    producer = source.producer()
    if producer is not None and producer.op_type == "QuantizeLinear" and producer.inputs[0] is not None:
        _replace(node.outputs[0], producer.inputs[0])
    return 0


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
    matmul = ir.node("MatMul", [x, _constant(model, node, weight)], name=f"{node.name}/float")
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


def _dequantized(node: ir.Node) -> Float:
    """(codes - zero point) * scale of a DequantizeLinear of constants."""
    codes, scale, zero = (_numbers(node, index) for index in range(3))
    assert codes is not None
    assert scale is not None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0

    def along(part: Float) -> Float:
        if block:
            return np.repeat(part, block, axis=axis).take(range(codes.shape[axis]), axis=axis)
        if part.ndim == 1 and part.size > 1:
            return part.reshape([-1 if index == axis % codes.ndim else 1 for index in range(codes.ndim)])
        return part

    value: Float = codes if zero is None else codes - along(zero)
    return value * along(scale)


def _numbers(node: ir.Node, index: int) -> Float | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    assert value.const_value is not None, f"{node.name}: input {index} is not a constant"
    return value.const_value.numpy().astype(np.float32)


def _constant(model: ir.Model, node: ir.Node, array: Float) -> ir.Value:
    name = f"{node.name}/float_weight"
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
