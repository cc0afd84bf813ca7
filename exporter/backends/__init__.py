"""Lowering targets: each folder turns a program into the files one runtime executes."""

from collections.abc import Sequence

from exporter.backends.base import Backend
from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.lowering.lowered import WeightsAs


def backend_for(target: str, arch: Sequence[str] = (), weights_as: WeightsAs = "auto") -> Backend:
    """The backend of --target; `arch`: the GPUs a TensorRT engine is for, `weights_as`: how ONNX stores weights."""
    return TensorRTBackend(tuple(arch)) if target == "trt" else OnnxBackend(weights_as)
