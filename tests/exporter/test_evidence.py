"""Evidence: planted outliers, clipping and coarse weights are measured where they are."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from exporter.causes import likely_causes
from exporter.evidence import SAMPLES, clipping, few_batches, gather, outlier
from exporter.metrics import compare
from exporter.report import Evidence, LayerDiff, LayerSqnr
from exporter.validate import own_output, run_layers
from passes.act_quant import ActQuant
from passes.base import LayerRule, Pass, Program
from passes.graph import find_layers
from passes.rtn import RTN
from passes.weights import AffineWeight
from tests.exporter.compiled import program_of, quantized
from tests.passes.nets import seeded


class Net(nn.Module):
    """A convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.one, self.two = nn.Linear(64, 32), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 6, 6] -> [N, 5]."""
        return self.two(self.one(self.stem(x).flatten(1)))


def samples(scale: float = 1.0, count: int = 16) -> dict[str, Tensor]:
    return {"x": scale * torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(0))}


def program(*passes: Pass, net: nn.Module | None = None, rules: tuple[LayerRule, ...] = ()) -> Program:
    return quantized(program_of(net or seeded(Net), samples(), layer_rules=rules), *passes)


def kinds(evidence: Evidence, own: float) -> list[str]:
    entry = LayerDiff("", "linear", "int8", 8.0, 1, 1.0, LayerSqnr(own, own, own, 150.0), evidence=evidence)
    return [cause.kind for cause in likely_causes(entry)]


def test_widths_and_what_each_quantizer_costs():
    found = gather(program(ActQuant(), RTN(), rules=(LayerRule("one", options={"bits": 2}),)))
    assert list(found) == ["stem", "one", "two"]
    assert {name: (entry.weight_bits, entry.input_bits) for name, entry in found.items()} == {
        "stem": (8.0, 8),
        "one": (2.0, 8),
        "two": (8.0, 8),
    }
    # Steps of 2 bits are 2^6 times as wide as those of 8: 36 dB; the input has 8 bits in both.
    assert found["one"].weight_only_db < found["one"].input_only_db - 25
    assert kinds(found["one"], found["one"].weight_only_db) == ["coarse bits"]
    assert set(kinds(found["two"], 40.0)) == {"rounding"}


def test_noises_of_both_quantizers_add_up():
    alone = program(ActQuant(), RTN())
    twin = alone.float_twin
    assert twin is not None
    layers = {layer.name: layer for layer in find_layers(alone.graph)}
    twins = {layer.name: layer for layer in find_layers(twin)}
    floats, inputs = run_layers(twin, twins, samples())
    for name, entry in gather(alone).items():
        own = compare(floats[name], own_output(alone.graph, layers[name], inputs[name]).numpy()).sqnr_db
        noise = 10 ** (-entry.weight_only_db / 10) + 10 ** (-entry.input_only_db / 10)
        # Independent up to chance: the cross term of N rounding errors is of order 1 / sqrt(N), N >= 80 here.
        assert own == pytest.approx(-10 * math.log10(noise), abs=1.0), name


def test_an_outlier_channel_of_the_input_is_named():
    net = seeded(Net)
    with torch.no_grad():
        net.one.weight[7] *= 100
        net.one.bias.zero_()
    found = gather(program(ActQuant(), RTN(), net=net))
    assert found["two"].input_outlier_channel == 7
    # 100 times the weight is 100 times the output; rows differ by chance, the median among 32 by little.
    assert 50 < found["two"].input_outlier_ratio < 200
    assert found["stem"].input_outlier_ratio < 2
    assert "outlier channels" in kinds(found["two"], 30.0)


def test_outlier_channels_of_a_weight_are_those_that_share_its_scale():
    net = seeded(Net)
    with torch.no_grad():
        net.one.weight[7] *= 100
        net.two.weight[:, 3] *= 100
    by_row = gather(program(RTN(group_size=-1), net=net))
    whole = gather(program(RTN(group_size=0), net=net))
    assert by_row["one"].weight_outlier_ratio < 3  # the wide row has a scale of its own
    assert (whole["one"].weight_outlier_channel, whole["one"].weight_outlier_axis) == (7, "output")
    assert whole["one"].weight_outlier_ratio > 50
    for found in (by_row, whole):
        assert (found["two"].weight_outlier_channel, found["two"].weight_outlier_axis) == (3, "input")
        assert found["two"].weight_outlier_ratio > 50


def test_clipped_inputs_are_counted():
    """Ranges come from the calibration samples, shares from held-out ones that are 4 times as wide."""
    result = program(ActQuant(), RTN())
    wide = dataclasses.replace(result.calibration, holdout=(samples(4.0),))
    narrow, clipped = gather(result)["stem"], gather(dataclasses.replace(result, calibration=wide))["stem"]
    assert narrow.input_clipped < 0.01
    assert clipped.input_clipped > 0.2
    assert clipped.input_clip_noise > 0.9
    assert kinds(clipped, 10.0) == ["clipping"]
    # Of a normal variable of 4 sigma, those beyond the largest of 1728 of 1 sigma: the range is 3 to 4 sigma wide.
    assert 2 * (1 - normal(4 / 4)) <= clipped.input_clipped <= 2 * (1 - normal(2.5 / 4))


def normal(x: float) -> float:
    """The normal distribution function."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_clipping_of_a_weight():
    weight = torch.tensor([[1.0, -1.0, 0.1, 4.0], [1.0, 1.0, 1.0, 0.9]])
    scale = torch.full((2, 1), 1 / 7)  # 4 bits: -8/7 to 1
    codes = torch.clamp(torch.round(weight / scale), -8, 7).to(torch.int8)
    stored = AffineWeight(codes, scale, None, 4, -1)
    share, noise = clipping(weight, stored.dequantize(), stored)
    assert share == 1 / 8  # 4.0 alone is out of reach
    assert noise > 0.99
    fits = dataclasses.replace(stored, scale=torch.full((2, 1), 4 / 7))
    assert clipping(weight, fits.dequantize(), fits)[0] == 0


