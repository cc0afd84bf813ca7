"""HQQ: groups of weights on their own levels with a float zero point, found without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (Mobius Labs, 2023). A weight is
(q - z) s with z any number, so that the levels need not hit zero; passes.hqq_solver finds s and z.

    axis 1    groups of group_size inputs; a row's last group may be shorter
    axis 0    groups of group_size outputs that stand out / group_size apart, of one input: the columns of
              W.reshape(group_size, -1)

Scales and zero points are then quantized themselves, to meta_bits, in groups of meta_group_size on their own range, and
each group takes the stored ones that serve it best; the codes are chosen last, for the levels as they are stored. Zero
points are first brought to within one width of the levels from the range 0..2^bits - 1, so that no group spoils the
others'.

With hessian=true the levels stay and the codes are GPTQ's (passes.gptq), for the inputs of the calibration data. GPTQ
works with whole zero points: with z' = round(z),

    (q - z) s = (q - z') s + (z' - z) s,

so it gets W - (z' - z) s to quantize with zero points z', and its codes are the ones sought.
"""

import dataclasses
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from passes import gptq
from passes.affine_grid import AffineGrid
from passes.base import PassError, Program
from passes.graph import Layer
from passes.hqq_solver import StoredGrid, choose_stored, fit_levels
from passes.walk import Walk
from passes.weight_pass import CodePass
from passes.weights import AffineWeight, group_columns

WIDTHS = (1, 2, 3, 4, 8)
META_WIDTHS = (4, 5, 6, 7, 8)

SHORT_ZERO = 256.0
"""Up to here a zero point rounded to 16 bits moves by an eighth of a step at most."""

COLUMNWISE_ROUNDS = 2
"""Rounds of passes.refine where every column is a group: they take long there, and the first two bring most."""


@dataclasses.dataclass(frozen=True)
class HQQ(CodePass):
    """Options of HQQ, and its pass.

    bits             1, 2, 3, 4 or 8
    group_size       k: groups of k weights; along axis 1 also -1: per output channel, 0: per tensor
    axis             1: groups of inputs; 0: of outputs
    lp_norm          p of the error that the levels minimize, more than 0, at most 4; 0: 3 up to 3 bits, else 2
    quant_zero       zero points are quantized too
    quant_scale      scales are quantized too
    meta_bits        width of the codes of quantized scales and zero points, 4 to 8
    meta_group_size  how many of them share a range; 0: all
    hessian          codes by GPTQ against calibration data instead of rounding

    The output head keeps at least 8 bits, and is then per output channel, unless the recipe sets its bits by name.
    """

    bits: int = 4
    group_size: int = 64
    axis: int = 1
    lp_norm: float = 0.0
    quant_zero: bool = True
    quant_scale: bool = True
    meta_bits: int = 8
    meta_group_size: int = 128
    hessian: bool = False
    embeddings: int = 8

    name: ClassVar[str] = "hqq"
    summary: ClassVar[str] = "weights in groups with float zero points, 1 to 8 bits, no data needed"
    paper: ClassVar[str] = "Badri and Shaji 2023, mobiusml.github.io/hqq_blog"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("bits", self.bits, WIDTHS)
        self._one_of("axis", self.axis, (0, 1))
        self._one_of("meta_bits", self.meta_bits, META_WIDTHS)
        if self.group_size < (-1 if self.axis == 1 else 1):
            raise PassError(
                f"{self.name}: group_size={self.group_size} is no size of groups along axis {self.axis}",
                fix="use group_size=64",
            )
        if not 0 <= self.lp_norm <= 4:
            raise PassError(f"{self.name}: lp_norm={self.lp_norm} is no norm", fix="use one from 0.5 to 4")
        if self.meta_group_size < 0:
            raise PassError(
                f"{self.name}: meta_group_size={self.meta_group_size} is negative", fix="use 128, or 0 for one group"
            )

    def _one_of(self, option: str, value: int, possible: tuple[int, ...]) -> None:
        if value not in possible:
            listed = f"{', '.join(map(str, possible[:-1]))} or {possible[-1]}"
            raise PassError(f"{self.name}: {option}={value} is not possible", fix=f"use {option}={listed}")

    def requires(self, program: Program) -> None:
        """The target must have zero points."""
        super().requires(program)
        if not program.rules.weight_zero_point:
            raise PassError(
                f"target {program.rules.name} has no weights with zero points, which {self.name} needs",
                fix="use gptq or rtn with symmetric=true",
            )

    @property
    def norm(self) -> float:
        """p: few levels clip large weights, which a larger p does less; from 4 bits on they clip next to none."""
        return self.lp_norm or (3.0 if self.bits <= 3 else 2.0)

    @property
    def per_channel(self) -> dict[str, Any]:
        """The options of one scale for each output channel."""
        return {"group_size": -1, "axis": 1}

    def for_layer(self, program: Program, layer: Layer) -> Self:
        """Besides what holds for every width: calibration data where GPTQ is asked for."""
        options = super().for_layer(program, layer)
        if options.hessian and not program.calibration.batches:
            raise PassError(f"{self.name}:hessian=true needs calibration data", fix="give --calib")
        return options

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> AffineWeight:
        """quantize_weight with these options."""
        return quantize_weight(matrix, self, walk.hessian(layer) if self.hessian else None)


