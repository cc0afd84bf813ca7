"""Learning from the float network: how far outputs are from its own, and steps that bring them closer."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from passes.calibration import Batch
from passes.output_moments import Loss

BATCH = 8
"""Samples of one step."""


def output_loss(found: Sequence[Tensor], wanted: Sequence[Tensor], loss: Loss) -> Tensor:
    """How far outputs are from the float network's, summed over them; outputs of whole numbers do not count.

    kl   mean over rows of the divergence of softmax(found) from softmax(wanted)
    mse  the squared error as a fraction of the wanted values' squares
    """
    pairs = [pair for pair in zip(found, wanted, strict=True) if pair[1].is_floating_point()]
    return torch.stack([_distance(value.float(), goal.float(), loss) for value, goal in pairs]).sum()


def _distance(value: Tensor, goal: Tensor, loss: Loss) -> Tensor:
    if loss == "kl":
        rows = value.flatten(0, -2) if value.dim() > 1 else value[None]
        goals = goal.flatten(0, -2) if goal.dim() > 1 else goal[None]
        return F.kl_div(rows.log_softmax(-1), goals.log_softmax(-1), reduction="batchmean", log_target=True)
    return (value - goal).square().sum() / goal.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


def mean_loss(loss_of: Callable[[Batch], Tensor], batches: Sequence[Batch]) -> float:
    """Over all samples."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            size = len(next(iter(batch.values())))
            total, count = total + float(loss_of(batch)) * size, count + size
    return total / count


def descend(
    parameters: Sequence[Tensor],
    loss_of: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    steps: int,
    rate: float,
    generator: torch.Generator,
    on_step: Callable[[int], None],
) -> None:
    """Adam, a batch a step in random order; the rate falls to zero along half a cosine. on_step is told each step."""
    optimizer = torch.optim.Adam(parameters, lr=rate)
    order: list[int] = []
    for step in range(steps):
        on_step(step)
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        for group in optimizer.param_groups:
            group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        with torch.enable_grad():
            loss_of(batches[order.pop()]).backward()
        optimizer.step()
