"""A TensorRT bundle: what it takes to build an engine, here or on the machine that has the GPU.

    model.onnx (+ model.onnx.data)    the quantized model in TensorRT's dialect
    kernels/*.ptx                     kernels of the plugins, for full TensorRT
    build.json                        schema, names of inputs and outputs, shapes, architectures, the quantized layers,
                                      and which kernels each set of a plugin has

`finish` builds the engine and looks at what became of every quantized weight: one that TensorRT folded back to float
gives the right answer at the wrong size and speed, so it counts as a failure.
"""

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from exporter.backends.tensorrt.build import BuildError, EngineBuild, Flavor, Profile, build_engine
from exporter.backends.tensorrt.folding import PackedWeight, packed_weights, stored_weights
from exporter.lowering.lowered import LoweredLayer

MODEL = "model.onnx"
DESCRIPTION = "build.json"
SCHEMA_VERSION = 1


class BundleError(Exception):
    """The folder is no bundle that this version can read; `str()` is one line that says why."""


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What build.json says. `profiles` has (min, opt, max) shapes; no `arch` means every one from Ampere on."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    profiles: Mapping[str, Profile]
    arch: tuple[str, ...]
    layers: tuple[LoweredLayer, ...]
    kernels: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class EngineResult:
    """A finished engine.

    kernels  {quantized layer: the kernels that hold its weight or compute with it, in execution order}
    folded   quantized layers whose weight the engine does not hold compressed
    bytes    {quantized layer: bytes of its packed constants}
    """

    build: EngineBuild
    kernels: Mapping[str, str]
    folded: tuple[str, ...]
    bytes: Mapping[str, int]


def write_bundle(folder: Path, bundle: Bundle) -> None:
    """Write build.json beside the model."""
    described = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(bundle)}
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def read_bundle(folder: Path) -> Bundle:
    """What `folder` holds. Raises BundleError when it is not a bundle."""
    path = folder / DESCRIPTION
    if not path.is_file() or not (folder / MODEL).is_file():
        raise BundleError(f"{folder} is no TensorRT bundle: it has to hold {DESCRIPTION} and {MODEL}")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        if read["schema_version"] != SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {read['schema_version']}; this qexport reads {SCHEMA_VERSION}"
            )
        return Bundle(
            inputs=tuple(read["inputs"]),
            outputs=tuple(read["outputs"]),
            profiles={str(name): _profile(shapes) for name, shapes in read["profiles"].items()},
            arch=tuple(read["arch"]),
            layers=tuple(LoweredLayer(**layer) for layer in read["layers"]),
            kernels=dict(read.get("kernels", {})),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # what reading a wrong structure raises
        raise BundleError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _profile(shapes: Sequence[Sequence[int]]) -> Profile:
    low, opt, high = (tuple(int(size) for size in shape) for shape in shapes)
    return low, opt, high


def finish(
    folder: Path,
    engine: Path,
    flavor: Flavor,
    *,
    arch: Sequence[str] | None = None,
    profiles: Mapping[str, Profile] | None = None,
    timeout_s: float = 3600.0,
) -> EngineResult:
    """Build the bundle in `folder` into the file `engine`; `arch` and `profiles` replace the bundle's own when given.

    Raises BundleError, and BuildError when the builder is missing, refuses, crashes or is too slow. A folded weight is
    not raised: the engine is there and right, and the caller decides.
    """
    bundle = read_bundle(folder)
    model = folder / MODEL
    if bundle.kernels and flavor == "rtx":
        raise BuildError(f"{folder} needs plugins, which TensorRT for RTX has not; compile it with --trt-flavor rtx")
    with _without_functions(folder, bool(bundle.kernels)) as parsed:
        build = build_engine(
            parsed,
            engine,
            flavor,
            # Full TensorRT builds for the GPU it finds, whatever an rtx engine would be for.
            arch=() if flavor == "tensorrt" else bundle.arch if arch is None else arch,
            profiles=bundle.profiles if profiles is None else profiles,
            plugins=(folder, bundle.kernels) if bundle.kernels else None,
            timeout_s=timeout_s,
        )
    weights = packed_weights(model)
    stored = stored_weights(build, weights, _codes(model, weights))
    parts = {
        layer.name: [part for part in stored if part.weight.name.startswith(layer.codes)] for layer in bundle.layers
    }
    kernels = {
        name: ", ".join(dict.fromkeys(kernel for part in own for kernel in part.kernels)) or "plugin"
        for name, own in parts.items()
    }
    sizes = _initializer_sizes(model)
    return EngineResult(
        build,
        kernels,
        tuple(name for name, own in parts.items() if any(part.state != "compressed" for part in own)),
        {
            layer.name: sum(size for name, size in sizes.items() if name.startswith(layer.codes))
            for layer in bundle.layers
        },
    )


@contextlib.contextmanager
def _without_functions(folder: Path, needed: bool) -> Iterator[Path]:
    """The model as TensorRT is to read it: where a plugin has its name, a function would stand in for it."""
    model = folder / MODEL
    if not needed:
        yield model
        return
    proto = onnx.load(str(model), load_external_data=False)
    del proto.functions[:]
    with tempfile.TemporaryDirectory(prefix=".parsed-", dir=folder) as scratch:
        parsed = Path(scratch) / MODEL
        parsed.write_bytes(proto.SerializeToString())
        external = folder / f"{MODEL}.data"
        if external.is_file():
            os.link(external, parsed.with_name(external.name))
        yield parsed


def _initializer_sizes(model: Path) -> dict[str, int]:
    """Bytes of the model's constants."""
    graph = onnx.load(str(model), load_external_data=False).graph
    return {
        tensor.name: -(-prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8) for tensor in graph.initializer
    }


def _codes(model: Path, weights: Sequence[PackedWeight]) -> dict[str, npt.NDArray[np.generic]]:
    """The codes of the weights, which can be compared and, where they are bytes, looked for in an engine file."""
    wanted = {weight.name for weight in weights}
    tensors = onnx.load(str(model)).graph.initializer
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors if tensor.name in wanted}
