"""centre: exact, whatever reads the values; their ranges become as wide as their widest channel."""

import pytest
import torch
from torch import Tensor, nn

from passes.base import PassError, PassResult, Program
from passes.calibration import watch_values
from passes.centre import Centre
from passes.fold_bn import FoldBatchNorm
from passes.graph import aten, tidy
from tests.passes.nets import assert_same_function, program_of, reasons, seeded

IMAGES = {"x": torch.zeros(4, 3, 6, 6)}
FEW = Centre(quantile=0)
"""Centres by the extremes themselves: what is left on either side is the same to rounding."""


class Stream(nn.Module):
    """Two projections added to each other, read by an expansion each and by what `last` is."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.expand = nn.Conv2d(8, 16, 1, groups=2)
        self.project = nn.Conv2d(16, 8, 1)
        self.last = last
        nn.init.normal_(self.first.bias, std=5)
        nn.init.normal_(self.project.bias, std=5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> what last makes of the sum [N, 8, H - 2, W - 2]."""
        y = self.first(x)
        return self.last(y + self.project(self.expand(y).relu()))


def _centred(module: nn.Module, inputs: dict[str, Tensor] = IMAGES, work: Centre = FEW) -> tuple[Program, PassResult]:
    program = program_of(module, inputs)
    FoldBatchNorm().run(program)
    result = work.run(program)
    tidy(program.graph)
    return program, result


def _middles(program: Program, name: str, axis: int) -> Tensor:
    """(low + high) / 2 of each channel of a layer's output."""
    node = next(layer.node for layer in program.layers() if layer.name == name)
    seen: list[Tensor] = []

    def watch(at: object, value: Tensor) -> None:
        if at is node:
            seen.append(value.movedim(axis, 0).flatten(1))

    watch_values(program.graph, program.calibration.batches, watch)
    rows = torch.cat(seen, 1)
    return (rows.amax(1) + rows.amin(1)) / 2


def test_a_stream_is_centred_and_the_function_stays() -> None:
    program, result = _centred(seeded(lambda: Stream(nn.Conv2d(8, 4, 1))))
    assert result.changed == ("first", "project")  # expand is read by a relu, last by the output
    assert set(reasons(result)) == {"expand", "last"}
    assert_same_function(program)
    for name in result.changed:
        # Values are a few tens at most: float32 rounds their sums at about 1e-6.
        assert float(_middles(program, name, 1).abs().max()) < 1e-4
    # Biases of a standard deviation of 5 spread the channels over more than their own widths.
    assert float(result.measured["range_ratio"]) < 0.8


@pytest.mark.parametrize(
    ("last", "why"),
    [
        (nn.Conv2d(8, 4, 3, padding=1), "last reads it with padding"),
        (nn.ConvTranspose2d(8, 4, 2, stride=2), "last reads it with padding"),
        (nn.ReLU(), "relu"),
        (nn.Linear(4, 4), "another axis"),
    ],
)
def test_a_reader_that_cannot_give_the_shift_back_keeps_it_from_all_it_reads(last: nn.Module, why: str) -> None:
    program, result = _centred(seeded(lambda: Stream(last)))
    assert "first" not in result.changed
    assert "project" not in result.changed
    assert why in reasons(result)["project"]
    assert_same_function(program)


def test_a_sum_with_something_else_hands_the_shift_on() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3, bias=False)
            nn.init.normal_(self.first.bias, std=5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.second(y + y + x.sigmoid())

    program, result = _centred(seeded(Added), {"x": torch.zeros(5, 6)})
    assert result.changed == ("first",)
    assert_same_function(program)
    assert float(_middles(program, "first", -1).abs().max()) < 1e-4


def test_a_sum_that_broadcasts_stays() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 1), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) + x)

    program, result = _centred(seeded(Broadcast), {"x": torch.zeros(5, 6)})
    assert result.changed == ()
    assert "shape" in reasons(result)["first"]
    assert_same_function(program)


def test_statistics_follow() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.bn(self.conv(x)))

    program = program_of(seeded(Normed), IMAGES)
    FoldBatchNorm().run(program)
    before = program.channel_stats["conv"]
    middles = _middles(program, "conv", 1)
    FEW.run(program)
    after = program.channel_stats["conv"]
    # Two float32 evaluations of the same numbers, of a few units.
    assert torch.allclose(after.mean, before.mean - middles, atol=1e-5)
    assert torch.equal(after.std, before.std)


def test_tails_count_for_the_middle_by_their_part_only() -> None:
    class Tail(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(1, 2), nn.Linear(2, 1)
            with torch.no_grad():
                self.first.weight.fill_(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    program = program_of(seeded(Tail), {"x": torch.zeros(100, 1)}, batches=1)
    value = torch.linspace(-1, 1, 100)[:, None]
    value[0] = -1000
    program.calibration.batches[0]["x"].copy_(value)
    Centre(quantile=0.02).run(program)
    bias = next(layer.bias for layer in program.layers() if layer.name == "first")
    assert bias is not None
    # Without its lowest value the line reaches from -0.98 to 1; with it the middle would be -499.5.
    assert bool((_middles(program, "first", -1) < -400).all())
    assert aten.linear.default in {node.target for node in program.graph.graph.nodes}
    assert_same_function(program)


def test_bad_options_and_no_data_are_refused() -> None:
    program = program_of(seeded(lambda: Stream(nn.Conv2d(8, 4, 1))), IMAGES)
    with pytest.raises(PassError, match=r"quantile=0\.5"):
        Centre(quantile=0.5).requires(program)
    program = program_of(seeded(lambda: Stream(nn.Conv2d(8, 4, 1))), IMAGES, batches=1)
    program.calibration = type(program.calibration)((), (), "none")
    with pytest.raises(PassError, match="calibration"):
        Centre().requires(program)
