"""Reference against artifact: outputs, and layer by layer.

Four networks see the same held-out samples:

    reference   the float capture
    plain       the lowered graph in eager torch: what the file says
    simulated   plain and what the runtime's kernels add by themselves: `eager_quantized`
    artifact    the file in its runtime, as shipped and unoptimized

reference - simulated is the cost of quantization, plain - unoptimized artifact a fault of the lowering, and
simulated - artifact the runtime's own arithmetic. Layers are compared with the float twin: the same layers with float
weights, as they were before the first quantizing pass.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, fx

from exporter.blocks import NodeByNode
from exporter.errors import InputError
from exporter.load import resolve_callable
from exporter.lockstep import InStep, float_layers, marked_layers
from exporter.lowering.lowered import Lowered, LoweredLayer
from exporter.metrics import Comparison, Figures, sqnr_db
from exporter.progress import steps
from exporter.report import LayerDiff, LayerSqnr, Sums
from exporter.sample_sums import LAYER_BLOCKS, OUTPUT_BLOCKS, SampleSums
from passes.base import Program
from passes.calibration import Batch
from passes.graph import Layer, find_layers, get_tensor, value_of
from passes.memory import release
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weight_nodes import is_quantized
from runtimes.base import Array, Session
from runtimes.eager import EagerSession

LAYER_BATCH = 8
"""Samples whose layer outputs are held at once, if they take no more than LAYER_BYTES."""

LAYER_BYTES = 32_000_000
"""Of all layers' outputs at once, in one network; a comparison holds those of several."""

OutputFigures = dict[str, Figures]


def arrays(batch: Batch) -> dict[str, Array]:
    """A batch as numpy arrays."""
    return {name: value.numpy() for name, value in batch.items()}


def eager_session(program: Program, graph: fx.GraphModule) -> EagerSession:
    """A session that runs one of the program's graphs in eager torch."""
    names = tuple(program.calibration.batches[0])
    return EagerSession(graph, names, program.output_names, release=release)


def compare_outputs(
    reference: Session, value: Session, batches: Iterable[Batch], sums: dict[str, Sums] | None = None
) -> OutputFigures:
    """Figures of every output over the batches; into `sums`, where given, go those of its samples."""
    comparisons = {name: Comparison() for name in reference.outputs}
    samples = {name: SampleSums() for name in reference.outputs} if sums is not None else {}
    for batch in batches:
        feeds = arrays(batch)
        expected, actual = reference.run(feeds), value.run(feeds)
        for name, comparison in comparisons.items():
            comparison.add(expected[name], actual[name])
        for name, sample in samples.items():
            sample.add(expected[name], actual[name], len(next(iter(feeds.values()))))
    value.close()
    if sums is not None:
        sums |= {name: found.blocks(OUTPUT_BLOCKS) for name, found in samples.items()}
    return {name: comparison.figures() for name, comparison in comparisons.items()}


def layer_bytes(program: Program) -> int:
    """Of all layers' outputs at one sample, in one network."""
    twin = program.float_twin or program.graph
    first = program.in_parts(program.calibration.holdout, 1)[0]
    layers = {layer.name: layer for layer in find_layers(twin)}
    whole = sum(output.nbytes for _, (_, output) in float_layers(twin, layers, first))
    return whole // len(next(iter(first.values())))


