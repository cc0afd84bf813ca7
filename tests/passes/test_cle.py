"""cle: the function never moves, ranges meet, the pairs are the ones a person would list."""

import math

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes.base import PassError, PassResult, Program
from passes.calibration import watch_values
from passes.cle import CrossLayerEqualization
from passes.fold_bn import FoldBatchNorm
from passes.graph import aten, bias_of, find_layers, get_tensor, set_weight, tidy, weight_of
from tests.passes.nets import (
    Decoder,
    FeedForward,
    Flattening,
    InvertedResidual,
    Residual,
    assert_same_function,
    count,
    outputs,
    program_of,
    reasons,
    seeded,
    spread_channels,
)

PAPER = CrossLayerEqualization(activations=0.0)


def _equalize(module: nn.Module, x: Tensor, cle: CrossLayerEqualization | None = None) -> tuple[Program, PassResult]:
    program = program_of(module, {"x": x})
    FoldBatchNorm().run(program)
    result = (cle or CrossLayerEqualization()).run(program)
    tidy(program.graph)
    return program, result


NETS = {
    "inverted residual": (InvertedResidual, (2, 3, 8, 8)),
    "inverted residual, relu6": (lambda: InvertedResidual(nn.ReLU6), (2, 3, 8, 8)),
    "inverted residual, prelu": (lambda: InvertedResidual(nn.PReLU), (2, 3, 8, 8)),
    "residual": (Residual, (2, 3, 8, 8)),
    "feed-forward": (FeedForward, (2, 5, 12)),
    "flattening": (Flattening, (2, 1, 10, 10)),
    "decoder": (Decoder, (2, 4, 8, 8)),
}
PAIRS = {
    "inverted residual": ("expand -> depthwise", "depthwise -> project"),
    "inverted residual, relu6": ("expand -> depthwise", "depthwise -> project"),
    "inverted residual, prelu": ("expand -> depthwise", "depthwise -> project"),
    "residual": ("first -> second",),
    "feed-forward": ("fc1 -> fc2",),
    "flattening": ("conv1 -> conv2", "conv2 -> fc1", "fc1 -> fc2"),
    "decoder": ("grouped -> up", "up -> mix", "mix -> up_again", "up_again -> last"),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_function_stays(net: str, seed: int) -> None:
    build, shape = NETS[net]
    program, result = _equalize(spread_channels(seeded(build, seed), seed), torch.zeros(shape))
    assert result.changed == PAIRS[net]
    assert_same_function(program)


@pytest.mark.parametrize("net", NETS)
def test_every_pair_ends_with_equal_ranges(net: str) -> None:
    build, shape = NETS[net]
    _, result = _equalize(spread_channels(seeded(build), 0), torch.zeros(shape), PAPER)
    assert result.measured["mismatch_before"] > 4
    # The last visit moved no scale by more than 1e-3 octaves: a range moves by no more, a ratio of two by twice that,
    # and the neighbouring pairs were visited after it.
    assert result.measured["mismatch_after"] < 2 ** (4 * 1e-3)
    assert result.measured["iterations"] < 40


def test_reasons_for_stopping() -> None:
    _, result = _equalize(seeded(InvertedResidual), torch.zeros(2, 3, 8, 8))
    assert reasons(result) == {
        "stem": "relu has 2 readers",
        "project": "add (aten.add.Tensor) joins another branch",
        "classifier": "it feeds an output of the model",
    }


def test_scales_are_the_papers() -> None:
    """Two linear layers: one visit is the closed form, s = sqrt(r1 r2) / r2."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 6)
            self.second = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x)))

    module = seeded(Two)
    program, result = _equalize(module, torch.zeros(2, 5), PAPER)
    first, second = find_layers(program.graph)
    r1, r2 = module.first.weight.double().abs().amax(1), module.second.weight.double().abs().amax(0)
    s = (r1 * r2).sqrt() / r2
    assert torch.equal(weight_of(program.graph, first), (module.first.weight.double() / s[:, None]).float())
    assert torch.equal(bias_of(program.graph, first), (module.first.bias.double() / s).float())
    assert torch.equal(weight_of(program.graph, second), (module.second.weight.double() * s).float())
    assert result.measured["iterations"] == 2  # the second visit finds nothing to move


def test_one_sweep_ends_worse() -> None:
    module = spread_channels(seeded(InvertedResidual), 3)
    x = torch.zeros(2, 3, 8, 8)
    _, swept = _equalize(module, x, CrossLayerEqualization(iterations=1, activations=0.0))
    _, converged = _equalize(module, x, PAPER)
    assert swept.measured["mismatch_after"] > 1.5
    assert converged.measured["mismatch_after"] < 1.01


def _input_ranges(program: Program) -> dict[str, Tensor]:
    """Largest magnitude of each channel of the layers' inputs [N, channels, ...] on the calibration data."""
    readers = {layer.input: layer.name for layer in find_layers(program.graph)}
    seen: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: Tensor) -> None:
        if node in readers:
            largest = value.abs().movedim(1, 0).flatten(1).amax(1)
            seen[readers[node]] = torch.maximum(largest, seen.get(readers[node], largest))

    watch_values(program.graph, program.calibration.batches, watch)
    return seen


