"""A weight with more of what codes keep too little of.

Of directions that cost little the codes keep a part only: errors there are not noise but the weight itself, weaker, in
one layer as in the next. The costs say that this hardly matters; it matters more, as it adds up over layers, and as
other data than those of the calibration feel it to first order. Fitted anew to a weight in which such directions are
stronger, codes lose less of them.
"""

import torch
from torch import Tensor

from passes.aq_rows import Rows
from passes.aq_start import Directions

LEVELS, LEAST = 24, 1024
"""Levels of cost that directions are sorted into, and the fewest numbers of a level: fewer are no measure of a part."""


def strengthened(rows: Rows, most: float, damp: float) -> Tensor:
    """rows.weight, stronger where rows.errors are part of it; H is damped by a fraction of its mean diagonal.

    Directions of like cost are taken together. Where the codes keep g = <Q, W> / <W, W> of the weight, it becomes 1 / g
    times as large, `most` at most: where codes follow, errors are then no weight lost any more.
    """
    along = Directions.of(rows, damp)
    whole = along.into(rows.weight)
    weight = whole.view(along.costs.numel(), -1)
    products = (whole - along.into(rows.errors)).view_as(weight) * weight
    factors = torch.ones_like(along.costs).view(-1, 1)
    levels = min(LEVELS, max(1, weight.numel() // LEAST))
    for alike in along.costs.flatten().argsort().chunk(levels):
        kept = products[alike].sum() / weight[alike].square().sum()
        factors[alike] = kept.nan_to_num(1.0).clamp(1 / most, 1).reciprocal()
    return along.back((weight * factors).view_as(whole))
