"""Lowered graph -> ONNX with neutral `qexport` nodes, and the frame in which a dialect replaces them.

torch.onnx translates the ATen operators; ours pass through as nodes of domain `qexport`, which a Dialect then expands
into what its runtime executes fast. What the file does not need (source lines, stack traces) is removed: they would
name the machine that built it.
"""

import abc
import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from exporter.errors import InputError
from exporter.lowering.ops import DOMAIN, TRANSLATIONS
from exporter.progress import steps
from passes.base import silent_step
from passes.calibration import Batch
from passes.graph import inputs_of
from passes.memory import Memory, release, release_array
from passes.weights import QuantWeight

OPSET = 21
IR_VERSION = 10
KEPT_METADATA = ("pkg.torch.onnx.name_scopes",)
EXTERNAL_DATA_ABOVE = 500_000_000
"""Bytes of weights above which they go into a file of their own: one file is built in memory, and ends at 2 GiB."""

LARGE = 1 << 16
"""Bytes from which on a constant is worth a place on disk."""

Array = NDArray[np.generic]


def export(
    graph: fx.GraphModule, example: Batch, dynamic: Mapping[str, Mapping[int, str]], output_names: Sequence[str]
) -> ir.Model:
    """The graph as an ONNX model in which `qexport` nodes are still neutral.

    `example` are inputs whose free axes are at least 2 long; free axes carry the labels of `dynamic`.
    Raises InputError for an operator that ONNX has no like of.
    """
    names = [str(node.target) for node in inputs_of(graph)]
    dimensions = {label: torch.export.Dim(label) for axes in dynamic.values() for label in axes.values()}
    automatic = tuple(dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in names)
    labels = tuple({axis: dimensions[label] for axis, label in dynamic.get(name, {}).items()} or None for name in names)
    with _quiet(), _untranslated_named():
        exported = torch.export.export(graph, tuple(example[name] for name in names), dynamic_shapes=automatic)
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=TRANSLATIONS,
            dynamic_shapes=labels,
            input_names=names,
            output_names=list(output_names),
            verbose=False,
        )
    assert program is not None
    model = program.model
    model.ir_version = IR_VERSION
    _name_outputs(model.graph, output_names)
    return model


def _name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Give every output its name, and a node of its own to those that are inputs, constants or another output."""
    for value in [value for node in graph for value in node.outputs]:
        if value.name in names and not value.is_graph_output():
            value.name = f"{value.name}/value"
    for index, (value, name) in enumerate(zip(graph.outputs, names, strict=True)):
        if value.producer() is None:
            if value.is_initializer():
                del graph.initializers[str(value.name)]
                value.name = f"{name}/value"
                graph.register_initializer(value)
            identity = ir.node("Identity", [value], name=f"{name}/Identity")
            graph.append(identity)
            identity.outputs[0].shape, identity.outputs[0].type = value.shape, value.type
            graph.outputs[index] = value = identity.outputs[0]
        value.name = name


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's progress and warnings; errors still come as exceptions."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextlib.contextmanager
def _untranslated_named() -> Iterator[None]:
    """An operator that torch.onnx cannot translate, by name in place of torch.onnx's report."""
    try:
        yield
    except torch.onnx.OnnxExporterError as error:
        cause: BaseException | None = error
        while cause is not None:
            if found := re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", str(cause)):
                raise InputError(
                    f"the model uses {found[1]}, for which ONNX has no operator",
                    where="MODEL",
                    fix="compute that part by other operators, or outside the model",
                ) from error
            cause = cause.__cause__
        raise


class Node:
    """A neutral node, read out."""

    def __init__(self, node: ir.Node, weights: Mapping[str, QuantWeight]) -> None:
        self.node = node
        self._weights = weights
        self.op = node.op_type
        self.out = node.outputs[0]

    def value(self, index: int) -> ir.Value | None:
        """Input `index`, or None when it was left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def array(self, index: int) -> Array | None:
        """Input `index` as the constant it is, or None when it was left out."""
        value = self.value(index)
        if value is None:
            return None
        assert value.const_value is not None, f"{self.node.name}: input {index} is not a constant"
        return value.const_value.numpy()

    def needed(self, index: int) -> Array:
        """Input `index` as the constant it must be."""
        array = self.array(index)
        assert array is not None
        return array

    def integer(self, name: str) -> int:
        """An integer attribute."""
        return self.node.attributes[name].as_int()

    def string(self, name: str) -> str:
        """A string attribute."""
        return self.node.attributes[name].as_string()

    @property
    def name(self) -> str:
        """The layer the node belongs to."""
        return self.string("name")

    @property
    def weight(self) -> QuantWeight:
        """The layer's quantized weight."""
        return self._weights[self.name]

    def next_ops(self, through: frozenset[str] = frozenset()) -> set[str]:
        """Operators that read the node's value; marks and those of `through` stand for their own readers."""
        readers = [use.node for use in self.out.uses()]
        for reader in readers:
            if reader.op_type == "Mark" or reader.op_type in through:
                readers += [use.node for use in reader.outputs[0].uses()]
        return {reader.op_type for reader in readers}


