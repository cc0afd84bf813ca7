"""Which quantized weights did TensorRT keep compressed, and which kernel computes with each?

TensorRT folds constant expressions while it builds: a DequantizeLinear it folds becomes a float weight, four to eight
times the size, in an engine that still computes the right answer. Three things tell the two apart:

1. The layer table names, for each kernel, the ONNX nodes it came from and the type and dims of its constants. A weight
   is compressed if a kernel that names its DequantizeLinear has a constant of the packed type with room for it: of the
   same dims, transposed, reshaped, padded on the channel axes (to 4 for int8 convolutions: [16,1,3,3] -> [16,4,3,3]),
   or stacked with its neighbours' weights (q, k and v of one input: 3 x [64,64] -> [64,192]). It is folded if a matmul
   or convolution that names it has no packed constant and a float one of the weight's size.
2. Kernels that name no DequantizeLinear are matched by type and dims alone, each constant counted once.
3. int8 codes are stored verbatim, row by row (channels last for convolutions), so rows of 16 bytes or more found in the
   engine file prove a weight compressed where there is no table. int4 codes are reordered and cannot be found so.
4. TensorRT merges weights of the same codes (a layer that is called twice) and names one of them: it stands for all.
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx

from exporter.backends.tensorrt.build import EngineBuild
from exporter.backends.tensorrt.layer_table import EngineLayer, EngineTensor

PackedType = Literal["int8", "int4", "fp8"]

ENGINE_TYPES: dict[PackedType, str] = {"int8": "Int8", "int4": "Int4", "fp8": "FP8"}
FLOAT_TYPES = frozenset({"Float", "Half", "BFloat16"})
ONNX_TYPES: dict[int, PackedType] = {
    onnx.TensorProto.INT8: "int8",
    onnx.TensorProto.INT4: "int4",
    onnx.TensorProto.FLOAT8E4M3FN: "fp8",
}
MOVES = frozenset({"Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Identity"})
CHANNEL_PADDING = 32  # the widest channel vector of TensorRT's tensor formats
MIN_ROW_BYTES = 16  # 128 bits do not turn up by chance in an engine of any size
ROWS_LOOKED_FOR = 8


@dataclass(frozen=True)
class PackedWeight:
    """A weight that the ONNX file holds in packed form: its initializer's name, type and dims, and the nodes around it.

    `dequantize` is the name of its DequantizeLinear, `consumers` of the nodes that compute with the result.
    """

    name: str
    dtype: PackedType
    dims: tuple[int, ...]
    dequantize: str
    consumers: tuple[str, ...] = ()


@dataclass(frozen=True)
class StoredWeight:
    """What became of it: `missing` means that neither packed nor float constant could be tied to it.

    `kernels` are short names of the kernels that hold or compute with it, in execution order.
    """

    weight: PackedWeight
    state: Literal["compressed", "folded", "missing"]
    kernels: tuple[str, ...]


def packed_weights(model: Path) -> tuple[PackedWeight, ...]:
    """The weights that `model` stores as int8, int4 or fp8 for a DequantizeLinear; external data is not read."""
    graph = onnx.load(str(model), load_external_data=False).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for value in node.input:
            users.setdefault(value, []).append(node)

    def consumers(value: str) -> Iterator[str]:
        for user in users.get(value, []):
            if user.op_type in MOVES:
                yield from consumers(user.output[0])
            else:
                yield node_name(user)

    found = []
    for node in graph.node:
        tensor = initializers.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if tensor is not None and tensor.data_type in ONNX_TYPES:
            found.append(
                PackedWeight(
                    name=tensor.name,
                    dtype=ONNX_TYPES[tensor.data_type],
                    dims=tuple(tensor.dims),
                    dequantize=node_name(node),
                    consumers=tuple(dict.fromkeys(consumers(node.output[0]))),
                )
            )
    return tuple(found)


def node_name(node: onnx.NodeProto) -> str:
    """The name TensorRT knows the node by: its own, or one made from its first output."""
    return node.name or f"node_of_{node.output[0]}"


def folded_weights(
    build: EngineBuild, expected: Sequence[PackedWeight], codes: Mapping[str, npt.NDArray[np.generic]] | None = None
) -> list[str]:
    """Names of the expected weights that the engine does not hold compressed, in their order."""
    return [stored.weight.name for stored in stored_weights(build, expected, codes) if stored.state != "compressed"]


def stored_weights(
    build: EngineBuild, expected: Sequence[PackedWeight], codes: Mapping[str, npt.NDArray[np.generic]] | None = None
) -> tuple[StoredWeight, ...]:
    """How the engine stores each expected weight. `codes`, arrays by weight name, allow evidence 3 and 4."""
    codes = codes or {}
    holders = _holders(build.layers, expected)
    for weight in [weight for weight in expected if weight not in holders]:
        twin = next((other for other in holders if _equal(weight, other, codes)), None)
        if twin is not None:
            holders[weight] = holders[twin]
    stored = []
    for weight in expected:
        state: Literal["compressed", "folded", "missing"]
        if prod(weight.dims) == 1:
            state = "compressed"  # a literal in a kernel's code: there is nothing to pack
        elif _folded(build.layers, weight, weight in holders):
            state = "folded"
        elif weight in holders or (weight.dtype == "int8" and _verbatim(build.engine, codes.get(weight.name))):
            state = "compressed"
        else:
            state = "missing"
        stored.append(StoredWeight(weight, state, _kernels(build.layers, weight, holders.get(weight))))
    return tuple(stored)


def _holders(layers: Sequence[EngineLayer], expected: Sequence[PackedWeight]) -> dict[PackedWeight, EngineLayer]:
    """The engine layer whose packed constant holds each weight, for those that have one."""
    holders: dict[PackedWeight, EngineLayer] = {}
    by_node = {weight.dequantize: weight for weight in expected}
    unnamed = []
    for layer in layers:
        here = [by_node[node] for node in dict.fromkeys(layer.nodes) if node in by_node]
        if not here:
            unnamed.append(layer)
        for weight in _filled(layer, here, most_misfits=1):
            holders.setdefault(weight, layer)
    for layer in unnamed:
        rest = [weight for weight in expected if weight not in holders]
        for weight in _filled(layer, rest, most_misfits=0):
            holders[weight] = layer
    return holders


def _filled(layer: EngineLayer, weights: Sequence[PackedWeight], most_misfits: int) -> Iterator[PackedWeight]:
    """The weights that the layer's packed constants have room for, best fits first."""
    room = [prod(constant.dims) for constant in layer.constants]
    fits = [
        (misfits, room[index] - prod(weight.dims), position, index)
        for position, weight in enumerate(weights)
        for index, constant in enumerate(layer.constants)
        if constant.dtype == ENGINE_TYPES[weight.dtype]
        and (misfits := _misfits(constant.dims, weight.dims)) <= most_misfits
    ]
    placed: set[int] = set()
    for _, _, position, index in sorted(fits):
        size = prod(weights[position].dims)
        if position not in placed and room[index] >= size:
            room[index] -= size
            placed.add(position)
            yield weights[position]


