"""bias-correct: afterwards every layer's mean is the float network's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.act_quant import ActQuant
from passes.base import LayerRule, PassError, Pipeline, Program
from passes.bias_correct import BiasCorrection, clipped_mean
from passes.calibration import Stream
from passes.fold_bn import FoldBatchNorm
from passes.graph import aten, bias_of, find_layers
from passes.rtn import RTN
from tests.passes.nets import (
    FLOAT32_EPS,
    Decoder,
    FeedForward,
    Flattening,
    InvertedResidual,
    Residual,
    count,
    outputs,
    program_of,
    reasons,
    seeded,
)

KNOWN = {work.name: work for work in (FoldBatchNorm, ActQuant, RTN, BiasCorrection)}


def _run(program: Program, *passes: object):
    return Pipeline(passes, KNOWN).run(program)[-1].result


def _mean_errors(program: Program) -> dict[str, float]:
    """Largest channel mean error of each layer's output, relative to the largest value of the float output."""
    assert program.float_twin is not None
    batches = program.calibration.batches
    floats, quantized = Stream(program.float_twin, batches), Stream(program.graph, batches)
    errors = {}
    for twin, layer in zip(find_layers(program.float_twin), program.layers(), strict=True):
        floats.advance(twin.node.next)
        quantized.advance(layer.node.next)
        wanted, actual = torch.cat(floats.values(twin.node)), torch.cat(quantized.values(layer.node))
        axes = [axis for axis in range(wanted.dim()) if axis != (wanted.dim() - 1 if layer.kind == "linear" else 1)]
        difference = wanted.double().mean(axes) - actual.double().mean(axes)
        errors[layer.name] = float(difference.abs().max() / wanted.abs().max())
    return errors


NETS = {
    "inverted residual": (InvertedResidual, (4, 3, 8, 8)),
    "residual": (Residual, (4, 3, 8, 8)),
    "feed-forward": (FeedForward, (4, 5, 12)),
    "flattening": (Flattening, (4, 1, 10, 10)),
    "decoder": (Decoder, (4, 4, 8, 8)),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("activations", [False, True])
def test_every_mean_is_right(net: str, activations: bool) -> None:
    build, shape = NETS[net]
    program = program_of(seeded(build), {"x": torch.zeros(shape)})
    passes = [ActQuant(bits=4)] if activations else []
    _run(program, *passes, RTN(bits=3))
    before = _mean_errors(program)
    assert min(before.values()) > 1e-4
    result = _run(program, BiasCorrection())
    assert list(result.changed) == list(before)
    assert result.measured["largest_relative_correction"] > 1e-3
    # The corrected bias is rounded to float32 once, and the two outputs are float32 sums (16 eps for the longest).
    assert max(_mean_errors(program).values()) < 32 * FLOAT32_EPS


def test_the_output_comes_closer() -> None:
    program = program_of(seeded(InvertedResidual), {"x": torch.zeros(16, 3, 8, 8)})
    _run(program, RTN(bits=4))
    expected = outputs(program.reference, program)
    before = (outputs(program.graph, program) - expected).square().mean()
    _run(program, BiasCorrection())
    after = (outputs(program.graph, program) - expected).square().mean()
    assert after < 0.9 * before


def test_a_layer_without_bias_gets_one_and_a_product_becomes_addmm() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(6, 8, bias=False)
            self.weight = nn.Parameter(torch.randn(8, 4))
            self.last = nn.Parameter(torch.randn(2, 2))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.mm(F.relu(self.plain(x)), self.weight)
            return torch.matmul(F.relu(x.view(-1, 2, 2)), self.last)

    program = program_of(seeded(Products), {"x": torch.zeros(6, 6)})
    _run(program, RTN(bits=3))
    result = _run(program, BiasCorrection())
    assert len(result.changed) == 2
    assert list(reasons(result).values()) == ["a matmul of its rank has no bias"]
    assert count(program.graph, aten.addmm.default) == 1
    assert bias_of(program.graph, program.layers()[0]).shape == (8,)
    assert sorted(_mean_errors(program).values())[1] < 32 * FLOAT32_EPS


def test_layers_left_in_float_stay() -> None:
    rules = (LayerRule("fc2", skip=True),)
    program = program_of(seeded(FeedForward), {"x": torch.zeros(4, 5, 12)}, layer_rules=rules)
    _run(program, RTN(bits=3))
    bias = bias_of(program.graph, program.layers()[1])
    result = _run(program, BiasCorrection())
    assert result.changed == ("fc1",)
    assert reasons(result) == {"fc2": "left in float by the recipe"}
    assert torch.equal(bias_of(program.graph, program.layers()[1]), bias)


def test_nothing_to_correct_is_an_error() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(4, 5, 12)})
    with pytest.raises(PassError, match="nothing quantized"):
        _run(program, BiasCorrection())


