"""Lower a quantized weight's layer error by coordinate descent on its codes and least squares on its scales.

The error of one output is tr(E H E^T), E = W - Q, a quadratic in every single code and in every single scale when all
else is fixed, so each has a best value in closed form. With G = H E^T, the gradient, and s the scale of code q_k:

    codes     q_k <- round(q_k + r G_k / (H_kk s)),  clamped to the grid
    scales    s_g <- s_g + <G_g, c_g> / <c_g, H_gg c_g>,  c_g the codes of group g less their zero point

With r = 1 the first is QuantEase's step (Behdin et al., arXiv 2309.01885), the nearest level to the parabola's lowest
point, and no step raises the error; but it soon ends where no single code is worth changing. Over-relaxed, r > 1, a
code that lies nearly halfway between two levels moves on although that costs a little, and the others make up for it.
So r is 1 in the first round, RELAXATION in the second, and falls to 1 again until the last; of all rounds' results each
output keeps its best. Where GPTQ lets a column make up for the ones before it only, here every column makes up for all
others; it starts from GPTQ's codes, as a start from rounding ends in a worse place. Zero points stay.

A group's G is computed when its turn comes, and brought up to date a block of columns at a time, inside the block by
one product a column. The work is done on W^T, several problems of one shape at once, as in passes.gptq.
"""

import dataclasses

import torch
from torch import Tensor

from passes.threads import single_thread
from passes.weights import AffineWeight, code_range, group_columns

RELAXATION = 1.2
"""Of 1.1 to 1.3 the best at 3 and 4 bits, in groups and per channel; from 1.4 on rounds lose more than they bring."""

BLOCK = 32
"""Columns between two products over all columns of a group."""

OUTPUTS_AT_ONCE = 1024
"""Outputs worked on together, unless one scale holds them all, here and in gptq: bounds the memory, keeps a block of
columns in the cache, and is what ranks share out."""


def refine(
    target: Tensor, hessian: Tensor, quantized: AffineWeight, rounds: int = 10, scales: bool = True
) -> AffineWeight:
    """`quantized` with better codes and scales for `target` [out, in]; a round visits every group: codes, then scale.

    The error is tr((target - Q) H (target - Q)^T), with H = `hessian` [in, in], or [groups, in, in] for a grouped
    convolution, whose rows fall into equal runs; it never ends above where it started but by the rounding of float32
    sums, and nor does that of an output with scales of its own. H need be positive semidefinite only; codes of inputs
    that are always zero stay. New scales are numbers that target's dtype can hold; without `scales` they stay.
    """
    with single_thread():
        hessians = hessian.float().view(-1, *hessian.shape[-2:])
        outputs = target.shape[0] // len(hessians)
        at_once = outputs if quantized.group_size == 0 else OUTPUTS_AT_ONCE
        codes, scale = [], []
        for start in range(0, outputs, at_once):
            part = _Part(target, hessians, quantized, start, at_once)
            best = _Best(part)
            for index in range(rounds):
                for group in range(part.scale.shape[1]):
                    gradient = _step_codes(part, hessians, group, _relaxation(index, rounds))
                    if scales:
                        _step_scale(part, group, gradient, target.dtype)
                best.see(part)
            codes.append((best.codes + part.zero).round_().to(quantized.codes.dtype))
            scale.append(best.scale)
        return dataclasses.replace(quantized, codes=_joined(codes), scale=_joined(scale))


def _relaxation(index: int, rounds: int) -> float:
    """r of round `index` of `rounds`."""
    return 1.0 if index == 0 else 1 + (RELAXATION - 1) * (rounds - 1 - index) / max(1, rounds - 2)


def _joined(parts: list[Tensor]) -> Tensor:
    """[problems * outputs, x] from runs of outputs [problems, x, outputs]."""
    return torch.cat(parts, dim=-1).mT.flatten(0, 1)


