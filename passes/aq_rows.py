"""The matrix under additive quantization, cut into runs of output groups that are worked on one after the other.

A run keeps its part of W^T, so that a group of inputs is a few contiguous lines: E = W - Q [in, og n] with the columns
in the order (row of the group, output group), n output groups. A group of ig inputs is then, without a copy, the
matrix [d, n] of its n vectors of d = ig og numbers. G = H E, the gradient, is kept in step with every change, and the
layer error of the run is <E, G>. Between vectors the error couples through H alone: the metric of group g's vectors is
H_gg (x) I_og, [d, d].

With `outer` (passes.aq_outer) the error is that of the network's outputs: G = H E outer, and rows couple, too.
"""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

OUTPUTS_AT_ONCE = 2048
"""Outputs of a run: bounds the memory, and keeps what a search looks at in the cache."""


@dataclasses.dataclass(frozen=True)
class Moments:
    """Second moments of a problem's inputs.

    hessian   [in, in]
    metrics   [groups, d, d], of the vectors of each group
    """

    hessian: Tensor
    metrics: Tensor
    _eigen: dict[float, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict, repr=False)

    def eigen(self, damp: float) -> tuple[Tensor, Tensor]:
        """Eigenvalues [in] and vectors [in, in] of the Hessian, damped by a fraction of its mean diagonal."""
        # runs of one problem share them: of thousands of inputs they take as long as a fit
        if damp not in self._eigen:
            values, vectors = torch.linalg.eigh(damped_by(self.hessian, damp))
            self._eigen[damp] = values, vectors
        return self._eigen[damp]

    def to(self, device: torch.device) -> "Moments":
        """On another device."""
        return Moments(self.hessian.to(device), self.metrics.to(device))


def moments_of(hessian: Tensor, in_group_size: int, out_group_size: int) -> Moments:
    """Moments of a problem with this Hessian [in, in]."""
    return Moments(hessian, vector_metrics(diagonal_blocks(hessian, in_group_size), out_group_size))


def damped_by(hessian: Tensor, damp: float) -> Tensor:
    """The Hessian with a fraction of its mean diagonal added."""
    return hessian + torch.eye(len(hessian), device=hessian.device) * (damp * hessian.diagonal().mean())


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """The blocks [n / size, size, size] on the diagonal of [n, n]."""
    blocks = matrix.unflatten(0, (-1, size)).unflatten(2, (-1, size))
    diagonal: Tensor = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return diagonal.contiguous()


def vector_metrics(blocks: Tensor, out_group_size: int) -> Tensor:
    """block (x) I: what [groups, ig, ig] is to vectors whose numbers come in the order (input, output)."""
    return torch.kron(blocks, torch.eye(out_group_size, device=blocks.device)) if out_group_size > 1 else blocks


