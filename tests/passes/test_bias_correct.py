"""bias-correct: afterwards every layer's mean is the float network's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.act_quant import ActQuant
from passes.base import LayerRule, PassError, Pipeline, Program
from passes.bias_correct import BiasCorrection
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