def quantize_weight(weight: Tensor, options: HQQ, hessian: Tensor | None = None) -> AffineWeight:
    """Quantize `weight` [out, in]; `hessian` = X^T X / n [in, in] (or [groups, in, in]) when options.hessian is set.

    Scales and zero points are numbers of the weight's dtype; of 16 bits, too, where they are not quantized themselves
    and 16 bits will do. Raises PassError when the weight is not finite or does not fall into the groups.
    """
    if not bool(weight.isfinite().all()):
        raise PassError("its weight is not finite", fix="repair the model, or leave the layer in float")
    rows, columns = weight.shape
    group_size = options.group_size
    if options.axis == 0 and rows % group_size:
        raise PassError(
            f"its {rows} outputs do not fall into groups of {group_size}",
            fix="use axis=1, or a group_size that divides them",
        )
    if options.axis == 1 and group_size >= columns:
        group_size = -1
    parts = _groups(weight, options.axis, group_size)
    scale, zero = _fit(parts, options)
    scale_codes = zero_codes = None
    if options.quant_scale:
        scale_codes = quantize_values(scale.to(weight.dtype), options.meta_bits, options.meta_group_size)
    if options.quant_zero:
        zero_codes = quantize_values(zero.to(weight.dtype), options.meta_bits, options.meta_group_size)
    if scale_codes and zero_codes:
        scale_codes, zero_codes = _choose_together(parts, options, scale, zero, scale_codes, zero_codes)
    if scale_codes:
        scale = scale_codes.dequantize().view(scale.shape)
    if zero_codes:
        zero = zero_codes.dequantize().view(zero.shape)
    scale, zero = _storable(scale, zero, weight.dtype, options)
    if hessian is not None:
        codes = _codes_by_gptq(weight, scale, zero, hessian, options, group_size)
    else:
        codes = _nearest(weight, scale, zero, options, group_size)
    return AffineWeight(codes, scale, zero, options.bits, group_size, options.axis, scale_codes, zero_codes)


def quantize_values(values: Tensor, bits: int, group_size: int) -> AffineWeight:
    """Scales or zero points rounded to the nearest of 2^bits levels from the least to the greatest of their group.

    They are taken in their order, groups of group_size (0: one group), as a matrix [1, how many]. Equal ones stay.
    """
    flat = values.reshape(1, -1)
    count = flat.shape[1]
    width = group_columns(count, group_size)
    short = -count % width
    grouped = torch.cat([flat, flat[:, -1:].expand(1, short)], dim=1).view(-1, width).float()
    low, high = grouped.aminmax(dim=1)
    step = (high - low) / (2**bits - 1)
    constant = step == 0
    scale = torch.where(constant, high.abs(), step).to(values.dtype)
    zero = torch.where(constant, (high < 0).float(), -low / scale.float()).to(values.dtype)
    divisor = torch.where(scale == 0, 1, scale).float()
    codes = torch.round(grouped / divisor[:, None] + zero.float()[:, None]).clamp_(0, 2**bits - 1)
    stored = codes.to(torch.uint8).view(1, -1)[:, :count].contiguous()
    return AffineWeight(stored, scale[None], zero[None], bits, 0 if width == count else width)


def _groups(weight: Tensor, axis: int, group_size: int) -> list[Tensor]:
    """The groups as their scales [a, b] stand: tensors [a, part of b, n], short groups in one of their own."""
    rows, columns = weight.shape
    if axis == 0:
        return [weight.reshape(group_size, -1).t().reshape(-1, columns, group_size)]
    if group_size == 0:
        return [weight.reshape(1, 1, -1)]
    width = group_columns(columns, group_size)
    full = columns - columns % width
    parts = [weight[:, :full].reshape(rows, -1, width)]
    return parts if full == columns else [*parts, weight[:, None, full:]]


