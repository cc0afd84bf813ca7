"""absorb-bias: exact wherever channels stay above c, at padded borders too; it reports the shift there is."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.absorb_bias import AbsorbBias
from passes.base import ChannelStatistics, PassError, PassResult, Program
from passes.cle import CrossLayerEqualization
from passes.fold_bn import FoldBatchNorm
from passes.graph import aten, bias_of, find_layers, get_tensor, tidy
from tests.passes.nets import (
    FeedForward,
    InvertedResidual,
    assert_same_function,
    count,
    float_tolerance,
    outputs,
    program_of,
    reasons,
    seeded,
)

NEVER_BELOW = AbsorbBias(quantile=0, border="always")
"""c is the smallest value seen: on calibration data nothing falls below it, so the function must stay to rounding."""


class Chain(nn.Module):
    """A 3x3 convolution whose channels are high, whatever `between` does, and a second layer."""

    def __init__(self, between: nn.Module, second: nn.Module, height: float = 6.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3)
        nn.init.constant_(self.first.bias, height)
        self.between = between
        self.second = second

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2, 8, 8] -> what second makes of it."""
        return self.second(self.between(self.first(x)))


def _relu(*more: nn.Module) -> nn.Module:
    return nn.Sequential(nn.ReLU(), *more)


def _relu_behind(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer, nn.ReLU())


def _absorb(
    module: nn.Module, x: Tensor, work: AbsorbBias = NEVER_BELOW, dynamic: dict[str, dict[int, str]] | None = None
) -> tuple[Program, PassResult]:
    program = program_of(module, {"x": x}, dynamic=dynamic)
    result = work.run(program)
    tidy(program.graph)
    return program, result


# name: (what lies between, second layer, border images)
EXACT = {
    "no padding": (_relu, lambda: nn.Conv2d(8, 5, 3), 0),
    "padded": (_relu, lambda: nn.Conv2d(8, 5, 3, padding=1), 1),
    "padding same": (_relu, lambda: nn.Conv2d(8, 5, 3, padding="same"), 1),
    "strided, dilated": (_relu, lambda: nn.Conv2d(8, 5, 3, stride=2, padding=2, dilation=2), 1),
    "depthwise": (_relu, lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), 1),
    "grouped, no bias": (_relu, lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2, bias=False), 1),
    "transposed": (_relu, lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2), 1),
    "padded with zeros": (lambda: _relu(nn.ZeroPad2d((1, 0, 2, 1))), lambda: nn.Conv2d(8, 5, 2), 1),
    "reflected": (lambda: _relu(nn.ReflectionPad2d(1)), lambda: nn.Conv2d(8, 5, 2), 0),
    "max pooling": (lambda: _relu(nn.MaxPool2d(3, padding=1, stride=2)), lambda: nn.Conv2d(8, 5, 1), 0),
    "average pooling": (lambda: _relu(nn.AvgPool2d(2)), lambda: nn.Conv2d(8, 5, 1), 0),
    "average pooling that counts padding": (
        lambda: _relu(nn.AvgPool2d(3, padding=1, stride=2)),
        lambda: nn.Conv2d(8, 5, 1),
        1,
    ),
    "flatten": (lambda: _relu(nn.Flatten()), lambda: nn.Linear(8 * 36, 5), 0),
    "padding, flatten": (lambda: _relu(nn.ZeroPad2d(1), nn.Flatten()), lambda: nn.Linear(8 * 64, 5), 0),
    "pooling in front of relu": (lambda: nn.Sequential(nn.MaxPool2d(2), nn.ReLU()), lambda: nn.Conv2d(8, 5, 1), 0),
    "cap": (lambda: nn.Hardtanh(0, 7), lambda: nn.Conv2d(8, 5, 3, padding=1), 1),
    "cap below the channels": (lambda: nn.Hardtanh(0, 1), lambda: nn.Conv2d(8, 5, 3), 0),
    "relu6": (nn.ReLU6, lambda: nn.Conv2d(8, 5, 1), 0),
}


