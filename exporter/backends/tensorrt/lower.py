"""The TensorRT target: a bundle of model.onnx in TensorRT's dialect and build.json, from which an engine is built.

The bundle is written without TensorRT; it can be carried to the machine with the GPU and finished there
(`bundle.finish`).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import fx

from exporter.backends.base import Backend, LoweringError
from exporter.backends.tensorrt.build import Profile
from exporter.backends.tensorrt.bundle import MODEL, Bundle, write_bundle
from exporter.backends.tensorrt.cast import TYPES, cast, float_only, overflows, rounded_weight, typed
from exporter.backends.tensorrt.dialect import TensorRTDialect
from exporter.backends.tensorrt.plugin_dialect import KernelFiles, PluginDialect, kernel_files, write_kernels
from exporter.backends.tensorrt.plugin_rounding import rounded_in_plugins, rounded_scales
from exporter.backends.tensorrt.profiles import choose_profiles, largest_axes
from exporter.lowering.fuse import Fused, fuse
from exporter.lowering.lowered import Dtype, Lowered, WeightsAs
from exporter.lowering.ops import CONV_WEIGHT, LINEAR, MATRIX
from exporter.lowering.to_onnx import expand, export, save
from passes.base import Program, TargetRules
from passes.graph import get_tensor, inputs_of
from passes.ops import E4M3_MAX, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weights import AffineWeight
from runtimes.base import Artifact

FLOAT8_ARCH = 89
"""The first architecture with 8-bit floats."""

TOKEN_BITS_ARGUMENT = 3  # of LINEAR


@dataclasses.dataclass(frozen=True)
class TensorRTBackend(Backend):
    """Lowers to a bundle.

    arch      the GPUs an rtx engine is for (sm80, sm89); none means all from Ampere on
    plugins   3-bit and codebook weights go into plugins, which full TensorRT has and TensorRT for RTX has not
    dtype     type of the values between the layers; inputs and outputs of the network stay float32
    weights_as   compact: symmetric weights of 2 and 3 bits take no more; else 4, fused with the product; a layer's rule
              in the recipe wins
    profiles  (min, opt, max) shapes of inputs whose shapes are to be others than `choose_profiles` finds
    """

    arch: tuple[str, ...] = ()
    plugins: bool = False
    dtype: Dtype = "float32"
    weights_as: WeightsAs = "auto"
    profiles: Mapping[str, Profile] = dataclasses.field(default_factory=dict)

    name: ClassVar[str] = "trt"
    rules: ClassVar[TargetRules] = TargetRules(
        name="trt",
        symmetric_activations=True,
        conv_outputs=False,
        integer_elementwise=False,
        quantized_skip=True,
        dynamic_activations=False,
        weight_zero_point=True,
        linear_bits=frozenset({1, 2, 3, 4, 8}),
        conv_bits=frozenset({1, 2, 3, 4, 8}),
        float8=True,
        integer_kinds=frozenset({"linear", "conv"}),  # a transposed convolution runs in float behind int8 activations
    )

    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write model.onnx (and model.onnx.data for large ones), build.json and kernels/*.ptx into `folder`.

        TensorRT's kernels add nothing of their own to the lowered graph but the rounding of 16-bit types: sums of int8
        products are exact, all that is not quantized stays float. So `simulated` is the graph in `dtype`, and `graph`
        the same without that rounding, its constants rounded alike. Both have the float16 that plugins read and yield.
        """
        fused = fuse(program, block_quantizes_input=False, narrow_conv_input=True)
        refused = {**fused.refused, **refusals(fused.graph), **float8_refusals(fused, self.arch)}
        if refused:
            raise LoweringError(self.name, refused)
        graph = written = fused.graph
        weights = fused.weights
        if self.dtype != "float32":
            dtype = TYPES[self.dtype]
            found = typed(fused.graph, program.calibration.batches, exact_scales=self.plugins)
            if refused := overflows(found, dtype):
                raise LoweringError(self.name, refused)
            written = cast(found, dtype, memory=program.memory)
            graph = cast(found, dtype, hold=torch.float32, memory=program.memory)
            weights = {name: rounded_weight(weight, dtype) for name, weight in weights.items()}
        model = export(written, program.calibration.example(program.dynamic), program.dynamic, program.output_names)
        float_only(model)
        compact = frozenset(
            name for name in weights if program.options_for(name).get("weights_as", self.weights_as) == "compact"
        )
        profiles = {**choose_profiles(program), **self.profiles}
        largest = largest_axes(program.dynamic, profiles)
        dialect = PluginDialect(compact, largest) if self.plugins else TensorRTDialect(compact, largest)
        taps = expand(model, dialect, weights, program.memory, program.on_step)
        save(model, folder / MODEL, program.on_step)
        inputs = tuple(str(node.target) for node in inputs_of(graph))
        layers, kernels = tuple(dialect.layers), KernelFiles({}, {})
        if isinstance(dialect, PluginDialect):
            kernels = kernel_files(dialect.kernel_sets)
            write_kernels(folder, kernels)
        write_bundle(folder, Bundle(inputs, program.output_names, profiles, self.arch, layers, kernels.described))
        if self.dtype == "float32":
            written = rounded_in_plugins(written, layers, activations=True)
            graph = rounded_in_plugins(graph, layers, activations=False)
        else:
            graph = rounded_scales(graph, layers, TYPES[self.dtype])
        artifact = Artifact("tensorrt", folder / MODEL, inputs, program.output_names)
        return Lowered(artifact, graph, written, layers, taps)


