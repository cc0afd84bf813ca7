"""Which layers the output's error comes from: each layer quantized alone, and all layers but it.

    alone     the float twin, in which only this layer computes as in the quantized network: its weight, its bias and
              the quantizer of its input
    without   the quantized network, in which this layer computes in float, from its input before that quantizer
    gain_db   SQNR of `without` minus SQNR of the quantized network: what leaving the layer in float is worth

No layer is quantized again, and no graph is rewritten: a batch runs through either network once, and for each layer
only what depends on that layer runs anew. Figures are against the float twin; of several outputs the worst counts.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from exporter.metrics import Comparison
from exporter.progress import steps
from exporter.report import LayerSensitivity
from exporter.validate import evaluate_metrics, layer_batches, own_output, unquantized_input
from passes.adapter_nodes import adapted_layers
from passes.base import Program
from passes.calibration import Batch
from passes.graph import Layer, find_layers, inputs_of, value_of
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weight_nodes import is_quantized
from runtimes.base import Array, Session

QUANTIZERS = (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC)

Values = Mapping[fx.Node, Any]
Compute = Callable[[Values], Tensor]
"""A layer's output from the values in front of it."""


def measure_sensitivity(program: Program, spec: str | None) -> tuple[LayerSensitivity, ...]:
    """Every quantized layer on the held-out samples, the most sensitive first; `spec` is that of --eval."""
    twin = program.float_twin or program.graph
    twins = {layer.name: layer for layer in find_layers(twin)}
    layers = quantized_layers(program)
    ends = {name: layer.node for name, layer in layers.items()} | adapted_layers(program.graph)
    alone = {name: noise_alone(program, layer, twins[name], ends[name]) for name, layer in layers.items()}
    without = {name: (ends[name], _in_float(twin, twins[name], layer)) for name, layer in layers.items()}
    batches = layer_batches(program)
    network, of_alone, of_without = (
        WorstOutput(),
        {name: WorstOutput() for name in layers},
        {name: WorstOutput() for name in layers},
    )
    for index, batch in enumerate(batches):
        floats, reference = run_all(twin, batch)
        values, outputs = run_all(program.graph, batch)
        network.add(reference, outputs)
        for name in steps(program.on_step, "layers", layers, len(batches) * len(layers), index * len(layers)):
            of_alone[name].add(reference, run_from(twin, floats, *alone[name]))
            of_without[name].add(reference, run_from(program.graph, values, *without[name]))
    metrics: dict[str, dict[str, dict[str, float | None]]] = {name: {} for name in layers}
    if spec is not None:
        for name in steps(program.on_step, "metrics", layers, len(layers)):
            sessions = {
                "alone": Variant(program, twin, dict([alone[name]])),
                "without": Variant(program, program.graph, dict([without[name]])),
            }
            metrics[name] = evaluate_metrics(spec, sessions)
    found = [
        LayerSensitivity(
            name=name,
            alone_sqnr_db=of_alone[name].sqnr_db(),
            without_sqnr_db=of_without[name].sqnr_db(),
            gain_db=of_without[name].sqnr_db() - network.sqnr_db(),
            metrics=metrics[name],
        )
        for name in layers
    ]
    return tuple(sorted(found, key=lambda layer: layer.alone_sqnr_db))  # stable: equals keep the graph's order


def quantized_layers(program: Program) -> dict[str, Layer]:
    """{name: layer} of those with a quantized weight or input, in the graph's order; adapters' own layers are none."""
    twins = {layer.name for layer in find_layers(program.float_twin or program.graph)}
    return {
        layer.name: layer
        for layer in find_layers(program.graph)
        if layer.name in twins and (is_quantized(layer) or layer.input.target in QUANTIZERS)
    }


def noise_alone(program: Program, layer: Layer, twin: Layer, end: fx.Node) -> tuple[fx.Node, Compute]:
    """The node of the float twin, and what it yields when the layer alone, up to `end`, is as in `program`."""
    source = unquantized_input(layer)
    return twin.node, lambda values: value_of(program.graph, end, {source: values[twin.input]})


def _in_float(twin: fx.GraphModule, float_layer: Layer, layer: Layer) -> Compute:
    """What the layer yields in float, from its input before the quantizer."""
    source = unquantized_input(layer)
    return lambda values: own_output(twin, float_layer, values[source])


class Variant(Session):
    """A network in which some layers compute something else."""

    def __init__(self, program: Program, graph: fx.GraphModule, replaced: Mapping[fx.Node, Compute]) -> None:
        self._graph, self._replaced = graph, replaced
        self.inputs, self.outputs = tuple(program.calibration.batches[0]), program.output_names

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        self.check(feeds)
        batch = {name: torch.from_numpy(np.array(value)) for name, value in feeds.items()}
        _, outputs = run_all(self._graph, batch, self._replaced)
        return {name: value.numpy() for name, value in zip(self.outputs, outputs, strict=True)}


def run_all(
    graph: fx.GraphModule, batch: Batch, replaced: Mapping[fx.Node, Compute] | None = None
) -> tuple[dict[fx.Node, Any], tuple[Tensor, ...]]:
    """Every node's value, and the outputs."""
    interpreter = _Replacing(graph, replaced or {}, keep=True)
    with torch.no_grad():
        outputs = interpreter.run(*(batch[str(node.target)] for node in inputs_of(graph)))
    return interpreter.env, tuple(outputs)


def run_from(graph: fx.GraphModule, values: Values, node: fx.Node, compute: Compute) -> tuple[Tensor, ...]:
    """The outputs when `node` yields what `compute` says, all in front of it being `values`."""
    later = {node}
    for reached in graph.graph.nodes:
        if not later.isdisjoint(reached.all_input_nodes):
            later.add(reached)
    kept = {reached: value for reached, value in values.items() if reached not in later}
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = tuple(_Replacing(graph, {node: compute}).run(initial_env=kept))
    return outputs


class _Replacing(fx.Interpreter):
    """Runs a graph, some of whose nodes yield something else."""

    def __init__(self, graph: fx.GraphModule, replaced: Mapping[fx.Node, Compute], *, keep: bool = False) -> None:
        super().__init__(graph, garbage_collect_values=not keep)
        self._replaced = replaced

    def run_node(self, n: fx.Node) -> Any:
        compute = self._replaced.get(n)
        return super().run_node(n) if compute is None else compute(self.env)


class WorstOutput:
    """The SQNR of the worst output over batches."""

    def __init__(self) -> None:
        self._outputs: list[Comparison] = []

    def add(self, reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """Take in the outputs of a batch."""
        self._outputs = self._outputs or [Comparison(ranks=False) for _ in reference]
        for comparison, one, other in zip(self._outputs, reference, outputs, strict=True):
            comparison.add(one.numpy(), other.numpy())

    def sqnr_db(self) -> float:
        """In dB, over all batches so far."""
        return min(comparison.figures().sqnr_db for comparison in self._outputs)
