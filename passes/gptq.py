"""GPTQ: round a layer's weights one input column after the other, each making up for the errors made before it.

Frantar et al., arXiv 2210.17323, algorithm 1. It minimizes tr(E H E^T), E = W - Q, H = X^T X / n (+ damping on the
diagonal), with U the upper Cholesky factor of the inverse Hessian, H^-1 = U^T U. Column by column, w' the weights as
updated so far,

    q_k = round(w'_k),      w'_j -= (w'_k - q_k) U_kj / U_kk   for j > k.

R = U^-1 is upper triangular too and H = R R^T, so R is one Cholesky factorization away (of H with its rows and columns
in reverse order) and H is never inverted. The same update, summed over the columns before k, reads

    w'_k = w_k + sum_{j<k} e_j R_jk / R_kk,      e_j = w_j - q_j   in the weights as they came,

which is Babai's nearest plane (Chen et al., arXiv 2507.18553) and the form used here: a block of columns takes what all
blocks before it owe in one matrix product (the lazy batch of the paper), the columns inside it one product each.
The best real-valued columns g of a group, given all before it, solve x R_gg = (e R)_g, w'_g = w_g + x.

What comes out is then refined: passes.refine.

The work is done on W^T, so that a column is a contiguous row, and for several problems of one shape at once: the
groups of a grouped or depthwise convolution.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from passes.affine_grid import AffineGrid, ScaleSearch, fit_grid
from passes.base import PassError
from passes.device import to_cpu
from passes.graph import Layer
from passes.ranks import Ranks
from passes.refine import OUTPUTS_AT_ONCE, refine
from passes.threads import single_thread
from passes.walk import Walk
from passes.weight_pass import GridPass
from passes.weights import AffineWeight, group_columns

MAX_DAMP = 10.0
"""Damping, as a fraction of the mean diagonal, past which the Hessian says nothing about the weights."""


@dataclasses.dataclass(frozen=True)
class GPTQ(GridPass):
    """Options of GPTQ, and its pass; see GridPass for those that are not listed here.

    act_order   columns by decreasing diagonal of the Hessian; the groups' grids are then fixed in front (static
                groups), so that a group stays a run of neighbours in the weight as stored. Without it a group's grid is
                fitted on its weights as updated so far.
    damp        added to the Hessian's diagonal, as a fraction of its mean; raised tenfold until the Hessian factorizes
    block_size  columns between two bulk updates, and, without act_order, between two fits of grids: all groups that
                start in a block are fitted when the block's turn comes
    refine      rounds of coordinate descent on the codes and scales afterwards, see passes.refine; 0: plain GPTQ
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_order: bool = True
    damp: float = 0.01
    block_size: int = 128
    scale_search: ScaleSearch = "hessian"
    embeddings: int = 8
    refine: int = 10

    name: ClassVar[str] = "gptq"
    summary: ClassVar[str] = "weights rounded column by column, each making up for the errors before it"
    paper: ClassVar[str] = "arXiv 2210.17323"
    needs_data: ClassVar[bool] = True
    shares_outputs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp < 0:
            raise PassError(f"{self.name}: damp={self.damp} is negative", fix="use damp=0.01")
        if self.block_size < 1:
            raise PassError(f"{self.name}: block_size={self.block_size} is not positive", fix="use block_size=128")
        if self.refine < 0:
            raise PassError(f"{self.name}: refine={self.refine} is negative", fix="use refine=10, or 0 for none")

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> AffineWeight:
        """quantize_weight with these options, on the layer's second moments."""
        return quantize_weight(matrix, walk.hessian(layer), self, ranks=walk.ranks)


