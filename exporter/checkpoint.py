"""model.safetensors: the quantized program's tensors, its weights packed, with all that is needed to read them back.

Tensors keep the names they have in the graph. A quantized layer's weight is stored in one of `exporter.formats`:

    <layer>.weight_codes, .weight_scale, .weight_zero_point      roles codes, scale, zero_point of the format
    quantizers.<value>.scale, .zero_point                        of a static activation quantizer
    anything else                                                float weights, biases, constants, as they are

The metadata is one string of JSON under the key `qexport` (one key, because safetensors writes several in any order):

    schema_version  1
    layers          {name: {format, kind, bits, group_size, shape, symmetric,            how to unpack: [out, in]
                            weight_shape, groups, transposed,                            and the layer's own shape
                            tensors: {role: name of the tensor}}}
    activations     [{value, layers, scale, zero_point, quant_min, quant_max}            scale, zero_point: names
                     or {value, layers, bits, group_size}]                               per token or block
    aliases         {name: name of the tensor that is the same one}
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, fx

from exporter.errors import InputError, InternalError
from exporter.formats import FORMATS, choose_format
from exporter.formats.base import Packed, PackedMeta
from exporter.lowering.fuse import quantized_weight
from exporter.report import Json
from passes.base import Program
from passes.graph import Layer, copy_graph, get_tensor
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weights import AffineWeight

FILE = "model.safetensors"
SCHEMA_VERSION = 1
KEY = "qexport"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class StoredLayer:
    """How a quantized layer's weight is stored.

    `weight_shape` is the layer's own ([out, in / groups, *kernel] of a convolution); `transposed` that of a linear
    layer whose weight is [in, out]; `bits_per_weight` is counted from the bytes.
    """

    format: str
    kind: str
    weight_shape: tuple[int, ...]
    groups: int
    transposed: bool
    bits_per_weight: float

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The weight in the layer's own shape whose matrix [out, in] this is."""
        weight: Tensor
        if self.kind == "linear":
            weight = matrix.t() if self.transposed else matrix
        elif self.kind == "conv_transpose":
            inputs, outputs, *kernel = self.weight_shape
            per_group = matrix.unflatten(0, (self.groups, outputs)).unflatten(2, (inputs // self.groups, *kernel))
            weight = per_group.transpose(1, 2).reshape(self.weight_shape)
        else:
            weight = matrix.unflatten(1, self.weight_shape[1:])
        return weight


@dataclasses.dataclass(frozen=True)
class StaticQuantizer:
    """(clamp(round(x / scale) + zero_point, quant_min, quant_max) - zero_point) scale, in front of `layers`."""

    value: str
    layers: tuple[str, ...]
    scale: float
    zero_point: int
    quant_min: int
    quant_max: int


@dataclasses.dataclass(frozen=True)
class DynamicQuantizer:
    """One symmetric scale a row (group_size -1) or a block of `group_size` values, taken when the layer runs."""

    value: str
    layers: tuple[str, ...]
    bits: int
    group_size: int


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A quantized model read back.

    weights      {layer: its quantized weight}, matrices [out, in]
    layers       {layer: how it is stored}
    activations  the activation quantizers, in the graph's order
    tensors      {name: tensor}: everything that is not part of a packed weight
    """

    weights: Mapping[str, AffineWeight]
    layers: Mapping[str, StoredLayer]
    activations: tuple[StaticQuantizer | DynamicQuantizer, ...]
    tensors: Mapping[str, Tensor]

    def float_weight(self, layer: str) -> Tensor:
        """What the layer multiplies by, in its own shape and type. Raises KeyError if the layer is not quantized."""
        return self.layers[layer].from_matrix(self.weights[layer].dequantize())


# ---- writing --------------------------------------------------------------------------------------------------------


def save_checkpoint(program: Program, folder: Path) -> Path:
    """Write model.safetensors into `folder`; the same program gives the same bytes.

    Raises InternalError when no format can hold a layer's weight.
    """
    from safetensors.torch import save_file

    graph, layers = program.graph, program.layers()
    used = copy_graph(graph)  # holds the tensors that nodes read, and no others
    tensors = {
        **dict(used.named_parameters(remove_duplicate=False)),
        **dict(used.named_buffers(remove_duplicate=False)),
    }
    entries: dict[str, Json] = {}
    for layer in layers:
        packed_layer = _packed(graph, layer)
        if packed_layer is not None:
            entries[layer.name], packed = packed_layer
            tensors.update(packed)
    stored, aliases = _without_sharing(tensors)
    content = {
        "schema_version": SCHEMA_VERSION,
        "layers": entries,
        "activations": _activations(graph, layers),
        "aliases": aliases,
    }
    path = folder / FILE
    path.touch()
    mode = path.stat().st_mode
    save_file(stored, path, metadata={KEY: json.dumps(content, sort_keys=True)})
    path.chmod(mode)  # safetensors makes a file that only its owner can read
    return path


def _packed(graph: fx.GraphModule, layer: Layer) -> tuple[dict[str, Json], dict[str, Tensor]] | None:
    """The metadata of a quantized layer and its packed tensors by name; None when its weight is float."""
    found = quantized_weight(layer)
    if found is None:
        return None
    codes, scale = get_tensor(graph, found.codes), get_tensor(graph, found.scale)
    zero_point = None if found.zero_point is None else get_tensor(graph, found.zero_point)
    weight = AffineWeight(codes, scale, zero_point, found.bits, found.group_size)
    try:
        form = choose_format(weight)
    except ValueError as error:
        raise InternalError(f"its weight cannot be stored: {error}", where=layer.name) from error
    packed = form.pack(weight)
    nodes = {"codes": found.codes, "scale": found.scale, "zero_point": found.zero_point}
    names = {role: str(node.target) for role, node in nodes.items() if node is not None}
    entry: dict[str, Json] = {
        "format": form.name,
        "kind": layer.kind,
        **dataclasses.asdict(packed.meta),
        "weight_shape": list(layer.weight.meta["val"].shape),
        "groups": layer.groups,
        "transposed": layer.transposed,
        "tensors": {role: names[role] for role in packed.tensors},
    }
    return entry, {names[role]: tensor for role, tensor in packed.tensors.items()}


def _activations(graph: fx.GraphModule, layers: list[Layer]) -> list[Json]:
    """The activation quantizers in the graph's order."""
    found: list[Json] = []
    for node in graph.graph.nodes:
        if node.target not in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC):
            continue
        entry: dict[str, Json] = {
            "value": node.args[0].name,
            "layers": [layer.name for layer in layers if layer.input is node],
        }
        if node.target is FAKE_QUANTIZE:
            _, scale, zero_point, quant_min, quant_max = node.args
            names = {"scale": str(scale.target), "zero_point": str(zero_point.target)}
            entry |= {**names, "quant_min": quant_min, "quant_max": quant_max}
        else:
            _, bits, group_size = node.args
            entry |= {"bits": bits, "group_size": group_size}
        found.append(entry)
    return found


def _without_sharing(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors with a memory of their own, and {name: name of the same tensor}: a file holds each of them once."""
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    memories: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        same = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), name)
        if same != name:
            aliases[name] = same
            continue
        memory = tensor.untyped_storage().data_ptr()
        stored[name] = tensor.clone() if memory in memories else tensor
        memories.add(memory)
    return stored, aliases


# ---- reading --------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a file that save_checkpoint wrote. Raises InputError when it is something else, damaged or too new."""
    tensors, text = _read(path)
    try:
        content = _as(dict, json.loads(text))
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"has schema version {version}; this qexport reads {SCHEMA_VERSION}",
                where=str(path),
                fix="read it with the version of qexport that wrote it",
            )
        for name, same in _as(dict, content["aliases"]).items():
            tensors[name] = tensors[str(same)]
        entries = {name: _as(dict, entry) for name, entry in _as(dict, content["layers"]).items()}
        activations = tuple(_quantizer(_as(dict, entry), tensors) for entry in _as(list, content["activations"]))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise _damaged(path, f"its metadata cannot be read ({_reason(error)})") from error
    weights, layers, packed_names = {}, {}, set()
    for name, entry in entries.items():
        try:
            weights[name], layers[name], names = _unpacked(entry, tensors)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise _damaged(path, f"layer {name}: {_reason(error)}") from error
        packed_names |= names
    others = {name: tensor for name, tensor in tensors.items() if name not in packed_names}
    return Checkpoint(weights, layers, activations, others)


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Every tensor in the file, and our metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path), fix="give the path of a model.safetensors") from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise _damaged(path, _reason(error)) from error
    if text is None:
        raise InputError(
            "is no quantized checkpoint of qexport", where=str(path), fix="give model.safetensors of an output folder"
        )
    return tensors, text