@pytest.mark.parametrize("case", EXACT)
def test_exact_where_no_channel_falls_below(case: str) -> None:
    between, second, borders = EXACT[case]
    module = seeded(lambda: Chain(between(), second()))
    program, result = _absorb(module, torch.zeros(2, 2, 8, 8))
    assert result.changed == ("first -> second",)
    assert result.measured["border_images"] == borders
    assert count(program.graph, aten.add.Tensor) == borders
    first = find_layers(program.graph)[0]
    assert (bias_of(program.graph, first) < 6).all()
    assert_same_function(program)
    expected = outputs(program.reference, program)
    assert result.measured["float_shift_max_abs"] <= float_tolerance(expected, 8)


def test_the_border_is_needed_and_is_only_a_border() -> None:
    module = seeded(lambda: Chain(nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)))
    program, _ = _absorb(module, torch.zeros(2, 2, 8, 8))
    add = next(node for node in program.graph.graph.nodes if node.target is aten.add.Tensor)
    image = get_tensor(program.graph, add.args[1])
    assert image.shape == (1, 5, 6, 6)
    assert (image[:, :, 1:-1, 1:-1] == 0).all()
    assert (image[:, :, 0] != 0).all()
    add.replace_all_uses_with(add.args[0])
    difference = outputs(program.graph, program) - outputs(program.reference, program)
    assert difference.abs().max() > 0.1  # what a peer loses by forgetting it


def test_feed_forward_over_tokens() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 6) / 4)
            self.out = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.mm(x.reshape(-1, 4), self.weight)
            return self.out(F.relu(hidden)).view(x.shape[0], -1, 3)

    program = program_of(seeded(Tokens), {"x": torch.zeros(2, 5, 4)}, dynamic={"x": {0: "batch", 1: "sequence"}})
    # Put the product's channels high by statistics alone: it has no bias, and gets one.
    name = find_layers(program.graph)[0].name
    program.channel_stats[name] = ChannelStatistics(torch.full((6,), 0.5), torch.full((6,), 0.1))
    result = AbsorbBias(sigmas=3, quantile=1).run(program)
    tidy(program.graph)
    assert len(result.changed) == 1
    assert count(program.graph, aten.addmm.default) == 1
    torch.testing.assert_close(bias_of(program.graph, find_layers(program.graph)[0]), torch.full((6,), -0.2))


def test_free_height_and_width() -> None:
    dynamic = {"x": {0: "batch", 2: "height", 3: "width"}}
    padded = seeded(lambda: Chain(nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)))
    program, result = _absorb(padded, torch.zeros(2, 2, 8, 8), dynamic=dynamic)
    assert reasons(result)["first -> second"] == (
        "its padding makes the bias depend on the place, and the height or width is free"
    )
    assert_same_function(program)
    for second in (nn.Conv2d(8, 5, 3), nn.Conv2d(8, 5, 1, padding=0)):
        program, result = _absorb(
            seeded(lambda s=second: Chain(_relu(nn.AvgPool2d(2)), s)), torch.zeros(2, 2, 8, 8), dynamic=dynamic
        )
        assert result.changed == ("first -> second",)
        assert_same_function(program)


