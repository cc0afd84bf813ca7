"""What the formats of an AffineWeight share: all but how the codes lie.

codes                as the format says
scale                [out or 1, groups] (along axis 0 [out / group_size, in]); 16 bits where that loses nothing
zero_point           whole numbers that are codes: as the format says; others: like the scales; symmetric: none
scale_codes, ...     instead of `scale`, when the scales are quantized: the tensors of that matrix [1, groups in all],
                     codes as a stream of bits; likewise zero_point_codes, ...
"""

import abc
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from exporter.formats.base import Packed, WeightFormat, check_roles, narrowed, original_type, tensor_of, widened
from exporter.formats.bit_stream import pack_bits, packed_width, unpack_bits
from exporter.formats.meta import AffineMeta
from passes.weights import AffineWeight, QuantWeight, code_dtype, code_range, group_columns


class AffineFormat(WeightFormat):
    """A format of AffineWeight; subclasses say which widths of code they hold and how codes and zero points lie."""

    widths: ClassVar[range]
    float8: ClassVar[bool] = False
    """Its codes are 8-bit floats, not integers."""

    @abc.abstractmethod
    def pack_matrix(self, weight: AffineWeight) -> Tensor:
        """The codes as stored."""

    @abc.abstractmethod
    def unpack_matrix(self, tensors: Mapping[str, Tensor], meta: AffineMeta) -> Tensor:
        """The codes [out, in] again, from the tensor of role codes."""

    def pack_zeros(self, zeros: Tensor, bits: int) -> Tensor:
        """Zero points uint8 [rows, groups] as stored: in as many bits as a code."""
        return pack_bits(zeros.reshape(1, -1), bits)[0]

    def unpack_zeros(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], bits: int) -> Tensor:
        """Zero points uint8 of a shape again, from the tensor of role zero_point."""
        count = torch.Size(shape).numel()
        stored = tensor_of(tensors, "zero_point", torch.uint8, (packed_width(count, bits),))
        return unpack_bits(stored[None], count, bits).view(shape)

    def accepts(self, weight: QuantWeight) -> str:
        """Affine weights of its widths that do not contradict themselves."""
        if not isinstance(weight, AffineWeight):
            return "it does not hold codebooks"
        if weight.is_float8 != self.float8:
            return f"it does not hold {weight.codes.dtype}"
        return self._fault_of_width(weight.bits) or fault_of(weight)

    def pack(self, weight: QuantWeight) -> Packed:
        """Shares the tensors that need no change."""
        checked = self._checked(weight)
        meta = AffineMeta.of(checked, original_type(checked.scale))
        tensors = {"codes": self.pack_matrix(checked)}
        if checked.scale_codes is not None:
            tensors |= _prefixed("scale", QUANTIZED_VALUES.pack(checked.scale_codes).tensors)
        else:
            tensors["scale"] = narrowed(checked.scale)
        zero_point = checked.zero_point
        if checked.zero_codes is not None:
            tensors |= _prefixed("zero_point", QUANTIZED_VALUES.pack(checked.zero_codes).tensors)
        elif zero_point is not None:
            low, high = code_range(checked.bits, symmetric=False)
            are_codes = (zero_point == zero_point.round()) & (zero_point >= low) & (zero_point <= high)
            if bool(are_codes.all()):
                tensors["zero_point"] = self.pack_zeros(zero_point.to(torch.uint8), checked.bits)
            else:
                tensors["zero_point"] = narrowed(zero_point)
        return Packed(tensors, meta)

    def unpack(self, packed: Packed) -> AffineWeight:
        """Shares the tensors that need no change."""
        meta, tensors = packed.meta, packed.tensors
        assert isinstance(meta, AffineMeta)
        check_roles(packed, set(_roles(meta)))
        reason = self._fault_of_width(meta.bits)
        if min(meta.shape) < 1:
            reason = f"no matrix has the shape {list(meta.shape)}"
        if reason:
            raise ValueError(reason)
        scale_codes, zero_codes = (
            None if inner is None else QUANTIZED_VALUES.unpack(_part(role, tensors, inner))
            for role, inner in (("scale", meta.scale), ("zero_point", meta.zero_point))
        )
        scale = widened(tensors["scale"], meta.dtype) if scale_codes is None else _values(scale_codes, meta)
        zero_point = None
        if zero_codes is not None:
            zero_point = _values(zero_codes, meta)
        elif not meta.symmetric and tensors["zero_point"].is_floating_point():
            zero_point = widened(tensors["zero_point"], meta.dtype)
        elif not meta.symmetric:
            zero_point = self.unpack_zeros(tensors, tuple(scale.shape), meta.bits).to(scale.dtype)
        return self._checked(
            AffineWeight(
                self.unpack_matrix(tensors, meta),
                scale,
                zero_point,
                meta.bits,
                meta.group_size,
                meta.axis,
                scale_codes,
                zero_codes,
            )
        )

    def read_meta(self, entry: Mapping[str, object]) -> AffineMeta:
        """An AffineMeta."""
        return AffineMeta.read(entry)

    def _fault_of_width(self, bits: int) -> str:
        """Why codes of `bits` are not held; empty when they are."""
        return "" if bits in self.widths else f"{bits} bits are not {self.widths.start} to {self.widths.stop - 1}"

    def _checked(self, weight: QuantWeight) -> AffineWeight:
        """The weight itself. Raises ValueError with the reason when this format cannot hold it."""
        reason = self.accepts(weight)
        if reason:
            raise ValueError(reason)
        assert isinstance(weight, AffineWeight)
        return weight