def test_activation_ranges_alone_become_equal() -> None:
    cle = CrossLayerEqualization(activations=1.0)
    program, _ = _equalize(spread_channels(seeded(InvertedResidual), 0), torch.zeros(2, 3, 8, 8), cle)
    for layer in ("depthwise", "project"):
        ranges = _input_ranges(program)[layer]
        active = ranges[ranges > 0]
        assert len(active) > len(ranges) / 2
        assert active.max() / active.min() < 1.001  # float32 weights carry the scales
    assert_same_function(program)


def test_a_share_of_activation_ranges_brings_them_closer() -> None:
    """Where all channels of a pair meet: (a / max a)^t (r1 / r2)^((1 - t) / 2) = 1."""
    spreads = []
    for share in (0.0, 0.5):
        cle = CrossLayerEqualization(activations=share)
        program, result = _equalize(seeded(InvertedResidual), torch.zeros(2, 3, 8, 8), cle)
        ranges = _input_ranges(program)["project"]
        active = ranges > ranges.max() / 16  # a quieter one counts as if it reached that
        spreads.append(float(ranges.max() / ranges[active].min()))
        assert result.measured["iterations"] < 40
    layers = {layer.name: weight_of(program.graph, layer) for layer in find_layers(program.graph)}
    r1, r2 = layers["depthwise"].flatten(1).abs().amax(1), layers["project"].abs().amax((0, 2, 3))
    # Scales of the last visit differ from 1 by at most 1e-3 octaves, and the neighbouring pair moved after that.
    met = ((ranges / ranges.max()) ** 0.5 * (r1 / r2) ** 0.25)[active]
    torch.testing.assert_close(met, torch.ones_like(met), rtol=4e-3, atol=0)
    assert spreads[1] < spreads[0]


def test_channels_that_calibration_never_sees_active_stay_within_bounds() -> None:
    module = seeded(FeedForward)
    module.fc1.bias.data[:3] = -1e3
    program, _ = _equalize(module, torch.zeros(2, 5, 12))
    weights = {layer.name: weight_of(program.graph, layer) for layer in find_layers(program.graph)}
    assert weights["fc1"][:3].abs().max() <= weights["fc1"].abs().max()
    assert (weights["fc1"][:3].abs().amax(1) < 4 * weights["fc1"][3:].abs().amax()).all()


def test_shares_outside_0_to_1_are_refused() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 5, 12)})
    with pytest.raises(PassError, match="activations=2"):
        CrossLayerEqualization(activations=2).requires(program)


