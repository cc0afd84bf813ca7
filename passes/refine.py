"""Lower a quantized weight's layer error by coordinate descent on its codes and least squares on its scales.

The error of one output is tr(E H E^T), E = W - Q, a quadratic in every single code and in every single scale when all
else is fixed, so each has a best value in closed form. With G = H E^T, the gradient, and s the scale of code q_k:

    codes     q_k += round(G_k / (H_kk s)),  clamped to the grid: the nearest level to the parabola's lowest point
    scales    s_g += <G_g, c_g> / <c_g, H_gg c_g>,  c_g the codes of group g less their zero point

The first is QuantEase's step (Behdin et al., arXiv 2309.01885). No step raises the error. Where GPTQ lets a column make
up for the ones before it only, here every column makes up for all others; it starts from GPTQ's codes, as a start from
rounding ends in a worse place. Zero points stay.

G is brought up to date a block of columns at a time by one matrix product over all columns, and inside the block by one
product a column. The work is done on W^T, several problems of one shape at once, as in passes.gptq.
"""

import dataclasses

import torch
from torch import Tensor

from passes.threads import single_thread
from passes.weights import AffineWeight, code_range, group_columns

BLOCK = 64
"""Columns between two products over all columns."""

OUTPUTS_AT_ONCE = 1024
"""Outputs worked on together, unless one scale holds them all, here and in gptq: bounds the memory, keeps a block of
columns in the cache, and is what ranks share out."""


def refine(
    target: Tensor, hessian: Tensor, quantized: AffineWeight, rounds: int = 4, scales: bool = True
) -> AffineWeight:
    """`quantized` with better codes and scales for `target` [out, in]; a round is all codes, then `scales` too.

    The error is tr((target - Q) H (target - Q)^T), with H = `hessian` [in, in], or [groups, in, in] for a grouped
    convolution, whose rows fall into equal runs; it never rises but by the rounding of float32 sums. H need be positive
    semidefinite only; codes of inputs that are always zero stay. New scales are numbers that target's dtype can hold.
    """
    with single_thread():
        hessians = hessian.float().view(-1, *hessian.shape[-2:])
        outputs = target.shape[0] // len(hessians)
        at_once = outputs if quantized.group_size == 0 else OUTPUTS_AT_ONCE
        codes, scale = [], []
        for start in range(0, outputs, at_once):
            part = _Part(target, quantized, len(hessians), start, at_once)
            for _ in range(rounds):
                _step_codes(part, hessians)
                if scales:
                    _step_scales(part, hessians, target.dtype)
            codes.append(part.stored_codes().to(quantized.codes.dtype))
            scale.append(part.scale)
        return dataclasses.replace(quantized, codes=_joined(codes), scale=_joined(scale))


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
    width           columns of a group
    """

    def __init__(self, target: Tensor, quantized: AffineWeight, problems: int, start: int, count: int) -> None:
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
        self.zero = zero.repeat_interleave(self.width, dim=1)[:, : target.shape[1]]  # [problems or 1, in, outputs or 1]
        self.codes -= self.zero
        self.errors = torch.empty_like(self.weight)
        for group in range(self.scale.shape[1]):
            self.set_scale(group, self.scale[:, group : group + 1])

    def stored_codes(self) -> Tensor:
        """Codes as they are stored, whole numbers, [problems, in, outputs]."""
        return (self.codes + self.zero).round_()

    def columns(self, group: int) -> slice:
        """The columns of a group."""
        return slice(group * self.width, (group + 1) * self.width)

    def set_scale(self, group: int, scale: Tensor) -> None:
        """Set a group's scale, [problems or 1, 1, outputs or 1], and its errors."""
        columns = self.columns(group)
        self.scale[:, group : group + 1] = scale
        torch.addcmul(self.weight[:, columns], self.codes[:, columns], scale, value=-1, out=self.errors[:, columns])


def _step_codes(part: _Part, hessians: Tensor) -> None:
    """Every code, column by column, to its best value given the others."""
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)[:, :, None]  # [problems, in, 1]
    columns = part.codes.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        gradient = hessians[:, start:stop] @ part.errors
        changes = torch.empty_like(gradient)
        for index, k in enumerate(range(start, stop)):
            step, column = gradient[:, index : index + 1], slice(k, k + 1)
            group = slice(k // part.width, k // part.width + 1)
            if index:
                step.baddbmm_(hessians[:, column, start:k], changes[:, :index])
            scale, low, high = (values[:, group] for values in (part.scale, part.low, part.high))
            codes = part.codes[:, column]
            step.mul_(inverse[:, column]).div_(scale).round_().add_(codes).clamp_(low, high)
            change = torch.sub(codes, step, out=changes[:, index : index + 1]).mul_(scale)
            codes.copy_(step)
            part.errors[:, column] += change


def _step_scales(part: _Part, hessians: Tensor, dtype: torch.dtype) -> None:
    """Every scale, group by group, to its best value given the codes and the other scales, as far as `dtype` goes."""
    for group in range(part.scale.shape[1]):
        columns, old = part.columns(group), part.scale[:, group : group + 1]
        codes = part.codes[:, columns]
        slope = ((hessians[:, columns] @ part.errors) * codes).sum(1, keepdim=True)  # [problems, 1, outputs]
        curvature = ((hessians[:, columns, columns] @ codes) * codes).sum(1, keepdim=True)
        if old.numel() == 1:
            slope, curvature = slope.sum(), curvature.sum()
        best = old + slope / curvature
        new = best.to(dtype).float()
        # The error is a parabola of the scale. Codes that are all zero have no best scale: nan is not nearer.
        nearer = (new > 0) & ((new - best).abs() < (old - best).abs())
        part.set_scale(group, torch.where(nearer, new, old))