class BitStreamFormat(AffineFormat):
    """Every row of codes as a stream of bits; symmetric codes as two's complement."""

    def width(self, bits: int) -> int:
        """Bits that a code of `bits` takes."""
        return bits

    def pack_matrix(self, weight: AffineWeight) -> Tensor:
        """uint8 [out, ceil(in * width / 8)]."""
        return pack_bits(weight.codes, self.width(weight.bits))

    def unpack_matrix(self, tensors: Mapping[str, Tensor], meta: AffineMeta) -> Tensor:
        """The codes."""
        rows, columns = meta.shape
        width = self.width(meta.bits)
        stored = tensor_of(tensors, "codes", torch.uint8, (rows, packed_width(columns, width)))
        codes = unpack_bits(stored, columns, width)
        if not meta.symmetric:
            return codes
        # Flipping the sign bit and taking its weight off again extends the sign to the whole byte.
        half = 2 ** (width - 1)
        signed: Tensor = (codes ^ half).view(torch.int8) - half
        return signed

    def pack_zeros(self, zeros: Tensor, bits: int) -> Tensor:
        """As wide as the codes."""
        return super().pack_zeros(zeros, self.width(bits))

    def unpack_zeros(self, tensors: Mapping[str, Tensor], shape: tuple[int, ...], bits: int) -> Tensor:
        """As wide as the codes."""
        return super().unpack_zeros(tensors, shape, self.width(bits))


class _QuantizedValues(BitStreamFormat):
    """Scales and zero points that are quantized themselves."""

    name: ClassVar[str] = "quantized values"
    widths: ClassVar[range] = range(1, 9)


QUANTIZED_VALUES = _QuantizedValues()


def fault_of(weight: AffineWeight) -> str:
    """What contradicts the definition of an AffineWeight; empty when nothing does."""
    codes, symmetric = weight.codes, weight.zero_point is None
    if codes.dim() != 2 or not codes.numel():
        return f"codes have shape {list(codes.shape)}, not [out, in]"
    if weight.is_float8:
        return _fault_of_float8(weight) or _fault_of_scales(weight)
    if codes.dtype != code_dtype(symmetric):
        return f"codes are {codes.dtype}, not {code_dtype(symmetric)}"
    low, high = code_range(weight.bits, symmetric)
    least, most = (int(value) for value in codes.aminmax())
    if least < low or most > high:
        return f"codes from {least} to {most} are outside of {low} to {high}, the range of {weight.bits} bits"
    return _fault_of_scales(weight)


