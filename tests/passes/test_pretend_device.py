"""Weight algorithms take tensors wherever they are: the same numbers, and nothing made on the CPU in between."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from passes import aq, gptaq, gptq, hqq, rtn
from passes.aq import AQ
from passes.device import to_cpu
from passes.gptaq import GPTAQ
from passes.gptq import GPTQ
from passes.hqq import HQQ
from passes.rtn import RTN
from tests.passes.pretend_device import DEVICE, Pretend, There


@pytest.fixture
def device() -> Iterator[Pretend]:
    """The pretended device, on."""
    with Pretend() as mode:
        yield mode


def test_the_device_tells_what_mixes(device: Pretend) -> None:
    there = torch.ones(2, device=DEVICE)
    assert isinstance(there, There)
    assert (there * 2).cpu().equal(torch.full((2,), 2.0))
    with pytest.raises(AssertionError, match="mixes devices"):
        _ = there + torch.ones(2)
    assert device.ran >= 2


CASES: dict[str, Callable[..., Any]] = {
    "rtn": lambda weight, hessian, cross: rtn.quantize_weight(weight, RTN(bits=4, group_size=16, scale_search="mse")),
    "gptq": lambda weight, hessian, cross: gptq.quantize_weight(weight, hessian, GPTQ(group_size=16)),
    "gptq in order": lambda weight, hessian, cross: gptq.quantize_weight(
        weight, hessian, GPTQ(group_size=16, act_order=False, symmetric=False, scale_search="minmax")
    ),
    "gptq of a tensor": lambda weight, hessian, cross: gptq.quantize_weight(weight, hessian, GPTQ(group_size=0)),
    "gptaq": lambda weight, hessian, cross: gptaq.quantize_weight(weight, hessian, GPTAQ(), cross),
    "gptaq eig": lambda weight, hessian, cross: gptaq.quantize_weight(weight, hessian, GPTAQ(eig=True), cross),
    "hqq": lambda weight, hessian, cross: hqq.quantize_weight(weight, HQQ(group_size=16)),
    "hqq hessian": lambda weight, hessian, cross: hqq.quantize_weight(weight, HQQ(group_size=16), hessian),
    "aq": lambda weight, hessian, cross: aq.quantize_weight(weight, hessian, AQ(codebook_bits=4, sample=64, rounds=2)),
    "aq with tables": lambda weight, hessian, cross: aq.quantize_weight(
        weight, hessian, AQ(codebook_bits=4, scale_bits=2, codebook_value_bits=3, sample=64, rounds=1, shuffle=True)
    ),
}


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randn(256, 64) * 0.1
    x[:, 5] = 0  # a dead input takes a path of its own
    y[:, 5] = 0
    return torch.randn(48, 64), x.T @ x / 256, (x + y).T @ x / 256


@pytest.mark.parametrize("name", CASES)
def test_a_weight_on_a_device_gets_the_codes_it_gets_on_the_cpu(name: str) -> None:
    weight, hessian, cross = _problem()
    expected = CASES[name](weight, hessian.clone(), cross.clone())
    with Pretend() as mode:
        found = CASES[name](weight.to(DEVICE), hessian.to(DEVICE), cross.to(DEVICE))
        assert mode.ran > 10
        assert isinstance(found.codes, There)
        back = to_cpu(found)
    assert not isinstance(back.codes, There)
    assert back.codes.equal(expected.codes)
    assert back.dequantize().equal(expected.dequantize())
