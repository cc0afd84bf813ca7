"""Held-out samples that are among the calibration samples are found, whatever they are made of."""

import pytest
import torch
from torch import Tensor

from exporter.leak import leak_warning
from passes.calibration import Calibration


def calibration(seen: list[dict[str, Tensor]], held_out: list[dict[str, Tensor]]) -> Calibration:
    return Calibration(tuple(seen), tuple(held_out), "data.npz")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 3)])
def test_a_repeated_sample_is_found_across_batches(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = (torch.arange(torch.Size(shape).numel()) % 7).view(shape).to(dtype)
    if dtype == torch.bool:
        values = torch.zeros(shape, dtype=dtype)
        values[0] = True
    seen = [{"x": values[:2]}, {"x": values[2:4]}]
    found = leak_warning(calibration(seen, [{"x": values[3:4]}]))
    assert found is not None
    assert found.startswith("1 of 1 held-out samples is also among those that the passes saw")
    assert "remove repeated samples from data.npz" in found


def test_samples_are_the_same_when_all_their_inputs_are() -> None:
    x, y = torch.arange(4.0)[:, None], torch.arange(10.0, 14.0)[:, None]
    seen = [{"x": x[:2], "y": y[:2]}]
    assert leak_warning(calibration(seen, [{"x": x[:2], "y": y[2:]}])) is None
    found = leak_warning(calibration(seen, [{"y": y[1:3], "x": x[1:3]}]))  # the order of the names says nothing
    assert found is not None
    assert "1 of 2 held-out samples" in found
    assert "(the first: held-out sample 0 is calibration sample 1)" in found


def test_samples_of_their_own_are_no_leak() -> None:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert leak_warning(calibration([{"x": x[:6]}], [{"x": x[6:]}])) is None