@dataclasses.dataclass
class Rows:
    """A run of n output groups.

    problem    number of the problem they are of
    moments    of their inputs
    weight     W^T, [in, og n], see above
    scales     [1 or groups, n]
    sharing    output groups and groups of inputs that share a scale; of the latter all if there is one scale a row
    codes      [num_codebooks, groups, n] int64: adding up by int32 numbers is many times slower
    errors     E = W - Q, as weight
    gradient   G = H E, as weight
    outer      [n, n] what errors of two rows cost together; without it each counts alone
    """

    problem: int
    moments: Moments
    weight: Tensor
    scales: Tensor
    codes: Tensor
    errors: Tensor
    gradient: Tensor
    sharing: tuple[int, int] = (1, 1)
    outer: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where the run is worked on."""
        return self.weight.device

    @property
    def groups(self) -> int:
        """How many groups the inputs fall into."""
        return self.codes.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs of a group."""
        return len(self.weight) // self.groups

    def vectors(self, matrix: Tensor) -> Tensor:
        """A matrix like `weight`, or some groups' lines of one, as vectors [groups, d, n] of the same storage."""
        return matrix.view(len(matrix) // self.group_size, -1, self.codes.shape[2])

    def scale(self, group: int) -> Tensor:
        """Scales [n] of a group."""
        return self.scales[group if len(self.scales) > 1 else 0]

    def shared_sum(self, values: Tensor) -> Tensor:
        """Values of scales [1 or groups, n] summed over those that share one, for each of them."""
        high, wide = self.sharing
        if high > 1:
            values = values.unflatten(1, (-1, high)).sum(2).repeat_interleave(high, 1)
        if wide > 1 and len(values) > 1:
            values = values.unflatten(0, (-1, wide)).sum(1).repeat_interleave(wide, 0)
        return values

    def inverse_scales(self) -> Tensor:
        """1 / scales, and 0 where a scale is 0."""
        return torch.where(self.scales > 0, 1 / self.scales, 0)

    def decode(self, codebooks: Tensor) -> Tensor:
        """What the codes stand for before scaling, [groups, d, n], with codebooks [num_codebooks, d, entries]."""
        total = codebooks[0].index_select(1, self.codes[0].view(-1))
        for book, codes in zip(codebooks[1:], self.codes[1:], strict=True):
            total += book.index_select(1, codes.view(-1))
        vectors: Tensor = total.unflatten(1, self.codes.shape[1:])
        return vectors.transpose(0, 1)

    def scaled(self, vectors: Tensor) -> Tensor:
        """Vectors [groups, d, n] times their scales, as a matrix like `weight`."""
        return (vectors * self.scales[:, None]).reshape(self.weight.shape)

    def refresh(self, codebooks: Tensor) -> None:
        """Compute errors and gradient from codes, codebooks and scales."""
        torch.sub(self.weight, self.scaled(self.decode(codebooks)), out=self.errors)
        self.gradient = self.product(self.errors)

    def product(self, change: Tensor) -> Tensor:
        """H change, times `outer` where there is one: what the gradient moves by when E moves by `change`."""
        product = self.moments.hessian @ change
        return product if self.outer is None else product @ self.outer

    def row_costs(self) -> Tensor:
        """What errors of each output group cost by themselves, [n]."""
        return torch.ones_like(self.scales[0]) if self.outer is None else self.outer.diagonal()

    def part(self, which: Tensor, shift: Tensor) -> "Rows":
        """Some rows by themselves, their weight moved by `shift` [in, rows]; errors and gradient are not set."""
        weight = self.weight[:, which] + shift
        empty = torch.empty_like(weight), torch.empty_like(weight)
        return Rows(self.problem, self.moments, weight, self.scales[:, which], self.codes[:, :, which], *empty)

    def take(self, which: Tensor, part: "Rows", shift: Tensor) -> None:
        """Codes and errors of a part worked on; the gradient is not brought up to date."""
        self.codes[:, :, which] = part.codes
        self.errors[:, which] = part.errors - shift

    def step(self, amount: float | Tensor, direction: Tensor, product: Tensor) -> None:
        """Add amount * direction to Q, `product` being the direction's; an amount for each output group broadcasts."""
        if isinstance(amount, Tensor):
            direction, product = direction * amount, product * amount
            amount = 1.0
        self.errors.sub_(direction, alpha=amount)
        self.gradient.sub_(product, alpha=amount)

    def error(self) -> float:
        """The error of the run, tr(E^T H E), or tr(E^T H E outer)."""
        return float((self.errors * self.gradient).sum(dtype=torch.float64))


class Kept:
    """Codes of rows as they are now, before a search of them; weight and scales must be the same after it."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.error = rows, rows.error()
        self.codes, self.errors, self.gradient = rows.codes.clone(), rows.errors.clone(), rows.gradient.clone()

    def undo_unless_lower(self) -> None:
        """Undo what came since if the error is not lower."""
        if not self.rows.error() < self.error:
            self.rows.codes, self.rows.errors, self.rows.gradient = self.codes, self.errors, self.gradient


def cut_rows(
    weight: Tensor,
    moments: Sequence[Moments],
    out_group_size: int,
    num_codebooks: int,
    devices: Sequence[torch.device],
    sharing: tuple[int, int] = (1, 1),
    whole: bool = False,
) -> list[Rows]:
    """`weight` [out, in] in runs of about OUTPUTS_AT_ONCE outputs; the outputs fall into as many problems as moments.

    Runs take turns on the devices. Their scales are one for each output group, or for as many as `sharing` says, the
    root mean square of these; codes, errors and gradient are not set yet. With `whole` a problem is one run.
    """
    groups = len(moments[0].metrics)
    outputs = len(weight) if whole else OUTPUTS_AT_ONCE
    at_once = max(1, outputs // (out_group_size * sharing[0])) * sharing[0]
    runs: list[Rows] = []
    for index, (problem, given) in enumerate(zip(weight.unflatten(0, (len(moments), -1)), moments, strict=True)):
        local = {device: given.to(device) for device in devices}
        for part in problem.unflatten(0, (-1, out_group_size)).split(at_once):  # [n, og, in]
            device = devices[len(runs) % len(devices)]
            part = part.to(device, torch.float32)
            lines = part.permute(2, 1, 0).contiguous().flatten(1)
            squares = part.square().mean((1, 2))[None]
            codes = torch.zeros(num_codebooks, groups, len(part), dtype=torch.int64, device=device)
            empty = torch.empty_like(lines), torch.empty_like(lines)
            rows = Rows(index, local[device], lines, squares, codes, *empty, sharing)
            rows.scales = (rows.shared_sum(squares) / sharing[0]).sqrt()
            runs.append(rows)
    return runs
