"""How the values of a few layers are spread before and after quantization, on the samples of `exporter.evidence`.

    weight   entries of the float twin's weight | of the quantized one
    input    values in the float twin           | the same after the layer's own quantizer
    output   values in the float twin           | in the quantized network

Bins are equal and span both. The samples are run twice, for the span and for the counts, so that no run is held.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from exporter.evidence import few_batches
from exporter.lockstep import InStep, float_layers, marked_layers
from exporter.lowering.lowered import Lowered
from exporter.progress import steps
from exporter.report import Histogram
from exporter.validate import quantize_input
from passes.base import Program
from passes.graph import find_layers, get_tensor, value_of
from passes.memory import release
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weight_nodes import is_quantized
from runtimes.base import Array

BINS = 48

Pair = tuple[str, str, Array, Array]
"""(layer, weight | input | output, values before, values after)."""


def layer_histograms(program: Program, lowered: Lowered, names: Sequence[str]) -> dict[str, dict[str, Histogram]]:
    """{layer: {weight | input | output: histogram}} of the layers `names`."""
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    for layer, kind, before, after in _values(program, lowered, names):
        found = [float(part) for values in (before, after) if values.size for part in (values.min(), values.max())]
        if found and np.isfinite(found).all():
            low, high = spans.get((layer, kind), (found[0], found[0]))
            spans[layer, kind] = (min(low, *found), max(high, *found))
    spans = {key: span if span[0] < span[1] else (span[0] - 0.5, span[1] + 0.5) for key, span in spans.items()}
    counts = {key: (np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)) for key in spans}
    for layer, kind, *pair in _values(program, lowered, names):
        span = spans.get((layer, kind))
        if span is not None:
            for total, values in zip(counts[layer, kind], pair, strict=True):
                total += np.histogram(values, BINS, span)[0]
    result: dict[str, dict[str, Histogram]] = {name: {} for name in names}
    for (layer, kind), (before, after) in counts.items():
        low, high = spans[layer, kind]
        result[layer][kind] = Histogram(low, high, tuple(before.tolist()), tuple(after.tolist()))
    return {name: kinds for name, kinds in result.items() if kinds}


def _values(program: Program, lowered: Lowered, names: Sequence[str]) -> Iterator[Pair]:
    twin = program.float_twin or program.graph
    twins = {layer.name: layer for layer in find_layers(twin) if layer.name in names}
    quantized = {layer.name: layer for layer in find_layers(program.graph) if layer.name in twins}
    for name, layer in quantized.items():
        if is_quantized(layer):
            before = get_tensor(twin, twins[name].weight)
            yield name, "weight", before.numpy(), value_of(program.graph, layer.weight).numpy()
            release([before])
    batches = few_batches(program)
    for batch in steps(program.on_step, "histograms", batches, len(batches)):
        simulated = InStep(marked_layers(lowered.simulated, batch))
        for name, (value, expected) in float_layers(twin, twins, batch):
            if name not in quantized:
                continue
            layer = quantized[name]
            if layer.input.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC):
                yield name, "input", value.numpy(), quantize_input(program.graph, layer, value).numpy()
            yield name, "output", expected, simulated.take(name)
