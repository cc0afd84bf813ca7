"""Histograms hold every value once, before and after, over one span."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporter.histograms import BINS, layer_histograms
from passes.act_quant import ActQuant
from passes.base import LayerRule
from passes.rtn import RTN
from tests.exporter.compiled import Compiled, compiled, program_of, quantized
from tests.passes.nets import seeded

pytestmark = pytest.mark.ort


class Net(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 64] -> [N, 5]."""
        return self.two(torch.relu(self.one(x)))


@pytest.fixture
def result(tmp_path: Path) -> Compiled:
    batch = {"x": torch.randn(20, 64, generator=torch.Generator().manual_seed(0))}
    rules = (LayerRule("one", options={"bits": 2}), LayerRule("two", skip=True))
    return compiled(quantized(program_of(seeded(Net), batch, layer_rules=rules), ActQuant(), RTN()), tmp_path)


def test_every_value_is_counted_once(result: Compiled) -> None:
    found = layer_histograms(result.program, result.lowered, ["one"])
    assert list(found) == ["one"]
    counts = {kind: (len(bins.before), sum(bins.before), sum(bins.after)) for kind, bins in found["one"].items()}
    assert counts == {"weight": (BINS, 2048, 2048), "input": (BINS, 1280, 1280), "output": (BINS, 640, 640)}
    assert all(bins.low < bins.high for bins in found["one"].values())


def test_a_coarse_weight_has_few_values_left(result: Compiled) -> None:
    weight = layer_histograms(result.program, result.lowered, ["one"])["one"]["weight"]
    # A row has 4 values at most, and scales of rows of 64 differ by little; the float weight is uniform.
    assert sum(count > 0 for count in weight.before) > sum(count > 0 for count in weight.after)
    assert max(weight.after) > 5 * max(weight.before)


def test_a_float_layer_has_an_output_only(result: Compiled) -> None:
    kinds = set(layer_histograms(result.program, result.lowered, ["two"])["two"])
    assert "weight" not in kinds
    assert "output" in kinds


def test_the_same_twice(result: Compiled) -> None:
    names = ["one", "two"]
    assert layer_histograms(result.program, result.lowered, names) == layer_histograms(
        result.program, result.lowered, names
    )


def test_equal_values_have_a_span_too(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    same = compiled(quantized(program_of(net, {"input": torch.ones(4, 8)}), RTN()), tmp_path)
    ((found),) = layer_histograms(same.program, same.lowered, ["0"]).values()
    assert (found["weight"].low, found["weight"].high, sum(found["weight"].before)) == (-0.5, 0.5, 32)
