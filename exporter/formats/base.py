"""A stored weight format: how the codes of a quantized matrix lie in a file.

    unpack(pack(w)) == w, bit for bit

An algorithm says which codes; a format says how they are stored. Both directions are pure: what goes in is not changed.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from passes.weights import AffineWeight, code_dtype, code_range, group_columns


@dataclasses.dataclass(frozen=True)
class PackedMeta:
    """What the packed tensors of an AffineWeight do not say; `shape` is [out, in]."""

    bits: int
    group_size: int
    shape: tuple[int, int]
    symmetric: bool


@dataclasses.dataclass(frozen=True)
class Packed:
    """A weight as it is stored: tensors by role (codes, scale, zero_point) and how to read them."""

    tensors: Mapping[str, Tensor]
    meta: PackedMeta

    @property
    def bits_per_weight(self) -> float:
        """Counted from the bytes of the tensors, padding included."""
        rows, columns = self.meta.shape
        return 8 * sum(tensor.nbytes for tensor in self.tensors.values()) / (rows * columns)


class WeightFormat(abc.ABC):
    """One way to store a weight."""

    name: ClassVar[str]

    @abc.abstractmethod
    def accepts(self, weight: AffineWeight) -> str:
        """Why this format cannot hold the weight; empty when it can."""

    @abc.abstractmethod
    def pack(self, weight: AffineWeight) -> Packed:
        """The weight as stored. Raises ValueError with the reason when the format cannot hold it."""

    @abc.abstractmethod
    def unpack(self, packed: Packed) -> AffineWeight:
        """The weight that was packed. Raises ValueError when tensors and metadata do not fit together."""

    def checked(self, weight: AffineWeight) -> AffineWeight:
        """The weight itself. Raises ValueError with the reason when this format cannot hold it."""
        reason = self.accepts(weight)
        if reason:
            raise ValueError(reason)
        return weight


def meta_of(weight: AffineWeight) -> PackedMeta:
    """The metadata of a weight."""
    rows, columns = weight.codes.shape
    return PackedMeta(weight.bits, weight.group_size, (rows, columns), weight.zero_point is None)


def fault_of(weight: AffineWeight) -> str:
    """What contradicts the definition of an AffineWeight with whole zero points; empty when nothing does."""
    codes, scale, zero_point = weight.codes, weight.scale, weight.zero_point
    symmetric = zero_point is None
    if codes.dim() != 2 or not codes.numel():
        return f"codes have shape {list(codes.shape)}, not [out, in]"
    if codes.dtype != code_dtype(symmetric):
        return f"codes are {codes.dtype}, not {code_dtype(symmetric)}"
    low, high = code_range(weight.bits, symmetric)
    least, most = (int(value) for value in codes.aminmax())
    if least < low or most > high:
        return f"codes from {least} to {most} are outside of {low} to {high}, the range of {weight.bits} bits"
    rows, columns = codes.shape
    groups = -(-columns // group_columns(columns, weight.group_size))
    if tuple(scale.shape) not in ((rows, groups), (1, groups)):
        return f"scale has shape {list(scale.shape)}, not [{rows} or 1, {groups}]"
    if not scale.is_floating_point() or not bool(scale.isfinite().all()):
        return "scale is not finite floating point"
    if zero_point is None:
        return ""
    if zero_point.shape != scale.shape or zero_point.dtype != scale.dtype:
        return "zero point and scale differ in shape or type"
    if not bool(((zero_point == zero_point.round()) & (zero_point >= low) & (zero_point <= high)).all()):
        return f"zero points are not whole numbers from {low} to {high}"
    return ""


def check_roles(packed: Packed) -> None:
    """Raises ValueError when the tensors are not codes, scale and, if asymmetric, zero_point."""
    roles = ["codes", "scale"] if packed.meta.symmetric else ["codes", "scale", "zero_point"]
    if sorted(packed.tensors) != roles:
        raise ValueError(f"stored are {', '.join(sorted(packed.tensors))}, not {', '.join(roles)}")


def tensor_of(packed: Packed, role: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a role. Raises ValueError when it is not of this type and shape."""
    tensor = packed.tensors[role]
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise ValueError(f"{role} is {tensor.dtype} {list(tensor.shape)}, not {dtype} {list(shape)}")
    return tensor
