"""A graph in 16 bits: which values become float16 or bfloat16, and where the casts between them and float32 stand.

TensorRT is strongly typed: it computes in the types that the file says. By kind of value:

    half    inputs, products (linear, convolution, attention, embedding), and what elementwise operators make of those
    full    sums, powers, exponentials, roots, softmax, sines: float32, and what elementwise operators make of those
    side    what comes from constants and integers alone (positions, masks, tables): float32 until it meets a half value

Each operand is cast where it is read; constants are stored as they are read. Inputs and outputs of the graph stay
float32. A mask's "minus infinity" becomes the lowest number of the type. Layer normalization stays in half: its sums
are float32 by definition (stash_type 1).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from exporter.lowering.lowered import Dtype
from exporter.lowering.ops import CONV_WEIGHT, EMBEDDING, LINEAR, MATRIX
from passes.calibration import Batch, watch_values
from passes.graph import add_tensor, aten, call_before, copy_graph, get_tensor, inputs_of, tidy
from passes.memory import Memory
from passes.ops import DEQUANTIZE, DEQUANTIZE_CODEBOOK, FAKE_QUANTIZE
from passes.weights import AffineWeight, QuantWeight

Kind = Literal["half", "full", "side"]

TYPES: Mapping[Dtype, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

MASK = 1e30
"""Values from here on stand for infinity."""

FULL = frozenset(
    [
        "softmax",
        "_softmax",
        "log_softmax",
        "_log_softmax",
        "logsumexp",
        "rms_norm",
        "group_norm",
        "instance_norm",
        "batch_norm",
        "pow",
        "mean",
        "sum",
        "var",
        "std",
        "norm",
        "linalg_vector_norm",
        "exp",
        "exp2",
        "expm1",
        "log",
        "log2",
        "log10",
        "log1p",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "cumsum",
        "prod",
        "cos",
        "sin",
    ]
)
"""Operators that are computed in float32."""

PRODUCTS = frozenset(
    [
        "linear",
        "addmm",
        "mm",
        "bmm",
        "matmul",
        "baddbmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "scaled_dot_product_attention",
        "einsum",
    ]
)

WITH_NUMBERS = frozenset(
    [
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "clamp",
        "clamp_min",
        "clamp_max",
        "hardtanh",
        "lerp",
        "addcmul",
        "addcdiv",
        "remainder",
        "fmod",
    ]
)
"""Operators whose numbers are inputs in ONNX, of the type of the others; elsewhere they are float32 attributes."""

FLOAT_ONLY = {
    ir.DataType.FLOAT16: frozenset(["Softmax"]),
    ir.DataType.BFLOAT16: frozenset(["Softmax", "HardSwish", "Mish"]),
}
"""ONNX operators that are not computed in a type: sums (torch.onnx writes attention with a Softmax), and what the
parser of TensorRT refuses in it."""

ATTENTION = aten.scaled_dot_product_attention.default
ALWAYS_HALF = frozenset({DEQUANTIZE, DEQUANTIZE_CODEBOOK, FAKE_QUANTIZE, LINEAR, CONV_WEIGHT, MATRIX, EMBEDDING})


@dataclasses.dataclass
class Seen:
    """A node's values on the data: are they float32, the largest number, the largest with masks, the width."""

    is_float32: bool = False
    width: int = 0
    largest: float = 0.0
    extreme: float = 0.0


@dataclasses.dataclass(frozen=True)
class Typed:
    """A float32 graph, what its nodes yield on data, and the kind of each node that yields float32."""

    graph: fx.GraphModule
    seen: Mapping[fx.Node, Seen]
    kinds: Mapping[fx.Node, Kind]


def typed(graph: fx.GraphModule, batches: Sequence[Batch], *, exact_scales: bool = False) -> Typed:
    """Run the graph on the batches and say what each node is.

    `exact_scales`: scales and zero points that are made of codes of their own are not rounded to 16 bits.
    """
    seen = {node: Seen() for node in graph.graph.nodes}

    def look(node: fx.Node, value: Any) -> None:
        for tensor in value if isinstance(value, tuple | list) else (value,):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                entry = seen[node]
                entry.is_float32, entry.width = True, tensor.shape[-1] if tensor.dim() else 1
                entry.extreme = max(entry.extreme, largest_of(tensor))
                entry.largest = max(entry.largest, largest_of(tensor[tensor.abs() < MASK]))

    watch_values(graph, batches, look)
    kinds: dict[fx.Node, Kind] = {}
    for node in graph.graph.nodes:
        if seen[node].is_float32 and node.op != "output":
            sources = [kinds[source] for source in node.all_input_nodes if source in kinds]
            kinds[node] = _kind_of(node, sources, exact_scales)
    return Typed(graph, seen, kinds)


