"""Scales adjusted by eigenvalues: the stated formula, for groups, groups of a convolution, and a whole tensor."""

import pytest
import torch

from passes.affine_grid import fit_grid
from passes.eigen_scale import POWER, eigen_adjusted


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_group_by_the_largest_eigenvalue_of_its_block(symmetric: bool) -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    grid = fit_grid(weight, 4, 2, symmetric)
    # Blocks [[5, 3], [3, 5]] and diag(1, 1): largest eigenvalues 8 and 1; the mean of all is 12 / 4 = 3.
    hessian = torch.block_diag(torch.tensor([[5.0, 3.0], [3.0, 5.0]]), torch.eye(2))
    adjusted = eigen_adjusted(grid, hessian)
    factors = torch.tensor([(3 / 8) ** POWER, 3.0**POWER])
    assert torch.allclose(adjusted.scale, grid.scale * factors, rtol=4 * 2.0**-23, atol=0)
    assert adjusted.zero_point is grid.zero_point


def test_groups_of_a_convolution_and_a_whole_tensor() -> None:
    weight = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    hessians = torch.stack([torch.diag(torch.tensor([3.0, 1.0])), torch.diag(torch.tensor([15.0, 1.0]))])
    per_row = fit_grid(weight, 4, -1, True)
    factors = torch.tensor([2 / 3, 2 / 3, 8 / 15, 8 / 15])[:, None] ** POWER
    assert torch.allclose(eigen_adjusted(per_row, hessians).scale, per_row.scale * factors, rtol=4 * 2.0**-23, atol=0)
    whole = fit_grid(weight, 4, 0, True)
    expected = whole.scale * (5 / 9) ** POWER  # of the mean Hessian, diag(9, 1)
    assert torch.allclose(eigen_adjusted(whole, hessians).scale, expected, rtol=4 * 2.0**-23, atol=0)


def test_a_group_of_dead_inputs_keeps_its_scale() -> None:
    grid = fit_grid(torch.ones(2, 4), 4, 2, True)
    adjusted = eigen_adjusted(grid, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0])))
    assert torch.equal(adjusted.scale[:, 1], grid.scale[:, 1])
    assert (adjusted.scale[:, 0] < grid.scale[:, 0]).all()
