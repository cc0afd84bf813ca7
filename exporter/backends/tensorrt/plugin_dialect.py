"""The dialect of full TensorRT: 3-bit and codebook weights in plugins, everything else in native layers.

    linear of 3-bit weights     qexport::int3_linear, int3_linear_meta   dequantization, product and bias in one kernel
    linear of codebooks         qexport::codebook_linear                 likewise
    convolution of codebooks    qexport::codebook_decode in front of it

The kernels take activations of 16 bits. Where the model's are float32 they are cast to float16 in front of a plugin and
back behind it: 11 bits, far finer than such weights. A weight with numbers that float16 cannot hold, or groups that the
kernels do not know, stays in native layers.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from exporter.backends.tensorrt import packed
from exporter.backends.tensorrt.dialect import TensorRTDialect, has_whole_groups, kind_of
from exporter.backends.tensorrt.plugin import INPUTS, NAMESPACE
from exporter.backends.tensorrt.reference import add_functions
from exporter.formats.int3_hqq import pack_codes
from exporter.gpu_kernels import SMALLEST_GROUP, Dtype, GpuKernel, codebook_kernels, int3_kernels
from exporter.lowering.ops import DOMAIN
from exporter.lowering.to_onnx import Array, Builder, Node, numpy_of
from passes.weights import AffineWeight, CodebookWeight

META_GROUP = 128
"""Quantized scales or zero points that share a scale, in the kernels."""

KERNELS = "kernels"
TYPES = {"packed": "INT32", "codes": "INT8"}
ENGINE_TYPES: Mapping[Dtype, str] = {"float16": "FP16", "bfloat16": "BF16"}


class PluginDialect(TensorRTDialect):
    """Collects in `kernel_sets` what the plugins run: {name: (plugin, the kernels' activation type, kernels)}."""

    def __init__(
        self, compact: frozenset[str] = frozenset(), largest: Mapping[str, int] = MappingProxyType({})
    ) -> None:
        super().__init__(compact, largest)
        self.kernel_sets: dict[str, tuple[str, Dtype, tuple[GpuKernel, ...]]] = {}

    def linear(self, b: Builder, node: Node) -> ir.Value:
        weight, kind = node.weight, half_of(kind_of(node))
        if node.integer("integer"):
            return super().linear(b, node)
        tensors: dict[str, Array] | None
        if isinstance(weight, CodebookWeight):
            tensors, plugin = codebook_tensors(weight, kind), "codebook_linear"
        else:
            tensors = int3_tensors(weight, kind)
            plugin = "int3_linear_meta" if tensors and "scale_meta_scale" in tensors else "int3_linear"
        bias = node.array(2)
        if tensors is not None:
            tensors["bias"] = np.zeros(weight.shape[0], kind) if bias is None else bias.astype(kind)
        if tensors is None or not all_finite(tensors):
            return super().linear(b, node)
        dtype, columns = dtype_of(kind), weight.shape[1]
        if isinstance(weight, CodebookWeight):
            kernels = codebook_kernels(dtype, columns, bias=True, **codebook_options(weight))[:-1]
        else:
            meta = plugin == "int3_linear_meta"
            group = columns // tensors["scale"].shape[1]
            kernels = int3_kernels(dtype, columns, group, bias=True, quant_scale=meta, quant_zero=meta)
        x = node.value(0)
        assert x is not None
        cast = kind_of(node) != kind
        if cast:
            x = b.op("Cast", x, to=ir.DataType.from_numpy(kind).value)
        y = self._plugin(b, node, plugin, kernels, x, tensors, kind)
        return b.op("Cast", y, to=ir.DataType.from_numpy(kind_of(node)).value) if cast else y

    def matrix(self, b: Builder, node: Node) -> ir.Value:
        weight, kind = node.weight, half_of(kind_of(node))
        if not isinstance(weight, CodebookWeight):
            return super().matrix(b, node)
        tensors = codebook_tensors(weight, kind)
        if not all_finite(tensors):
            return super().matrix(b, node)
        decode = codebook_kernels(dtype_of(kind), weight.shape[1], **codebook_options(weight))[-1:]
        matrix = self._plugin(b, node, "codebook_decode", decode, None, tensors, kind)
        if kind_of(node) == kind:
            return matrix
        return b.op("Cast", matrix, to=ir.DataType.from_numpy(kind_of(node)).value)

    def _plugin(
        self,
        b: Builder,
        node: Node,
        plugin: str,
        kernels: tuple[GpuKernel, ...],
        x: ir.Value | None,
        tensors: Mapping[str, Array],
        kind: packed.Kind,
    ) -> ir.Value:
        """The plugin's node; its inputs in the order of the kernels' parameters."""
        inputs = [x if name == "x" else b.constant(initializer_of(name), tensors[name]) for name in INPUTS[plugin]]
        wanted = (plugin, dtype_of(kind), kernels)
        name = next((name for name, known in self.kernel_sets.items() if known == wanted), "")
        name = name or f"{plugin}.{len(self.kernel_sets)}"
        self.kernel_sets[name] = wanted
        attributes: dict[str, Any] = {KERNELS: name, "plugin_namespace": NAMESPACE, "plugin_version": "1", "aot": 1}
        call = ir.node(plugin, inputs, attributes, domain=DOMAIN, name=f"{b.scope}/{plugin}")
        y = call.outputs[0]
        y.name, y.type = f"{call.name}:0", ir.TensorType(ir.DataType.from_numpy(kind))
        b.nodes.append(call)
        add_functions(b.model, plugin)
        self._record(b, node, f"plugin {plugin}")
        return y


def initializer_of(name: str) -> str:
    """Of an input: packed ones by the name that packed initializers have."""
    return packed.CODES if name in TYPES else f"weight_{name}" if name != "bias" else name


def half_of(kind: packed.Kind) -> packed.Kind:
    """The 16-bit type in which a layer of this type goes through a plugin."""
    return kind if kind == ml_dtypes.bfloat16 else np.dtype(np.float16)


def dtype_of(kind: packed.Kind) -> Dtype:
    """The kernels' word for it."""
    return "float16" if kind == np.float16 else "bfloat16"


def all_finite(tensors: Mapping[str, Array]) -> bool:
    """True when no number was too large for its type."""
    return all(np.isfinite(value.astype(np.float32)).all() for value in tensors.values() if value.dtype.kind != "i")


def int3_tensors(weight: AffineWeight, kind: packed.Kind) -> dict[str, Array] | None:
    """The inputs of int3_linear or int3_linear_meta beside x and bias; None for weights that they do not take."""
    rows, columns = weight.shape
    groups = weight.scale.shape[1]
    if weight.bits != 3 or weight.axis != 1 or not has_whole_groups(weight) or columns // groups < SMALLEST_GROUP:
        return None
    lowest = -4 if weight.zero_point is None else 0
    codes = pack_codes((weight.codes.to(torch.int16) - lowest).to(torch.uint8))
    tensors = {"packed": numpy_of(codes)}
    shape = (rows, groups)
    scale_meta = meta_tensors(weight.scale_codes, "scale", shape)
    zero_meta = meta_tensors(weight.zero_codes, "zero", shape)
    if scale_meta and zero_meta:
        return tensors | scale_meta | zero_meta
    zero = np.array(-lowest) if weight.zero_point is None else numpy_of(weight.zero_point)
    for name, values in (("scale", numpy_of(weight.scale)), ("zero", zero)):
        with np.errstate(over="ignore"):
            tensors[name] = np.ascontiguousarray(np.broadcast_to(values, shape)).astype(kind)
    return tensors


def meta_tensors(weight: AffineWeight | None, name: str, shape: tuple[int, int]) -> dict[str, Array] | None:
    """Quantized scales or zero points as the kernels read them: bytes in an int8, float32 for every 128 of them."""
    if weight is None or weight.codes.numel() != shape[0] * shape[1]:
        return None
    count, groups = weight.codes.numel(), weight.scale.shape[1]
    if groups > 1 and weight.group_size % META_GROUP:
        return None
    lowest = -128 if weight.zero_point is None else 0
    codes = (numpy_of(weight.codes).astype(np.int16) - lowest).astype(np.uint8)
    each = -(-count // META_GROUP) if groups == 1 else weight.group_size // META_GROUP
    zeros = np.zeros(weight.scale.shape) if weight.zero_point is None else numpy_of(weight.zero_point)
    needed = -(-count // META_GROUP)
    return {
        name: codes.view(np.int8).reshape(shape),
        f"{name}_meta_scale": np.repeat(numpy_of(weight.scale).reshape(-1), each)[:needed].astype(np.float32),
        f"{name}_meta_zero": np.repeat((zeros - lowest).reshape(-1), each)[:needed].astype(np.float32),
    }


def codebook_tensors(weight: CodebookWeight, kind: packed.Kind) -> dict[str, Array]:
    """The inputs of codebook_linear and codebook_decode beside x and bias."""
    codes = numpy_of(weight.codes)
    stored = codes.astype("<u2" if weight.codebook_bits > packed.BYTE else np.uint8).view(np.int8)
    books = numpy_of(weight.codebooks)
    missing = 2**weight.codebook_bits - books.shape[1]
    with np.errstate(over="ignore"):
        return {
            "codes": stored,
            "codebooks": np.pad(books, ((0, 0), (0, missing), (0, 0), (0, 0))).astype(kind),
            "scales": numpy_of(weight.block_scales).astype(kind),
        }


def codebook_options(weight: CodebookWeight) -> dict[str, Any]:
    """What is fixed when a codebook kernel is compiled."""
    count, _, out_group, in_group = weight.codebooks.shape
    return {
        "num_codebooks": count,
        "codebook_bits": weight.codebook_bits,
        "in_group": in_group,
        "out_group": out_group,
        "group_scales": weight.block_scales.shape[1] > 1,
    }


@dataclasses.dataclass(frozen=True)
class KernelFiles:
    """The part of build.json about kernels, and the PTX files {path in the bundle: content}."""

    described: Mapping[str, Any]
    files: Mapping[str, bytes]


def kernel_files(kernel_sets: Mapping[str, tuple[str, Dtype, tuple[GpuKernel, ...]]]) -> KernelFiles:
    """PTX for sm_80 and later of all kernels, each compiled once. Raises TargetError without NVRTC."""
    names: dict[tuple[str, tuple[tuple[str, int], ...]], str] = {}
    files: dict[str, bytes] = {}
    described: dict[str, Any] = {}
    for name, (plugin, dtype, kernels) in kernel_sets.items():
        listed = []
        for kernel in kernels:
            key = (kernel.entry, kernel.defines)
            if key not in names:
                names[key] = f"kernels/{kernel.entry}.{len(names)}.ptx"
                files[names[key]] = kernel.ptx()
            listed.append(
                {
                    "entry": kernel.entry,
                    "ptx": names[key],
                    "defines": dict(kernel.defines),
                    "sizes": list(kernel.sizes),
                    "block_outputs": kernel.block_outputs,
                    "block_rows": kernel.block_rows,
                    "threads": kernel.threads,
                }
            )
        described[name] = {"plugin": plugin, "types": engine_types(plugin, dtype), "kernels": listed}
    return KernelFiles(described, files)


def engine_types(plugin: str, dtype: Dtype) -> list[str]:
    """TensorRT's types of the plugin's inputs and its output."""
    activation = ENGINE_TYPES[dtype]
    meta = plugin == "int3_linear_meta"
    types = []
    for name in INPUTS[plugin]:
        if meta and name in ("scale", "zero"):
            types.append("INT8")
        else:
            types.append(TYPES.get(name, "FP32" if "_meta_" in name else activation))
    return [*types, activation]


def write_kernels(folder: Path, kernels: KernelFiles) -> None:
    """The PTX files into the bundle."""
    for path, content in kernels.files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(content)
