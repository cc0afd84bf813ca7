"""The first codes: vectors rounded group by group, each making up for the errors made before it.

GPTQ's step (arXiv 2210.17323) taken with vectors (GPTVQ, arXiv 2402.15319) and searched with a beam. With H = R R^T, R
upper triangular, and groups taken in an order, the layer error of a row splits exactly into a sum over groups,

    e H e^T = sum_g |(w'_g - q_g) R_gg|^2,      w'_g = w_g + sum_{j<g} e_j R_jg R_gg^-1,

as R is triangular in blocks, too. So group g's vectors are searched for w'_g under the metric R_gg R_gg^T: what an
error costs when all later groups make up for it as best they can.

Parts of a weight that cost less than the errors will need not be kept, though rounding them takes as many bits, and
errors fed back on top of them overload the codebooks. So what is rounded first is not W but

    argmin_T tr(G (W - T) H (W - T)^T) + theta |T|^2,

theta a small part of what a weight costs, smaller by 4 for every bit. This is reverse water-filling (Cover & Thomas,
Elements of Information Theory, section 10.3.3), softly. The rounds that follow are on W.
"""

import dataclasses

import torch
from torch import Tensor

from passes.aq_rows import Rows, damped_by, diagonal_blocks, vector_metrics
from passes.aq_search import GROUPS_AT_ONCE, GroupBooks, score_buffer, search_group
from passes.base import PassError

IDLE = 0.08
"""theta over the mean cost of a weight, at no bits."""

MAX_DAMP = 10.0
"""Damping, as a fraction of the mean diagonal, past which the Hessian says nothing about the weights."""


@dataclasses.dataclass(frozen=True)
class Feedback:
    """What errors made in earlier groups add to later ones.

    order     [groups] of the groups
    carry     [in, in]   R_jg R_gg^-1 at [lines of g, lines of j], lines in that order
    metrics   [groups, d, d]   R_gg R_gg^T of the vectors of the group at each place of the order
    """

    order: Tensor
    carry: Tensor
    metrics: Tensor

    def to(self, device: torch.device) -> "Feedback":
        """On another device."""
        return Feedback(self.order.to(device), self.carry.to(device), self.metrics.to(device))

    def metrics_by_group(self) -> Tensor:
        """The metrics [groups, d, d] in the groups' own order."""
        return self.metrics[self.order.argsort()]


def feedback_of(hessian: Tensor, in_group_size: int, out_group_size: int, damp: float) -> Feedback:
    """Groups by decreasing trace of their Hessian; damp is a fraction of the mean diagonal, raised until H factorizes.

    Raises PassError when it does not, strongly damped.
    """
    diagonal = hessian.diagonal()
    order = diagonal.unflatten(0, (-1, in_group_size)).sum(1).argsort(descending=True, stable=True)
    lines = (order[:, None] * in_group_size + torch.arange(in_group_size, device=order.device)).view(-1)
    factor = upper_factor(hessian[lines][:, lines], damp)
    blocks = diagonal_blocks(factor, in_group_size)  # R_gg
    carry = torch.linalg.solve_triangular(blocks.mT, factor.mT.unflatten(0, (-1, in_group_size)), upper=False)
    return Feedback(order, carry.flatten(0, 1), vector_metrics(blocks @ blocks.mT, out_group_size))


@dataclasses.dataclass(frozen=True)
class Directions:
    """Of a matrix like Rows.weight: errors E cost sum(costs into(E)^2).

    left    [in, in], orthogonal
    right   [n, n], likewise; None where rows do not couple
    costs   [in, n]; [in, 1] where rows do not couple
    """

    left: Tensor
    right: Tensor | None
    costs: Tensor

    @classmethod
    def of(cls, rows: Rows, damp: float) -> "Directions":
        """H is damped by a fraction of its mean diagonal."""
        inner, left = rows.moments.eigen(damp)
        costs = inner.clamp_min(0)[:, None]
        if rows.outer is None:
            return cls(left, None, costs)
        outer, right = torch.linalg.eigh(rows.outer)
        return cls(left, right, costs * outer.clamp_min(0))

    def into(self, matrix: Tensor) -> Tensor:
        """The matrix' parts along these directions."""
        parts = self.left.T @ matrix
        return parts if self.right is None else parts @ self.right

    def back(self, parts: Tensor) -> Tensor:
        """The matrix that has these parts."""
        matrix = self.left @ parts
        return matrix if self.right is None else matrix @ self.right.T


