"""AffineWeight: what codes, scales and zero points stand for."""

import pytest
import torch
from torch import Tensor

from passes.weights import AffineWeight, code_dtype, code_range, group_columns


def _by_hand(weight: AffineWeight) -> Tensor:
    """The definition, number by number."""
    rows, columns = weight.codes.shape
    result = torch.empty(rows, columns)
    for o in range(rows):
        for i in range(columns):
            at = (o if weight.scale.shape[0] > 1 else 0, i // weight.group_size if weight.group_size > 0 else 0)
            zero = 0.0 if weight.zero_point is None else float(weight.zero_point[at])
            result[o, i] = (float(weight.codes[o, i]) - zero) * weight.scale[at]
    return result


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("group_size", "scales"), [(-1, (3, 1)), (0, (1, 1)), (4, (3, 2)), (3, (3, 3))])
def test_dequantize_is_the_definition(group_size: int, scales: tuple[int, int], symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = code_range(4, symmetric)
    codes = torch.randint(low, high + 1, (3, 7), generator=generator).to(code_dtype(symmetric))
    scale = torch.rand(scales, generator=generator) + 0.1
    zero_point = None if symmetric else torch.randint(0, 16, scales, generator=generator).float()
    weight = AffineWeight(codes, scale, zero_point, 4, group_size)
    assert torch.equal(weight.dequantize(), _by_hand(weight))


def test_ranges_of_codes() -> None:
    assert [code_range(bits, True) for bits in (2, 3, 4, 8)] == [(-2, 1), (-4, 3), (-8, 7), (-128, 127)]
    assert [code_range(bits, False) for bits in (2, 3, 4, 8)] == [(0, 3), (0, 7), (0, 15), (0, 255)]
    assert (code_dtype(True), code_dtype(False)) == (torch.int8, torch.uint8)


def test_width_of_a_group() -> None:
    assert [group_columns(96, size) for size in (-1, 0, 32, 96, 128)] == [96, 96, 32, 96, 96]


def test_bits_per_weight_counts_scales_and_zero_points() -> None:
    codes = torch.zeros(2, 64, dtype=torch.int8)
    per_group = AffineWeight(codes, torch.ones(2, 2), None, 4, 32)
    assert per_group.bits_per_weight == 4 + 16 / 32
    with_zero_points = AffineWeight(codes.to(torch.uint8), torch.ones(2, 2), torch.ones(2, 2), 4, 32)
    assert with_zero_points.bits_per_weight == 4 + (16 + 4) / 32
