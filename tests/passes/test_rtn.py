"""rtn: the nearest level for every weight, with no calibration data."""

import dataclasses

import pytest
import torch
from torch import nn

from passes.affine_grid import fit_grid
from passes.base import PassError
from passes.calibration import Calibration
from passes.rtn import RTN, quantize_weight
from tests.passes.nets import InvertedResidual, outputs, program_of, seeded


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_those_of_the_grid(bits: int, group_size: int, symmetric: bool) -> None:
    weight = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    for search in ("minmax", "mse"):
        options = RTN(bits=bits, group_size=group_size, symmetric=symmetric, scale_search=search)
        expected = fit_grid(weight, bits, group_size, symmetric, search).round(weight)
        actual = quantize_weight(weight, options)
        assert torch.equal(actual.dequantize(), expected.dequantize())
        assert (actual.bits, actual.group_size) == (bits, group_size)


def test_error_falls_fourfold_in_amplitude_with_two_bits() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [
        float((quantize_weight(weight, RTN(bits=bits)).dequantize() - weight).square().mean().sqrt())
        for bits in (2, 4, 8)
    ]
    # The step is 2 max|w| / (2^b - 1): 3, 15 and 255 steps. At 2 bits few weights lie within a step of zero, so the
    # error is a little off uniform; 10 % covers it.
    assert errors[0] / errors[1] == pytest.approx(15 / 3, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(255 / 15, rel=0.1)


def test_pass_needs_no_data() -> None:
    program = program_of(seeded(InvertedResidual), {"x": torch.zeros(2, 3, 8, 8)})
    data = program.calibration
    program.calibration = Calibration((), (), "none")
    options = RTN()
    options.requires(program)
    result = options.run(program)
    assert result.changed == ("stem", "expand", "depthwise", "project", "classifier")
    assert result.measured["bits_per_weight"] > 8
    program.calibration = data
    expected = torch.cat([program.reference(batch["x"])[0] for batch in data.batches]).detach()
    actual = outputs(program.graph, program)
    # Five layers of 8-bit weights, each off by at most half a step = 2^-8 max|w|, here as if all errors added up.
    assert float((actual - expected).norm() / expected.norm()) < 5 * 2.0**-8


def test_requires_the_width_to_be_one_of_the_target() -> None:
    program = program_of(nn.Sequential(nn.Linear(4, 3)), {"input": torch.zeros(2, 4)})
    program.rules = dataclasses.replace(program.rules, linear_bits=frozenset({4, 8}))
    with pytest.raises(PassError, match="target test cannot run rtn with bits=2") as caught:
        RTN(bits=2).requires(program)
    assert caught.value.fix == "the nearest it can is rtn:bits=4"
