"""Round to nearest: every weight goes to the nearest level of its grid, whatever the layer's inputs are.

Also what embedding tables get from every weight pass: a row is looked up alone, so no other weight can make up for its
error.
"""

import dataclasses
from typing import ClassVar

from torch import Tensor

from passes.affine_grid import ScaleSearch, fit_grid
from passes.graph import Layer
from passes.walk import Walk
from passes.weight_pass import GridPass
from passes.weights import AffineWeight


@dataclasses.dataclass(frozen=True)
class RTN(GridPass):
    """Options of round to nearest, and its pass; see GridPass."""

    bits: int = 8
    group_size: int = -1
    symmetric: bool = True
    scale_search: ScaleSearch = "minmax"
    embeddings: int = 8

    name: ClassVar[str] = "rtn"
    summary: ClassVar[str] = "weights rounded to the nearest level: 2, 3, 4 or 8 bits, no data needed"

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> AffineWeight:
        """quantize_weight with these options."""
        return quantize_weight(matrix, self)


def quantize_weight(weight: Tensor, options: RTN) -> AffineWeight:
    """Round `weight` [out, in] to the nearest levels of its grid."""
    return fit_grid(weight, options.bits, options.group_size, options.symmetric, options.scale_search).round(weight)
