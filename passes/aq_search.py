"""Which entries' sum comes nearest to a vector: beam search over the codebooks of one group, for many vectors at once.

A vector t, metric S [d, d] and codebooks C_m give each choice of codes k the cost

    |q - t|_S^2 = q^T S q - 2 y^T q + const,      q = sum_m C_m k_m,  y = S t.

With all codebooks but m fixed, their sum u, it is c^T S c + 2 (S u - y)^T c plus a constant in the entry c of codebook
m: one matrix product gives the cost of all entries for all vectors. The codebooks are visited one after the other, and
the beam_size cheapest choices are carried on. A search that starts from codes counts those of codebooks not visited
yet, and never ends at a higher cost than it began at; one that starts from none takes them for zero.

A code's penalty is added to its cost.

Seen over the whole matrix, `sweep` is coordinate descent: y_g = G_g + S_g q_g is what group g's vectors should be when
all others stay. A block of groups first takes all that happened outside it from G; inside, each group takes the changes
of those before it; then G takes all of the block's in one matrix product.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from passes.aq_rows import Rows

GROUPS_AT_ONCE = 16
"""Groups of a block in a sweep."""

SCORES_AT_ONCE = 1 << 19
"""Costs held at once, vectors times entries: few enough for the caches."""

PACKED_ENTRIES = 256
"""Largest codebook whose entries' numbers fit into the low bits of a cost without blurring it."""


@dataclasses.dataclass(frozen=True)
class GroupBooks:
    """The codebooks as the vectors of one group, of one metric, see them.

    books      [num_codebooks, d, entries]
    metric     [d, d]
    norms      [num_codebooks, entries]   c^T S c of each entry
    penalties  [num_codebooks, entries], or None
    """

    books: Tensor
    metric: Tensor
    norms: Tensor
    penalties: Tensor | None

    @classmethod
    def of(cls, books: Tensor, metric: Tensor, penalties: Tensor | None = None) -> "GroupBooks":
        """With the norms computed."""
        return cls(books, metric, ((metric @ books) * books).sum(1), penalties)

    def total(self, codes: Tensor, which: Iterable[int]) -> Tensor:
        """Sum over some codebooks of their entries numbered by codes [num_codebooks, n], [d, n]."""
        total = None
        for index in which:
            part = self.books[index].index_select(1, codes[index])
            total = part if total is None else total.add_(part)
        return torch.zeros(len(self.metric), codes.shape[1], device=codes.device) if total is None else total

    def scores(self, index: int, pull: Tensor, inverse_square: Tensor | None, scratch: Tensor) -> Tensor:
        """Cost [n, entries] of each entry of a codebook, but for a constant; pull = 2 (S u - y), [d, n]."""
        scores = torch.addmm(self.norms[index], pull.T, self.books[index], out=scratch[: pull.shape[1]])
        if self.penalties is not None and inverse_square is not None:
            scores.addr_(inverse_square, self.penalties[index])
        return scores

    def cost(self, codes: Tensor, targets: Tensor, inverse_square: Tensor | None) -> Tensor:
        """Cost [n] of codes [num_codebooks, n] for targets y [d, n], but for a constant of each vector."""
        total = self.total(codes, range(len(codes)))
        cost = ((self.metric @ total).sub_(targets, alpha=2) * total).sum(0)
        if self.penalties is not None and inverse_square is not None:
            cost += self.penalties.gather(1, codes).sum(0) * inverse_square
        return cost


