"""Block tuning: closer to the float network, codes untouched, nothing worse."""

import dataclasses

import torch
from torch import Tensor, nn

from exporter.capture import capture, export_module
from passes.aq import AQ
from passes.base import Program
from passes.block_tune import find_blocks, tune_blocks
from passes.calibration import Calibration, run_graph
from passes.graph import copy_graph, tidy
from passes.weight_nodes import read_weight
from passes.weights import CodebookWeight
from tests.passes.nets import RULES, seeded

OPTIONS = AQ(num_codebooks=1, codebook_bits=4, in_group_size=4, beam_size=2, rounds=1)


class Block(nn.Module):
    """A residual feed-forward block with a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.table: Tensor
        self.register_buffer("table", torch.linspace(0.9, 1.1, 32))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 32] -> [N, 32]."""
        result: Tensor = x + self.down(torch.relu(self.up(self.norm(x) * self.table)))
        return result


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Block(), Block())
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 32] -> [N, 8]."""
        result: Tensor = self.head(self.layers(x))
        return result


def _quantized() -> Program:
    generator = torch.Generator().manual_seed(0)
    data = tuple({"x": torch.randn(128, 32, generator=generator)} for _ in range(2))
    exported = export_module(seeded(Net), data[0], {"x": {0: "batch"}})
    program = capture(exported, Calibration(data, data[:1], "random"), RULES)
    program.float_twin = copy_graph(program.graph)
    OPTIONS.run(program)
    return program


def _distance(program: Program) -> float:
    assert program.float_twin is not None
    program.graph.recompile()
    both = (run_graph(graph, program.calibration.batches) for graph in (program.graph, program.float_twin))
    return sum(float((mine[0] - theirs[0]).square().sum()) for mine, theirs in zip(*both, strict=True))


def _codebooks(program: Program) -> dict[str, CodebookWeight]:
    weights = {layer.name: read_weight(program.graph, layer) for layer in program.layers()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, CodebookWeight)}


def test_blocks_are_those_of_numbered_modules() -> None:
    assert set(find_blocks(_quantized().graph)) == {"layers.0", "layers.1"}


def test_tuning_brings_the_output_closer_and_leaves_the_codes() -> None:
    program = _quantized()
    before, weights = _distance(program), _codebooks(program)
    ratios = tune_blocks(program, 60, 0.003)
    tidy(program.graph)
    assert set(ratios) == {"layers.0", "layers.1"}
    assert all(ratio < 0.95 for ratio in ratios.values())
    assert _distance(program) < 0.95 * before
    targets = {str(node.target) for node in program.graph.graph.nodes if node.op == "get_attr"}
    assert "layers.0.table" in targets  # not trained, not tuned
    assert "layers.0.norm.weight" not in targets  # replaced by a tuned one
    tuned = _codebooks(program)
    for name, weight in weights.items():
        assert torch.equal(weight.codes, tuned[name].codes)
        assert not torch.equal(weight.codebooks, tuned[name].codebooks)
        assert not torch.equal(weight.scales, tuned[name].scales)
        for values in (tuned[name].codebooks, tuned[name].scales):  # 16 bits hold them
            assert torch.equal(values, values.half().float())


def test_a_block_that_tuning_makes_worse_stays() -> None:
    program = _quantized()
    before = _distance(program)
    assert set(tune_blocks(program, 3, 10.0).values()) == {1.0}
    assert _distance(program) == before


def test_the_pass_tunes_when_asked() -> None:
    program = _quantized()
    assert program.float_twin is not None
    steps: list[tuple[str, int, int]] = []
    fresh = dataclasses.replace(program, graph=copy_graph(program.float_twin), on_step=lambda *step: steps.append(step))
    result = dataclasses.replace(OPTIONS, tune=30).run(fresh)
    assert result.measured["tuned_blocks"] == 2
    assert steps[-2:] == [("tuning layers.0", 0, 2), ("tuning layers.1", 1, 2)]
    assert _distance(fresh) < 0.97 * _distance(program)
