"""Adapters in a graph: the same function as the adapted weight, whatever the base and the operator of the layer."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from passes.adapter_nodes import attach, with_rows_scaled
from passes.base import Program
from passes.dora import Adapter
from passes.graph import aten, bias_of, tidy, weight_of
from passes.hqq import HQQ
from passes.hqq import quantize_weight as hqq
from passes.rtn import RTN
from passes.rtn import quantize_weight as rtn
from passes.weight_nodes import is_quantized, read_weight, write_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight
from tests.passes.nets import FLOAT32_EPS, count, outputs, program_of

OUT, IN, RANK = 16, 32, 3


class Product(nn.Module):
    """One layer in the form under test, and something behind it."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.weight = nn.Parameter(torch.randn(OUT, IN) if form == "linear" else torch.randn(IN, OUT))
        self.bias = nn.Parameter(torch.randn(OUT))

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "linear":
            y = nn.functional.linear(x, self.weight, self.bias)
        elif self.form == "addmm":
            y = torch.addmm(self.bias, x, self.weight)
        else:
            y = torch.mm(x, self.weight)
        return torch.relu(y)


def codebooks(matrix: Tensor, height: int = 1) -> QuantWeight:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (OUT // height, IN // 4, 1), generator=generator, dtype=torch.uint8)
    entries = torch.randn(1, 16, height, 4, generator=generator)
    return CodebookWeight(codes, entries, torch.rand(OUT // height, 1, generator=generator) + 0.5)


def float_zeros(matrix: Tensor) -> QuantWeight:
    found = rtn(matrix, RTN(bits=4, group_size=8, symmetric=False))
    assert found.zero_point is not None
    return dataclasses.replace(found, zero_point=found.zero_point + 0.3)


def axis_0(matrix: Tensor) -> QuantWeight:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (OUT, IN), generator=generator, dtype=torch.uint8)
    scale, zero = (torch.rand(OUT // 8, IN, generator=generator) + start for start in (0.1, 3))
    return AffineWeight(codes, scale, zero, 3, 8, axis=0)


BASES = {
    "groups": lambda matrix: rtn(matrix, RTN(bits=4, group_size=8)),
    "one scale": lambda matrix: rtn(matrix, RTN(bits=4, group_size=0)),
    "float zeros": float_zeros,
    "quantized scales": lambda matrix: hqq(matrix, HQQ(bits=3, group_size=16)),
    "axis 0": axis_0,
    "codebooks": codebooks,
    "codebooks of two rows": lambda matrix: codebooks(matrix, 2),
}
MERGED = {"groups", "float zeros", "codebooks"}


def random_adapter(sign: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(1)
    parts = (torch.randn(shape, generator=generator) for shape in ((RANK, IN), (OUT, RANK)))
    magnitude = 4 * torch.rand(OUT, generator=generator) + 1
    magnitude[0] *= sign
    return Adapter(*parts, magnitude, alpha=2.0)


def program(form: str, base: str) -> tuple[Program, QuantWeight]:
    found = program_of(Product(form), {"x": torch.randn(5, IN)})
    layer = found.layers()[0]
    weight: QuantWeight = BASES[base](layer.to_matrix(weight_of(found.graph, layer)).contiguous())
    write_weight(found.graph, layer, weight)
    tidy(found.graph)
    return found, weight


@pytest.mark.parametrize("form", ["linear", "addmm", "mm"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_graph_is_the_adapted_weight(form: str, base: str, sign: float) -> None:
    found, weight = program(form, base)
    layer, adapter = found.layers()[0], random_adapter(sign)
    bias = bias_of(found.graph, layer)
    attach(found.graph, layer, adapter)
    tidy(found.graph)
    x = torch.cat([batch["x"] for batch in found.calibration.batches])
    expected = x @ adapter.weight(weight.dequantize()).T
    expected = torch.relu(expected if bias is None else expected + bias)
    # Three sums of at most IN products in place of one, and a scale that is rounded once more.
    assert float((outputs(found.graph, found) - expected).abs().max()) <= 8 * IN * FLOAT32_EPS * float(expected.max())
    merged = base in MERGED and sign > 0
    assert count(found.graph, aten.mul.Tensor) == (not merged)
    names = {layer.name: is_quantized(layer) for layer in found.layers()}
    assert sorted(names.values()) == [False, False, True]
    assert {f"{layer.name}.lora_A", f"{layer.name}.lora_B"} == {name for name, codes in names.items() if not codes}
    kept = read_weight(found.graph, found.layers()[0])
    assert kept is not None
    assert kept.codes.equal(weight.codes)


def test_a_float_layer_takes_its_adapter_in() -> None:
    found = program_of(Product("addmm"), {"x": torch.randn(5, IN)})
    layer, adapter = found.layers()[0], random_adapter()
    matrix = layer.to_matrix(weight_of(found.graph, layer))
    attach(found.graph, layer, adapter)
    tidy(found.graph)
    assert len(found.layers()) == 1
    assert layer.to_matrix(weight_of(found.graph, found.layers()[0])).equal(adapter.weight(matrix))


def test_rows_that_scales_cannot_say() -> None:
    factor = torch.full((OUT,), 2.0)
    matrix = torch.randn(OUT, IN)
    for name, make in BASES.items():
        scaled = with_rows_scaled(make(matrix), factor)
        assert (scaled is not None) == (name in MERGED), name
        if scaled is not None:
            assert scaled.dequantize().equal(2 * make(matrix).dequantize())
    whole = BASES["groups"](matrix)
    assert isinstance(whole, AffineWeight)
    assert with_rows_scaled(whole, -factor) is None