def test_without_calibration_data_it_refuses() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 5, 12)}, batches=0)
    with pytest.raises(PassError, match="needs calibration data"):
        BiasCorrection().requires(program)


# ---- analytic ------------------------------------------------------------------------------------------------------


def test_the_mean_of_a_clipped_gaussian() -> None:
    mean, std = torch.tensor([-1.0, 0.0, 2.0, 5.0]).double(), torch.tensor([0.5, 1.0, 2.0, 0.0]).double()
    # Midpoints of a million equal shares of the distribution: the integral itself, but for the outermost shares.
    shares = (torch.arange(1_000_000, dtype=torch.float64) + 0.5) / 1_000_000
    z = mean[:, None] + std[:, None] * torch.special.ndtri(shares)
    for low, high in ((0.0, 6.0), (0.0, float("inf")), (float("-inf"), 1.0), (float("-inf"), float("inf"))):
        found = clipped_mean(mean, std, low, torch.full_like(mean, high))
        torch.testing.assert_close(found, z.clamp(low, high).mean(1), atol=1e-5, rtol=0)


class Gaussian(nn.Module):
    """A 1x1 convolution of normal noise is Gaussian."""

    def __init__(self, activation: type[nn.Module], pool: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.act, self.pool = activation(), nn.AvgPool2d(2) if pool else nn.Identity()
        self.depthwise, self.last = nn.Conv2d(8, 8, 2, groups=8), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.depthwise(self.pool(self.act(self.norm(self.first(x))))))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("activation", [nn.Identity, nn.ReLU, nn.ReLU6])
def test_analytic_is_what_data_says_where_channels_are_gaussian(activation: type[nn.Module], pool: bool) -> None:
    module = seeded(lambda: Gaussian(activation, pool))
    module.norm.running_mean.zero_()
    module.norm.running_var.copy_(module.first.weight.detach().flatten(1).square().sum(1))
    corrections = []
    for source in ("data", "analytic"):
        float_layers = (LayerRule("first", skip=True), LayerRule("last", skip=True))
        program = program_of(module, {"x": torch.zeros(64, 4, 16, 16)}, layer_rules=float_layers)
        _run(program, RTN(bits=3))
        before = bias_of(program.graph, program.layers()[1])
        result = _run(program, BiasCorrection(source=source))
        assert result.changed == ("depthwise",)
        corrections.append(bias_of(program.graph, program.layers()[1]) - before)
    # The data's mean of 49152 values is off by 1 / 222 of their deviation, which is twice their mean where nothing is
    # clipped: 0.9 %, and three times that to be safe.
    assert (corrections[1] - corrections[0]).norm() < 0.03 * corrections[0].norm()


def test_analytic_names_what_it_does_not_know() -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.max_pool2d(F.relu(self.norm(self.conv(x))), 2))

    program = program_of(seeded(Pooled), {"x": torch.zeros(2, 3, 8, 8)})
    _run(program, RTN(bits=4))
    result = _run(program, BiasCorrection(source="analytic"))
    assert result.changed == ()
    assert reasons(result)["last"] == "the mean behind max_pool2d (aten.max_pool2d.default) is not known"


def test_a_source_that_does_not_exist_is_refused() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 5, 12)})
    with pytest.raises(PassError, match="source=guess"):
        BiasCorrection(source="guess").requires(program)