def refusals(graph: fx.GraphModule) -> dict[str, str]:
    """{layer or value: why} of the activations in a lowered graph that TensorRT cannot express."""
    refused: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.target is LINEAR and node.args[TOKEN_BITS_ARGUMENT]:
            refused[str(node.args[-1])] = "TensorRT has no per-token activations; use act-quant:mode=static"
        elif node.target is FAKE_QUANTIZE_DYNAMIC:
            refused[str(node.args[0])] = "TensorRT has no per-token activations; use act-quant:mode=static"
        elif node.target is FAKE_QUANTIZE:
            reason = _activation_refusal(graph, node)
            if reason:
                refused[str(node.args[0])] = reason
    return refused


def float8_refusals(fused: Fused, arch: Sequence[str]) -> dict[str, str]:
    """{layer: why} of layers with 8-bit floats that do not fit their inputs or the GPUs."""
    old = [name for name in arch if name.removeprefix("sm").isdigit() and int(name.removeprefix("sm")) < FLOAT8_ARCH]
    refused: dict[str, str] = {}
    for node in fused.graph.graph.nodes:
        if node.target not in (LINEAR, CONV_WEIGHT, MATRIX):
            continue
        name = str(node.args[-1])
        weight = fused.weights[name]
        floats = isinstance(weight, AffineWeight) and weight.is_float8
        source = node.args[0] if node.target is LINEAR else next(iter(node.users)).args[0]
        quantized = isinstance(source, fx.Node) and source.target is FAKE_QUANTIZE
        of_floats = quantized and source.args[4] == E4M3_MAX
        if (floats or of_floats) and old:
            refused[name] = f"{', '.join(old)} has no 8-bit floats; give --trt-arch sm89 or later, or use format=int"
        elif quantized and node.target is not MATRIX and floats != of_floats:
            refused[name] = "8-bit floats do not multiply integers; use format=fp8 for rtn and act-quant or neither"
    return refused


def _activation_refusal(graph: fx.GraphModule, node: fx.Node) -> str:
    zero_point, low, high = node.args[2:]
    assert isinstance(zero_point, fx.Node)
    assert isinstance(low, int)
    assert isinstance(high, int)
    if high == E4M3_MAX:
        return ""
    if torch.count_nonzero(get_tensor(graph, zero_point)) or low < -128 or high > 127:
        return f"TensorRT has no activations with a zero point or codes {low} to {high}; use act-quant:symmetric=true"
    return ""