class _Part:
    """Some outputs of every problem. `scale`, `low` and `high` broadcast over problems and outputs they are shared by.

    weight          [problems, in, outputs]
    codes           likewise, less their zero point
    errors          likewise, weight - codes * scale
    scale           [problems or 1, groups, outputs or 1]
    low, high       likewise, smallest and largest of codes
    zero            [problems or 1, in, outputs or 1], zero points
    responses       [problems, in, outputs], H_gg c_g of each group
    change          [problems, 1, outputs], what the error tr(E H E^T) has changed by
    width           columns of a group
    """

    def __init__(self, target: Tensor, hessians: Tensor, quantized: AffineWeight, start: int, count: int) -> None:
        problems = len(hessians)

        def part_of(matrix: Tensor) -> Tensor:
            if len(matrix) == 1 < len(target):
                matrix = matrix[:, :, None]
            else:
                matrix = matrix.unflatten(0, (problems, -1))[:, start : start + count].mT
            return matrix.float().clone(memory_format=torch.contiguous_format)

        self.width = group_columns(target.shape[1], quantized.group_size)
        self.weight, self.codes, self.scale = map(part_of, (target, quantized.codes, quantized.scale))
        low, high = code_range(quantized.bits, quantized.zero_point is None)
        zero = torch.zeros_like(self.scale) if quantized.zero_point is None else part_of(quantized.zero_point)
        self.low, self.high = low - zero, high - zero
        self.zero = zero.repeat_interleave(self.width, dim=1)[:, : target.shape[1]]
        self.codes -= self.zero
        self.errors, self.responses = torch.empty_like(self.weight), torch.empty_like(self.weight)
        self.change = torch.zeros_like(self.weight[:, :1])
        for group in range(self.scale.shape[1]):
            columns = self.columns(group)
            self.responses[:, columns] = hessians[:, columns, columns] @ self.codes[:, columns]
            self.set_scale(group, self.scale[:, group : group + 1])

    def columns(self, group: int) -> slice:
        """The columns of a group."""
        return slice(group * self.width, min((group + 1) * self.width, self.weight.shape[1]))

    def set_scale(self, group: int, scale: Tensor) -> None:
        """Set a group's scale, [problems or 1, 1, outputs or 1], and its errors."""
        columns = self.columns(group)
        self.scale[:, group : group + 1] = scale
        torch.addcmul(self.weight[:, columns], self.codes[:, columns], scale, value=-1, out=self.errors[:, columns])


class _Best:
    """The codes and scales with the least error so far, of each output, or of all that share a scale."""

    def __init__(self, part: _Part) -> None:
        self.codes, self.scale = part.codes.clone(), part.scale.clone()
        self.change = torch.zeros_like(self.scale[:, :1])

    def see(self, part: _Part) -> None:
        """Keep what is better."""
        change = part.change.sum_to_size(self.change.shape)
        better = change < self.change
        self.change = torch.where(better, change, self.change)
        self.codes = torch.where(better, part.codes, self.codes)
        self.scale = torch.where(better, part.scale, self.scale)


def _step_codes(part: _Part, hessians: Tensor, group: int, relaxation: float) -> Tensor:
    """Move a group's codes, column by column; returns its gradient [problems, columns, outputs] as it is then."""
    columns = part.columns(group)
    scale, low, high = (values[:, group : group + 1] for values in (part.scale, part.low, part.high))
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)[:, columns, None]
    factor = torch.where(diagonal > 0, relaxation / diagonal, 0)  # [problems, columns, 1]
    codes, errors, inner = part.codes[:, columns], part.errors[:, columns], hessians[:, columns, columns]
    gradient = hessians[:, columns] @ part.errors
    part.responses[:, columns] += gradient / scale
    for start in range(0, codes.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        before, old = gradient[:, block].clone(), codes[:, block].clone()
        new = before * (factor[:, block] / scale)  # steps first, in codes
        coupling = inner[:, block, block] * factor[:, block]
        changes = torch.zeros_like(new)  # of -codes; those of columns to come are zero, and add nothing
        rows = zip(*(values.split(1, dim=1) for values in (new, old, changes, coupling)), strict=True)
        for step, was, change, coupled in rows:
            step.baddbmm_(coupled, changes).round_().add_(was).clamp_(low, high)
            torch.sub(was, step, out=change)
        codes[:, block] = new
        changes.mul_(scale)  # of errors
        errors[:, block] += changes
        gradient.baddbmm_(inner[:, :, block], changes)
        part.change += changes.mul_(before.add_(gradient[:, block])).sum(1, keepdim=True)
    # The gradient fell by s H_gg times what the codes rose by.
    part.responses[:, columns] -= gradient / scale
    return gradient


def _step_scale(part: _Part, group: int, gradient: Tensor, dtype: torch.dtype) -> None:
    """Set a group's scale to its best value given all codes and the other scales, as far as `dtype` goes."""
    columns, old = part.columns(group), part.scale[:, group : group + 1]
    codes = part.codes[:, columns]
    slope = (gradient * codes).sum(1, keepdim=True)  # [problems, 1, outputs]
    curvature = (part.responses[:, columns] * codes).sum(1, keepdim=True)
    best = old + slope.sum_to_size(old.shape) / curvature.sum_to_size(old.shape)
    new = best.to(dtype).float()
    # The error is a parabola of the scale. Codes that are all zero have no best scale: nan is not nearer.
    nearer = (new > 0) & ((new - best).abs() < (old - best).abs())
    new = torch.where(nearer, new, old)
    part.change += (new - old) * ((new - old) * curvature - 2 * slope)
    part.set_scale(group, new)
