"""The scales that fit given codes: a step along the diagonally preconditioned gradient, exact line search for each row.

Some groups of an output group share a scale: all of them, none, or those of the same level when scales come from a
table of 2^bits numbers a row. Q is linear in the scales, so along any direction the layer error of each row is a
parabola and the step to its lowest point never raises it. With one scale a row this is the exact minimum.
"""

import torch
from torch import Tensor

from passes.aq_kmeans import fit_tables
from passes.aq_rows import Rows

TABLE_ITERATIONS = 20


def update_scales(rows: Rows, codebooks: Tensor, levels: Tensor | None = None) -> None:
    """Improve the rows' scales; levels [groups, n] says which number of its table each is, if there are tables."""
    decoded = rows.decode(codebooks)
    slopes = (rows.vectors(rows.gradient) * decoded).sum(1)  # [groups, n]
    curvatures = ((rows.moments.metrics @ decoded) * decoded).sum(1)
    if len(rows.scales) == 1:
        slopes, curvatures = slopes.sum(0, keepdim=True), curvatures.sum(0, keepdim=True)
    elif levels is not None:
        slopes, curvatures = _shared(slopes, levels), _shared(curvatures, levels)
    direction = torch.where(curvatures > 0, slopes / curvatures, 0)
    change = (decoded * direction[:, None]).reshape(rows.weight.shape)
    product = rows.moments.hessian @ change
    gain = rows.vectors(rows.gradient * change).sum((0, 1))
    curvature = rows.vectors(product * change).sum((0, 1))
    amount = torch.where(curvature > 0, gain / curvature, 0)
    scales = rows.scales + direction * amount
    # A scale that would change its sign is rather left as it is, with all of its row's.
    amount = torch.where((scales >= 0).all(0), amount, 0)
    rows.scales += direction * amount
    repeats = rows.weight.shape[1] // len(amount)
    rows.step(amount.repeat(repeats), change, product)


def _shared(values: Tensor, levels: Tensor) -> Tensor:
    """Values [groups, n] summed over the groups of a level, for every group."""
    return torch.zeros_like(values).scatter_add_(0, levels, values).gather(0, levels)


def group_scales(rows: Rows) -> None:
    """Give every group of the rows a scale of its own, its root mean square."""
    rows.scales = rows.vectors(rows.weight).square().mean(1).sqrt()


def round_to_tables(rows: Rows, codebooks: Tensor, bits: int) -> Tensor:
    """Round each row's scales to a table of 2^bits numbers; what number each is, [groups, n]. Errors stay."""
    decoded = rows.decode(codebooks)
    weights = ((rows.moments.metrics @ decoded) * decoded).sum(1) + torch.finfo(torch.float32).tiny
    tables, levels = fit_tables(rows.scales.T, weights.T, bits, TABLE_ITERATIONS)
    rows.scales = tables.gather(1, levels).T.contiguous()
    return levels.T.contiguous()