def _misfits(stored: tuple[int, ...], dims: tuple[int, ...]) -> int:
    """How many axes of a constant are longer than the weight's, padding allowed: 0 it is the weight, 1 a stack with it.

    An axis that is shorter, or another number of axes, makes it no fit at all: the number of axes + 1.
    """
    if prod(stored) == prod(dims):
        return 0
    while len(stored) > len(dims) and stored[0] == 1:
        stored = stored[1:]
    trailing = (1,) * (len(stored) - len(dims))
    no_fit = len(dims) + 1
    if len(stored) != len(dims + trailing) or len(dims) < 2:
        return no_fit
    best = no_fit
    for order in (dims, (dims[1], dims[0], *dims[2:])):
        pairs = list(zip(stored, order + trailing, strict=True))
        if all(have >= want for have, want in pairs):
            padded = sum(have > -(-want // CHANNEL_PADDING) * CHANNEL_PADDING for have, want in pairs[:2])
            best = min(best, padded + sum(have != want for have, want in pairs[2:]))
    return best


def _folded(layers: Sequence[EngineLayer], weight: PackedWeight, held: bool) -> bool:
    """A kernel of the weight has a float constant of its size and no packed one.

    A weight that is also `held` compressed may be used twice. Elementwise kernels do not count against it then: the
    float constant may be any that is added to the result.
    """
    packed = ENGINE_TYPES[weight.dtype]
    return any(
        any(constant.dtype in FLOAT_TYPES and _misfits(constant.dims, weight.dims) == 0 for constant in layer.constants)
        for layer in layers
        if weight.dequantize in layer.nodes
        and not _has_type(layer.constants, packed)
        and not (held and layer.kind == "kgen")
    )


def _equal(weight: PackedWeight, other: PackedWeight, codes: Mapping[str, npt.NDArray[np.generic]]) -> bool:
    one, two = codes.get(weight.name), codes.get(other.name)
    return weight.dtype == other.dtype and one is not None and two is not None and np.array_equal(one, two)


def _has_type(tensors: Sequence[EngineTensor], dtype: str) -> bool:
    return any(tensor.dtype == dtype for tensor in tensors)


def _verbatim(engine: Path, codes: npt.NDArray[np.generic] | None) -> bool:
    """Rows spread over the codes are all in the engine file: as they are, transposed or with channels last."""
    if codes is None or codes.ndim < 2:
        return False
    orders = (codes, np.moveaxis(codes, 1, -1), np.moveaxis(codes, 0, -1))
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for order in orders:
            rows = np.ascontiguousarray(order).reshape(-1, order.shape[-1])
            chosen = rows[:: max(1, len(rows) // ROWS_LOOKED_FOR)]
            if rows.shape[1] >= MIN_ROW_BYTES and all(data.find(row.tobytes()) >= 0 for row in chosen):
                return True
    return False


def _kernels(layers: Sequence[EngineLayer], weight: PackedWeight, holder: EngineLayer | None) -> tuple[str, ...]:
    computing = {weight.dequantize, *weight.consumers}
    return tuple(
        layer.kernel
        for layer in layers
        if layer is holder or (layer.kind != "kgen" and not computing.isdisjoint(layer.nodes))
    )
