"""The ONNX target: one file, standard operators, shaped for onnxruntime's integer kernels."""

from pathlib import Path
from typing import ClassVar

from torch import fx

from exporter.backends.base import Backend, Lowered, LoweringError
from exporter.backends.fuse import fuse
from exporter.backends.lowered_ops import LINEAR
from exporter.backends.onnx_qdq.dialect import OnnxRuntimeDialect, kernel_block
from exporter.backends.to_onnx import expand, export, save
from passes.base import Program, TargetRules
from passes.graph import call_before, copy_graph, get_tensor, inputs_of, tidy
from passes.ops import FAKE_QUANTIZE_DYNAMIC
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
        model = export(fused.graph, example, program.dynamic, program.output_names)
        dialect = OnnxRuntimeDialect()
        taps = expand(model, dialect)
        path = folder / "model.onnx"
        save(model, path)
        inputs = tuple(str(node.target) for node in inputs_of(fused.graph))
        artifact = Artifact("onnxruntime", path, inputs, program.output_names)
        return Lowered(artifact, fused.graph, simulate_kernels(fused.graph), tuple(dialect.layers), taps)


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