def layer_batches(program: Program) -> list[Batch]:
    """The held-out samples in batches small enough to hold every layer's output."""
    at_once = max(1, min(LAYER_BATCH, LAYER_BYTES // max(1, layer_bytes(program))))
    return program.in_parts(program.calibration.holdout, at_once)


class _LayerComparison:
    def __init__(self) -> None:
        self.own, self.accumulated, self.runtime, self.lowering = (Comparison(ranks=False) for _ in range(4))
        self.sums = SampleSums(ranks=False)


def compare_layers(
    program: Program,
    lowered: Lowered,
    kernels: Mapping[str, str | None],
    sums: dict[str, Sums] | None = None,
) -> tuple[LayerDiff, ...]:
    """Every layer with a weight: how it is stored and how far its output is from the float twin's.

    Into `sums`, where given, go those of the samples, of the layer's output in the quantized network.
    """
    twin = program.float_twin or program.graph
    twins = {layer.name: layer for layer in find_layers(twin)}
    quantized = {layer.name: layer for layer in find_layers(program.graph)}
    found = {name: _LayerComparison() for name in quantized if name in twins}
    _run_networks(program, lowered, found)
    program.memory.settle()
    if sums is not None:
        sums |= {name: comparison.sums.blocks(LAYER_BLOCKS) for name, comparison in found.items()}
    stored = {layer.name: layer for layer in lowered.layers}
    return tuple(
        _layer_diff(program, twin, twins[name], quantized[name], comparison, stored.get(name), kernels.get(name))
        for name, comparison in steps(program.on_step, "weights", found.items(), len(found))
    )


def _run_networks(program: Program, lowered: Lowered, found: Mapping[str, _LayerComparison]) -> None:
    """Add every layer of `found` in the networks, which advance side by side, to its comparison."""
    twin = program.float_twin or program.graph
    twins = {layer.name: layer for layer in find_layers(twin) if layer.name in found}
    quantized = {layer.name: layer for layer in find_layers(program.graph)}
    batches = layer_batches(program)
    file = NodeByNode(lowered.artifact, lowered.taps.values())
    for index, batch in enumerate(batches):
        written = InStep(tapped_layers(file, lowered.taps, batch))
        simulated, plain = (InStep(marked_layers(graph, batch)) for graph in (lowered.simulated, lowered.graph))
        layers, total = float_layers(twin, twins, batch), len(batches) * len(twins)
        for name, (value, expected) in steps(program.on_step, "layers", layers, total, index * len(twins)):
            comparison, in_network, in_file = found[name], simulated.take(name), written.take(name)
            comparison.own.add(expected, own_output(program.graph, quantized[name], value).numpy())
            comparison.accumulated.add(expected, in_network)
            comparison.sums.add(expected, in_network, len(next(iter(batch.values()))))
            comparison.runtime.add(expected, in_file)
            comparison.lowering.add(plain.take(name), in_file)


def tapped_layers(file: NodeByNode, taps: Mapping[str, str], batch: Batch) -> Iterator[tuple[str, Array]]:
    """(layer, output) in the file in onnxruntime, unoptimized: to see a value keeps the optimizer from fusing."""
    layers: dict[str, list[str]] = {}
    for layer, value in taps.items():
        layers.setdefault(value, []).append(layer)
    for name, array in file.values(arrays(batch)):
        yield from ((layer, array) for layer in layers.get(name, ()))


def _layer_diff(
    program: Program,
    twin: fx.GraphModule,
    float_layer: Layer,
    layer: Layer,
    comparison: _LayerComparison,
    stored: LoweredLayer | None,
    kernel: str | None,
) -> LayerDiff:
    weight = get_tensor(twin, float_layer.weight)
    figures, sqnr = comparison.accumulated.figures(), None
    if is_quantized(layer):
        sqnr = sqnr_db(weight.numpy(), value_of(program.graph, layer.weight).numpy())
        release([weight])
    return LayerDiff(
        name=layer.name,
        kind=layer.kind,
        format=stored.format if stored else str(weight.dtype).removeprefix("torch."),
        bits_per_weight=stored.bits_per_weight if stored else 8.0 * weight.element_size(),
        params=weight.numel(),
        weight_sqnr_db=sqnr,
        output_sqnr_db=LayerSqnr(
            own=comparison.own.figures().sqnr_db,
            accumulated=figures.sqnr_db,
            onnxruntime=comparison.runtime.figures().sqnr_db,
            onnxruntime_vs_eager_quantized=comparison.lowering.figures().sqnr_db,
        ),
        cosine=figures.cosine,
        max_abs=figures.max_abs,
        kernel=kernel,
        why=stored.why if stored else "",
    )


def run_layers(
    twin: fx.GraphModule, layers: Mapping[str, Layer], batch: Batch
) -> tuple[dict[str, Array], dict[str, Tensor]]:
    """{layer: output} and {layer: input} in the float twin, all of them at once."""
    found = dict(float_layers(twin, layers, batch))
    return {name: output for name, (_, output) in found.items()}, {name: value for name, (value, _) in found.items()}


def run_marks(graph: fx.GraphModule, batch: Batch) -> dict[str, Array]:
    """{layer: output} in a lowered graph, all of them at once."""
    return dict(marked_layers(graph, batch))


def own_output(graph: fx.GraphModule, layer: Layer, value: Tensor, *, quantize: bool = True) -> Tensor:
    """What the layer yields when it is fed `value`: quantized as in the network, or as it is (`quantize` False)."""
    return value_of(graph, layer.node, {unquantized_input(layer) if quantize else layer.input: value})


def quantize_input(graph: fx.GraphModule, layer: Layer, value: Tensor) -> Tensor:
    """`value` after the layer's own activation quantizer, if it has one."""
    return value_of(graph, layer.input, {unquantized_input(layer): value})


def unquantized_input(layer: Layer) -> fx.Node:
    """The node whose value the layer multiplies, before the layer's own activation quantizer."""
    quantized = layer.input.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC)
    return layer.input.all_input_nodes[0] if quantized else layer.input


def predictor(session: Session) -> Callable[[Mapping[str, Any]], dict[str, Array]]:
    """The session as the `predict(inputs) -> outputs` that an evaluation function calls with tensors or arrays."""

    def predict(inputs: Mapping[str, Any]) -> dict[str, Array]:
        return session.run({name: np.asarray(value) for name, value in inputs.items()})

    return predict


def evaluate_metrics(spec: str | None, sessions: Mapping[str, Session]) -> dict[str, dict[str, float | None]]:
    """{metric: {runtime: figure}} of the user's evaluation function, `pkg.mod:function`; {} without one."""
    if spec is None:
        return {}
    function: Callable[..., Any] = resolve_callable(spec, "--eval")
    found: dict[str, dict[str, float | None]] = {}
    for runtime, session in sessions.items():
        try:
            values = function(predictor(session))
            figures = {str(name): float(value) for name, value in values.items()}
        except Exception as error:  # the user's function may raise anything, and feed the model anything
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{spec} failed on {runtime}: {reason}", where="--eval") from error
        for name, figure in figures.items():
            if not math.isfinite(figure):
                raise InputError(f"{spec} gives {name} = {figure} for {runtime}", where="--eval")
            found.setdefault(name, {})[runtime] = figure
    return found