REFUSED = {
    "no relu": (nn.Identity, lambda: nn.Conv2d(8, 5, 1), "there is no relu between them"),
    "leaky": (
        lambda: _relu(nn.LeakyReLU(0.5)),
        lambda: nn.Conv2d(8, 5, 1),
        "leaky_relu (aten.leaky_relu.default) is not a relu",
    ),
    "maximum over a border": (
        lambda: _relu(nn.ZeroPad2d(1), nn.MaxPool2d(2)),
        lambda: nn.Conv2d(8, 5, 1),
        "max_pool2d (aten.max_pool2d.default) takes a maximum over a padded border",
    ),
    "cap behind padding": (
        lambda: _relu(nn.ZeroPad2d(1), nn.ReLU6()),
        lambda: nn.Conv2d(8, 5, 1),
        "the cap hardtanh lies behind padding",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    between, second, why = REFUSED[case]
    program, result = _absorb(seeded(lambda: Chain(between(), second())), torch.zeros(2, 2, 8, 8))
    assert result.changed == ()
    assert reasons(result)["first -> second"] == why
    assert_same_function(program)


def test_low_channels_are_left() -> None:
    module = seeded(lambda: Chain(nn.ReLU(), nn.Conv2d(8, 5, 1), height=-1.0))
    program, result = _absorb(module, torch.zeros(2, 2, 8, 8))
    assert reasons(result)["first -> second"] == "no channel stays above 0"
    assert result.measured["channels"] == 0
    assert_same_function(program)


def _high() -> nn.Module:
    """An inverted residual in which every third inner channel has beta = 8 |gamma|."""
    module = seeded(InvertedResidual)
    for norm in (module.expand_bn, module.depthwise_bn):
        norm.bias.data[::3] = 8 * norm.weight.data[::3].abs()
    return module


def test_statistics_say_how_much() -> None:
    module = _high()
    program = program_of(module, {"x": torch.zeros(2, 3, 8, 8)})
    FoldBatchNorm().run(program)
    before = {layer.name: bias_of(program.graph, layer) for layer in find_layers(program.graph)}
    result = AbsorbBias(sigmas=3, quantile=1, border="always").run(program)
    tidy(program.graph)
    assert set(result.changed) >= {"expand -> depthwise", "depthwise -> project"}
    expand = next(layer for layer in find_layers(program.graph) if layer.name == "expand")
    norm = module.expand_bn
    c = (norm.bias - 3 * norm.weight.abs()).clamp(min=0)
    assert (c[::3] > 0).all()
    torch.testing.assert_close(bias_of(program.graph, expand), before["expand"] - c)
    torch.testing.assert_close(program.channel_stats["expand"].mean, norm.bias - c)
    assert torch.equal(program.channel_stats["expand"].std, norm.weight.abs())


def test_the_reported_shift_is_the_shift() -> None:
    program = program_of(_high(), {"x": torch.zeros(2, 3, 8, 8)})
    FoldBatchNorm().run(program)
    CrossLayerEqualization().run(program)
    before = outputs(program.graph, program)
    result = AbsorbBias(sigmas=1, quantile=1, border="always").run(program)  # so bold that values do fall below c
    after = outputs(program.graph, program)
    shift = float((after - before).abs().max())
    assert shift > 1e-3
    assert result.measured["float_shift_max_abs"] == shift


def test_calibration_lowers_what_statistics_promise() -> None:
    program = program_of(seeded(lambda: Chain(nn.ReLU(), nn.Conv2d(8, 5, 1))), {"x": torch.zeros(2, 2, 8, 8)})
    program.channel_stats["first"] = ChannelStatistics(torch.full((8,), 100.0), torch.ones(8))
    result = AbsorbBias(quantile=0).run(program)
    assert result.measured["channels"] == 8
    assert_same_function(program)


def test_a_border_that_costs_more_than_it_gains_is_left() -> None:
    """Behind the second layer a relu keeps little of each value: the image would have to be added in front of it."""
    module = seeded(lambda: Chain(nn.ReLU(), _relu_behind(nn.Conv2d(8, 8, 3, padding=1, groups=8))))
    nn.init.ones_(module.second[0].weight)
    nn.init.constant_(module.second[0].bias, -54.0)
    program, result = _absorb(module, torch.zeros(2, 2, 8, 8), AbsorbBias(quantile=0))
    assert result.changed == ()
    assert reasons(result)["first -> second.0"].startswith("its border would cost more than it gains (0.")
    assert_same_function(program)
    _, always = _absorb(module, torch.zeros(2, 2, 8, 8), NEVER_BELOW)
    assert always.measured["border_images"] == 1


def test_a_border_that_pays_is_added() -> None:
    """High values that vary little: nearly all of the range in front goes, and a little of it behind."""
    module = seeded(lambda: Chain(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), height=20.0))
    program, result = _absorb(module, torch.zeros(2, 2, 8, 8), AbsorbBias(quantile=0))
    assert result.changed == ("first -> second",)
    assert result.measured["border_images"] == 1
    assert_same_function(program)


def test_equalized_caps_move_with_their_channels() -> None:
    module = seeded(lambda: Chain(nn.Hardtanh(0, 7), nn.Conv2d(8, 5, 3, padding=1)))
    module.first.weight.data *= torch.exp2(torch.arange(8) - 4.0).view(-1, 1, 1, 1)
    program = program_of(module, {"x": torch.zeros(2, 2, 8, 8)})
    CrossLayerEqualization().run(program)
    result = NEVER_BELOW.run(program)
    tidy(program.graph)
    assert result.changed == ("first -> second",)
    assert count(program.graph, aten.minimum.default) == 1
    assert_same_function(program)


def test_without_calibration_data_it_refuses() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 5, 12)}, batches=0)
    with pytest.raises(PassError, match="needs calibration data"):
        AbsorbBias().requires(program)
