"""The outer factor: what it is in expectation, what it leaves out, that it repeats itself."""

import pytest
import torch
from torch import Tensor, nn

from passes.base import Program
from passes.output_moments import Loss, output_moments
from tests.passes.nets import program_of

WIDE, OUT, SAMPLES = 6, 4, 512


class Pair(nn.Module):
    """Two layers and nothing between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(5, WIDE), nn.Linear(WIDE, OUT)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


class Branches(nn.Module):
    """A layer in front of an operator that works in place, and one that only whole numbers are read off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.seen, self.chosen = nn.Linear(5, WIDE), nn.Linear(5, OUT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu_(self.seen(x)), self.chosen(x).argmax(-1)


def moments(program: Program, loss: Loss, seed: int = 0) -> dict[str, Tensor]:
    names = [layer.name for layer in program.layers()]
    generator = torch.Generator().manual_seed(seed)
    return output_moments(program.graph, names, program.calibration.batches, loss, generator)


def samples() -> Tensor:
    return torch.randn(SAMPLES, 16, 5, generator=torch.Generator().manual_seed(1))


def test_squares_count_by_what_follows() -> None:
    """J is W2 for the first layer's output and the identity for the last one's."""
    program = program_of(Pair(), {"x": samples()})
    weight = Pair().second.weight.detach()
    found = moments(program, "mse")
    for name, expected in (("first", weight.T @ weight), ("second", torch.eye(OUT))):
        # A mean of n products of normal numbers is within 5 sigma = 5 sqrt(2 / n) of its variances.
        bound = 5 * (2 / (SAMPLES * 16)) ** 0.5 * float(expected.diagonal().max())
        assert float((found[name] - expected).abs().max()) <= bound


def test_divergence_counts_by_the_softmax() -> None:
    """The Fisher information of the logits is diag(p) - p p^T."""
    program = program_of(Pair(), {"x": samples()})
    p = Pair()(samples()).softmax(-1).flatten(0, 1).detach()
    expected = torch.diag(p.mean(0)) - p.T @ p / len(p)
    # One draw for each of n rows, products at most 1: 5 sigma are at most 5 / (2 sqrt(n)).
    bound = 2.5 / len(p) ** 0.5
    assert float((moments(program, "kl")["second"] - expected).abs().max()) <= bound


def test_what_no_gradient_reaches_is_missing() -> None:
    found = moments(program_of(Branches(), {"x": samples()}), "mse")
    assert found.keys() == {"seen"}
    assert float(found["seen"].diagonal().min()) > 0


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_it_repeats_itself_and_seeds_differ(loss: Loss) -> None:
    program = program_of(Pair(), {"x": samples()})
    first, second, other = (moments(program, loss, seed)["first"] for seed in (0, 0, 1))
    assert first.equal(second)
    assert not first.equal(other)
