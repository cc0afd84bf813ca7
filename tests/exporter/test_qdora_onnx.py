"""Adapted layers in a file: the base keeps its kernel on codes, the adapter is two products beside it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from passes.aq import AQ
from passes.base import Pass
from passes.hqq import HQQ
from passes.qdora import QDoRA
from passes.rtn import RTN
from tests.exporter.compiled import compiled, program_of, quantized, sqnr, typical_sqnr

pytestmark = pytest.mark.ort

DIM = 64


class Blocks(nn.Module):
    """Two layers with biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


@pytest.mark.parametrize(
    ("base", "merged"),
    [
        (RTN(bits=4, group_size=32), True),
        (AQ(num_codebooks=1, codebook_bits=4), True),
        (HQQ(bits=3, group_size=64), False),  # its scales are codes themselves
    ],
)
def test_the_base_keeps_its_kernel(base: Pass, merged: bool, tmp_path: Path) -> None:
    x = torch.randn(64, 3, DIM, generator=torch.Generator().manual_seed(0))
    program = quantized(program_of(Blocks(), {"x": x}), base, QDoRA(rank=32, steps=3))
    result = compiled(program, tmp_path)
    kernels = result.kernel_of
    assert (kernels["net.0"], kernels["net.2"]) == ("MatMulNBits", "MatMulNBits")
    assert result.repeated == ()
    kinds = [kernel.op for kernel in result.kernels]
    # lora_A and lora_B of two layers, in 8 bits, run on codes as well
    assert kinds.count("MatMulNBits") == 6
    # a row factor and a bias behind the sum where the scales cannot take it in
    assert kinds.count("Mul") == (0 if merged else 2)
    outputs = result.outputs({"x": x[:9]})
    assert typical_sqnr(outputs.plain, outputs.unoptimized) >= 60
    assert (
        sqnr(outputs.reference, outputs.plain) < 50
    )  # far from float: the parity above compares two quantized networks