def test_codes_without_sign_reach_from_zero():
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    stored = AffineWeight(weight.to(torch.uint8), torch.ones(1, 1), torch.zeros(1, 1), 2, -1)
    assert clipping(weight, stored.dequantize(), stored) == (0.0, 0.0)
    assert clipping(weight - 1, stored.dequantize(), stored)[0] == 1 / 4


def test_outlier_leaves_out_channels_of_zeros():
    ratio, channel = outlier(torch.tensor([0.0, 0.0, 1.0, 0.0, 10.0, 1.0]))
    assert (ratio, channel) == (10.0, 4)
    assert outlier(torch.tensor([0.0, 3.0])) == (None, None)
    assert outlier(torch.tensor([3.0])) == (None, None)


def test_float_layers_have_no_evidence():
    assert set(gather(program(RTN(), rules=(LayerRule("one", skip=True),)))) == {"stem", "two"}
    weights = gather(program(RTN()))["one"]
    assert (weights.input_bits, weights.input_only_db, weights.input_clipped) == (None, None, None)


def test_few_samples_are_enough():
    many = program_of(seeded(Net), samples(count=100))
    assert sum(len(batch["x"]) for batch in few_batches(many)) == SAMPLES


def test_progress_counts_quantized_layers_in_small_batches():
    found = program(RTN(), rules=(LayerRule("one", skip=True),))
    seen: dict[str, list[int]] = {}
    found.on_step = lambda text, done, total: seen.setdefault(f"{text} of {total}", []).append(done)
    gather(found)
    # 16 samples are 2 batches, and 2 of the 3 layers are quantized
    assert seen == {"causes of 4": [0, 1, 2, 2, 3, 4], "causes in weights of 2": [0, 1, 2]}


def test_an_embedding_has_no_input_channels():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(32, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    ids = {"ids": torch.arange(32).view(8, 4)}
    found = gather(quantized(program_of(seeded(Words), ids), RTN()))
    assert (found["embed"].input_outlier_ratio, found["embed"].weight_bits) == (None, 8.0)
    assert found["embed"].weight_only_db > 30
