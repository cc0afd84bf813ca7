"""Lowering targets: each folder turns a program into the files one runtime executes."""

from collections.abc import Sequence

from exporter.backends.base import Backend
from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.backends.tensorrt.lower import TensorRTBackend


def backend_for(target: str, arch: Sequence[str] = ()) -> Backend:
    """The backend of --target; `arch` are the GPU architectures a TensorRT engine is for."""
    return TensorRTBackend(tuple(arch)) if target == "trt" else OnnxBackend()