class Builder:
    """Collects the nodes that replace one neutral node, under the layer's name."""

    def __init__(self, model: ir.Model, scope: str, memory: Memory | None = None) -> None:
        self.model, self.scope, self.memory = model, scope, memory or Memory()
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self._counts: dict[str, int] = {}

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: int | float | str | list[int]) -> ir.Value:
        """Append a node and return its output."""
        count = self._counts[kind] = self._counts.get(kind, 0) + 1
        name = f"{self.scope}/{kind}" + (f"_{count}" if count > 1 else "")
        node = ir.node(kind, list(inputs), attributes=attributes, name=name)
        node.outputs[0].name = f"{name}:0"
        self.nodes.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: Array | np.generic | ir.TensorProtocol) -> ir.Value:
        """An initializer of its own (never one shared with another layer), named after the layer."""
        tensor = self._kept(ir.tensor(np.asarray(array)) if isinstance(array, np.ndarray | np.generic) else array)
        full, count = f"{self.scope}.{name}", 1
        while full in self.model.graph.initializers:
            count += 1
            full = f"{self.scope}.{name}_{count}"
        tensor.name = full
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=full, shape=ir.Shape(tensor.shape.numpy()), type=kind, const_value=tensor)
        self.model.graph.register_initializer(value)
        self.constants.append(value)
        return value

    def _kept(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The tensor where the program keeps what it holds for long."""
        if tensor.nbytes < LARGE:
            return tensor
        raw = raw_of(tensor)
        kept = self.memory.keep(torch.from_numpy(np.ascontiguousarray(raw).reshape(-1).view(np.uint8)))
        array = kept.numpy().view(raw.dtype).reshape(raw.shape)
        if isinstance(tensor, ir.PackedTensor):
            return ir.PackedTensor(array, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()))
        return ir.Tensor(array, tensor.dtype)

    @property
    def bytes(self) -> int:
        """Of the initializers so far."""
        return sum(value.const_value.nbytes for value in self.constants if value.const_value is not None)


class Dialect(abc.ABC):
    """How one runtime wants each neutral operator; every method returns the value that replaces the node's.

    The weights are `node.weight`; inputs: of linear x, W and bias, of embedding W and the indices, of a quantizer x,
    scale and zero point. W, and of conv_weight and matrix the one input, only says the shape.
    """

    @abc.abstractmethod
    def linear(self, b: Builder, node: Node) -> ir.Value: ...
    @abc.abstractmethod
    def conv_weight(self, b: Builder, node: Node) -> ir.Value: ...
    @abc.abstractmethod
    def matrix(self, b: Builder, node: Node) -> ir.Value: ...
    @abc.abstractmethod
    def embedding(self, b: Builder, node: Node) -> ir.Value: ...
    @abc.abstractmethod
    def fake_quantize(self, b: Builder, node: Node) -> ir.Value: ...
    @abc.abstractmethod
    def fake_quantize_dynamic(self, b: Builder, node: Node) -> ir.Value: ...


def expand(
    model: ir.Model,
    dialect: Dialect,
    weights: Mapping[str, QuantWeight],
    memory: Memory,
    on_step: Callable[[str, int, int], None],
) -> dict[str, str]:
    """Replace every neutral node in place; returns {layer: name of the value that holds its output}.

    The layers come first: the nodes that made their weights in the graph are then read by nobody, and go.
    """
    layers = {
        "Linear": dialect.linear,
        "ConvWeight": dialect.conv_weight,
        "Matrix": dialect.matrix,
        "Embedding": dialect.embedding,
    }
    quantizers = {"FakeQuantize": dialect.fake_quantize, "FakeQuantizeDynamic": dialect.fake_quantize_dynamic}
    _make_room(model)
    _expand(model, layers, weights, memory, on_step)
    _remove_unread(model)
    _expand(model, quantizers, weights, memory, on_step)
    marks: dict[str, ir.Value] = {}
    for node in _neutral(model, "Mark"):
        source = node.inputs[0]
        assert source is not None
        marks[node.attributes["name"].as_string()] = source
        _substitute(model, node, [], source)
    _clean(model)
    for name, value in marks.items():
        if value.producer() is not None and not value.is_graph_output():
            value.name = f"{name}/output"
    return {name: str(value.name) for name, value in marks.items()}


def _neutral(model: ir.Model, *kinds: str) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == DOMAIN and node.op_type in kinds]


def _expand(
    model: ir.Model,
    expansions: Mapping[str, Callable[[Builder, Node], ir.Value]],
    weights: Mapping[str, QuantWeight],
    memory: Memory,
    on_step: Callable[[str, int, int], None],
) -> None:
    nodes = _neutral(model, *expansions)
    for node in steps(on_step, "nodes", nodes, len(nodes)):
        scope = node.attributes["name"].as_string() if "name" in node.attributes else str(node.name)
        builder = Builder(model, scope.removeprefix("node_"), memory)
        result = expansions[node.op_type](builder, Node(node, weights))
        for new in builder.nodes:
            for key in KEPT_METADATA:
                if key in node.metadata_props:
                    new.metadata_props[key] = node.metadata_props[key]
        _substitute(model, node, builder.nodes, result)
        if scope in weights:
            release([weights[scope].codes])


def _remove_unread(model: ir.Model) -> None:
    """Drop the nodes whose values nobody reads."""
    for node in reversed(list(model.graph)):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)


def _make_room(model: ir.Model) -> None:
    """Rename the initializers that only neutral nodes read: their names are wanted by what replaces them."""
    for name, value in list(model.graph.initializers.items()):
        if all(use.node.domain == DOMAIN for use in value.uses()):
            del model.graph.initializers[name]
            value.name = f"{DOMAIN}::{name}"
            model.graph.register_initializer(value)


def _substitute(model: ir.Model, node: ir.Node, new: list[ir.Node], result: ir.Value) -> None:
    """Put `new` in place of `node`, and `result` in place of its output; type, shape and a graph output's name stay."""
    old = node.outputs[0]
    is_output = any(output is old for output in model.graph.outputs)
    if result.producer() in new or (is_output and result.producer() is not None):
        result.shape, result.type = old.shape, old.type
        if is_output:
            result.name = old.name
    elif is_output:
        identity = ir.node("Identity", [result], name=f"{node.name}/Identity")
        new, result = [*new, identity], identity.outputs[0]
        result.shape, result.type, result.name = old.shape, old.type, old.name
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], new, [old], [result])


