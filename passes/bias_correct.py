"""Empirical bias correction (Nagel et al., arXiv 1906.04721, section 4.2 and appendix D).

Quantization errors do not average out: with float weights W, quantized ones W', and x' the input as the quantized
network computes it, an output channel is off by

    E[W x + b] - E[W' x' + b] = delta        mean over calibration data and places

and b + delta puts its mean right. Layers are corrected in order, each on what the layers in front of it yield once they
are corrected; the float side is the network as it was before anything was quantized.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from passes.base import Pass, PassError, PassResult, Program, Skip
from passes.calibration import Stream
from passes.equalize_pairs import channel_axis
from passes.graph import Layer, bias_of, can_take_bias, find_layers, give_bias
from passes.ops import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC


@dataclasses.dataclass(frozen=True)
class BiasCorrection(Pass):
    """Correct the biases of linear and convolution layers so that each channel's mean is the float network's."""

    name: ClassVar[str] = "bias-correct"
    summary: ClassVar[str] = "correct biases for the mean error of quantization, on calibration data"
    paper: ClassVar[str] = "arXiv 1906.04721"

    def requires(self, program: Program) -> None:
        """Something must be quantized already, and there must be data to see by how much it is off."""
        if not program.calibration.batches:
            raise PassError("bias-correct needs calibration data", fix="give --calib")
        quantizers = (DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC)
        if not any(node.target in quantizers for node in program.graph.graph.nodes):
            raise PassError("bias-correct finds nothing quantized", fix="put it behind the passes that quantize")

    def run(self, program: Program) -> PassResult:
        """Correct layer after layer; reports the largest correction, relative to its layer's float output (rms)."""
        assert program.float_twin is not None  # the pipeline made it in front of the first pass that quantizes
        batches = program.calibration.batches
        floats, quantized = Stream(program.float_twin, batches), Stream(program.graph, batches)
        twins = {layer.name: layer for layer in find_layers(program.float_twin)}
        changed, skipped, largest = [], [], 0.0
        for layer in program.layers():
            if layer.kind == "embedding":
                continue
            reason = _obstacle(program, layer)
            if reason:
                skipped.append(Skip(layer.name, reason))
                continue
            twin = twins[layer.name]
            floats.advance(twin.node.next)
            quantized.advance(layer.node)
            wanted, energy = _mean(twin, floats.values(twin.node))
            delta = wanted - _mean(twin, quantized.peek(layer.node))[0]
            bias = bias_of(program.graph, layer)
            dtype = twin.node.meta["val"].dtype
            give_bias(program.graph, layer, (delta if bias is None else bias.double() + delta).to(dtype))
            largest = max(largest, float(delta.abs().max() / energy.sqrt().clamp_min(torch.finfo(dtype).tiny)))
            changed.append(layer.name)
        return PassResult(tuple(changed), tuple(skipped), {"largest_relative_correction": largest})


def _obstacle(program: Program, layer: Layer) -> str:
    if program.is_skipped(layer.name):
        return "left in float by the recipe"
    return "" if can_take_bias(layer) else "a matmul of its rank has no bias"


def _mean(layer: Layer, values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean [out] of each channel of the layer's output over batches and places, and the mean square [] of all of it."""
    total, square, count = torch.zeros(()), torch.zeros(()), 0
    for value in values:
        rows = value.movedim(channel_axis(layer, value.dim()), -1).flatten(0, -2).double()  # [places, out]
        total, square, count = total + rows.sum(0), square + rows.square().mean(1).sum(), count + len(rows)
    return total / count, square / count
