"""From a module to a file in its runtime: what the tests of capture, lowering and validation share."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.capture import Dynamic, capture, export_module
from exporter.kernels import Kernel, kernel_of_layers, optimized_kernels, weight_dequantize_left
from exporter.lowering.lowered import Lowered
from exporter.validate import arrays
from passes.base import LayerRule, Pass, Pipeline, Program, TargetRules
from passes.calibration import Batch, Calibration, run_graph
from passes.fold_bn import FoldBatchNorm
from runtimes.base import Session
from runtimes.ort import OnnxRuntime

KNOWN = {"fold-bn": FoldBatchNorm}

INTEGER_KERNELS = {
    "QLinearConv",
    "QGemm",
    "MatMulIntegerToFloat",
    "MatMulInteger",
    "DynamicQuantizeMatMul",
    "MatMulNBits",
}
"""onnxruntime's kernels that multiply integers."""


def program_of(
    module: nn.Module,
    *batches: Batch,
    dynamic: Dynamic | None = None,
    rules: TargetRules = OnnxBackend.rules,
    layer_rules: Sequence[LayerRule] = (),
) -> Program:
    """`module` captured with `batches` as calibration and holdout data; axis 0 stays free unless told otherwise."""
    free = {name: {0: "batch"} for name in batches[0]} if dynamic is None else dynamic
    exported = export_module(module.eval(), batches[0], free)
    return capture(
        exported, Calibration(batches, batches, "random"), rules, dynamic=free, layer_rules=tuple(layer_rules)
    )


def quantized(program: Program, *passes: Pass) -> Program:
    """The program after the passes, prerequisites included."""
    Pipeline(passes, KNOWN).run(program)
    return program


@dataclasses.dataclass(frozen=True)
class Outputs:
    """One output of a program over one batch, in each of the networks that should agree."""

    reference: Tensor
    graph: Tensor
    plain: Tensor
    simulated: Tensor
    unoptimized: Tensor
    optimized: Tensor


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A lowered program and what onnxruntime makes of it."""

    program: Program
    lowered: Lowered
    kernels: tuple[Kernel, ...]

    @property
    def path(self) -> Path:
        """The file."""
        return self.lowered.artifact.model

    @property
    def model(self) -> onnx.ModelProto:
        """The file's content."""
        return onnx.load(self.path)

    @property
    def kernel_of(self) -> dict[str, str | None]:
        """{layer: kernel that runs it}."""
        return kernel_of_layers(self.path, self.kernels)

    @property
    def repeated(self) -> tuple[Kernel, ...]:
        """Nodes that prepare constants at every run."""
        return weight_dequantize_left(self.kernels)

    def outputs(self, batch: Batch) -> Outputs:
        """The first output for `batch`, everywhere."""
        return next(iter(self.all_outputs(batch).values()))

    def all_outputs(self, batch: Batch) -> dict[str, Outputs]:
        """{output: its value everywhere} for `batch`."""
        graphs = (self.program.reference, self.program.graph, self.lowered.graph, self.lowered.simulated)
        everywhere = [run_graph(graph, [batch])[0] for graph in graphs]
        for optimize in (False, True):
            found = self.session(OnnxRuntime(threads=1, optimize=optimize)).run(arrays(batch))
            everywhere.append(tuple(torch.from_numpy(found[name]) for name in self.lowered.artifact.outputs))
        return {
            name: Outputs(*values)
            for name, values in zip(self.lowered.artifact.outputs, zip(*everywhere, strict=True), strict=True)
        }

    def run(self, batch: Batch, runtime: OnnxRuntime) -> Tensor:
        """The first output of the file in `runtime`."""
        return torch.from_numpy(self.session(runtime).run(arrays(batch))[self.lowered.artifact.outputs[0]])

    def session(self, runtime: OnnxRuntime) -> Session:
        """The file, loaded."""
        return runtime.load(self.lowered.artifact)


def compiled(program: Program, folder: Path) -> Compiled:
    """Lower to onnx; the file must pass onnx's own checker."""
    lowered = OnnxBackend().lower(program, folder)
    onnx.checker.check_model(str(lowered.artifact.model), full_check=True)
    return Compiled(program, lowered, optimized_kernels(lowered.artifact))


def first(graph: fx.GraphModule, batch: Batch) -> Tensor:
    """The graph's first output."""
    return run_graph(graph, [batch])[0][0]


def sqnr(reference: Tensor, value: Tensor) -> float:
    """Signal to quantization noise in dB; infinite when the two are equal."""
    noise = (reference.double() - value.double()).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(reference.double().square().sum().item() / noise)


def typical_sqnr(reference: Tensor, value: Tensor) -> float:
    """The median over samples (axis 0), which one value on the other side of a rounding boundary does not change."""
    return statistics.median(sqnr(*pair) for pair in zip(reference, value, strict=True))


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The constants of a model by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer}


def array(tensor: onnx.TensorProto) -> NDArray[np.generic]:
    """A constant's values."""
    return onnx.numpy_helper.to_array(tensor)


def labels(model: onnx.ModelProto) -> Mapping[str, tuple[str | int, ...]]:
    """{input or output: its axes}, free ones by their label."""
    return {
        value.name: tuple(axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim)
        for value in [*model.graph.input, *model.graph.output]
    }