def test_dead_channels_keep_their_scale() -> None:
    module = seeded(FeedForward)
    with torch.no_grad():
        module.fc1.weight[3] = 0
        module.fc1.weight[4] *= 1e-12  # as good as dead: equalizing it would multiply its bias by a million
        module.fc2.weight[:, 7] = 0
    program, _ = _equalize(module, torch.zeros(2, 5, 12))
    first, second = find_layers(program.graph)
    for channel in (3, 4, 7):
        assert torch.equal(bias_of(program.graph, first)[channel], module.fc1.bias[channel])
        assert torch.equal(weight_of(program.graph, second)[:, channel], module.fc2.weight[:, channel])
    assert torch.isfinite(weight_of(program.graph, first)).all()
    assert_same_function(program)


def test_a_network_of_zeros_is_left_alone() -> None:
    module = seeded(FeedForward)
    nn.init.zeros_(module.fc1.weight)
    program, _ = _equalize(module, torch.zeros(2, 5, 12))
    assert torch.equal(weight_of(program.graph, find_layers(program.graph)[1]), module.fc2.weight)


def test_statistics_follow_the_channels() -> None:
    program = program_of(spread_channels(seeded(InvertedResidual), 1), {"x": torch.zeros(2, 3, 8, 8)})
    FoldBatchNorm().run(program)
    folded = dict(program.channel_stats)
    before = {layer.name: bias_of(program.graph, layer) for layer in find_layers(program.graph)}
    CrossLayerEqualization().run(program)
    for layer in find_layers(program.graph):
        if layer.name in ("expand", "depthwise"):
            factor = bias_of(program.graph, layer) / before[layer.name]
            assert factor.max() / factor.min() > 2
            torch.testing.assert_close(program.channel_stats[layer.name].std, folded[layer.name].std * factor)
            torch.testing.assert_close(program.channel_stats[layer.name].mean, folded[layer.name].mean * factor)
        elif layer.name in folded:
            assert program.channel_stats[layer.name] is folded[layer.name]


def _capped(octaves: float = 3.0) -> nn.Module:
    """Inverted residual with ReLU6 and biases so large that many values reach the cap."""
    module = seeded(lambda: InvertedResidual(nn.ReLU6))
    for norm in (module.expand_bn, module.depthwise_bn):
        norm.weight.data *= 4
        norm.bias.data += 2
    return spread_channels(module, 0, octaves)


def test_caps_are_exact_and_per_channel() -> None:
    program, result = _equalize(_capped(), torch.zeros(2, 3, 8, 8))
    assert result.changed == PAIRS["inverted residual, relu6"]
    assert count(program.graph, aten.minimum.default) == 2
    assert count(program.graph, aten.hardtanh.default) == 1  # the stem's, which ends in a branch
    for node in program.graph.graph.nodes:
        if node.target is aten.minimum.default:
            cap = get_tensor(program.graph, node.args[1])
            assert cap.shape == (1, 24, 1, 1)
            assert cap.max() / cap.min() > 2
            assert node.args[0].target is aten.relu.default
    assert_same_function(program)
    for node in list(program.graph.graph.nodes):  # without its caps the function is another: they were reached
        if node.target is aten.minimum.default:
            node.replace_all_uses_with(node.args[0])
    difference = outputs(program.graph, program) - outputs(program.reference, program)
    assert difference.abs().max() > 0.01


def test_caps_are_scaled_again_by_a_second_run() -> None:
    program, _ = _equalize(_capped(), torch.zeros(2, 3, 8, 8))
    layers = {layer.name: layer for layer in find_layers(program.graph)}
    depthwise = layers["depthwise"]
    factor = torch.exp2(torch.arange(24) % 5 - 2.0).view(-1, 1, 1, 1)
    set_weight(program.graph, depthwise, weight_of(program.graph, depthwise) * factor)
    before = outputs(program.graph, program)
    CrossLayerEqualization().run(program)
    tidy(program.graph)
    assert count(program.graph, aten.minimum.default) == 2
    difference = outputs(program.graph, program) - before
    assert difference.abs().max() <= 32 * 2.0**-23 * math.sqrt(8) * before.abs().max().clamp(min=1)