def upper_factor(hessian: Tensor, damp: float) -> Tensor:
    """R, upper triangular, of the damped Hessian R R^T."""
    hessian = hessian.flip(0, 1)
    live = hessian.diagonal() > 0
    mean = hessian.diagonal()[live].mean()
    while damp <= MAX_DAMP:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damp * mean)
        factor, info = torch.linalg.cholesky_ex(damped)
        # A pivot at the level of rounding noise divides what follows by noise.
        if not info and factor.diagonal().square().amin() > torch.finfo(torch.float32).eps * mean:
            upper: Tensor = factor.flip(0, 1)
            return upper
        damp = max(10 * damp, 1e-4)
    raise PassError(
        "its Hessian is not positive definite, even strongly damped",
        fix="use more calibration samples, or leave the layer out (--skip) or to rtn",
    )


def prefiltered(rows: Rows, bits: float, damp: float) -> Tensor:
    """What to round to so many bits a weight, as rows.weight; H is damped by a fraction of its mean diagonal."""
    hessian = rows.moments.hessian
    theta = IDLE * 4**-bits * hessian.diagonal().mean() * rows.row_costs().mean()
    if rows.outer is None:
        damped = damped_by(hessian, damp)
        damped.diagonal().add_(theta)
        dropped: Tensor = theta * torch.linalg.solve(damped, rows.weight)
        return rows.weight - dropped
    along = Directions.of(rows, damp)
    return along.back(along.into(rows.weight) * (along.costs / (along.costs + theta)))


def first_codes(
    rows: Rows, feedback: Feedback, codebooks: Tensor, beam_size: int, penalties: Tensor | None = None
) -> None:
    """Set the rows' codes, and errors and gradient to match."""
    size = rows.group_size
    lines = torch.arange(size, device=feedback.order.device)
    places = (feedback.order[:, None] * size + lines).view(-1)
    weight = rows.weight[places]
    errors = torch.empty_like(weight)
    inverses = rows.inverse_scales()
    books = range(len(codebooks))
    scratch = score_buffer(rows.codes.shape[2], codebooks.shape[2], rows.device)
    for start in range(0, rows.groups, GROUPS_AT_ONCE):
        stop = min(start + GROUPS_AT_ONCE, rows.groups)
        done, block = slice(0, start * size), slice(start * size, stop * size)
        targets = torch.addmm(weight[block], feedback.carry[block, done], errors[done])
        for place in range(start, stop):
            here, before = slice(place * size, (place + 1) * size), slice(start * size, place * size)
            target = targets[here.start - block.start : here.stop - block.start]
            if place > start:
                target.addmm_(feedback.carry[here, before], errors[before])
            g = int(feedback.order[place])
            group = GroupBooks.of(codebooks, feedback.metrics[place], penalties)
            inverse = inverses[g if len(inverses) > 1 else 0]
            codes = rows.codes[:, g]
            search_group(
                group,
                group.metric @ (rows.vectors(target)[0] * inverse),
                codes,
                scratch,
                start=False,
                beam_size=beam_size,
                order=books,
                inverse_square=None if penalties is None else inverse.square(),
            )
            quantized = rows.vectors(weight[here])[0] - group.total(codes, books).mul_(rows.scale(g))
            rows.vectors(errors[here])[0].copy_(quantized)
    rows.errors[places] = errors
    torch.mm(rows.moments.hessian, rows.errors, out=rows.gradient)