def _unpacked(entry: dict[str, Json], tensors: Mapping[str, Tensor]) -> tuple[AffineWeight, StoredLayer, set[str]]:
    """A layer's weight, how it is stored, and the names of its tensors."""
    form = FORMATS.get(_as(str, entry["format"]))
    if form is None:
        raise ValueError(f"format {entry['format']!r} is not known")
    names = {role: _as(str, name) for role, name in _as(dict, entry["tensors"]).items()}
    rows, columns = _integers(entry["shape"])
    meta = PackedMeta(
        _as(int, entry["bits"]), _as(int, entry["group_size"]), (rows, columns), _as(bool, entry["symmetric"])
    )
    packed = Packed({role: tensors[name] for role, name in names.items()}, meta)
    weight = form.unpack(packed)
    layer = StoredLayer(
        format=form.name,
        kind=_as(str, entry["kind"]),
        weight_shape=_integers(entry["weight_shape"]),
        groups=_as(int, entry["groups"]),
        transposed=_as(bool, entry["transposed"]),
        bits_per_weight=packed.bits_per_weight,
    )
    if layer.groups < 1 or layer.from_matrix(torch.empty(rows, columns, device="meta")).shape != layer.weight_shape:
        raise ValueError(f"a weight of shape {list(layer.weight_shape)} has no matrix of {rows} x {columns}")
    return weight, layer, set(names.values())


def _quantizer(entry: dict[str, Json], tensors: Mapping[str, Tensor]) -> StaticQuantizer | DynamicQuantizer:
    value, layers = _as(str, entry["value"]), tuple(_as(str, name) for name in _as(list, entry["layers"]))
    if "scale" not in entry:
        return DynamicQuantizer(value, layers, _as(int, entry["bits"]), _as(int, entry["group_size"]))
    scale, zero_point = float(tensors[_as(str, entry["scale"])]), int(tensors[_as(str, entry["zero_point"])])
    if not 0 < scale < math.inf:
        raise ValueError(f"scale of {value} is {scale}")
    return StaticQuantizer(value, layers, scale, zero_point, _as(int, entry["quant_min"]), _as(int, entry["quant_max"]))


def _as(kind: type[T], value: object) -> T:
    """The value itself, when JSON gave it the type it must have (true is no number)."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{value!r:.40} is no {kind.__name__}")
    return value


def _integers(value: object) -> tuple[int, ...]:
    return tuple(_as(int, number) for number in _as(list, value))


def _reason(error: Exception) -> str:
    """What went wrong, on one line; a KeyError only names what is missing."""
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"truncated or damaged: {what}", where=str(path), fix="compile the model again")
