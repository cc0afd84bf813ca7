"""The ONNX target: one file, standard operators, shaped for onnxruntime's integer kernels."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, cast

import onnx_ir as ir
from torch import fx

from exporter.backends.base import Backend, LoweringError
from exporter.backends.onnx_qdq.dialect import OnnxRuntimeDialect
from exporter.backends.onnx_qdq.forms import Form, choose_forms, input_block, round_again
from exporter.backends.onnx_qdq.grids import whole_zeros
from exporter.lowering.fuse import fuse, has_whole_zeros
from exporter.lowering.lowered import Lowered, WeightsAs
from exporter.lowering.ops import CONV_WEIGHT, LINEAR, MARK
from exporter.lowering.to_onnx import expand, export, save
from passes.act_quant import ACTIVATIONS
from passes.base import Program, TargetRules
from passes.graph import CONVS, add_tensor, aten, call_before, copy_graph, inputs_of, tidy
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weights import AffineWeight, QuantWeight
from runtimes.base import Artifact

KERNEL_BITS = 8
"""Width to which MatMulNBits (accuracy level 4, the default) quantizes its own input, block by block."""


@dataclasses.dataclass(frozen=True)
class OnnxBackend(Backend):
    """Lowers to model.onnx. `weights_as` chooses the weights' forms, but for layers whose rule in the recipe does."""

    weights_as: WeightsAs = "auto"

    name: ClassVar[str] = "onnx"
    rules: ClassVar[TargetRules] = TargetRules(
        name="onnx",
        symmetric_activations=False,
        conv_outputs=True,
        integer_elementwise=True,
        quantized_skip=False,
        dynamic_activations=True,
        weight_zero_point=True,
        integer_kinds=frozenset({"linear", "conv"}),
        linear_bits=frozenset({1, 2, 3, 4, 8}),
        conv_bits=frozenset({1, 2, 3, 4, 8}),
    )

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write model.onnx (and model.onnx.data past 2 GB) into `folder`."""
        fused = fuse(program, block_quantizes_input=True, requantize_conv=True)
        if fused.refused:
            raise LoweringError(self.name, fused.refused)
        example = program.calibration.example(program.dynamic)
        quantize_before_activation(fused.graph)
        wanted = {name: self._wanted(program, name) for name in fused.weights}
        forms = choose_forms(fused.graph, fused.weights, wanted)
        round_again(fused.graph, fused.weights, forms)
        model = export(fused.graph, example, program.dynamic, program.output_names)
        dialect = OnnxRuntimeDialect(forms)
        taps = expand(model, dialect, fused.weights, program.memory, program.on_step)
        keep_float(model)
        path = folder / "model.onnx"
        save(model, path, program.on_step)
        inputs = tuple(str(node.target) for node in inputs_of(fused.graph))
        artifact = Artifact("onnxruntime", path, inputs, program.output_names)
        simulated = simulate_kernels(fused.graph, fused.weights, forms)
        return Lowered(artifact, fused.graph, simulated, tuple(dialect.layers), taps)

    def _wanted(self, program: Program, layer: str) -> WeightsAs:
        return cast(WeightsAs, program.options_for(layer).get("weights_as", self.weights_as))


def quantize_before_activation(graph: fx.GraphModule) -> None:
    """conv -> relu -> Q with signed codes becomes conv -> Q -> relu -> Q with the same range, which changes no value.

    onnxruntime takes a convolution to integers only when what follows is a quantizer, or an activation that the
    quantizer makes redundant (unsigned codes that begin at 0). Signed symmetric codes, which a program has that also
    serves TensorRT, do not. Rounding to a grid that holds 0 commutes with clamping, so the first quantizer is exact.
    """
    for node in list(graph.graph.nodes):
        if node.target is not FAKE_QUANTIZE or node.args[3] >= 0 or node.args[0].target not in ACTIVATIONS:
            continue
        activation = node.args[0]
        value = activation.args[0]
        conv = value.args[0] if value.target is MARK else value
        if conv.target in CONVS and conv.args[1].target is CONV_WEIGHT:
            with graph.graph.inserting_before(activation):
                grid = tuple(graph.graph.get_attr(argument.target) for argument in node.args[1:3])
            args = (value, *grid, *node.args[3:])
            activation.update_arg(0, call_before(graph, activation, FAKE_QUANTIZE, args))
    tidy(graph)


def keep_float(model: ir.Model) -> None:
    """Keep onnxruntime from quantizing what the program left in float.

    Between a DequantizeLinear and a QuantizeLinear it rounds the weight of a Conv, ConvTranspose or Gemm to int8 per
    tensor on its own (WeightBiasQuantization). A Sum of one value in between, which it does not remove, prevents that.
    """
    for node in list(model.graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        value, weight = node.inputs[0], node.inputs[1]
        assert value is not None
        assert weight is not None
        if _made_by_dequantize(value) and not _made_by_dequantize(weight):
            apart = ir.node("Sum", [value], name=f"{node.name}/Sum")
            apart.outputs[0].name = f"{node.name}/Sum:0"
            apart.outputs[0].shape, apart.outputs[0].type = value.shape, value.type
            model.graph.insert_before(node, apart)
            node.replace_input_with(0, apart.outputs[0])


def _made_by_dequantize(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def simulate_kernels(
    graph: fx.GraphModule, weights: Mapping[str, QuantWeight], forms: Mapping[str, Form]
) -> fx.GraphModule:
    """The lowered graph with what onnxruntime's kernels add by themselves.

    MatMulNBits quantizes its input to 8 bits in the blocks of its weight; what zero points are off a code is a float
    product beside it. (Convolutions round their bias to the int32 grid of input scale times weight scale: at most half
    a step of the accumulator, not simulated.)
    """
    simulated = copy_graph(graph)
    for node in list(simulated.graph.nodes):
        if node.target is not LINEAR or node.args[4]:
            continue
        name = str(node.args[-1])
        weight = weights[name]
        block = input_block(weight, forms[name])
        if block is None:
            continue
        x, matrix = node.args[:2]
        node.update_arg(0, call_before(simulated, node, FAKE_QUANTIZE_DYNAMIC, (x, KERNEL_BITS, block)))
        if forms[name].kernel == "blocks" and isinstance(weight, AffineWeight) and not has_whole_zeros(weight):
            whole = whole_zeros(weight).dequantize()
            kernels = add_tensor(simulated, f"{name}.kernel_weight", whole, node)
            node.update_arg(1, kernels)
            rest = call_before(simulated, node, aten.sub.Tensor, (matrix, kernels))
            beside = call_before(simulated, node, aten.linear.default, (x, rest))
            y = call_before(simulated, node.next, aten.add.Tensor, (node, beside))
            y.meta = dict(node.meta)
            node.replace_all_uses_with(y, delete_user_cb=lambda user, own=y: user is not own)
    tidy(simulated)
    return simulated
