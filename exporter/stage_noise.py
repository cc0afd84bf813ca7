"""The noise that each stage makes at every layer's output, by itself and with what it inherits.

A stage takes a network A to a network B that should do the same:

    quantization        the float twin        -> the quantized network in eager torch (`simulated`)
    lowering            the graph as written  -> its file in onnxruntime, node by node
    runtime             the file node by node -> the graph that onnxruntime's optimizer makes of it
    tensorrt dialect    the graph as written  -> its file for TensorRT, in onnxruntime node by node

    total   sum (A_L - B_L)^2                          over the output of layer L in both networks
    own     sum (A_L - B_L(A's outputs of the layers before L))^2

For `own` every layer's output in B is replaced by A's on its way to whoever reads it: what a stage spoils is then seen
at the first layer behind the fault and nowhere else. One run of B gives that of all layers. Values that A and B round
on different sides of a boundary differ by a whole step without any fault. They are few, so a stage that should be exact
is also judged by a typical row (the values of one sample and position):

    typical   mean over batches of the TYPICAL-quantile over rows of sum over channels (A_L - B_L)^2

The optimizer fuses layers with what is around them, and making a value visible would keep it from doing so. So its
graph is written out and run as it stands, and a layer is compared at the first value behind it that both graphs have.
"""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import fx

from exporter.evidence import channel_axis, few_batches
from exporter.lowering.lowered import Lowered
from exporter.lowering.ops import MARK
from exporter.metrics import Comparison, decibels
from exporter.progress import steps
from exporter.stages import DIALECT, LOWERING, QUANTIZATION, RUNTIME, Noises
from exporter.validate import arrays, run_layers, run_marks
from passes.base import Program
from passes.calibration import Batch
from passes.graph import find_layers, inputs_of
from runtimes.base import Array, Artifact, Session
from runtimes.ort import OnnxRuntime

TYPICAL = 0.75
"""Rows with a value on the other side of a rounding boundary are fewer than the rest of this."""

NEAREST = 4
"""Layers before a layer that are named: through residual adds all of them are."""

INTEGERS_OUT = frozenset({"QLinearConv", "QGemm"})
"""onnxruntime's kernels of layers that yield codes."""

FED = "::fed"

UNOPTIMIZED = OnnxRuntime(optimize=False)

Values = dict[str, Array]


class _Sums:
    """One layer in one stage."""

    def __init__(self, axis: int) -> None:
        self.own, self.total = Comparison(ranks=False), Comparison(ranks=False)
        self._axis = axis
        self._signal: list[float] = []
        self._noise: list[float] = []
        self.is_float32 = True

    def add(self, expected: Array, alone: Array, network: Array | None) -> None:
        """A batch: A's value, B's on A's values, and B's in the network (None: not known)."""
        self.own.add(expected, alone)
        if network is not None:
            self.total.add(expected, network)
        self.is_float32 &= expected.dtype == np.float32
        a, b = (np.moveaxis(np.atleast_1d(value), self._axis, -1).astype(np.float64) for value in (expected, alone))
        self._signal.append(float(np.mean(np.square(a).sum(-1))))
        self._noise.append(float(np.quantile(np.square(a - b).sum(-1), TYPICAL)))

    @property
    def typical(self) -> float:
        """dB of a typical row."""
        return decibels(sum(self._signal), sum(self._noise))


def measure_stages(
    program: Program,
    lowered: Mapping[str, Lowered],
    runtime: OnnxRuntime | None = None,
) -> dict[str, Noises]:
    """{layer: its noises} on a few held-out samples; `runtime` (default: the CPU) is what runs the ONNX target."""
    main = lowered.get("onnx") or next(iter(lowered.values()))
    twin = program.float_twin or program.graph
    twins = {layer.name: layer for layer in find_layers(twin)}
    axes = {layer.name: channel_axis(layer, layer, twin) or -1 for layer in twins.values()}
    batches = few_batches(program)
    sums: dict[str, dict[str, _Sums]] = {name: {} for name in twins}

    def add(stage: str, expected: Values, alone: Values, network: Values) -> None:
        for name, value in expected.items():
            if name in sums and name in alone:
                entry = sums[name].setdefault(stage, _Sums(axes[name]))
                entry.add(value, alone[name], network.get(name))

    with tempfile.TemporaryDirectory() as folder:
        files = {name: _File(entry, Path(folder) / name) for name, entry in lowered.items()}
        optimized = _Optimized(main, runtime or OnnxRuntime(), Path(folder)) if "onnx" in lowered else None
        for batch in steps(program.on_step, "stages", batches, len(batches)):
            floats, _ = run_layers(twin, twins, batch)
            forced = run_forced(main.simulated, batch, floats)
            add(QUANTIZATION, floats, forced, run_marks(main.simulated, batch))
            for name, file in files.items():
                plain = run_marks(lowered[name].graph, batch)
                add(DIALECT if name == "trt" else LOWERING, plain, file.run_forced(batch, plain), file.run(batch))
            if optimized is not None:
                add(RUNTIME, *optimized.compare(batch))
    before = layers_before(main.graph)
    return {name: _noises(found, before.get(name, ())) for name, found in sums.items() if found}