def test_a_cap_in_front_of_a_flatten() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3)
            self.linear = nn.Linear(8 * 16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.clamp(self.conv(x).permute(0, 2, 3, 1).flatten(1), 0, 1))

    program, result = _equalize(spread_channels(seeded(Net), 0), torch.zeros(2, 2, 6, 6))
    assert result.changed == ("conv -> linear",)
    assert count(program.graph, aten.minimum.default) == 1
    assert_same_function(program)


def test_caps_of_equalized_pairs_stay_as_they_are() -> None:
    program, _ = _equalize(_capped(), torch.zeros(2, 3, 8, 8), PAPER)
    again = PAPER.run(program)
    assert again.measured["mismatch_after"] < 1.01

    class Balanced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu6(self.first(x)))

    module = Balanced()
    nn.init.eye_(module.first.weight)
    nn.init.eye_(module.second.weight)
    program, _ = _equalize(module, torch.zeros(2, 4), PAPER)
    assert count(program.graph, aten.minimum.default) == 0
    assert torch.equal(weight_of(program.graph, find_layers(program.graph)[0]), torch.eye(4))


def test_replace_relu6_only_where_calibration_stays_below() -> None:
    module = seeded(lambda: InvertedResidual(nn.ReLU6))
    module.depthwise_bn.bias.data += 10
    program, result = _equalize(module, torch.zeros(2, 3, 8, 8), CrossLayerEqualization(replace_relu6=True))
    assert result.measured["caps_replaced"] == 1
    kept = [why for why in reasons(result).values() if "cap" in why]
    assert len(kept) == 1
    assert kept[0].startswith("calibration reaches its cap of 6 (1")
    assert count(program.graph, aten.minimum.default) == 1
    assert_same_function(program)


def test_what_is_not_understood_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for index in range(8):
                setattr(self, f"conv{index}", nn.Conv2d(4, 4, 1))
            self.linear = nn.Linear(6, 6)
            self.last = nn.Linear(4 * 36, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.conv0(x))
            x = F.hardtanh(self.conv1(x), -1, 1)
            x = F.pad(self.conv2(x), (1, 1, 1, 1), value=1.0)[:, :, 1:-1, 1:-1]
            x = self.linear(self.conv3(x))
            x = self.conv4(x)
            x = torch.cat([x, x], 1)[:, :4]
            x = self.conv5(x).mean(1, keepdim=True).expand(-1, 4, -1, -1)
            x = F.avg_pool3d(self.conv6(x), (4, 1, 1)).expand(-1, 4, -1, -1)
            return self.last(self.conv7(x).flatten(1))

    program, result = _equalize(seeded(Odd), torch.zeros(2, 4, 6, 6))
    why = reasons(result)
    assert why["conv0"] == "gelu (aten.gelu.default) does not pass a scale of its channels through"
    assert why["conv1"] == "hardtanh (aten.hardtanh.default) clamps from below at a value that is not 0"
    assert why["conv2"] == "pad pads with 1.0"
    assert why["conv3"] == "its channels are mixed with other axes on the way to linear"
    assert why["linear"] == "its channels are mixed with other axes on the way to conv4"
    assert why["conv4"] == "cat (aten.cat.default) joins another branch"
    assert why["conv5"] == "mean (aten.mean.dim) works across channels"
    assert why["conv6"] == "avg_pool3d (aten.avg_pool3d.default) works across channels"
    assert result.changed == ("conv7 -> last",)
    assert_same_function(program)


def test_without_calibration_data_it_refuses() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 5, 12)}, batches=0)
    with pytest.raises(PassError, match="needs calibration data"):
        CrossLayerEqualization().requires(program)
