"""A stored weight format: how the codes of a quantized matrix lie in a file.

    unpack(pack(w)) == w, bit for bit

An algorithm says which codes; a format says how they are stored. Both directions are pure: what goes in is not changed.
Float values (scales, zero points, codebooks) are stored in 16 bits where that loses nothing.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from exporter.formats.meta import PackedMeta
from passes.weights import QuantWeight

FLOATS = {"float32": torch.float32, "float64": torch.float64}
"""Types whose values may be stored in 16 bits, by the name that a file gives them."""


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight as it is stored: tensors by role (codes, scale, ...) and how to read them."""

    tensors: Mapping[str, Tensor]
    meta: PackedMeta

    @property
    def bits_per_weight(self) -> float:
        """Counted from the bytes of the tensors, padding included."""
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / math.prod(self.meta.shape)


class WeightFormat(abc.ABC):
    """One way to store a weight."""

    name: ClassVar[str]

    @abc.abstractmethod
    def accepts(self, weight: QuantWeight) -> str:
        """Why this format cannot hold the weight; empty when it can."""

    @abc.abstractmethod
    def pack(self, weight: QuantWeight) -> Packed:
        """The weight as stored. Raises ValueError with the reason when the format cannot hold it."""

    @abc.abstractmethod
    def unpack(self, packed: Packed) -> QuantWeight:
        """The weight that was packed. Raises ValueError when tensors and metadata do not fit together."""

    @abc.abstractmethod
    def read_meta(self, entry: Mapping[str, object]) -> PackedMeta:
        """The metadata from a file's JSON. Raises ValueError or KeyError when something in it is wrong or missing."""


def check_roles(packed: Packed, roles: set[str]) -> None:
    """Raises ValueError when the tensors have other roles."""
    if set(packed.tensors) != roles:
        raise ValueError(f"stored are {', '.join(sorted(packed.tensors))}, not {', '.join(sorted(roles))}")


def tensor_of(tensors: Mapping[str, Tensor], role: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a role. Raises ValueError when it is not of this type and shape."""
    tensor = tensors[role]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{role} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    return tensor


def narrowed(values: Tensor) -> Tensor:
    """The values in 16 bits where that loses nothing, else as they are."""
    if values.dtype not in FLOATS.values():
        return values
    half = values.half()
    return half if bool((half == values).all()) else values


def widened(values: Tensor, dtype: str) -> Tensor:
    """What was narrowed from `dtype`, in that type again. Raises ValueError when it cannot have been."""
    if not dtype:
        return values
    if dtype not in FLOATS:
        raise ValueError(f"{dtype!r:.40} is no type of values stored in 16 bits")
    if values.dtype not in (torch.float16, FLOATS[dtype]):
        raise ValueError(f"stored values are {values.dtype}, not float16 or {dtype}")
    return values.to(FLOATS[dtype])


def original_type(values: Tensor) -> str:
    """What `widened` needs to know: the name of the values' type if narrowing may change it."""
    return next((name for name, dtype in FLOATS.items() if values.dtype == dtype), "")
