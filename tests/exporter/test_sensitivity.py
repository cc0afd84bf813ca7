"""Sensitivity against networks that were really quantized so: one layer alone, and all but one."""

import functools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.metrics import sqnr_db
from exporter.report import LayerSensitivity
from exporter.sensitivity import measure_sensitivity
from passes.act_quant import ActQuant
from passes.base import LayerRule, Program
from passes.calibration import run_graph
from passes.qdora import QDoRA
from passes.rtn import RTN
from tests.exporter.compiled import program_of, quantized
from tests.passes.nets import seeded

NAMES = ("stem", "one", "two", "three")
TWO_BITS = LayerRule("two", options={"bits": 2})


class Net(nn.Module):
    """A convolution and three linear layers, the second of which is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.one, self.two, self.three = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 6, 6] -> [N, 5]."""
        y = F.relu(self.one(F.relu(self.stem(x)).flatten(1)))
        return self.three(F.relu(self.two(y)) + y)


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(20, 1, 6, 6, generator=torch.Generator().manual_seed(0))}


@functools.cache
def program(*skipped: str) -> Program:
    """Rounded to 8 bits, `two` to 2; static ranges and plain rounding depend on no other layer's quantization."""
    rules = (TWO_BITS, *(LayerRule(name, skip=True) for name in skipped))
    return quantized(program_of(seeded(Net), batch(), layer_rules=rules), ActQuant(), RTN())


def output_sqnr(found: Program) -> float:
    reference, value = (run_graph(graph, [batch()])[0][0] for graph in (found.reference, found.graph))
    return sqnr_db(reference.numpy(), value.numpy())


@functools.cache
def measured(spec: str | None = None) -> dict[str, LayerSensitivity]:
    return {layer.name: layer for layer in measure_sensitivity(program(), spec)}


def test_the_most_sensitive_layer_comes_first() -> None:
    found = measured()
    assert set(found) == set(NAMES)
    assert next(iter(found)) == "two"
    assert found["two"].gain_db == max(layer.gain_db for layer in found.values())
    assert found["two"].gain_db > 10  # without it, 8 bits are left


@pytest.mark.parametrize("name", NAMES[1:])  # the quantizer of a convolution's output counts as its readers'
def test_alone_is_the_network_with_this_layer_quantized(name: str) -> None:
    really = output_sqnr(program(*(other for other in NAMES if other != name)))
    assert measured()[name].alone_sqnr_db == pytest.approx(really, abs=0.01)


@pytest.mark.parametrize("name", ["two", "three"])
def test_without_is_the_network_with_this_layer_in_float(name: str) -> None:
    assert measured()[name].without_sqnr_db == pytest.approx(output_sqnr(program(name)), abs=0.01)


def test_gain_is_against_the_quantized_network() -> None:
    found = measured()
    for layer in found.values():
        assert layer.gain_db == pytest.approx(layer.without_sqnr_db - output_sqnr(program()), abs=0.01)


@pytest.mark.parametrize("base", [RTN(bits=2, group_size=-1), RTN(bits=2, group_size=16)])
def test_a_layer_with_an_adapter_counts_as_one(base: RTN) -> None:
    rules = tuple(LayerRule(name, skip=True) for name in NAMES if name != "two")
    adapted = quantized(program_of(seeded(Net), batch(), layer_rules=rules), ActQuant(), base, QDoRA(rank=8))
    (layer,) = (found for found in measure_sensitivity(adapted, None) if found.name == "two")
    assert layer.alone_sqnr_db == pytest.approx(output_sqnr(adapted), abs=0.01)
    bare = quantized(program_of(seeded(Net), batch(), layer_rules=rules), ActQuant(), base)
    assert layer.alone_sqnr_db > output_sqnr(bare) + 1
    assert layer.without_sqnr_db > 100  # float, its adapter gone with it


def test_it_is_deterministic_and_leaves_the_program_alone() -> None:
    found = program()
    before = str(found.graph.graph)
    first, second = (measure_sensitivity(found, None) for _ in range(2))
    assert first == second
    assert str(found.graph.graph) == before


def mean_output(predict: Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]]) -> dict[str, float]:
    return {"mean": float(predict(batch())["output"].mean())}


def test_metrics_are_measured_for_every_layer() -> None:
    found = measured("tests.exporter.test_sensitivity:mean_output")
    alone = program("stem", "two", "three")
    expected = run_graph(alone.graph, [batch()])[0][0].mean().item()
    assert found["one"].metrics["mean"]["alone"] == pytest.approx(expected, abs=1e-6)
    assert set(found["one"].metrics["mean"]) == {"alone", "without"}