def _fit(parts: list[Tensor], options: HQQ) -> tuple[Tensor, Tensor]:
    """(scale, zero point) in the shape an AffineWeight has them in; all scales positive."""
    fitted = []
    for part in parts:
        levels = fit_levels(part.flatten(0, 1), options.bits, options.norm, bounded=options.quant_zero)
        fitted.append([values.view(part.shape[:2]) for values in levels])
    scale, zero = (torch.cat(kind, dim=1) for kind in zip(*fitted, strict=True))
    positive = scale[scale > 0]
    least = positive.min() if len(positive) else 1.0  # zeros are met by any scale: one that suits the others' range
    return torch.where(scale > 0, scale, least), zero


def _choose_together(
    parts: list[Tensor], options: HQQ, scale: Tensor, zero: Tensor, scale_codes: AffineWeight, zero_codes: AffineWeight
) -> tuple[AffineWeight, AffineWeight]:
    """The stored scales and zero points, near those fitted, that together leave the least error."""
    widths = [part.shape[1] for part in parts]

    def by_part(values: Tensor) -> list[Tensor]:
        return [columns.reshape(-1, 1) for columns in values.view(scale.shape).split(widths, dim=1)]

    def grids(stored: AffineWeight) -> list[StoredGrid]:
        assert stored.zero_point is not None
        step, offset = (
            by_part(_per_weight(values, stored.codes.shape, stored.group_size, 1).expand(stored.shape).contiguous())
            for values in (stored.scale, stored.zero_point)
        )
        return [StoredGrid(*grid, 2**stored.bits - 1) for grid in zip(step, offset, strict=True)]

    chosen = []
    levels = zip(by_part(scale), by_part(zero), grids(scale_codes), grids(zero_codes), strict=True)
    for part, fitted in zip(parts, levels, strict=True):
        found = choose_stored(part.flatten(0, 1), options.bits, options.norm, *fitted)
        chosen.append([codes.view(part.shape[:2]) for codes in found])
    scales, zeros = (torch.cat(kind, dim=1).view(1, -1) for kind in zip(*chosen, strict=True))
    return dataclasses.replace(scale_codes, codes=scales), dataclasses.replace(zero_codes, codes=zeros)


def _storable(scale: Tensor, zero: Tensor, dtype: torch.dtype, options: HQQ) -> tuple[Tensor, Tensor]:
    """Scales and zero points as a graph of `dtype` holds them, and of 16 bits where these will do."""
    half = torch.finfo(torch.float16)
    if not options.quant_scale and dtype == torch.float32 and scale.min() >= half.tiny and scale.max() <= half.max:
        scale = scale.half()
    if not options.quant_zero and dtype == torch.float32 and zero.abs().max() <= SHORT_ZERO:
        zero = zero.half()
    return scale.to(dtype), zero.to(dtype)


def _per_weight(values: Tensor, shape: torch.Size, group_size: int, axis: int) -> Tensor:
    """Values of groups as float32 that broadcast to the matrix [out, in]."""
    if axis == 0:
        return values.float().repeat(shape[0] // len(values), 1)
    if values.shape[1] == 1:
        return values.float()
    return values.float().repeat_interleave(group_size, dim=1)[:, : shape[1]]


def _nearest(weight: Tensor, scale: Tensor, zero: Tensor, options: HQQ, group_size: int) -> Tensor:
    """The code of the level nearest to every weight."""
    scale, zero = (_per_weight(values, weight.shape, group_size, options.axis) for values in (scale, zero))
    divisor = torch.where(scale > 0, scale, 1)  # a scale may underflow in the weight's dtype
    return (weight.float() / divisor).add_(zero).round_().clamp_(0, 2**options.bits - 1).to(torch.uint8)


def _codes_by_gptq(
    weight: Tensor, scale: Tensor, zero: Tensor, hessian: Tensor, options: HQQ, group_size: int
) -> Tensor:
    """Codes that make up for each other's errors on the layer's inputs."""
    scale = torch.where(scale > 0, scale, 1).float()
    zero = zero.float()
    whole = zero.round()
    offset = _per_weight((whole - zero) * scale, weight.shape, group_size, options.axis)
    rounds = gptq.GPTQ.refine
    if options.axis == 0:  # a group of its own for every weight
        scale, whole = (_per_weight(values, weight.shape, group_size, 0) for values in (scale, whole))
        group_size, rounds = 1, COLUMNWISE_ROUNDS
    grid = AffineGrid(scale, whole, options.bits, group_size)
    gptq_options = gptq.GPTQ(group_size=group_size, symmetric=False, refine=rounds)
    return gptq.quantize_weight(weight.float() - offset, hessian, gptq_options, grid).codes
