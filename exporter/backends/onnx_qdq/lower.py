"""The ONNX target: one file, standard operators, shaped for onnxruntime's integer kernels."""

from pathlib import Path
from typing import ClassVar

import onnx_ir as ir
from torch import fx

from exporter.backends.base import Backend, LoweringError
from exporter.backends.onnx_qdq.dialect import OnnxRuntimeDialect, kernel_block
from exporter.lowering.fuse import fuse
from exporter.lowering.lowered import Lowered
from exporter.lowering.ops import CONV_WEIGHT, LINEAR, MARK
from exporter.lowering.to_onnx import expand, export, save
from passes.act_quant import ACTIVATIONS
from passes.base import Program, TargetRules
from passes.graph import CONVS, call_before, copy_graph, get_tensor, inputs_of, tidy
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from runtimes.base import Artifact

KERNEL_BITS = 8
"""Width to which MatMulNBits (accuracy level 4, the default) quantizes its own input, block by block."""


class OnnxBackend(Backend):
    """Lowers to model.onnx."""

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
    )

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write model.onnx (and model.onnx.data past 2 GB) into `folder`."""
        fused = fuse(program, block_quantizes_input=True)
        if fused.refused:
            raise LoweringError(self.name, fused.refused)
        example = program.calibration.example()
        quantize_before_activation(fused.graph)
        model = export(fused.graph, example, program.dynamic, program.output_names)
        dialect = OnnxRuntimeDialect()
        taps = expand(model, dialect)
        keep_float(model)
        path = folder / "model.onnx"
        save(model, path)
        inputs = tuple(str(node.target) for node in inputs_of(fused.graph))
        artifact = Artifact("onnxruntime", path, inputs, program.output_names)
        return Lowered(artifact, fused.graph, simulate_kernels(fused.graph), tuple(dialect.layers), taps)


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


def simulate_kernels(graph: fx.GraphModule) -> fx.GraphModule:
    """The lowered graph with what onnxruntime's kernels add by themselves.

    MatMulNBits quantizes its input to 8 bits in the blocks of its weight. (Convolutions round their bias to the
    int32 grid of input scale times weight scale: at most half a step of the accumulator, not simulated.)
    """
    simulated = copy_graph(graph)
    for node in list(simulated.graph.nodes):
        if node.target is not LINEAR or node.args[8]:
            continue
        codes = node.args[1]
        block = kernel_block(get_tensor(simulated, codes).shape[1], node.args[6])
        if block is not None:
            rounded = call_before(simulated, node, FAKE_QUANTIZE_DYNAMIC, (node.args[0], KERNEL_BITS, block))
            node.update_arg(0, rounded)
    tidy(simulated)
    return simulated
