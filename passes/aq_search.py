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
    push, beam = targets * -2, codes[:, None]  # [num_codebooks, hypotheses, n]
    for step, index in enumerate(order):
        counted = [m for m in order if m != index] if start else order[:step]
        keep, held = 1 if step == len(order) - 1 else beam_size, beam.shape[1]
        pull = push.repeat(1, held)
        squares = None if inverse_square is None else inverse_square.repeat(held)
        base = torch.zeros(pull.shape[1], device=pull.device)  # what hypotheses cost but for the entry to come
        if counted:
            flat = beam.flatten(1)
            rest = group.total(flat, counted)
            ahead = torch.addmm(pull, group.metric, rest, alpha=2)
            base = (pull.add_(ahead) * rest).sum(0).mul_(0.5)
            pull = ahead
            if group.penalties is not None and squares is not None:
                base += group.penalties[counted].gather(1, flat[counted]).sum(0) * squares
        each = min(keep, scratch.shape[1])
        costs, entries = _cheapest(group, index, pull, squares, each, scratch)
        costs = (costs + base).view(each * held, -1)
        entries = entries.view(each * held, -1)
        if each * held <= keep:
            beam = beam.repeat(1, each, 1)
        else:
            chosen = costs.argmin(0, keepdim=True) if keep == 1 else costs.topk(keep, dim=0, largest=False).indices
            beam = beam.gather(1, (chosen % held).expand(len(beam), -1, -1))
            entries = entries.gather(0, chosen)
        beam[index] = entries
    return beam[:, 0]


def _cheapest(
    group: GroupBooks, index: int, pull: Tensor, inverse_square: Tensor | None, count: int, scratch: Tensor
) -> tuple[Tensor, Tensor]:
    """The `count` entries of a codebook of least cost for each vector: costs and entries, [count, vectors].

    A search for the smallest value alone is many times as fast as one that says where it stands, so, where there is
    room, the entry's number takes the place of a cost's last bits.
    """
    entries, packed = scratch.shape[1], scratch.shape[1] <= PACKED_ENTRIES
    costs = torch.empty(count, pull.shape[1], device=pull.device)
    found = torch.empty(0 if packed else count, pull.shape[1], dtype=torch.int64, device=pull.device)
    numbers = torch.arange(entries, dtype=torch.int32, device=pull.device)
    mask = (1 << (entries - 1).bit_length()) - 1
    for first in range(0, pull.shape[1], len(scratch)):
        part = slice(first, first + len(scratch))
        squares = None if inverse_square is None else inverse_square[part]
        scores = group.scores(index, pull[:, part], squares, scratch)
        if not packed:
            best = scores.topk(count, dim=1, largest=False)
            costs[:, part], found[:, part] = best.values.T, best.indices.T
            continue
        scores.view(torch.int32).bitwise_and_(~mask).bitwise_or_(numbers)
        for rank in range(count):
            value = torch.amin(scores, 1, out=costs[rank, part])
            if rank + 1 < count:
                scores.scatter_(1, (value.view(torch.int32) & mask).long()[:, None], float("inf"))
    return costs, (costs.view(torch.int32) & mask).long() if packed else found


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
    order = group_order(groups, generator).to(rows.codes.device)
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
                order=group_order(len(codes), generator).tolist(),
                inverse_square=None if penalties is None else inverse.square(),
            )
            change = old.sub_(group.total(codes, range(len(codes)))).mul_(scale)
            rows.vectors(changes[here])[0].copy_(change)
            errors[g] += change
        rows.gradient.addmm_(couplings.T, changes)


def group_order(count: int, generator: torch.Generator | None) -> Tensor:
    """0..count-1, shuffled with a generator."""
    return torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
