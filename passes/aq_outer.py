"""Codes for what the network's outputs feel: rows of a weight matrix couple through what follows the layer.

The error is tr(G E H E^T) with G = E[g g^T], g the gradient at the layer's output (passes.output_moments), instead of
tr(E H E^T). G is far from a multiple of the identity, as a network's few outputs feel few of a layer's directions. So
errors of the rows are to cancel where G is large, as errors of the columns are where H is.

Rows are taken in parts. With all others fixed, and what couples those of a part b left out, the best these can do is
to be quantized by themselves, under H, for other weights: for rows of cost D = diag(G) that is

    W_b + sum_{j not in b} e_j G_jb / D_b.

The first codes come as GPTQ's do, with rows in the place of columns (YAQA has feedback from both sides, Tseng et al.,
arXiv 2505.22988): G = R R^T, R upper triangular in the order of decreasing G_ii, and rows b make up for those before,

    W_b + sum_{j<b} e_j R_jb R_bb^-1,

what is left after them costing R_bb R_bb^T. A part is searched until its own error stops falling before the next one
makes up for it. G is damped strongly: it is second order, of inputs and gradients taken to be independent.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.aq_rows import Kept, Rows
from passes.aq_search import GROUPS_AT_ONCE, GroupBooks, group_order, score_buffer, search_group, sweep
from passes.aq_start import Feedback, first_codes, upper_factor

FIRST_PARTS, PARTS = 32, 64
"""Parts that rows are taken in, for the first codes and in a round: fewer are faster, and worse."""

OUTER_DAMP = 0.2
"""Added to G's diagonal, as a fraction of its mean."""

SWEEPS = 8
"""Most searches of a part before the next one's turn."""

STEPS = 4
"""Conjugate-gradient steps on codebooks and scales in a round, as many rows move together."""


def damped_outer(outer: Tensor) -> Tensor:
    """G [n, n] in float32, damped; the identity where no gradient was seen."""
    diagonal = outer.diagonal().float()
    mean = diagonal.mean()
    if not mean > 0:
        return torch.eye(len(outer), device=outer.device)
    return outer.float() + torch.eye(len(outer), device=outer.device) * (OUTER_DAMP * mean)


def first_codes_by_rows(
    rows: Rows,
    feedback: Feedback,
    codebooks: Tensor,
    beam_size: int,
    tolerance: float,
    generator: torch.Generator | None,
) -> None:
    """Set the codes of rows that couple, if that lowers the error, and errors and gradient to match.

    feedback is that of the inputs; a search that lowers a part's error by less than `tolerance` is its last.
    """
    assert rows.outer is not None
    kept = Kept(rows)
    order = rows.outer.diagonal().argsort(descending=True, stable=True)
    factor = upper_factor(rows.outer[order][:, order], 0.0)
    size = -(-len(order) // FIRST_PARTS)
    for start in range(0, len(order), size):
        few, done = slice(start, start + size), slice(0, start)
        shift = rows.errors[:, order[done]] @ torch.linalg.solve_triangular(
            factor[few, few], factor[done, few], upper=True, left=False
        )
        part = rows.part(order[few], shift)
        first_codes(part, feedback, codebooks, beam_size)
        before = part.error()
        for _ in range(SWEEPS):
            sweep(part, codebooks, beam_size, generator=generator)
            after = part.error()
            if after >= (1 - tolerance) * before:
                break
            before = after
        rows.take(order[few], part, shift)
    rows.gradient = rows.product(rows.errors)
    kept.undo_unless_lower()


def sweep_coupled(rows: Rows, codebooks: Tensor, beam_size: int, generator: torch.Generator | None) -> None:
    """Search every group's codes anew, part of the rows by part; the error does not rise."""
    assert rows.outer is not None
    kept = Kept(rows)
    outer, hessian, metrics = rows.outer, rows.moments.hessian, rows.moments.metrics
    size, books = rows.group_size, range(len(codebooks))
    parts = [torch.arange(first, len(outer), PARTS, device=rows.device) for first in range(min(PARTS, len(outer)))]
    inverses = rows.inverse_scales() / _stiffness(outer, parts)
    errors = rows.vectors(rows.errors)
    lines = torch.arange(size, device=rows.device)
    scratch = score_buffer(len(parts[0]), codebooks.shape[2], rows.device)
    for block in group_order(rows.groups, generator).to(rows.device).split(GROUPS_AT_ONCE):
        members = (block[:, None] * size + lines).view(-1)
        couplings = hessian[members]  # [lines of the block, in]
        inner = couplings[:, members]
        gradient = rows.gradient[members]
        felt = torch.zeros_like(gradient)  # changes of the errors, times outer
        for position, g in enumerate(block.tolist()):
            here, before = slice(position * size, (position + 1) * size), slice(0, position * size)
            slope = torch.addmm(gradient[here], inner[here, before], felt[before])
            group = GroupBooks.of(codebooks, metrics[g])
            inverse, scale = inverses[g if len(inverses) > 1 else 0], rows.scale(g)
            for part in parts:
                codes = rows.codes[:, g, part]
                old = group.total(codes, books)
                targets = torch.addmm(slope[:, part] * inverse[part], group.metric, old)
                search_group(group, targets, codes, scratch, start=True, beam_size=beam_size, order=books)
                rows.codes[:, g, part] = codes
                change = old.sub_(group.total(codes, books)).mul_(scale[part])
                errors[g][:, part] += change
                coupled = change @ outer[part]
                felt[here] += coupled
                slope.addmm_(group.metric, coupled)
        rows.gradient.addmm_(couplings.T, felt)
    kept.undo_unless_lower()


def _stiffness(outer: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """What a row's error is taken to cost where its part moves together, [n].

    With diag(G) times the largest eigenvalue of a part's correlations no move could raise the error, with diag(G) alone
    those of a part may add up; their geometric mean goes further than the first and hardly ever too far.
    """
    stiffness = outer.diagonal().clone()
    for part in parts:
        sizes = stiffness[part].sqrt()
        correlations = outer[part][:, part] / (sizes[:, None] * sizes)
        stiffness[part] *= torch.linalg.eigvalsh(correlations)[-1].sqrt()
    return stiffness
