"""Weight scales adjusted by the Hessian's eigenvalues: finer steps where a layer is sensitive, paid for by clipping.

For the columns g of a group, H_g the block of the Hessian that belongs to them (per output channel: the whole of it),

    s_g  <-  s_g (mean eigenvalue of H / largest eigenvalue of H_g)^(1/8).

The formula is ours: the thesis this option reproduces names the idea, not the formula. It does not help. A factor that
all weights of a group share leaves the order of their scales' errors as it was, so the best scale does not depend on
it; what a sensitivity can tell is which weights *within* a group may be clipped.
"""

import dataclasses

import torch
from torch import Tensor

from passes.affine_grid import AffineGrid
from passes.threads import single_thread
from passes.weights import group_columns

POWER = 1 / 8
"""The mildest of 1/2, 1/4 and 1/8: on the reference networks largest and mean eigenvalue lie 4 to 200 apart."""


def eigen_adjusted(grid: AffineGrid, hessian: Tensor) -> AffineGrid:
    """The grid with its scales adjusted; zero points stay, so that both ends of the range move in proportion.

    hessian  [in, in], or [groups, in, in] for a grouped convolution, whose outputs fall into equal runs
    """
    hessians = hessian.view(-1, *hessian.shape[-2:]).double()
    if grid.group_size == 0:
        hessians = hessians.mean(0, keepdim=True)
    with single_thread():
        factors = torch.stack([_factors(each, grid.group_size) for each in hessians])  # [problems, groups]
    rows = len(grid.scale) // len(hessians)
    return dataclasses.replace(grid, scale=grid.scale * factors.float().repeat_interleave(rows, dim=0))


def _factors(hessian: Tensor, group_size: int) -> Tensor:
    """The factor of each group [groups] under one Hessian [in, in]; 1 where no input is alive."""
    mean = hessian.diagonal().mean()
    columns = torch.arange(len(hessian), device=hessian.device).split(group_columns(len(hessian), group_size))
    largest = torch.stack([torch.linalg.eigvalsh(hessian[group][:, group])[-1] for group in columns])
    return torch.where(largest > 0, (mean / largest.clamp_min(torch.finfo(torch.float32).tiny)) ** POWER, 1.0)