def largest_of(tensor: Tensor) -> float:
    """The largest absolute value, infinity for one that is none; 0 of an empty tensor."""
    largest = float(tensor.abs().max()) if tensor.numel() else 0.0
    return math.inf if math.isnan(largest) else largest


def _kind_of(node: fx.Node, sources: Sequence[Kind], exact_scales: bool) -> Kind:
    name = packet(node)
    if node.op == "placeholder":
        return "half"
    if node.op == "get_attr" or _is_meta(node):
        return "side"
    if exact_scales and node.target is DEQUANTIZE and any(source.op != "get_attr" for source in node.all_input_nodes):
        return "full"
    if node.target in ALWAYS_HALF or name == "embedding":
        return "half"
    if all(source == "side" for source in sources):
        return "side"
    if name in PRODUCTS:
        return "half"
    return "full" if name in FULL or "dtype" in node.kwargs or "full" in sources else "half"


def packet(node: fx.Node) -> str:
    """The operator's name without its overload."""
    return str(getattr(node.target, "overloadpacket", "")).rpartition(".")[2]


def _is_meta(node: fx.Node) -> bool:
    """True for scales and zero points that are made of codes of their own: these stay float32."""
    return node.target is DEQUANTIZE and any(
        reader.target is DEQUANTIZE for user in node.users for reader in user.users
    )


def overflows(found: Typed, dtype: torch.dtype) -> dict[str, str]:
    """{layer or value: why} of what the type cannot hold: numbers too large, and scales that would become 0."""
    info = torch.finfo(dtype)
    refused: dict[str, str] = {}
    if dtype != torch.float16:
        return refused  # the range of float32
    for node, kind in found.kinds.items():
        largest = found.seen[node].largest
        halved = kind == "half" or any(found.kinds.get(user) == "half" for user in node.users)
        if not halved:
            continue
        if largest > info.max:
            what = "its values reach" if node.op == "get_attr" else "its values on the calibration data reach"
            refused[name_of(node)] = f"{what} {largest:.4g}, past float16's {info.max:.0f}; give --dtype bfloat16"
        elif 0 < largest < info.smallest_normal * info.eps / 2 and node.op == "get_attr":
            refused[name_of(node)] = f"its values of {largest:.2g} would be 0 in float16; give --dtype bfloat16"
    return refused


def name_of(node: fx.Node) -> str:
    """The layer, the constant or the value that a node is to the user."""
    if node.target in (LINEAR, CONV_WEIGHT, MATRIX, EMBEDDING):
        return str(node.args[-1])
    return str(node.meta.get("layer_name", node.target if node.op in ("get_attr", "placeholder") else node.name))


def cast(
    found: Typed, dtype: torch.dtype, *, hold: torch.dtype | None = None, memory: Memory | None = None
) -> fx.GraphModule:
    """The graph in `dtype`, in a graph of its own; inputs and outputs stay float32.

    `hold` float32: the same nodes and the same constants, rounded to `dtype`, while everything is computed in float32.
    """
    graph = copy_graph(found.graph)
    by_name = {node.name: node for node in found.graph.graph.nodes}
    return _Caster(graph, found, by_name, dtype, hold or dtype, memory or Memory()).run()


