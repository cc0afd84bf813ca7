"""An ONNX file beside the network in float, both in onnxruntime.

The float network is a file of the user's, or the artifact's own graph with float weights and without rounding: what
passes added to it (caps per channel of `cle`) is in both.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from exporter.errors import InputError
from exporter.float_twin import make_float
from exporter.lowering.to_onnx import save
from runtimes.base import Artifact, Session
from runtimes.ort import OnnxRuntime


@contextlib.contextmanager
def onnx_pair(path: Path, model: ir.Model, float_model: Path | None, threads: int) -> Iterator[tuple[Session, Session]]:
    """(float, quantized) of the file `path`, whose graph is `model`; without `float_model` that becomes its float twin.

    `float_model` is a file, or a folder where it has the same name. Raises InputError when there is nothing to compare.
    """
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    outputs = tuple(str(value.name) for value in model.graph.outputs)
    runtime = OnnxRuntime(threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        if float_model is not None:
            twin = float_model / path.name if float_model.is_dir() else float_model
            if not twin.is_file():
                raise InputError("no such file", where=f"--float {twin}", fix="give the float model in ONNX")
        elif make_float(model):
            twin = Path(folder) / path.name
            save(model, twin)
        else:
            raise InputError("computes in float: nothing to compare", where=str(path), fix="give --float")
        in_float, quantized = (runtime.load(Artifact("onnxruntime", file, inputs, outputs)) for file in (twin, path))
        yield in_float, quantized
