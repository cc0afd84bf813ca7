"""Run what was compiled: `qexport.load("out").run({"x": x})`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from numpy.typing import ArrayLike

from exporter.backends.tensorrt.bundle import BundleError, read_bundle
from exporter.errors import InputError, TargetError
from runtimes.base import Array, Artifact, RuntimeFault, Session
from runtimes.ort import OnnxRuntime, Provider
from runtimes.trt import TensorRT

MODEL, ENGINE, BUNDLE = "model.onnx", "model.engine", "trt"


class LoadedModel:
    """A compiled model, ready to run: `inputs` and `outputs` are names, in order."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs, self.outputs = session.inputs, session.outputs

    def run(self, feeds: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """{output: array} for {input: array or CPU tensor}. Raises InputError when the feeds do not fit."""
        try:
            return self._session.run({name: np.asarray(value) for name, value in feeds.items()})
        except RuntimeFault as fault:
            raise InputError(fault.what, fix=fault.fix) from fault


def load(
    out: str | Path,
    *,
    runtime: Literal["onnxruntime", "tensorrt"] | None = None,
    provider: Provider = "cpu",
    flavor: Literal["tensorrt", "rtx"] = "tensorrt",
) -> LoadedModel:
    """The model in the output folder `out`: model.onnx in onnxruntime, or else model.engine in TensorRT.

    Raises InputError when the folder holds neither, or not what `runtime` asks for, and TargetError when the engine is
    missing here or refuses the file.
    """
    folder = Path(out)
    runtime = runtime or ("onnxruntime" if (folder / MODEL).is_file() else "tensorrt")
    name = MODEL if runtime == "onnxruntime" else ENGINE
    if not (folder / name).is_file():
        raise InputError(f"has no {name}", where=str(folder), fix="give an output folder of qexport")
    try:
        if runtime == "onnxruntime":
            return LoadedModel(OnnxRuntime(provider=provider).load(_onnx(folder / MODEL)))
        bundle = read_bundle(folder / BUNDLE)
        artifact = Artifact("tensorrt", folder / ENGINE, bundle.inputs, bundle.outputs)
        return LoadedModel(TensorRT(flavor=flavor).load(artifact))
    except BundleError as error:
        raise InputError(str(error), where=str(folder)) from error
    except RuntimeFault as fault:
        raise TargetError(fault.what, where=str(folder), fix=fault.fix) from fault


def _onnx(path: Path) -> Artifact:
    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own kind derives from Exception only
        raise InputError(f"is damaged: {type(error).__name__}", where=str(path)) from error
    inputs, outputs = (tuple(value.name for value in values) for values in (graph.input, graph.output))
    return Artifact("onnxruntime", path, inputs, outputs)