def _clean(model: ir.Model) -> None:
    """Drop initializers nobody reads, our domain, and metadata that tells of the machine."""
    for name in [name for name, value in model.graph.initializers.items() if not value.uses()]:
        if not any(output.name == name for output in model.graph.outputs):
            del model.graph.initializers[name]
    if not model.functions:
        model.opset_imports.pop(DOMAIN, None)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph:
        for key in [key for key in node.metadata_props if key not in KEPT_METADATA]:
            del node.metadata_props[key]
        for value in node.outputs:
            value.metadata_props.clear()


def save(model: ir.Model, path: Path, on_step: Callable[[str, int, int], None] = silent_step) -> None:
    """Write the model; weights past EXTERNAL_DATA_ABOVE go one by one into `<path>.data` beside it."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size <= EXTERNAL_DATA_ABOVE:
        ir.save(model, path)
        return
    data = f"{path.name}.data"
    written: list[ir.TensorProtocol] = []

    def before_next(tensor: ir.TensorProtocol, info: ir.external_data.CallbackInfo) -> None:
        on_step(data, info.index, info.total)
        for before in written:
            release_array(raw_of(before))
        written[:] = [tensor]

    # One worker writes in order; more would hold as many tensors at once.
    ir.save(model, path, external_data=data, callback=before_next, max_workers=1)
    on_step(data, 1, 1)


def raw_of(tensor: ir.TensorProtocol) -> Array:
    """The array that holds a tensor's values, packed if they are."""
    raw = tensor.raw if isinstance(tensor, ir.PackedTensor) else tensor.numpy()
    return np.asarray(raw)


def packed_int4(codes: Array, name: str, *, signed: bool) -> ir.TensorProtocol:
    """Codes [...] as an INT4 or UINT4 tensor, two in a byte, the first in its low half."""
    flat = codes.reshape(-1).view(np.uint8) & 15
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    kind = ir.DataType.INT4 if signed else ir.DataType.UINT4
    return ir.PackedTensor(flat[0::2] | (flat[1::2] << 4), kind, shape=ir.Shape(codes.shape), name=name)


def numpy_of(tensor: Tensor) -> Array:
    """A tensor's values."""
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.detach().cpu().view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().cpu().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().cpu().numpy()
