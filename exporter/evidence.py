"""What hints at why a layer is far from float, measured on a few held-out samples and on its weight.

Of a quantizer Q of values v (a layer's weight, or its input in the float twin):

    clipped       share of v that lie more than half a step outside the values that Q can represent
    clip_noise    sum over those of (v - Q(v))^2 / sum over all of (v - Q(v))^2
    outlier_ratio max_c m_c / median_c m_c,   m_c = max |v| over channel c, channels of zeros left out

Input channels share one scale, or one of each token: a channel m times the median's leaves the others log2(m) bits
fewer (SmoothQuant, arXiv 2211.10438, section 3). Weight channels are those that share a scale: the inputs, and the
outputs too where one scale serves the whole weight.

weight_only and input_only run the layer with float inputs and one of its two quantizers: their noises add up to the
noise of its own output when they are independent.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from exporter.lockstep import float_layers
from exporter.metrics import Comparison
from exporter.progress import steps
from exporter.report import Evidence
from exporter.validate import layer_batches, own_output, quantize_input
from passes.base import Program
from passes.calibration import Batch
from passes.graph import Layer, find_layers, get_tensor, value_of
from passes.memory import release
from passes.ops import E4M3_MAX, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weight_nodes import is_quantized, read_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight

SAMPLES = 32
"""Held-out samples that are looked at: shares and ratios need fewer than figures that gates judge."""


def few_batches(program: Program) -> Sequence[Batch]:
    """The first SAMPLES held-out samples, few at a time."""
    batches = layer_batches(program)
    return batches[: max(1, SAMPLES // _samples(batches[0]))]


def _samples(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def gather(program: Program) -> dict[str, Evidence]:
    """{quantized layer: what was measured}; layers with float weights and float inputs are left out."""
    twin = program.float_twin or program.graph
    twins = {layer.name: layer for layer in find_layers(twin)}
    quantized = {
        layer.name: layer
        for layer in find_layers(program.graph)
        if layer.name in twins and (is_quantized(layer) or _input_bits(layer) is not None)
    }
    runs = {name: _Runs(layer, channel_axis(layer, twins[name], twin)) for name, layer in quantized.items()}
    batches, looked_at = few_batches(program), {name: twins[name] for name in quantized}
    for index, batch in enumerate(batches):
        layers, total = float_layers(twin, looked_at, batch), len(batches) * len(looked_at)
        for name, (value, expected) in steps(program.on_step, "causes", layers, total, index * len(looked_at)):
            run, layer = runs[name], quantized[name]
            if run.weight_only is not None:
                alone = own_output(program.graph, layer, value, quantize=False)
                run.weight_only.add(expected, alone.numpy())
            if run.input_only is not None:
                rounded = quantize_input(program.graph, layer, value)
                run.input_only.add(expected, own_output(twin, twins[name], rounded).numpy())
                run.input.add(value, rounded, _static_range(program.graph, layer))
    return {
        name: _with_weight(runs[name].evidence(), program.graph, layer, twin, twins[name])
        for name, layer in steps(program.on_step, "causes in weights", quantized.items(), len(quantized))
    }


class _Runs:
    """What runs of one layer add up to; None where it has no such quantizer."""

    def __init__(self, layer: Layer, axis: int | None) -> None:
        self.weight_only = Comparison(ranks=False) if is_quantized(layer) else None
        self.input_only = Comparison(ranks=False) if _input_bits(layer) is not None else None
        self.input = _Quantizer(axis)

    def evidence(self) -> Evidence:
        """The figures of the runs."""
        ratio, channel = outlier(self.input.channels) if self.input.channels is not None else (None, None)
        return Evidence(
            weight_only_db=self.weight_only.figures().sqnr_db if self.weight_only else None,
            input_only_db=self.input_only.figures().sqnr_db if self.input_only else None,
            input_outlier_ratio=ratio,
            input_outlier_channel=channel,
            input_clipped=self.input.clipped,
            input_clip_noise=self.input.clip_noise,
        )


class _Quantizer:
    """Sums over an input's values and what its quantizer made of them."""

    def __init__(self, axis: int | None) -> None:
        self._axis = axis
        self._count = self._outside = 0
        self._noise = self._noise_outside = 0.0
        self._static = False
        self.channels: Tensor | None = None  # [channels] max |value| so far

    def add(self, value: Tensor, rounded: Tensor, limits: tuple[float, float] | None) -> None:
        """Take in a batch [...] of both; `limits` is the range without a half step, None for one taken at run time."""
        if self._axis is not None:
            peaks = channel_peaks(value, self._axis)
            self.channels = peaks if self.channels is None else torch.maximum(self.channels, peaks)
        if limits is None:
            return
        self._static = True
        outside = (value < limits[0]) | (value > limits[1])
        error = (value - rounded).double().square()
        self._count += value.numel()
        self._outside += int(outside.sum())
        self._noise += float(error.sum())
        self._noise_outside += float(error[outside].sum())

    @property
    def clipped(self) -> float | None:
        """Share of values outside."""
        return self._outside / self._count if self._static else None

    @property
    def clip_noise(self) -> float | None:
        """Their share of the squared error."""
        if not self._static:
            return None
        return self._noise_outside / self._noise if self._noise else 0.0


