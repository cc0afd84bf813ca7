"""The codebooks that fit given codes best: linear least squares, by conjugate gradients.

The layer error is quadratic in the codebooks' values: with D the linear map from codebooks to Q (decode, then scale),

    D^T H D dC = D^T G.

D^T adds up, for each entry, what its vectors are off, times their scales. Preconditioned by the entries' own blocks
A_k = sum of s^2 S_g over the vectors (of group g, scale s) that use entry k. Every step costs one product with H and
lowers the error; a few between two searches are worth more than the exact minimum, as the codes will change.

An entry that no vector uses is put where the worst vector would want it.
"""

import torch
from torch import Tensor

from passes.aq_rows import Rows

RIDGE = 1e-4
"""Added to the preconditioner's diagonal, as a fraction of its mean over all entries."""


def update_codebooks(runs: list[Rows], codebooks: Tensor, steps: int) -> Tensor:
    """Codebooks [num_codebooks, d, entries] of lower layer error for the runs' codes, whose errors are updated."""
    inverse, used = _preconditioner(runs, codebooks)
    residual = sum_runs([_gather(rows, rows.gradient, codebooks) for rows in runs])
    ahead = _precondition(inverse, residual)
    direction = ahead.clone()
    gain = (residual * ahead).sum()
    result = codebooks.clone()
    for _ in range(steps):
        if not gain > 0:
            break
        changes = [rows.scaled(rows.decode(direction.to(rows.codes.device))) for rows in runs]
        products = [rows.product(change) for rows, change in zip(runs, changes, strict=True)]
        curved = sum_runs([_gather(rows, product, codebooks) for rows, product in zip(runs, products, strict=True)])
        curvature = (direction * curved).sum()
        if not curvature > 0:
            break
        amount = float(gain / curvature)
        for rows, change, product in zip(runs, changes, products, strict=True):
            rows.step(amount, change, product)
        result.add_(direction, alpha=amount)
        residual.sub_(curved, alpha=amount)
        ahead = _precondition(inverse, residual)
        previous, gain = gain, (residual * ahead).sum()
        direction = ahead + direction * (gain / previous)
    if not used.all():
        _place_unused(runs, result, used)
    return result


def sum_runs(parts: list[Tensor]) -> Tensor:
    """The sum, in the runs' order, on the first one's device."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def _gather(rows: Rows, matrix: Tensor, codebooks: Tensor) -> Tensor:
    """D^T of a matrix like rows.weight: [num_codebooks, d, entries]."""
    vectors = (rows.vectors(matrix) * rows.scales[:, None]).transpose(0, 1).flatten(1)  # [d, groups n]
    total = torch.zeros(codebooks.shape, device=vectors.device)
    for book, codes in zip(total, rows.codes, strict=True):
        book.index_add_(1, codes.view(-1), vectors)
    return total


def _preconditioner(runs: list[Rows], codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """The inverses of A_k, [num_codebooks, entries, d, d], and which entries [num_codebooks, entries] are in use."""
    blocks = sum_runs([_entry_blocks(rows, codebooks.shape[2]) for rows in runs])
    counts = sum_runs([_entry_counts(rows, codebooks.shape[2]) for rows in runs])
    mean = blocks.diagonal(dim1=-2, dim2=-1).mean()
    ridge = torch.eye(blocks.shape[-1], device=blocks.device) * (RIDGE * mean + torch.finfo(torch.float32).tiny)
    return torch.linalg.inv(blocks + ridge), counts > 0


def _entry_blocks(rows: Rows, entries: int) -> Tensor:
    """A_k over the vectors of a run."""
    groups, d = rows.moments.metrics.shape[:2]
    first = torch.arange(groups, device=rows.codes.device)[:, None] * entries
    squares = (rows.scales.square() * rows.row_costs()).expand(groups, -1).reshape(-1)
    blocks = []
    for codes in rows.codes:
        weights = torch.zeros(groups * entries, device=squares.device).index_add_(0, (codes + first).view(-1), squares)
        blocks.append(weights.view(groups, entries).T @ rows.moments.metrics.flatten(1))
    square: Tensor = torch.stack(blocks).unflatten(-1, (d, d))
    return square


def _entry_counts(rows: Rows, entries: int) -> Tensor:
    """How often each entry is used, [num_codebooks, entries]."""
    return torch.stack([torch.bincount(codes.view(-1), minlength=entries) for codes in rows.codes])


def _precondition(inverse: Tensor, residual: Tensor) -> Tensor:
    return (inverse @ residual.mT[..., None])[..., 0].mT.contiguous()


def _place_unused(runs: list[Rows], codebooks: Tensor, used: Tensor) -> None:
    """Move unused entries to what vectors of large error would have in their place."""
    rows = max(runs, key=Rows.error)
    errors, gradient = rows.vectors(rows.errors), rows.vectors(rows.gradient)
    worst = (errors * gradient).sum(1).view(-1)  # [groups n]
    inverse = rows.inverse_scales().expand(rows.groups, -1)
    for book, codes, in_use in zip(codebooks, rows.codes, used, strict=True):
        free = (~in_use).nonzero()[:, 0]
        at = worst.topk(min(len(free), len(worst))).indices
        group, row = at // errors.shape[2], at % errors.shape[2]
        wanted = errors[group, :, row] * inverse[group, row, None]  # [entries, d]
        chosen = codes[group, row].to(book.device)
        book[:, free[: len(at)]] = book[:, chosen] + wanted.T.to(book.device)