def score_buffer(vectors: int, entries: int, device: torch.device) -> Tensor:
    """Room for the costs of as many of some vectors as are searched at once, [at once, entries].

    Allocated once: memory that is new costs more than what is computed in it.
    """
    return torch.empty(max(1, min(vectors, SCORES_AT_ONCE // entries)), entries, device=device)


def search_group(
    group: GroupBooks,
    targets: Tensor,
    codes: Tensor,
    scratch: Tensor,
    *,
    start: bool,
    beam_size: int,
    order: Sequence[int],
    inverse_square: Tensor | None = None,
) -> None:
    """Set codes [num_codebooks, n] of the vectors whose y = S t are `targets` [d, n].

    start            the search begins at `codes`, else at nothing
    scratch          from score_buffer: to work in
    order            of the codebooks
    inverse_square   1 / scale^2 of each vector: penalties are of the scaled vectors' cost
    """
    at_once = len(scratch)
    for first in range(0, targets.shape[1], at_once):
        part = slice(first, first + at_once)
        inverses = None if inverse_square is None else inverse_square[part]
        found = _search(group, targets[:, part], codes[:, part], scratch, start, beam_size, order, inverses)
        if start:
            before = group.cost(codes[:, part], targets[:, part], inverses)
            better = group.cost(found, targets[:, part], inverses) < before
            found = torch.where(better, found, codes[:, part])
        codes[:, part] = found


def _search(
    group: GroupBooks,
    targets: Tensor,
    codes: Tensor,
    scratch: Tensor,
    start: bool,
    beam_size: int,
    order: Sequence[int],
    inverse_square: Tensor | None,
) -> Tensor:
    """The best codes [num_codebooks, n] found."""
    push = targets * -2
    numbers = torch.arange(scratch.shape[1], dtype=torch.int32, device=scratch.device)
    beam = codes[None]  # [hypotheses, num_codebooks, n]
    for step, index in enumerate(order):
        counted = [m for m in order if m != index] if start else order[:step]
        keep = 1 if step == len(order) - 1 else beam_size
        found = []
        for source, hypothesis in enumerate(beam):
            base: float | Tensor = 0.0
            pull = push
            if counted:
                rest = group.total(hypothesis, counted)
                pull = torch.addmm(push, group.metric, rest, alpha=2)
                if len(beam) > 1:  # what hypotheses are compared by
                    base = ((push + pull) * rest).sum(0).mul_(0.5)
                    if group.penalties is not None and inverse_square is not None:
                        base += group.penalties[counted].gather(1, hypothesis[counted]).sum(0) * inverse_square
            scores = group.scores(index, pull, inverse_square, scratch)
            for value, entry in _smallest(scores, min(keep, scores.shape[1]), numbers):
                found.append((value + base, source, entry))
        beam = _best(beam, found, index, keep)
    return beam[0]


def _best(beam: Tensor, found: list[tuple[Tensor, int, Tensor]], index: int, keep: int) -> Tensor:
    """The `keep` cheapest of found (cost, hypothesis it extends, entry), as hypotheses with that entry put in."""
    sources = torch.tensor([source for _, source, _ in found], device=beam.device)
    entries = torch.stack([entry for _, _, entry in found])
    if len(found) <= keep:
        kept = beam[sources]
    else:
        costs = torch.stack([cost for cost, _, _ in found])
        chosen = costs.argmin(0, keepdim=True) if keep == 1 else costs.topk(keep, dim=0, largest=False).indices
        kept = beam.gather(0, sources[chosen][:, None].expand(-1, beam.shape[1], -1))
        entries = entries.gather(0, chosen)
    kept[:, index] = entries
    return kept


def _smallest(scores: Tensor, count: int, numbers: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The `count` smallest of each line of scores [n, entries], which is overwritten: (cost [n], entry [n]).

    numbers [entries] counts from 0, in int32.

    A search for the smallest value alone is many times as fast as one that says where it stands, so, where there is
    room, the entry's number takes the place of a cost's last bits.
    """
    entries = scores.shape[1]
    if entries > PACKED_ENTRIES:
        best = scores.topk(count, dim=1, largest=False)
        return [(best.values[:, k], best.indices[:, k]) for k in range(count)]
    mask = (1 << (entries - 1).bit_length()) - 1
    scores.view(torch.int32).bitwise_and_(~mask).bitwise_or_(numbers)
    best_of = []
    for rank in range(count):
        value = scores.amin(1)
        entry = (value.view(torch.int32) & mask).long()
        best_of.append((value, entry))
        if rank + 1 < count:
            scores.scatter_(1, entry[:, None], float("inf"))
    return best_of


def sweep(
    rows: Rows,
    codebooks: Tensor,
    beam_size: int,
    penalties: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Search every group's codes anew, all others fixed; the layer error plus penalties does not rise.

    With a generator groups, and codebooks within a group, come in an order drawn from it.
    """
    groups, size = rows.groups, rows.group_size
    order = _order(groups, generator).to(rows.codes.device)
    inverses = rows.inverse_scales()
    hessian, metrics = rows.moments.hessian, rows.moments.metrics
    errors = rows.vectors(rows.errors)
    lines = torch.arange(size, device=order.device)
    scratch = score_buffer(rows.codes.shape[2], codebooks.shape[2], order.device)
    for block in order.split(GROUPS_AT_ONCE):
        members = (block[:, None] * size + lines).view(-1)
        couplings = hessian[members]  # [lines of the block, in]
        inner = couplings[:, members]
        gradient = rows.gradient[members]
        changes = torch.zeros_like(gradient)
        for position, g in enumerate(block.tolist()):
            here, before = slice(position * size, (position + 1) * size), slice(0, position * size)
            slope = gradient[here]
            if position:
                slope.addmm_(inner[here, before], changes[before])
            group = GroupBooks.of(codebooks, metrics[g], penalties)
            codes, scale = rows.codes[:, g], rows.scale(g)
            inverse = inverses[g if len(inverses) > 1 else 0]
            old = group.total(codes, range(len(codes)))
            targets = torch.addmm(rows.vectors(slope)[0] * inverse, metrics[g], old)
            search_group(
                group,
                targets,
                codes,
                scratch,
                start=True,
                beam_size=beam_size,
                order=_order(len(codes), generator).tolist(),
                inverse_square=None if penalties is None else inverse.square(),
            )
            change = old.sub_(group.total(codes, range(len(codes)))).mul_(scale)
            rows.vectors(changes[here])[0].copy_(change)
            errors[g] += change
        rows.gradient.addmm_(couplings.T, changes)


def _order(count: int, generator: torch.Generator | None) -> Tensor:
    return torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
