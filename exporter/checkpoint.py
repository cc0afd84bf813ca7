"""model.safetensors: the quantized program's tensors, its weights packed, with all that is needed to read them back.

Tensors keep the names they have in the graph. A quantized layer's weight is stored in one of `exporter.formats`:

    <layer>.weight_codes, .weight_scale, .weight_zero_point, ... roles codes, scale, zero_point, ... of the format
    quantizers.<value>.scale, .zero_point                        of a static activation quantizer
    anything else                                                float weights, biases, constants, as they are

The metadata is one string of JSON under the key `qexport` (one key, because safetensors writes several in any order):

    schema_version  1
    layers          {name: {format, kind, shape, bits, ... or num_codebooks, ...         how to unpack: [out, in]
                            weight_shape, groups, transposed,                            and the layer's own shape
                            tensors: {role: name of the tensor}}}
    activations     [{value, layers, scale, zero_point, quant_min, quant_max}            scale, zero_point: names
                     or {value, layers, bits, group_size}]                               per token or block
    aliases         {name: name of the tensor that is the same one}
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Set
from pathlib import Path

import torch
from torch import Tensor, fx

from exporter.errors import InputError, InternalError
from exporter.formats import FORMATS, pack_smallest
from exporter.formats.base import Packed
from exporter.formats.meta import integers, typed
from exporter.mapped import save_safetensors
from exporter.progress import steps
from exporter.report import Json
from passes.base import Program
from passes.graph import Layer, copy_graph, get_tensor
from passes.memory import release
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weight_nodes import read_weight, source_of
from passes.weights import QuantWeight

FILE = "model.safetensors"
SCHEMA_VERSION = 1
KEY = "qexport"


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

    weights: Mapping[str, QuantWeight]
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
    graph, layers = program.graph, program.layers()
    used = copy_graph(graph)  # holds the tensors that nodes read, and no others
    tensors = {
        **dict(used.named_parameters(remove_duplicate=False)),
        **dict(used.named_buffers(remove_duplicate=False)),
    }
    entries: dict[str, Json] = {}
    for layer in steps(program.on_step, "packing", layers, len(layers)):
        source = source_of(layer)
        if source is not None:
            parts = _tensor_names(source)
            for name in parts:
                tensors.pop(name, None)  # already when two layers share it
            entries[layer.name], packed = _packed(graph, layer, parts[0], tensors.keys())
            tensors.update({name: program.memory.keep(tensor) for name, tensor in packed.items()})
            release(get_tensor(graph, node) for node in source.all_input_nodes if node.op == "get_attr")
    stored, aliases = _without_sharing(tensors)
    content = {
        "schema_version": SCHEMA_VERSION,
        "layers": entries,
        "activations": _activations(graph, layers),
        "aliases": aliases,
    }
    path = folder / FILE
    save_safetensors(path, stored, {KEY: json.dumps(content, sort_keys=True)}, program.on_step)
    return path


def _tensor_names(source: fx.Node) -> list[str]:
    """Names of the tensors that a dequantizing node reads, its codes first."""
    names = []
    for node in source.all_input_nodes:
        names += [str(node.target)] if node.op == "get_attr" else _tensor_names(node)
    return names


def _packed(
    graph: fx.GraphModule, layer: Layer, codes: str, taken: Set[str]
) -> tuple[dict[str, Json], dict[str, Tensor]]:
    """The metadata of a quantized layer, and its packed tensors by a name that is not taken.

    Its codes are called `codes` in the graph, and are the file's first choice too.
    """
    weight = read_weight(graph, layer)
    assert weight is not None
    try:
        form, packed = pack_smallest(weight)
    except ValueError as error:
        raise InternalError(f"its weight cannot be stored: {error}", where=layer.name) from error
    names = {role: _free(f"{codes.removesuffix('_codes')}_{role}", taken) for role in packed.tensors}
    entry: dict[str, Json] = {
        "format": form.name,
        "kind": layer.kind,
        **dataclasses.asdict(packed.meta),
        "weight_shape": list(layer.weight.meta["val"].shape),
        "groups": layer.groups,
        "transposed": layer.transposed,
        "tensors": dict(names),
    }
    return entry, {names[role]: tensor for role, tensor in packed.tensors.items()}


def _free(name: str, taken: Set[str]) -> str:
    while name in taken:
        name += "_"
    return name


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
        content = typed(dict, json.loads(text))
        version = content.get("schema_version")
        if version != SCHEMA_VERSION:
            raise InputError(
                f"has schema version {version}; this qexport reads {SCHEMA_VERSION}",
                where=str(path),
                fix="read it with the version of qexport that wrote it",
            )
        for name, same in typed(dict, content["aliases"]).items():
            tensors[name] = tensors[str(same)]
        entries = {name: typed(dict, entry) for name, entry in typed(dict, content["layers"]).items()}
        activations = tuple(_quantizer(typed(dict, entry), tensors) for entry in typed(list, content["activations"]))
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


def _unpacked(entry: dict[str, Json], tensors: Mapping[str, Tensor]) -> tuple[QuantWeight, StoredLayer, set[str]]:
    """A layer's weight, how it is stored, and the names of its tensors."""
    form = FORMATS.get(typed(str, entry["format"]))
    if form is None:
        raise ValueError(f"format {entry['format']!r} is not known")
    names = {role: typed(str, name) for role, name in typed(dict, entry["tensors"]).items()}
    meta = form.read_meta(entry)
    packed = Packed({role: tensors[name] for role, name in names.items()}, meta)
    weight = form.unpack(packed)
    layer = StoredLayer(
        format=form.name,
        kind=typed(str, entry["kind"]),
        weight_shape=integers(entry["weight_shape"]),
        groups=typed(int, entry["groups"]),
        transposed=typed(bool, entry["transposed"]),
        bits_per_weight=packed.bits_per_weight,
    )
    if layer.groups < 1 or layer.from_matrix(torch.empty(meta.shape, device="meta")).shape != layer.weight_shape:
        raise ValueError(
            f"a weight of shape {list(layer.weight_shape)} has no matrix of {meta.shape[0]} x {meta.shape[1]}"
        )
    return weight, layer, set(names.values())


def _quantizer(entry: dict[str, Json], tensors: Mapping[str, Tensor]) -> StaticQuantizer | DynamicQuantizer:
    value, layers = typed(str, entry["value"]), tuple(typed(str, name) for name in typed(list, entry["layers"]))
    if "scale" not in entry:
        return DynamicQuantizer(value, layers, typed(int, entry["bits"]), typed(int, entry["group_size"]))
    scale, zero_point = float(tensors[typed(str, entry["scale"])]), int(tensors[typed(str, entry["zero_point"])])
    if not 0 < scale < math.inf:
        raise ValueError(f"scale of {value} is {scale}")
    return StaticQuantizer(
        value, layers, scale, zero_point, typed(int, entry["quant_min"]), typed(int, entry["quant_max"])
    )


def _reason(error: Exception) -> str:
    """What went wrong, on one line; a KeyError only names what is missing."""
    return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"truncated or damaged: {what}", where=str(path), fix="compile the model again")
