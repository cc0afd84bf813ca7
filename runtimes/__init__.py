"""Engines that run what the exporter wrote; one file per engine, each imports its engine only when it loads."""

from collections.abc import Mapping

from runtimes.base import Runtime
from runtimes.ort import OnnxRuntime
from runtimes.trt import TensorRT

RUNTIMES: Mapping[str, type[Runtime]] = {"onnxruntime": OnnxRuntime, "tensorrt": TensorRT}
"""What runs an artifact, by `Artifact.runtime`."""