def quantize_weight(
    weight: Tensor, hessian: Tensor, options: GPTQ, grid: AffineGrid | None = None, ranks: Ranks | None = None
) -> AffineWeight:
    """Quantize `weight` [out, in] for inputs whose second moments are `hessian` = X^T X / n, [in, in].

    A grouped convolution has one Hessian for each group: [groups, in, in]; the rows of `weight` fall into as many equal
    runs. Inputs that are always zero are dead: their weights become zero, and count for nothing in the damping.
    With `grid` the levels are given, for all of `weight`, instead of fitted; its groups are then static.
    `ranks` share the outputs, and all get the whole weight.
    Raises PassError when the Hessian is not finite or not positive definite even when damped.
    """
    with single_thread():
        hessians = hessian.float().view(-1, *hessian.shape[-2:])
        if ranks is None or ranks.world == 1 or len(hessians) > 1 or options.group_size == 0 or grid is not None:
            return _quantize_and_refine(weight, hessians, options, grid)
        units = ranks.units(-(-len(weight) // OUTPUTS_AT_ONCE))
        mine = weight[units.start * OUTPUTS_AT_ONCE : units.stop * OUTPUTS_AT_ONCE]
        parts = ranks.gather(to_cpu(_quantize_and_refine(mine, hessians, options, None)) if len(mine) else None)
        return _joined([part for part in parts if part is not None], 1)


def _quantize_and_refine(weight: Tensor, hessians: Tensor, options: GPTQ, grid: AffineGrid | None) -> AffineWeight:
    quantized = _quantize(weight, hessians, options, grid)
    return refine(weight, hessians, quantized, options.refine, scales=grid is None) if options.refine else quantized


def _quantize(weight: Tensor, hessians: Tensor, options: GPTQ, grid: AffineGrid | None) -> AffineWeight:
    problems, columns = hessians.shape[0], hessians.shape[1]
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    if not torch.isfinite(diagonal).all():
        raise PassError("the layer's inputs are not finite on the calibration data", fix="check the calibration data")
    dead = diagonal == 0  # [problems, in]
    alive = weight.unflatten(0, (problems, -1)).masked_fill(dead[:, None, :], 0)  # [problems, out / problems, in]
    if options.act_order:
        order = diagonal.masked_fill(dead, -1).argsort(dim=-1, descending=True, stable=True)
    else:
        order = torch.arange(columns, device=weight.device).expand(problems, -1)
    factor, pivots = _unit_factor(_permuted(hessians, order.flip(-1)), dead.sum(-1), options.damp)
    importance = _importance(diagonal, pivots, order)
    if grid is None and options.group_size == 0:
        grid = _fit(alive, importance, options)
    parts = []
    for start in range(0, alive.shape[1], OUTPUTS_AT_ONCE):
        run = slice(start, start + OUTPUTS_AT_ONCE)
        given = None if grid is None else _part(grid, problems, run)
        parts.append(_quantize_outputs(alive[:, run], importance, factor, order, given, options))
    return parts[0] if len(parts) == 1 else _joined(parts, problems)


def _quantize_outputs(
    weight: Tensor, importance: Tensor, factor: Tensor, order: Tensor, given: AffineGrid | None, options: GPTQ
) -> AffineWeight:
    """Quantize some outputs of every problem, weight [problems, outputs, in]; outputs do not touch each other."""
    columns = weight.shape[2]
    rows = _Rows(_take(weight.float().mT, order))
    width = group_columns(columns, options.group_size)
    if options.act_order or width == columns or given is not None:
        grid = given or _fit(weight, importance, options)
        rows.set_grid(grid, order // width, 0)
        for start in range(0, columns, options.block_size):
            block = rows.corrected(factor, start, min(start + options.block_size, columns))
            _round_block(rows, factor, start, block)
    else:
        grids = []
        step = width * max(1, options.block_size // width)
        for start in range(0, columns, step):
            stop = min(start + step, columns)
            block = rows.corrected(factor, start, stop)
            updated = _updated(rows, factor, start, block).mT.to(weight.dtype)
            grids.append(_fit(updated, importance[:, start:stop], options))
            rows.set_grid(grids[-1], (order[:, start:stop] - start) // width, start)
            _round_block(rows, factor, start, block)
        grid = AffineGrid(
            torch.cat([grid.scale for grid in grids], dim=1),
            None if options.symmetric else torch.cat([_present(grid.zero_point) for grid in grids], dim=1),
            options.bits,
            options.group_size,
        )
    centred = _take(rows.codes, order.argsort(dim=-1)).mT.flatten(0, 1)
    return grid.with_centred_codes(centred)


def _joined(parts: list[AffineWeight], problems: int) -> AffineWeight:
    """The weight of all outputs from those of runs of outputs of each problem."""

    def join(values: list[Tensor]) -> Tensor:
        return torch.cat([value.unflatten(0, (problems, -1)) for value in values], dim=1).flatten(0, 1)

    codes, first = join([part.codes for part in parts]), parts[0]
    if first.group_size == 0:
        return dataclasses.replace(first, codes=codes)
    return dataclasses.replace(
        first,
        codes=codes,
        scale=join([part.scale for part in parts]),
        zero_point=None if first.zero_point is None else join([_present(part.zero_point) for part in parts]),
    )


def _part(grid: AffineGrid, problems: int, outputs: slice) -> AffineGrid:
    """The grid of a run of outputs of each problem; one for the whole tensor stays whole."""
    if len(grid.scale) == 1:
        return grid

    def cut(value: Tensor) -> Tensor:
        part: Tensor = value.unflatten(0, (problems, -1))[:, outputs].flatten(0, 1)
        return part

    zero_point = None if grid.zero_point is None else cut(grid.zero_point)
    return dataclasses.replace(grid, scale=cut(grid.scale), zero_point=zero_point)


def _fit(weight: Tensor, importance: Tensor, options: GPTQ) -> AffineGrid:
    """Grids for the outputs of all problems, weight [problems, outputs, in], as those of one matrix.

    `importance` [problems, in] says what an error of a weight counts for.
    """
    matrix, costs = weight.flatten(0, 1), importance.repeat_interleave(weight.shape[1], dim=0)
    return fit_grid(matrix, options.bits, options.group_size, options.symmetric, options.scale_search, costs)


def _present(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


class _Rows:
    """The rows of W^T in the order they are rounded, and their grids; all [problems, in, out].

    codes   codes minus zero point, as far as they are known; in low..high
    errors  weight - codes * scale, likewise
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.scale, self.low, self.high, self.codes, self.errors = (torch.empty_like(weight) for _ in range(5))

    def set_grid(self, grid: AffineGrid, groups: Tensor, start: int) -> None:
        """From row `start` on, row k of a problem takes its group number groups[problem, k - start] of `grid`."""
        problems, count = groups.shape
        low, high = grid.centred_range()
        for target, values in ((self.scale, grid.scale), (self.low, low), (self.high, high)):
            # values [out or 1, groups], one number for the whole tensor or one a row of every problem
            per_problem = values.expand(problems, 1, 1) if len(values) == 1 else values.unflatten(0, (problems, -1))
            target[:, start : start + count] = _take(per_problem.mT, groups)

    def corrected(self, factor: Tensor, start: int, stop: int) -> Tensor:
        """Rows start..stop plus what the rows before `start` owe them, divided by R_kk."""
        return torch.baddbmm(self.weight[:, start:stop], factor[:, start:stop, :start], self.errors[:, :start])


def _updated(rows: _Rows, factor: Tensor, start: int, block: Tensor) -> Tensor:
    """The best real-valued rows of `block`, given those before: w' of the paper when column `start` is reached."""
    stop = start + block.shape[1]
    weight, inner = rows.weight[:, start:stop], factor[:, start:stop, start:stop]
    updated: Tensor = torch.linalg.solve_triangular(inner, block - weight, upper=False, unitriangular=True).add_(weight)
    return updated


def _round_block(rows: _Rows, factor: Tensor, start: int, block: Tensor) -> None:
    """Round the rows from `start` on whose corrected values are `block`, all before them being done."""
    run = slice(start, start + block.shape[1])
    weight, scale, low, high, codes, errors = (
        values[:, run] for values in (rows.weight, rows.scale, rows.low, rows.high, rows.codes, rows.errors)
    )
    errors.zero_()  # rows to come add nothing to those before them
    parts = (block, weight, scale, low, high, codes, errors, factor[:, run, run].tril(-1))
    for target, w, s, bottom, top, code, error, owed in zip(*(part.split(1, dim=1) for part in parts), strict=True):
        target.baddbmm_(owed, errors)
        torch.div(target, s, out=code).round_().clamp_(bottom, top)
        torch.addcmul(w, code, s, value=-1, out=error)


def _unit_factor(reversed_hessians: Tensor, dead: Tensor, damp: float) -> tuple[Tensor, Tensor]:
    """Of each damped Hessian [problems, in, in] = R R^T: lower triangular R_jk / R_kk at [k, j]; R_kk^2 [problems, in].

    The Hessians come with rows and columns in reverse order and are overwritten; `dead` [problems] counts their zero
    diagonal entries.
    """
    diagonal = reversed_hessians.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.sum(-1) / (diagonal.shape[-1] - dead).clamp_min(1)
    diagonal.add_((diagonal == 0) * torch.where(mean > 0, mean, 1.0)[:, None])
    mean = torch.where(mean > 0, mean, 1.0)
    undamped = diagonal.clone()
    upper = reversed_hessians  # all are pending at first
    pending = torch.arange(len(mean), device=mean.device)
    while True:
        diagonal[pending] = undamped[pending] + damp * mean[pending, None]
        everything = len(pending) == len(mean)  # then nothing is copied: these are the largest matrices there are
        wanted = reversed_hessians if everything else reversed_hessians[pending]
        part, info = torch.linalg.cholesky_ex(wanted, upper=True)
        # A pivot at the level of rounding noise divides what follows by noise.
        smallest = part.diagonal(dim1=-2, dim2=-1).square().amin(-1)
        good = (info == 0) & (smallest > torch.finfo(torch.float32).eps * mean[pending])
        if everything:
            upper = part
        else:
            upper[pending] = part
        pending = pending[~good]
        if not len(pending):
            break
        damp = max(10 * damp, 1e-4)
        if damp > MAX_DAMP:
            raise PassError(
                "its Hessian is not positive definite, even strongly damped",
                fix="use more calibration samples, or leave the layer out (--skip) or to rtn",
            )
    factor = upper.flip(-1, -2)
    roots = factor.diagonal(dim1=-2, dim2=-1).clone()
    return factor.div_(roots[:, :, None]), roots.square()


def _importance(diagonal: Tensor, pivots: Tensor, order: Tensor) -> Tensor:
    """What a squared error of a weight counts for when scales are searched, [problems, in]; 0 for dead inputs.

    It costs H_kk if nothing makes up for it, and R_kk^2, `pivots` in `order`, if all columns behind it do. What GPTQ
    and refinement make of it lies between; their geometric mean measures better than either.
    """
    return torch.empty_like(pivots).scatter_(1, order, pivots).mul_(diagonal).sqrt_()


def _permuted(hessians: Tensor, order: Tensor) -> Tensor:
    """Each symmetric matrix [problems, in, in] with its rows and columns in `order` [problems, in], as a copy."""
    # Rows gather whole and fast, columns do not; the matrices are symmetric, so both are rows.
    return _take(_take(hessians, order).mT.contiguous(), order)


def _take(rows: Tensor, order: Tensor) -> Tensor:
    """Rows [problems, in, ...] in `order` [problems, in], as a contiguous copy."""
    return rows.contiguous()[torch.arange(len(order), device=order.device)[:, None], order]
