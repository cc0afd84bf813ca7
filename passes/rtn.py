"""Round to nearest: every weight goes to the nearest level of its grid, whatever the layer's inputs are.

Also what embedding tables get from every weight pass: a row is looked up alone, so no other weight can make up for its
error.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from passes.affine_grid import ScaleSearch, fit_grid
from passes.base import PassError, Program
from passes.graph import Layer
from passes.ops import E4M3, E4M3_MAX
from passes.walk import Walk
from passes.weight_pass import GridPass
from passes.weights import AffineWeight

Format = Literal["int", "fp8"]


@dataclasses.dataclass(frozen=True)
class RTN(GridPass):
    """Options of round to nearest, and its pass; see GridPass.

    format   int; fp8: 8-bit floats E4M3, one scale for each output channel
    """

    bits: int = 8
    group_size: int = -1
    symmetric: bool = True
    scale_search: ScaleSearch = "minmax"
    embeddings: int = 8
    format: Format = "int"

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "weights rounded to the nearest level: 2, 3, 4 or 8 bits, no data needed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in get_args(Format):
            raise PassError(f"rtn: format={self.format} is no format", fix="use format=int or format=fp8")
        if self.format == "fp8" and (self.bits, self.group_size, self.symmetric) != (8, -1, True):
            raise PassError("rtn: format=fp8 has 8 bits and one scale for each output", fix="use rtn:format=fp8")

    def requires(self, program: Program) -> None:
        """The target must have 8-bit floats, if these are wanted."""
        super().requires(program)
        if self.format == "fp8":
            require_float8(program, "rtn")

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> AffineWeight:
        """quantize_weight with these options."""
        return to_float8(matrix) if self.format == "fp8" else quantize_weight(matrix, self)


def require_float8(program: Program, name: str) -> None:
    """Raise PassError when the target does not compute with 8-bit floats."""
    if not program.rules.float8:
        raise PassError(f"target {program.rules.name} does not run 8-bit floats", fix=f"use {name}:bits=8")


def to_float8(weight: Tensor) -> AffineWeight:
    """Every row of `weight` [out, in] divided by its largest entry / 448, to the nearest E4M3."""
    scale = weight.float().abs().amax(1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale > 0, scale, 1.0)
    codes = (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return AffineWeight(codes, scale, None, 8, -1)


def quantize_weight(weight: Tensor, options: RTN) -> AffineWeight:
    """Round `weight` [out, in] to the nearest levels of its grid."""
    return fit_grid(weight, options.bits, options.group_size, options.symmetric, options.scale_search).round(weight)