def channel_axis(layer: Layer, float_layer: Layer, graph: fx.GraphModule) -> int | None:
    """The axis of the layer's input, counted from the end, along which its channels lie; None for indices."""
    if layer.kind == "embedding":
        return None
    if layer.kind == "linear":
        return -1
    return 1 - get_tensor(graph, float_layer.weight).dim()  # [..., C, *spatial] beside a weight [out, in, *kernel]


def channel_peaks(value: Tensor, axis: int) -> Tensor:
    """max |value| [channels] over all axes but one."""
    return value.detach().abs().movedim(axis, 0).flatten(1).amax(1)


def outlier(peaks: Tensor) -> tuple[float | None, int | None]:
    """Largest / median of the channels' peaks [channels] that are not 0, and where the largest is."""
    used = peaks[peaks > 0]
    if len(used) < 2:
        return None, None
    return float(peaks.max() / used.median()), int(peaks.argmax())


def _with_weight(
    evidence: Evidence, graph: fx.GraphModule, layer: Layer, twin: fx.GraphModule, float_layer: Layer
) -> Evidence:
    """The evidence with the widths and what speaks of the weight."""
    evidence = dataclasses.replace(evidence, input_bits=_input_bits(layer))
    stored = read_weight(graph, layer)
    if stored is None:
        return evidence
    weight = get_tensor(twin, float_layer.weight)
    matrix, rounded = float_layer.to_matrix(weight), layer.to_matrix(value_of(graph, layer.weight))
    share, noise = clipping(matrix, rounded, stored) if isinstance(stored, AffineWeight) else (None, None)
    axes = ("input", "output") if isinstance(stored, AffineWeight) and stored.group_size == 0 else ("input",)
    found = [(*outlier(_weight_peaks(layer, matrix, weight, axis)), axis) for axis in axes]
    ratio, channel, axis = max(found, key=lambda entry: entry[0] or 0.0)
    release([weight])
    return dataclasses.replace(
        evidence,
        weight_bits=_code_bits(stored),
        weight_outlier_ratio=ratio,
        weight_outlier_channel=channel,
        weight_outlier_axis=axis if ratio is not None else None,
        weight_clipped=share,
        weight_clip_noise=noise,
    )


def _weight_peaks(layer: Layer, matrix: Tensor, weight: Tensor, axis: str) -> Tensor:
    """max |W| [channels] of the weight's outputs or inputs (of a grouped convolution, inputs within a group)."""
    if axis == "output":
        return channel_peaks(matrix, 0)
    spatial = weight[0, 0].numel() if layer.kind in ("conv", "conv_transpose") else 1
    return channel_peaks(matrix.unflatten(1, (-1, spatial)), 1)


def _code_bits(weight: QuantWeight) -> float:
    """Width of the codes for one weight, without scales and tables."""
    if isinstance(weight, CodebookWeight):
        return weight.codes.numel() * weight.codebook_bits / math.prod(weight.shape)
    return float(weight.bits)


def clipping(matrix: Tensor, rounded: Tensor, stored: AffineWeight) -> tuple[float, float]:
    """(share of W [out, in] that its codes cannot reach, their share of the squared error)."""
    if stored.is_float8:
        low, high = -E4M3_MAX, E4M3_MAX
    else:
        low, high = (0, 2**stored.bits - 1) if stored.zero_point is not None else signed_range(stored.bits)
    bottom, top = _filled(stored, low), _filled(stored, high)
    half = (top - bottom) / (2 * (high - low))
    outside = (matrix < bottom - half) | (matrix > top + half)
    error = (matrix - rounded).double().square()
    noise = float(error.sum())
    return float(outside.double().mean()), float(error[outside].sum()) / noise if noise else 0.0


def signed_range(bits: int) -> tuple[int, int]:
    """The symmetric codes, see `passes.weights`."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _filled(stored: AffineWeight, code: int) -> Tensor:
    """The matrix [out, in] that one code stands for everywhere."""
    return dataclasses.replace(stored, codes=torch.full_like(stored.codes, code)).dequantize()


def _input_bits(layer: Layer) -> int | None:
    """Width of the codes of the layer's input."""
    source = layer.input
    if source.target is FAKE_QUANTIZE_DYNAMIC:
        bits = source.args[1]
        assert isinstance(bits, int)
        return bits
    if source.target is not FAKE_QUANTIZE:
        return None
    low, high = source.args[3], source.args[4]
    assert isinstance(low, int)
    assert isinstance(high, int)
    return 8 if high == E4M3_MAX else (high - low).bit_length()


def _static_range(graph: fx.GraphModule, layer: Layer) -> tuple[float, float] | None:
    """The values that round to the input's lowest and highest code without being clipped."""
    if layer.input.target is not FAKE_QUANTIZE:
        return None
    scale, zero_point, low, high = (_number(graph, arg) for arg in layer.input.args[1:])
    return scale * (low - 0.5 - zero_point), scale * (high + 0.5 - zero_point)


def _number(graph: fx.GraphModule, argument: object) -> float:
    if isinstance(argument, fx.Node):
        return float(value_of(graph, argument))
    assert isinstance(argument, int)
    return float(argument)
