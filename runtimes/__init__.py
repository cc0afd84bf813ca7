"""Engines that run what the exporter wrote; one file per engine, each imports its engine only when it loads."""

from collections.abc import Mapping

from runtimes.base import Runtime
from runtimes.ort import OnnxRuntime

RUNTIMES: Mapping[str, type[Runtime]] = {"onnxruntime": OnnxRuntime}