def _fault_of_float8(weight: AffineWeight) -> str:
    """What 8-bit floats cannot be beside their codes; empty when it is not so."""
    if weight.zero_point is not None or weight.bits != 8:
        return "8-bit floats are symmetric codes of 8 bits"
    return "" if bool(weight.codes.float().isfinite().all()) else "codes are not finite"


def _fault_of_scales(weight: AffineWeight) -> str:
    """What contradicts the definition in scales and zero points; empty when nothing does."""
    scale, zero_point, symmetric = weight.scale, weight.zero_point, weight.zero_point is None
    if weight.axis not in (0, 1):
        return f"axis {weight.axis} is not 0 or 1"
    rows = weight.codes.shape[0]
    if weight.axis == 0 and (weight.group_size < 1 or rows % weight.group_size):
        return f"{rows} outputs do not fall into groups of {weight.group_size}"
    shape = _scale_shape(weight.shape, weight.group_size, weight.axis)
    if tuple(scale.shape) != shape and (weight.axis == 0 or tuple(scale.shape) != (1, shape[1])):
        expected = f"[{rows} or 1, {shape[1]}]" if weight.axis else str(list(shape))
        return f"scale has shape {list(scale.shape)}, not {expected}"
    if not scale.is_floating_point() or not bool(scale.isfinite().all()):
        return "scale is not finite floating point"
    if zero_point is not None and (zero_point.shape != scale.shape or zero_point.dtype != scale.dtype):
        return "zero point and scale differ in shape or type"
    if zero_point is not None and not bool(zero_point.isfinite().all()):
        return "zero point is not finite"
    if symmetric and weight.zero_codes is not None:
        return "there are codes of zero points, but no zero points"
    for name, values, quantized in (
        ("scale", scale, weight.scale_codes),
        ("zero point", zero_point, weight.zero_codes),
    ):
        reason = "" if values is None or quantized is None else _fault_of_values(values, quantized, shape)
        if reason:
            return f"quantized {name}: {reason}"
    return ""


def _fault_of_values(values: Tensor, quantized: AffineWeight, shape: tuple[int, int]) -> str:
    """Why these are not the codes of scales or zero points of this shape; empty when they are."""
    reason = fault_of(quantized)
    if reason:
        return reason
    if quantized.shape != (1, shape[0] * shape[1]):
        return f"codes have shape {list(quantized.shape)}, not {[1, shape[0] * shape[1]]}"
    if not torch.equal(quantized.dequantize().view(shape), values):
        return "the values are not what their codes stand for"
    return ""


def _scale_shape(shape: tuple[int, int], group_size: int, axis: int) -> tuple[int, int]:
    """[rows, groups] of a weight's scales."""
    rows, columns = shape
    if axis == 0:
        return rows // group_size, columns
    return 1 if group_size == 0 else rows, -(-columns // group_columns(columns, group_size))


def _values(quantized: AffineWeight, meta: AffineMeta) -> Tensor:
    """Scales or zero points from their codes."""
    if meta.axis == 0 and meta.group_size < 1:
        raise ValueError(f"group size {meta.group_size} along the outputs is not positive")
    values = quantized.dequantize()
    shape = _scale_shape(meta.shape, meta.group_size, meta.axis)
    if values.numel() != shape[0] * shape[1]:
        raise ValueError(f"{values.numel()} quantized values are not {shape[0]} x {shape[1]}")
    return values.view(shape)


def _roles(meta: AffineMeta) -> Iterator[str]:
    """The tensors that a weight is stored in."""
    yield "codes"
    for role, inner in (("scale", meta.scale), ("zero_point", meta.zero_point)):
        if inner is not None:
            yield from (f"{role}_{name}" for name in _roles(inner))
        elif role == "scale" or not meta.symmetric:
            yield role


def _prefixed(role: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{role}_{name}": tensor for name, tensor in tensors.items()}


def _part(role: str, tensors: Mapping[str, Tensor], meta: AffineMeta) -> Packed:
    """The packed scales or zero points among a weight's tensors."""
    return Packed({name: tensors[f"{role}_{name}"] for name in _roles(meta)}, meta)
