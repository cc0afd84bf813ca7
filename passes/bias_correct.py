"""Bias correction (Nagel et al., arXiv 1906.04721, section 4.2 and appendices C and D).

Quantization errors do not average out: with float weights W, quantized ones W', and x' the input as the quantized
network computes it, an output channel is off by

    E[W x + b] - E[W' x' + b] = delta        mean over inputs and places

and b + delta puts its mean right.

data      delta is measured on calibration data. Layers are corrected in order, each on what the layers in front of it
          yield once they are corrected; the float side is the network as it was before anything was quantized.
analytic  delta = (W - W') E[x]: the errors of the weights alone, for layers that read a ReLU or cap, if any, of a layer
          z with batch norm. Its statistics make z a Gaussian N(mu, sigma^2) in each channel, so that

              E[clip(z, l, h)] = l P(l) + h (1 - P(h)) + mu (P(h) - P(l)) + sigma (p(l) - p(h))

          with p and P the density and distribution of a standard normal value at (l - mu) / sigma and so on. Zero
          padding is not counted.
"""

import dataclasses
import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from passes.base import ChannelStatistics, Pass, PassError, PassResult, Program, Skip
from passes.calibration import Stream
from passes.channels import inputs_per_group, per_kernel
from passes.equalize_pairs import (
    ADAPTIVE_POOLS,
    AVERAGE_POOLS,
    CLAMPS,
    SHAPES,
    Pair,
    channel_axis,
    find_pairs,
    is_relu,
    observe_shapes,
)
from passes.graph import Layer, aten, bias_of, can_take_bias, find_layers, give_bias, weight_of
from passes.ops import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC

Source = Literal["data", "analytic"]

AVERAGES = {*SHAPES, *AVERAGE_POOLS, *ADAPTIVE_POOLS, aten.mean.dim}
"""Operators that keep a channel's mean."""


@dataclasses.dataclass(frozen=True)
class BiasCorrection(Pass):
    """Correct the biases of linear and convolution layers so that each channel's mean is the float network's.

    source  data or analytic, as above
    """

    name: ClassVar[str] = "bias-correct"
    summary: ClassVar[str] = "correct biases for the mean error of quantization"
    paper: ClassVar[str] = "arXiv 1906.04721"

    source: Source = "data"

    def requires(self, program: Program) -> None:
        """Something must be quantized already, and there must be data: to see how much it is off, or shapes by."""
        if self.source not in get_args(Source):
            raise PassError(f"bias-correct: source={self.source} is none", fix=f"use {' or '.join(get_args(Source))}")
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
        inputs = _Inputs(program) if self.source == "analytic" else None
        changed, skipped, largest = [], [], 0.0
        for layer in program.layers():
            if layer.kind == "embedding":
                continue
            reason = _obstacle(program, layer) or (inputs.unknown(layer) if inputs is not None else "")
            if reason:
                skipped.append(Skip(layer.name, reason))
                continue
            twin = twins[layer.name]
            floats.advance(twin.node.next)
            quantized.advance(layer.node)
            wanted, energy = _mean(twin, floats.values(twin.node))
            if inputs is None:
                delta = wanted - _mean(twin, quantized.peek(layer.node))[0]
            else:
                error = weight_of(program.float_twin, twin) - quantized.values(layer.weight)[0]
                delta = inputs.seen_through(layer, error)
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


class _Inputs:
    """What layers read on average, by the batch-norm statistics of the layers in front of them."""

    def __init__(self, program: Program) -> None:
        assert program.float_twin is not None
        pairs, _ = find_pairs(program.float_twin, observe_shapes(program.float_twin, program.calibration.batches[0]))
        self._graph = program.float_twin
        self._pairs = {pair.second.name: pair for pair in pairs}
        self._statistics = program.channel_stats

    def unknown(self, layer: Layer) -> str:
        """Why the layer's mean input is not known; empty when it is."""
        pair = self._pairs.get(layer.name)
        if pair is None or pair.first.name not in self._statistics:
            return "its input does not come from one layer with batch norm"
        clips = {cap.node for cap in pair.caps}
        averaged = False
        for node in pair.path:
            bends = is_relu(node) or node in clips
            if (bends and averaged) or not (bends or node.target in AVERAGES):
                return f"the mean behind {node.name} ({node.target}) is not known"
            averaged |= node.target not in SHAPES and not bends
        return ""

    def seen_through(self, layer: Layer, weight: Tensor) -> Tensor:
        """Mean [out] of what `weight`, shaped as the layer's, makes of the layer's input."""
        mean = _mean_behind(self._pairs[layer.name], self._statistics[self._pairs[layer.name].first.name])
        matrix = layer.to_matrix(weight.double())
        kernels = matrix.unflatten(1, (inputs_per_group(self._graph, self._pairs[layer.name].second), -1)).sum(2)
        seen: Tensor = (kernels * per_kernel(mean, layer.groups, len(kernels))).sum(1)
        return seen


def _mean_behind(pair: Pair, statistics: ChannelStatistics) -> Tensor:
    """E[x], [in channels of the second layer]."""
    low, high = -math.inf, torch.full_like(statistics.mean, math.inf, dtype=torch.float64)
    for node in pair.path:
        if is_relu(node) or node.target in CLAMPS:
            low = 0.0
    for cap in pair.caps:
        limit, channel = torch.broadcast_tensors(torch.as_tensor(cap.limit, dtype=torch.float64), cap.channel)
        high.scatter_reduce_(0, channel.flatten(), limit.flatten(), "amin")
    return clipped_mean(statistics.mean.double(), statistics.std.double(), low, high)[pair.channel]


def clipped_mean(mean: Tensor, std: Tensor, low: float, high: Tensor) -> Tensor:
    """E[clip(z, low, high)] [channels] of z ~ N(mean, std^2); `low` and `high` may be infinite."""
    std = std.clamp_min(torch.finfo(std.dtype).tiny)
    below, above = (low - mean) / std, (high - mean) / std
    middle = mean * (_distribution(above) - _distribution(below)) + std * (_density(below) - _density(above))
    # An infinite end is never reached: its probability is 0, and 0 times infinity must not be asked for.
    at_low = low * _distribution(below) if math.isfinite(low) else torch.zeros_like(mean)
    return at_low + middle + torch.where(high.isinf(), 0.0, high) * (1 - _distribution(above))


def _density(value: Tensor) -> Tensor:
    return torch.exp(-value.square() / 2) / math.sqrt(2 * math.pi)


def _distribution(value: Tensor) -> Tensor:
    probability: Tensor = torch.special.ndtr(value)
    return probability
