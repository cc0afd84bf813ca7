"""A file of 16-bit types computed in float32: the same operators and constants, without the rounding in between.

onnxruntime has few bfloat16 kernels on the CPU, and rounds float16 where it likes. Without that rounding the file can
be held to the graph it was written from as tightly as a float32 one; `Lowered.graph` is that graph, likewise widened.
"""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from exporter.lowering.lowered import Lowered

HALVES = frozenset({onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16})
FLOAT = onnx.TensorProto.FLOAT
EXTERNAL_ABOVE = 1 << 30


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model, its 16-bit floats made float32."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    del wide.graph.value_info[:]
    for tensor in wide.graph.initializer:
        _widen(tensor)
    for node in wide.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALVES:
                attribute.i = FLOAT
            elif attribute.type == onnx.AttributeProto.TENSOR:
                _widen(attribute.t)
    return wide


def _widen(tensor: onnx.TensorProto) -> None:
    if tensor.data_type in HALVES:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@contextlib.contextmanager
def in_float32(lowered: Lowered) -> Iterator[Lowered]:
    """The same, its file widened in a folder that is there for as long."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / lowered.artifact.model.name
        model = widened(onnx.load(lowered.artifact.model))
        big = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > EXTERNAL_ABOVE
        onnx.save(model, path, save_as_external_data=big)
        yield dataclasses.replace(lowered, artifact=dataclasses.replace(lowered.artifact, model=path))
