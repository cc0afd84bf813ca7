"""Codebooks to begin with: residual k-means on a sample of the vectors, each under its group's metric; and k-means on
numbers, for tables of scales and codebook values.

A vector w of group g, scale s, counts as s^2 |w / s - c|_S^2 with S the metric of its group that passes.aq_start uses.
Lloyd's steps: the nearest entry under S; then for each entry the c that solves (sum s^2 S) c = sum s^2 S w / s. The
next codebook is fitted to what the ones before it left over.
"""

import torch
from torch import Tensor

from passes.aq_rows import Rows
from passes.aq_search import GroupBooks, score_buffer, search_group

RIDGE = 1e-4


def first_codebooks(
    runs: list[Rows],
    metrics: list[Tensor],
    entries: int,
    sample: int,
    iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """Codebooks [num_codebooks, d, entries] for about `sample` vectors; metrics [groups, d, d] are given per run.

    Entries start at vectors drawn with a chance that grows with what they cost.
    """
    groups = runs[0].groups
    total = sum(rows.codes.shape[2] for rows in runs)
    per_group = min(total, max(1, sample // groups))
    drawn = [_draw(rows, max(1, rows.codes.shape[2] * per_group // total), generator) for rows in runs]
    device = drawn[0][0].device
    vectors = [part.to(device) for part, _ in drawn]  # [groups, d, drawn]
    weights = [part.to(device) for _, part in drawn]  # [groups, drawn]
    metrics = [part.to(device) for part in metrics]
    codebooks = []
    for _ in range(len(runs[0].codes)):
        book, codes = _fit(vectors, weights, metrics, entries, iterations, generator)
        for part, chosen in zip(vectors, codes, strict=True):
            part -= book.index_select(1, chosen.view(-1)).unflatten(1, chosen.shape).transpose(0, 1)
        codebooks.append(book)
    return torch.stack(codebooks)


def _draw(rows: Rows, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` vectors of each group over their scales, [groups, d, count], and their scales' squares."""
    available = rows.codes.shape[2]
    weight = rows.vectors(rows.weight)
    scales = rows.scales.expand(rows.groups, -1)
    if count < available:
        chosen = torch.randint(available, (rows.groups, count), generator=generator).to(weight.device)
        weight = weight.gather(2, chosen[:, None].expand(-1, weight.shape[1], -1))
        scales = scales.gather(1, chosen)
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return weight * inverse[:, None], scales.square()


def _fit(
    vectors: list[Tensor],
    weights: list[Tensor],
    metrics: list[Tensor],
    entries: int,
    iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, list[Tensor]]:
    """One codebook [d, entries] and, per run, the nearest entries [groups, drawn]."""
    pulled = [metric @ part for metric, part in zip(metrics, vectors, strict=True)]  # S w
    energies = [(pull * part).sum(1) * weight for pull, part, weight in zip(pulled, vectors, weights, strict=True)]
    energy = torch.cat([part.reshape(-1) for part in energies])
    flat = torch.cat([part.transpose(0, 1).flatten(1) for part in vectors], dim=1)  # [d, vectors]
    book = flat[:, _seeds(energy, entries, generator)]
    codes = _nearest(pulled, metrics, book)
    ridge = torch.eye(len(flat), device=flat.device)
    for _ in range(iterations):
        blocks = torch.zeros(entries, len(flat) ** 2, device=flat.device)
        sums = torch.zeros(len(flat), entries, device=flat.device)
        for chosen, pull, weight, metric in zip(codes, pulled, weights, metrics, strict=True):
            first = torch.arange(len(chosen), device=flat.device)[:, None] * entries
            shares = torch.zeros(len(chosen) * entries, device=flat.device)
            shares.index_add_(0, (chosen + first).view(-1), weight.reshape(-1))
            blocks += shares.view(-1, entries).T @ metric.flatten(1)
            sums.index_add_(1, chosen.view(-1), (pull * weight[:, None]).transpose(0, 1).flatten(1))
        square = blocks.unflatten(1, (len(flat), -1))
        damping = RIDGE * square.diagonal(dim1=1, dim2=2).mean() + torch.finfo(torch.float32).tiny
        used = square.diagonal(dim1=1, dim2=2).sum(1) > 0
        book = torch.linalg.solve(square + damping * ridge, sums.T).T.contiguous()
        if not used.all():
            book[:, ~used] = flat[:, _seeds(energy, int((~used).sum()), generator)]
        codes = _nearest(pulled, metrics, book)
    return book, codes


def _seeds(energy: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different vectors, drawn by their energy."""
    # A cumulative sum searched with stratified numbers: torch.multinomial takes no more than 2^24 categories.
    chance = energy.double().cpu().clamp_min(0)
    chance += chance.mean() * 1e-3 + torch.finfo(torch.float64).tiny
    keys = torch.rand(len(chance), generator=generator, dtype=torch.float64).log() / chance
    return keys.topk(count).indices.to(energy.device)


def _nearest(pulled: list[Tensor], metrics: list[Tensor], book: Tensor) -> list[Tensor]:
    """Nearest entries [groups, drawn] of each run's vectors."""
    result = []
    for pull, metric in zip(pulled, metrics, strict=True):
        scratch = score_buffer(pull.shape[2], book.shape[1], book.device)
        codes = torch.empty(1, len(pull), pull.shape[2], dtype=torch.int64, device=book.device)
        for g in range(len(pull)):
            group = GroupBooks.of(book[None], metric[g])
            search_group(group, pull[g], codes[:, g], scratch, start=False, beam_size=1, order=(0,))
        result.append(codes[0])
    return result


def fit_tables(values: Tensor, weights: Tensor, bits: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Weighted k-means on the numbers of each line of values [lines, n]: tables [lines, 2^bits], indices [lines, n].

    Tables start at the numbers' quantiles and are sorted.
    """
    levels = 2**bits
    at = ((torch.arange(levels, device=values.device) + 0.5) / levels * values.shape[1]).long()
    tables = values.sort(1).values[:, at.clamp_max(values.shape[1] - 1)].contiguous()
    indices = _level_of(values, tables)
    for _ in range(iterations):
        total = torch.zeros_like(tables).scatter_add_(1, indices, weights)
        summed = torch.zeros_like(tables).scatter_add_(1, indices, weights * values)
        tables = torch.where(total > 0, summed / total, tables).sort(1).values
        indices = _level_of(values, tables)
    return tables, indices


def _level_of(values: Tensor, tables: Tensor) -> Tensor:
    """The nearest number of a sorted table, [lines, n]."""
    return torch.searchsorted((tables[:, 1:] + tables[:, :-1]).mul_(0.5), values.contiguous())
