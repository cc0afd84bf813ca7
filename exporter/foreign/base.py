"""What the layouts share: a layer's weight as it was taken over, and checks of the tensors it came from.

A layout reads the tensors of one layer, by the last part of their names, into a QuantWeight. It raises ValueError with
one line on what is wrong; `exporter.foreign.folder` puts the file and the layer in front of it.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from passes.weights import QuantWeight

Tensors = Mapping[str, Tensor]
"""{last part of the name: tensor} of one layer."""

Settings = Mapping[str, Any]
"""The folder's quantization_config."""


@dataclasses.dataclass(frozen=True)
class ForeignWeight:
    """A layer's codes and, where its groups lie scattered over the inputs, the order in which they are runs.

    weight    [out, in], columns in that order
    columns   int64 [in]: column k of `weight` multiplies input columns[k]; None: input k
    """

    weight: QuantWeight
    columns: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The float matrix [out, in] in the inputs' own order."""
        matrix = self.weight.dequantize()
        return matrix if self.columns is None else matrix[:, self.columns.argsort()]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a tool stores a layer.

    method   what the configuration calls it
    marker   the tensor that every quantized layer has
    parts    every tensor of a quantized layer but its bias
    check    raises ValueError when the configuration names a variant that is not read here
    read     (tensors, configuration, (out, in)) -> the weight
    """

    method: str
    marker: str
    parts: frozenset[str]
    check: Callable[[Settings], None]
    read: Callable[[Tensors, Settings, tuple[int, int]], ForeignWeight]


def take(tensors: Tensors, part: str, shape: tuple[int, ...], *dtypes: torch.dtype) -> Tensor:
    """The tensor of a part; any floating-point type where no dtype is given.

    Raises ValueError when it is missing, or not of this shape and type; -1 stands for any size.
    """
    if part not in tensors:
        raise ValueError(f"{part} is missing")
    tensor = tensors[part]
    fits = tensor.dim() == len(shape) and all(
        want in (-1, size) for want, size in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise ValueError(f"{part} has shape {list(tensor.shape)}, not [{wanted}]")
    if tensor.dtype not in dtypes if dtypes else not tensor.is_floating_point():
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "floating point"
        raise ValueError(f"{part} is {str(tensor.dtype).removeprefix('torch.')}, not {kinds}")
    return tensor


def finite(part: str, values: Tensor) -> Tensor:
    """The values as float32. Raises ValueError when one is NaN or infinite."""
    values = values.float()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{part} holds NaN or infinite values")
    return values
