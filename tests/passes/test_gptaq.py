"""gptaq: activations first, then weights fitted to the activations as they are rounded."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes import gptq
from passes.act_quant import ActQuant
from passes.base import LayerRule, PassError, Pipeline
from passes.fold_bn import FoldBatchNorm
from passes.gptaq import GPTAQ
from passes.gptq import GPTQ
from passes.graph import find_layers
from passes.layer_inputs import hessian_of
from passes.ops import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC, fake_quantize_dynamic
from tests.passes.nets import RULES, FeedForward, InvertedResidual, count, outputs, program_of, reasons, seeded


class Chain(nn.Module):
    """Two linear layers with a ReLU in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 4]."""
        return self.second(F.relu(self.first(x)))


def test_weights_are_fitted_to_rounded_inputs() -> None:
    module = seeded(Chain)
    program = program_of(module, {"x": torch.zeros(40, 8)})
    options = GPTAQ(bits=8, act_bits=4, activations="token")
    options.run(program)
    batches = [fake_quantize_dynamic(batch["x"], 4, -1) for batch in program.calibration.batches]
    layers = {layer.name: layer for layer in find_layers(program.reference)}
    first = gptq.quantize_weight(module.first.weight.detach(), hessian_of(layers["first"], batches), options)
    assert torch.equal(program.graph.get_buffer("first.weight_codes"), first.codes)
    hidden = [F.relu(F.linear(x, first.dequantize(), module.first.bias.detach())) for x in batches]
    hidden = [fake_quantize_dynamic(x, 4, -1) for x in hidden]
    second = gptq.quantize_weight(module.second.weight.detach(), hessian_of(layers["second"], hidden), options)
    assert torch.equal(program.graph.get_buffer("second.weight_codes"), second.codes)


@pytest.mark.parametrize(("activations", "target"), [("static", FAKE_QUANTIZE), ("token", FAKE_QUANTIZE_DYNAMIC)])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_same_as_its_two_passes_in_turn(activations: str, target: object, act_bits: int) -> None:
    inputs = {"x": torch.zeros(4, 5, 12)}
    together, apart, given = (program_of(seeded(FeedForward), inputs) for _ in range(3))
    GPTAQ(act_bits=act_bits, activations=activations).run(together)
    ActQuant(bits=act_bits, mode=activations).run(apart)
    GPTQ(bits=8, group_size=-1).run(apart)
    assert torch.equal(outputs(together.graph, together), outputs(apart.graph, apart))
    assert count(together.graph, target) == count(apart.graph, target) == 2
    # With quantized activations in the graph it leaves them as they are.
    ActQuant(bits=act_bits, mode=activations).run(given)
    GPTAQ(act_bits=8, activations="static").run(given)
    assert torch.equal(outputs(given.graph, given), outputs(apart.graph, apart))


def test_defaults_are_eight_bits_per_channel_and_static() -> None:
    options = GPTAQ()
    assert (options.bits, options.act_bits, options.group_size, options.activations) == (8, 8, -1, "static")
    assert options.symmetric
    program = program_of(seeded(InvertedResidual), {"x": torch.zeros(16, 3, 8, 8)})
    records = Pipeline([options], {"fold-bn": FoldBatchNorm}).run(program)
    assert [(record.name, record.inserted) for record in records] == [("fold-bn", True), ("gptaq", False)]
    assert count(program.graph, DEQUANTIZE) == 5
    assert count(program.graph, FAKE_QUANTIZE) >= 5
    expected, actual = outputs(program.reference, program), outputs(program.graph, program)
    # Eight-bit values, each within half of 255 steps of its range: about 2^-8 of the signal for each of the dozen
    # quantized values on the longest path, were they all to add up.
    assert float((actual - expected).norm() / expected.norm()) < 12 * 2.0**-8


def test_layers_left_in_float_are_named_once() -> None:
    rules = (LayerRule("fc1", skip=True),)
    program = program_of(seeded(FeedForward), {"x": torch.zeros(4, 5, 12)}, layer_rules=rules)
    result = GPTAQ().run(program)
    assert reasons(result) == {"fc1": "left in float by the recipe"}
    assert len(result.skipped) == 1


def test_what_cannot_be_asked() -> None:
    with pytest.raises(PassError, match="gptaq: activations=dynamic is no kind"):
        GPTAQ(activations="dynamic")
    program = program_of(seeded(FeedForward), {"x": torch.zeros(4, 5, 12)})
    with pytest.raises(PassError, match="3-bit activations"):
        GPTAQ(act_bits=3).requires(program)
    program.rules = dataclasses.replace(RULES, dynamic_activations=False)
    with pytest.raises(PassError, match="no per-token activations"):
        GPTAQ(activations="token").requires(program)
