"""Tuning the network as a whole: outputs closer to the float network's, codes untouched, nothing worse."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from passes.aq import AQ
from passes.base import Program
from passes.calibration import run_graph
from passes.distill import BATCH, output_loss
from passes.graph import copy_graph, tidy
from passes.network_tune import tune_network
from passes.output_moments import Loss
from passes.weight_nodes import read_weight
from passes.weights import CodebookWeight
from tests.passes.nets import program_of, seeded

OPTIONS = AQ(num_codebooks=1, codebook_bits=4, in_group_size=4, beam_size=2, rounds=1)


class Net(nn.Module):
    """A classifier that also returns the class, a whole number, and its temperature, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 8)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[N, 32] -> [N, 8], [N], [1]."""
        logits = self.head(x + self.down(torch.relu(self.up(self.norm(x)))))
        return logits, logits.argmax(-1), self.temperature


def _program() -> Program:
    program = program_of(seeded(Net), {"x": torch.empty(64, 32)}, batches=4)
    program.float_twin = copy_graph(program.graph)
    return program


def _loss(program: Program, loss: Loss) -> float:
    program.graph.recompile()
    batches = program.in_parts(program.calibration.batches, BATCH)
    both = (run_graph(graph, batches) for graph in (program.graph, program.reference))
    return sum(float(output_loss(*pair, loss)) for pair in zip(*both, strict=True)) / len(batches)


def _codebooks(program: Program) -> dict[str, CodebookWeight]:
    weights = {layer.name: read_weight(program.graph, layer) for layer in program.layers()}
    return {name: weight for name, weight in weights.items() if isinstance(weight, CodebookWeight)}


@pytest.mark.parametrize("loss", ["kl", "mse"])
def test_tuning_brings_the_outputs_closer_and_leaves_the_codes(loss: Loss) -> None:
    program = _program()
    OPTIONS.run(program)
    before, weights = _loss(program, loss), _codebooks(program)
    measured = tune_network(program, 60, 0.01, loss, 0)
    tidy(program.graph)
    assert measured["loss_before"] == pytest.approx(before, rel=1e-4)
    assert measured["loss_after"] == pytest.approx(_loss(program, loss), rel=1e-4)
    assert measured["loss_after"] < 0.8 * before
    tuned = _codebooks(program)
    assert set(tuned) == {"up", "down"}
    for name, weight in weights.items():
        assert torch.equal(weight.codes, tuned[name].codes)
        for old, new in ((weight.codebooks, tuned[name].codebooks), (weight.scales, tuned[name].scales)):
            assert not torch.equal(old, new)
            assert torch.equal(new, new.half().float())  # 16 bits hold them


def test_a_network_that_tuning_makes_worse_stays() -> None:
    program = _program()
    OPTIONS.run(program)
    before = _loss(program, "kl")
    measured = tune_network(program, 3, 10.0, "kl", 0)
    assert measured["loss_after"] == measured["loss_before"]
    assert _loss(program, "kl") == before


def test_a_network_without_codebooks_is_left_alone() -> None:
    assert tune_network(_program(), 3, 0.003, "kl", 0) == {}


def test_the_pass_tunes_when_asked() -> None:
    program = _program()
    steps: list[tuple[str, int, int]] = []
    program.on_step = lambda *step: steps.append(step)
    result = dataclasses.replace(OPTIONS, loss="kl", tune=60, tune_rate=0.01).run(program)
    assert result.measured["loss_after"] < 0.95 * result.measured["loss_before"]  # 0.90 when written
    assert "tuned_blocks" not in result.measured
    assert steps[-1] == ("tuning the network", 59, 60)