def _noises(stages: Mapping[str, _Sums], after: tuple[str, ...]) -> Noises:
    return Noises(
        after=after,
        own={stage: entry.own.figures().sqnr_db for stage, entry in stages.items()},
        total={stage: entry.total.figures().sqnr_db for stage, entry in stages.items()},
        typical={
            stage: entry.typical for stage, entry in stages.items() if stage in (LOWERING, DIALECT) and entry.is_float32
        },
    )


class _Forced(fx.Interpreter):
    """Keeps the value of every mark, and gives its readers another one."""

    def __init__(self, graph: fx.GraphModule, values: Mapping[str, Array]) -> None:
        super().__init__(graph)
        self._values = values
        self.marks: Values = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is not MARK:
            return value
        name = str(n.args[1])
        self.marks[name] = value.float().numpy()
        return torch.from_numpy(self._values[name]).to(value.dtype) if name in self._values else value


def run_forced(graph: fx.GraphModule, batch: Batch, values: Mapping[str, Array]) -> Values:
    """{layer: output} in a lowered graph where the layers behind it are fed `values` {layer: output} instead."""
    interpreter = _Forced(graph, values)
    with torch.no_grad():
        interpreter.run(*(batch[str(node.target)] for node in inputs_of(graph)))
    return interpreter.marks


def layers_before(graph: fx.GraphModule) -> dict[str, tuple[str, ...]]:
    """{layer: the layers whose outputs reach it without another layer in between}, of a lowered graph."""
    reach: dict[fx.Node, tuple[str, ...]] = {}  # the layers that a node's value comes from
    before: dict[str, tuple[str, ...]] = {}
    for node in graph.graph.nodes:
        found = tuple(dict.fromkeys(name for source in node.all_input_nodes for name in reach[source]))
        if node.target is MARK:
            name = str(node.args[1])
            before[name], found = found[-NEAREST:], (name,)
        reach[node] = found
    return before


class _File:
    """A lowered file, node by node, with the layers' outputs visible: as it is, and fed with other values."""

    def __init__(self, lowered: Lowered, folder: Path) -> None:
        folder.mkdir()
        self._artifact, self._folder, self._taps = lowered.artifact, folder, lowered.taps
        self._model = onnx.load(lowered.artifact.model)
        makes = _makers(self._model)
        self._names = [name for name in dict.fromkeys(lowered.taps.values()) if name in makes]
        self._session = open_graph(self._model, self._artifact, self._names, {}, folder / "tapped.onnx")
        self._forced: Session | None = None

    def run(self, batch: Batch) -> Values:
        """{layer: output}."""
        return self._by_layer(self._session.run(arrays(batch)))

    def run_forced(self, batch: Batch, values: Values) -> Values:
        """{layer: output} where whoever reads a layer's output gets that of `values` {layer: output}."""
        feeds = {tap: values[name] for name, tap in self._taps.items() if tap in self._names}
        if self._forced is None:
            self._forced = open_graph(self._model, self._artifact, self._names, feeds, self._folder / "forced.onnx")
        fed = {f"{name}{FED}": value for name, value in feeds.items() if f"{name}{FED}" in self._forced.inputs}
        return self._by_layer(self._forced.run({**arrays(batch), **fed}))

    def _by_layer(self, values: Values) -> Values:
        return {name: values[tap] for name, tap in self._taps.items() if tap in values}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A value of the file and the same value in the optimizer's graph.

    scale, zero_point   of codes: the number that they stand for is (code - zero_point) scale
    channels_last       the optimizer turned [N, C, ...] to [N, ..., C]
    """

    before: str
    after: str
    scale: float = 1.0
    zero_point: float = 0.0
    channels_last: bool = False

    def turned(self, value: Array) -> Array:
        """The file's value as the optimizer's graph holds it."""
        return np.ascontiguousarray(np.moveaxis(value, 1, -1)) if self.channels_last else value

    def decoded(self, value: Array) -> Array:
        """A value of the optimizer's graph as the file has it, codes as the numbers they stand for."""
        value = np.moveaxis(value, -1, 1) if self.channels_last else value
        is_code = np.issubdtype(value.dtype, np.integer)
        return (value.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale) if is_code else value


