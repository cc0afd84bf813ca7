"""Lowering targets: each folder turns a program into the files one runtime executes."""

from collections.abc import Sequence
from typing import Literal

from exporter.backends.base import Backend
from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.backends.tensorrt.build import available_flavor
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.lowering.lowered import Dtype, WeightsAs
from exporter.recipe_values import Profiles


def backend_for(
    target: str,
    arch: Sequence[str] = (),
    weights_as: WeightsAs = "auto",
    flavor: Literal["auto", "tensorrt", "rtx"] = "auto",
    dtype: Dtype = "float32",
    profiles: Profiles | None = None,
) -> Backend:
    """The backend of --target.

    `arch`: the GPUs a TensorRT engine is for; `flavor`: which TensorRT, for `auto` the one that works here; a bundle
    that no TensorRT here can finish is for both. `weights_as`: how weights are stored. `dtype`: of a TensorRT engine's
    values, `profiles` its shapes.
    """
    if target != "trt":
        return OnnxBackend(weights_as)
    plugins = flavor == "tensorrt" or (flavor == "auto" and available_flavor("auto") == "tensorrt")
    return TensorRTBackend(tuple(arch), plugins, dtype, weights_as, profiles or {})
