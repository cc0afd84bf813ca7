"""The scales that fit given codes: a step along the diagonally preconditioned gradient, exact line search for each row.

Some groups of an output group share a scale: all of them, none, a few neighbours, or those of the same level when
scales come from a table of 2^bits numbers a row; and some output groups may share theirs. Q is linear in the scales, so
along any direction the layer error of such rows is a parabola and the step to its lowest point never raises it. With
one scale for whole rows this is the exact minimum. Where rows couple (passes.aq_outer) one
step serves all of them.
"""

import math

import torch
from torch import Tensor

from passes.aq_kmeans import fit_tables
from passes.aq_rows import Rows

TABLE_ITERATIONS = 20


def update_scales(rows: Rows, codebooks: Tensor, levels: Tensor | None = None, steps: int = 1) -> None:
    """Improve the rows' scales; levels [groups, n] says which number of its table each is, if there are tables.

    More than one step goes along conjugate directions.
    """
    decoded = rows.decode(codebooks)
    curvatures = _of_scales(rows, ((rows.moments.metrics @ decoded) * decoded).sum(1) * rows.row_costs(), levels)
    direction, before = torch.zeros_like(curvatures), torch.ones(())
    for _ in range(steps):
        slopes = _of_scales(rows, (rows.vectors(rows.gradient) * decoded).sum(1), levels)
        ahead = torch.where(curvatures > 0, slopes / curvatures, 0)
        now = (slopes * ahead).sum()
        direction, before = ahead + direction * (now / before), now
        change = (decoded * direction[:, None]).reshape(rows.weight.shape)
        product = rows.product(change)
        gain = _of_rows(rows, rows.vectors(rows.gradient * change).sum((0, 1)))
        curvature = _of_rows(rows, rows.vectors(product * change).sum((0, 1)))
        amount = torch.where(curvature > 0, gain / curvature, 0)
        scales = rows.scales + direction * amount
        # A scale that would change its sign is rather left as it is, with all of its row's.
        positive = (scales >= 0).all(0)
        amount = torch.where(_of_rows(rows, (~positive).float()) > 0, 0, amount)
        rows.scales = rows.scales + direction * amount
        repeats = rows.weight.shape[1] // len(amount)
        rows.step(amount.repeat(repeats), change, product)


def _of_scales(rows: Rows, values: Tensor, levels: Tensor | None) -> Tensor:
    """Values [groups, n] summed over what has the same scale, for every scale."""
    values = rows.shared_sum(values.sum(0, keepdim=True) if len(rows.scales) == 1 else values)
    return values if levels is None else _of_level(values, levels)


def _of_level(values: Tensor, levels: Tensor) -> Tensor:
    """Values [groups, n] summed over the groups of a level, for every group."""
    return torch.zeros_like(values).scatter_add_(0, levels, values).gather(0, levels)


def _of_rows(rows: Rows, values: Tensor) -> Tensor:
    """Values [n] summed over the output groups that share scales, or all if they couple, for each of them."""
    if rows.outer is not None:
        return values.sum().expand_as(values)
    high = rows.sharing[0]
    return values.unflatten(0, (-1, high)).sum(1).repeat_interleave(high) if high > 1 else values


def group_scales(rows: Rows) -> None:
    """Give every group of the rows, or those that share one, a scale of its own, their root mean square."""
    squares = rows.vectors(rows.weight).square().mean(1)
    rows.scales = (rows.shared_sum(squares) / math.prod(rows.sharing)).sqrt()


def round_to_tables(rows: Rows, codebooks: Tensor, bits: int) -> Tensor:
    """Round each row's scales to a table of 2^bits numbers; what number each is, [groups, n]. Errors stay."""
    decoded = rows.decode(codebooks)
    weights = ((rows.moments.metrics @ decoded) * decoded).sum(1) + torch.finfo(torch.float32).tiny
    high, wide = rows.sharing
    scales, weights = rows.scales[::wide, ::high].T, rows.shared_sum(weights)[::wide, ::high].T
    tables, levels = fit_tables(scales, weights, bits, TABLE_ITERATIONS)

    def spread(values: Tensor) -> Tensor:
        return values.T.repeat_interleave(wide, 0).repeat_interleave(high, 1)

    rows.scales = spread(tables.gather(1, levels))
    return spread(levels)
