"""Siblings: layers that read one value, shared out by cost; whoever quantizes them, the weights are the same."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.aq import AQ
from passes.graph import copy_graph
from passes.hqq import HQQ
from passes.ranks import Ranks
from passes.rtn import RTN
from passes.siblings import shared_out, siblings_of
from passes.weight_pass import WeightPass, _Turn
from tests.exporter.compiled import program_of, quantized
from tests.passes.nets import seeded


class Attention(nn.Module):
    """q, k and v of one value, then two layers of one value, and one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 16] -> [N, 8]."""
        mixed = self.q(x)[:, :16] * self.k(x) + self.v(x)
        result: Tensor = self.down(torch.sigmoid(self.gate(mixed)) * self.up(mixed))
        return result


def _program() -> Any:
    torch.manual_seed(0)
    return program_of(seeded(Attention), *({"x": torch.randn(32, 16)} for _ in range(4)))


def test_siblings_are_runs_of_linear_layers_with_one_input() -> None:
    runs = [[layer.name for layer in run] for run in siblings_of(_program().layers())]
    assert runs == [["q", "k", "v"], ["gate", "up"], ["down"]]


def test_the_largest_goes_first_to_whoever_has_least() -> None:
    assert shared_out([4, 1, 1], 2) == [0, 1, 1]
    assert shared_out([1, 1, 3, 2], 2) == [1, 0, 0, 1]
    assert shared_out([5, 5], 2) == [0, 1]
    assert shared_out([7], 2) == [0]
    # With as many pieces as ranks nobody is without one.
    assert sorted(shared_out([9, 1, 1], 3)) == [0, 1, 2]


class _Meeting:
    """What ranks in threads of one process bring together."""

    def __init__(self, world: int) -> None:
        self.board: list[Any] = [None] * world
        self.barrier = threading.Barrier(world, timeout=60)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value."""
        self.board[rank] = value
        self.barrier.wait()
        found = list(self.board)
        self.barrier.wait()
        return found


class _Threads(Ranks):
    """A rank that is a thread."""

    def at(self, meeting: _Meeting) -> "_Threads":
        """The rank, at a meeting of its own."""
        object.__setattr__(self, "meeting", meeting)
        return self

    def gather(self, value: Any) -> list[Any]:
        """As of processes."""
        return self.meeting.exchange(self.rank, value)  # type: ignore[attr-defined,no-any-return]

    def from_first(self, value: Any) -> Any:
        """As of processes."""
        return self.gather(value)[0]

    def together(self, tensors: Any) -> Any:
        """As of processes."""
        return {place: tensor.clone() for own in self.gather(tensors) for place, tensor in own.items()}


@pytest.mark.parametrize(
    "work",
    [
        HQQ(group_size=16),
        HQQ(group_size=16, hessian=True),
        AQ(codebook_bits=3, in_group_size=4, sample=64, rounds=1, kmeans_iterations=2),
        RTN(bits=4),
    ],
    ids=["hqq", "hqq hessian", "aq", "rtn"],
)
def test_ranks_share_siblings_and_come_to_the_weights_of_one(work: WeightPass, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(ranks: Ranks) -> dict[str, Tensor]:
        program = _program()
        program.ranks = ranks
        state: dict[str, Tensor] = quantized(program, work).graph.state_dict()
        return state

    expected = run(Ranks())
    done: list[tuple[int, str]] = []
    original = _Turn.quantized

    def noted(self: _Turn, program: Any, walk: Any) -> Any:
        done.append((program.ranks.rank, self.layer.name))
        return original(self, program, walk)

    monkeypatch.setattr(_Turn, "quantized", noted)
    meeting, found = _Meeting(2), dict[int, dict[str, Tensor]]()
    programs = {rank: _program() for rank in range(2)}  # torch.export is not for several threads

    def rank(number: int) -> None:
        program = programs[number]
        program.ranks = _Threads(number, 2).at(meeting)
        program.float_twin = twins[number]
        work.run(program)
        found[number] = program.graph.state_dict()

    twins = {number: copy_graph(program.graph) for number, program in programs.items()}
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) == {0, 1}
    for state in found.values():
        codes = [name for name in expected if "codes" in name]
        assert codes
        assert all(state[name].equal(expected[name]) for name in codes)
    # Of layers that read one value each is done by one rank; the one alone by both.
    assert sorted(name for _, name in done) == ["down", "down", "gate", "k", "q", "up", "v"]
    assert {name for number, name in done if number == 0} == {"q", "gate", "down"}