class _Caster:
    """Rewrites one graph; `original` gives the node of `found` by its name."""

    def __init__(
        self,
        graph: fx.GraphModule,
        found: Typed,
        original: Mapping[str, fx.Node],
        dtype: torch.dtype,
        hold: torch.dtype,
        memory: Memory,
    ) -> None:
        self._graph, self._found, self._original = graph, found, original
        self._dtype, self._hold, self._memory = dtype, hold, memory
        self._done: dict[tuple[fx.Node, bool], fx.Node] = {}
        self._last_input = inputs_of(graph)[-1]

    def run(self) -> fx.GraphModule:
        for node in list(self._graph.graph.nodes):
            if node.op == "output":
                node.args = (tuple(self._operand(value, half=False) for value in node.args[0]),)
            elif node.op == "call_function":
                self._node(node)
        tidy(self._graph)
        return self._graph

    def _node(self, node: fx.Node) -> None:
        original = self._original[node.name]
        if original not in self._found.kinds and not any(source in self._kinds for source in original.all_input_nodes):
            return
        half = self._wants_half(original)
        if half and node.target is ATTENTION:
            self._scale_queries(node)
        for source in list(node.all_input_nodes):
            node.replace_input_with(source, self._operand(source, half=half))
        if half:
            fit = self._rounded if packet(node) in WITH_NUMBERS else self._within
            node.args = map_aggregate(node.args, fit)
            node.kwargs = map_aggregate(node.kwargs, fit)

    def _scale_queries(self, node: fx.Node) -> None:
        """Attention on scaled queries: torch.onnx would multiply queries and keys by a rounded square root."""
        queries = node.args[0]
        assert isinstance(queries, fx.Node)
        scale = node.kwargs.get("scale") or self._found.seen[self._original[queries.name]].width ** -0.5
        assert isinstance(scale, float)
        factor = torch.tensor(scale).to(self._dtype).to(self._hold)
        constant = add_tensor(self._graph, f"{node.name}_scale", factor, node)
        scaled = call_before(self._graph, node, aten.mul.Tensor, (self._operand(queries, half=True), constant))
        node.args = (scaled, *node.args[1:])
        node.kwargs = {**node.kwargs, "scale": 1.0}

    @property
    def _kinds(self) -> Mapping[fx.Node, Kind]:
        return self._found.kinds

    def _wants_half(self, node: fx.Node) -> bool:
        """Whether the node reads its float operands in half; one that yields no float reads them as they come."""
        if node in self._kinds:
            return self._kinds[node] == "half"
        sources = [self._kinds[source] for source in node.all_input_nodes if source in self._kinds]
        return "half" in sources and "full" not in sources

    def _within(self, value: Any) -> Any:
        """A number that the type can hold."""
        limit = torch.finfo(self._dtype).max
        if isinstance(value, float) and math.isfinite(value) and abs(value) > limit:
            return math.copysign(limit, value)
        return value

    def _rounded(self, value: Any) -> Any:
        """A number as the file has it: a constant of the type."""
        value = self._within(value)
        return torch.tensor(value).to(self._dtype).item() if isinstance(value, float) else value

    def _operand(self, node: fx.Node, *, half: bool) -> fx.Node:
        """The node's value in the type that is wanted."""
        original = self._original.get(node.name)
        kind = self._kinds.get(original) if original is not None else None
        is_half = kind == "half" and node.op != "placeholder"
        if original is None or kind is None or is_half == half:
            return node
        if (node, half) not in self._done:
            self._done[node, half] = self._constant(node) if node.op == "get_attr" else self._cast(node, original, half)
        return self._done[node, half]

    def _constant(self, node: fx.Node) -> fx.Node:
        value = get_tensor(self._graph, node)
        limit = torch.finfo(self._dtype).max
        value = torch.where(value.abs() < MASK, value, value.clamp(-limit, limit)).to(self._dtype).to(self._hold)
        return add_tensor(self._graph, f"{node.target}_16", self._memory.keep(value), node)

    def _cast(self, node: fx.Node, original: fx.Node, half: bool) -> fx.Node:
        behind = self._last_input if node.op == "placeholder" else node
        limit = torch.finfo(self._dtype).max
        with self._graph.graph.inserting_after(behind):
            if half and self._found.seen[original].extreme > limit:
                node = behind = self._graph.graph.call_function(aten.clamp.default, (node, -limit, limit))
        with self._graph.graph.inserting_after(behind):
            return self._graph.graph.call_function(aten.to.dtype, (node, self._hold if half else torch.float32))


def rounded_weight(weight: QuantWeight, dtype: torch.dtype) -> QuantWeight:
    """The weight with its numbers rounded to `dtype`, as float32; scales of scales stay as they are."""

    def rounded(values: Tensor) -> Tensor:
        return values.to(dtype).float()

    if isinstance(weight, AffineWeight):
        zero = None if weight.zero_point is None else rounded(weight.zero_point)
        return dataclasses.replace(weight, scale=rounded(weight.scale), zero_point=zero)
    return dataclasses.replace(weight, codebooks=rounded(weight.codebooks), scales=rounded(weight.scales))


def float_only(model: ir.Model) -> None:
    """Have the operators of FLOAT_ONLY compute in float32, casts around them."""
    for node in list(model.graph):
        source, result = node.inputs[0] if node.inputs else None, node.outputs[0]
        kind = result.dtype
        if source is None or kind is None or node.op_type not in FLOAT_ONLY.get(kind, ()):
            continue
        wide = ir.node("Cast", [source], attributes={"to": ir.DataType.FLOAT.value}, name=f"{node.name}/float")
        narrow = ir.node("Cast", [result], attributes={"to": kind.value}, name=f"{node.name}/narrow")
        wide.outputs[0].name, narrow.outputs[0].name = f"{wide.name}:0", f"{narrow.name}:0"
        wide.outputs[0].shape, wide.outputs[0].type = source.shape, ir.TensorType(ir.DataType.FLOAT)
        narrow.outputs[0].shape, narrow.outputs[0].type = result.shape, ir.TensorType(kind)
        ir.convenience.replace_all_uses_with(result, narrow.outputs[0])
        narrow.replace_input_with(0, result)
        node.replace_input_with(0, wide.outputs[0])
        result.type = ir.TensorType(ir.DataType.FLOAT)
        model.graph.insert_before(node, wide)
        model.graph.insert_after(node, narrow)
