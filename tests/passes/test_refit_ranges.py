"""Re-fitted activation ranges: the layers' output error falls, and nodes that other operators read are left alone."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes import PASSES
from passes.act_quant import ActQuant
from passes.base import Pass, Pipeline, Program
from passes.calibration import watch_values
from passes.graph import find_layers
from passes.ops import FAKE_QUANTIZE
from passes.refit_ranges import range_of, refit_ranges
from passes.rtn import RTN
from tests.passes.nets import InvertedResidual, outputs, program_of, seeded


class Outliers(nn.Module):
    """A linear layer whose input has a heavy tail, and a second one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 4]."""
        return self.second(F.relu(self.first(x**3)))


def quantized(module: nn.Module, inputs: Tensor, *works: Pass) -> Program:
    """A program behind these passes."""
    program = program_of(module, {"x": inputs})
    Pipeline(works, PASSES).run(program)
    return program


def layer_output_error(program: Program, name: str) -> float:
    """Squared distance between a layer's output and the float twin's, relative."""
    assert program.float_twin is not None
    seen: list[list[Tensor]] = [[], []]
    for graph, values in zip((program.float_twin, program.graph), seen, strict=True):
        (node,) = (layer.node for layer in find_layers(graph) if layer.name == name)
        watch_values(
            graph,
            program.calibration.batches,
            lambda at, value, node=node, values=values: values.append(value) if at is node else None,
        )
    wanted, found = torch.cat(seen[0]), torch.cat(seen[1])
    return float((found - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_error_of_the_first_layer_falls(symmetric: bool) -> None:
    works = ActQuant(bits=4, method="minmax", symmetric=symmetric), RTN(bits=8)
    program = quantized(seeded(Outliers), torch.zeros(64, 8), *works)
    nodes = [node for node in program.graph.graph.nodes if node.target is FAKE_QUANTIZE]
    before, old = layer_output_error(program, "first"), range_of(program.graph, nodes[0])
    moved = refit_ranges(program)
    program.graph.recompile()
    new = range_of(program.graph, nodes[0])
    assert nodes[0].args[0].name in moved
    assert layer_output_error(program, "first") < before
    assert new.scale < old.scale  # cubes of normal numbers: what is gained inside outweighs a few clipped values
    assert (new.quant_min, new.quant_max) == (old.quant_min, old.quant_max)
    assert (new.zero_point == 0) == symmetric


def test_only_what_layers_alone_read_moves() -> None:
    program = quantized(
        seeded(InvertedResidual), torch.zeros(16, 3, 8, 8), ActQuant(bits=4, method="minmax"), RTN(bits=8)
    )
    layers = {layer.node for layer in find_layers(program.graph)}
    nodes = [node for node in program.graph.graph.nodes if node.target is FAKE_QUANTIZE]
    others = [node for node in nodes if not set(node.users) <= layers]
    before = {node: range_of(program.graph, node) for node in others}
    assert others
    moved = refit_ranges(program)
    assert moved
    assert not set(moved) & {node.args[0].name for node in others}
    assert {node: range_of(program.graph, node) for node in others} == before
    assert torch.isfinite(outputs(program.graph, program)).all()


def test_the_same_every_time() -> None:
    pair = [
        quantized(seeded(Outliers), torch.zeros(64, 8), ActQuant(bits=4, method="minmax"), RTN(bits=8))
        for _ in range(2)
    ]
    for program in pair:
        refit_ranges(program)
    assert torch.equal(*(outputs(program.graph, program) for program in pair))