class _Optimized:
    """The file node by node beside the graph that the optimizer makes of it, at values that both have."""

    def __init__(self, lowered: Lowered, runtime: OnnxRuntime, folder: Path) -> None:
        self._artifact, self._path = lowered.artifact, folder / "optimized_forced.onnx"
        self._as_it_stands = dataclasses.replace(runtime, optimize=False)  # its kernels are those of its provider
        runtime.write_optimized(lowered.artifact, folder / "optimized.onnx")
        written, self._model = onnx.load(lowered.artifact.model), onnx.load(folder / "optimized.onnx")
        self._pairs = pair_values(written, self._model, lowered.taps)
        names = list(dict.fromkeys(pair.before for pair in self._pairs.values()))
        self._names = list(dict.fromkeys(pair.after for pair in self._pairs.values()))
        self._before = open_graph(written, self._artifact, names, {}, folder / "values.onnx")
        self._after = open_graph(
            self._model, self._artifact, self._names, {}, folder / "optimized_values.onnx", self._as_it_stands
        )
        self._forced: Session | None = None

    def compare(self, batch: Batch) -> tuple[Values, Values, Values]:
        """{layer: value} of the file, of the optimizer's graph on the file's values, and of that graph by itself."""
        feeds = arrays(batch)
        before, after = self._before.run(feeds), self._after.run(feeds)
        known = {name: pair for name, pair in self._pairs.items() if _alike(pair, before, after)}
        given = {pair.after: pair.turned(before[pair.before]) for pair in known.values()}
        if self._forced is None:
            self._forced = open_graph(self._model, self._artifact, self._names, given, self._path, self._as_it_stands)
        fed = {f"{name}{FED}": value for name, value in given.items() if f"{name}{FED}" in self._forced.inputs}
        alone = self._forced.run({**feeds, **fed})
        return (
            {name: pair.decoded(given[pair.after]) for name, pair in known.items()},
            {name: pair.decoded(alone[pair.after]) for name, pair in known.items()},
            {name: pair.decoded(after[pair.after]) for name, pair in known.items()},
        )


def _alike(pair: Pair, before: Values, after: Values) -> bool:
    """False for a value that the optimizer keeps in a form which is not known here."""
    expected, found = pair.turned(before[pair.before]), after[pair.after]
    return expected.shape == found.shape and expected.dtype == found.dtype


def pair_values(written: onnx.ModelProto, optimized: onnx.ModelProto, taps: Mapping[str, str]) -> dict[str, Pair]:
    """{layer: the first value at or behind its output, in front of the next layer, that both graphs have}.

    A value is known by its name; that of an integer kernel by the node whose name the kernel took: what it yields are
    the codes of the next QuantizeLinear.
    """
    makes, made = _makers(written), _makers(optimized)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in written.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    kernels = {node.name.partition("_token_")[0]: node for node in optimized.graph.node if node.op_type in INTEGERS_OUT}
    constants = {tensor.name: tensor for tensor in written.graph.initializer}
    others = set(taps.values())
    found: dict[str, Pair] = {}
    for layer, tap in taps.items():
        kernel = kernels.get(makes[tap].name) if tap in makes else None
        waiting = [tap]
        for name in waiting:  # grows while it is walked
            codes = name in makes and makes[name].op_type == "QuantizeLinear"
            if name in made if kernel is None else codes:
                scale, zero = (number(constants[entry]) for entry in makes[name].input[1:]) if codes else (1.0, 0.0)
                found[layer] = Pair(name, name if kernel is None else kernel.output[0], scale, zero, _is_turned(kernel))
                break
            if name == tap or name not in others:
                waiting += [output for node in readers.get(name, []) for output in node.output]
    return found


def open_graph(
    model: onnx.ModelProto,
    artifact: Artifact,
    names: Sequence[str],
    fed: Mapping[str, Array],
    path: Path,
    runtime: OnnxRuntime = UNOPTIMIZED,
) -> Session:
    """The graph run as it stands, `names` among its outputs; whoever reads a value of `fed` reads an input instead.

    The input is called after the value and FED; only the type of `fed`'s arrays matters here. Writes `path`.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    graph = changed.graph
    read: set[str] = set()
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in fed:
                node.input[index] = f"{name}{FED}"
                read.add(name)
    inputs = [name for name in fed if name in read]
    for name in inputs:
        kind = onnx.helper.np_dtype_to_tensor_dtype(fed[name].dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(f"{name}{FED}", kind, [None] * fed[name].ndim))
    present = {value.name for value in graph.output}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    big = sum(len(tensor.raw_data) for tensor in graph.initializer) > 1 << 30
    onnx.save(changed, path, save_as_external_data=big)
    every = (*artifact.inputs, *(f"{name}{FED}" for name in inputs))
    outputs = tuple(dict.fromkeys((*artifact.outputs, *names)))
    return runtime.load(Artifact("onnxruntime", path, every, outputs))


def number(tensor: onnx.TensorProto) -> float:
    """A constant of one entry."""
    return float(numpy_helper.to_array(tensor).reshape(()))


def _is_turned(kernel: onnx.NodeProto | None) -> bool:
    return kernel is not None and any(entry.name == "channels_last" and entry.i for entry in kernel.attribute)


def _makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {output: node for node in model.graph.node for output in node.output if output}
