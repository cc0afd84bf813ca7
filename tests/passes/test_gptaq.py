"""gptaq: activations first, then weights fitted to the activations as they are rounded."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes import PASSES, gptq, rtn
from passes.act_quant import ActQuant
from passes.base import LayerRule, Pass, PassError, PassRecord, Pipeline, Program
from passes.eigen_scale import POWER
from passes.fold_bn import FoldBatchNorm
from passes.gptaq import GPTAQ, Activations, quantize_weight
from passes.gptq import GPTQ
from passes.graph import find_layers
from passes.layer_inputs import hessian_of, moments_of
from passes.ops import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC, fake_quantize_dynamic
from passes.refit_ranges import refit_ranges
from passes.rtn import RTN
from passes.weights import AffineWeight
from tests.passes.nets import RULES, FeedForward, InvertedResidual, count, outputs, program_of, reasons, seeded
from tools.bench.problem import layer_problem


class Chain(nn.Module):
    """Two linear layers with a ReLU in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 4]."""
        return self.second(F.relu(self.first(x)))


def run(program: Program, *works: Pass) -> list[PassRecord]:
    """The passes through the pipeline, which makes the float twin."""
    return Pipeline(works, PASSES).run(program)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_weights_are_fitted_to_rounded_inputs(asymmetric: bool) -> None:
    module = seeded(Chain)
    program = program_of(module, {"x": torch.zeros(40, 8)})
    options = GPTAQ(bits=8, act_bits=4, activations="token", asymmetric=asymmetric)
    run(program, options)
    layers = {layer.name: layer for layer in find_layers(program.reference)}

    def expected(name: str, floats: list[Tensor], rounded: list[Tensor]) -> AffineWeight:
        weight, hessian = module.get_submodule(name).weight.detach(), hessian_of(layers[name], rounded)
        cross = moments_of(layers[name], floats, rounded)
        return quantize_weight(weight, hessian, options, cross=cross if asymmetric else None)

    inputs = [batch["x"] for batch in program.calibration.batches]
    rounded = [fake_quantize_dynamic(x, 4, -1) for x in inputs]
    first = expected("first", inputs, rounded)
    assert torch.equal(program.graph.get_buffer("first.weight_codes"), first.codes)
    # What the float network feeds the second layer, and what the quantized one does.
    floats = [F.relu(module.first(x)).detach() for x in inputs]
    hidden = [F.relu(F.linear(x, first.dequantize(), module.first.bias.detach())) for x in rounded]
    second = expected("second", floats, [fake_quantize_dynamic(x, 4, -1) for x in hidden])
    assert torch.equal(program.graph.get_buffer("second.weight_codes"), second.codes)


def test_without_a_cross_term_it_is_gptq() -> None:
    problem = layer_problem(64)
    for options in (GPTAQ(bits=4), GPTAQ(bits=4, alpha=0.0), GPTAQ(bits=4, asymmetric=False)):
        cross = None if options.asymmetric and options.alpha else 2 * problem.hessian
        ours = quantize_weight(problem.weight, problem.hessian, options, cross=cross)
        assert torch.equal(ours.codes, gptq.quantize_weight(problem.weight, problem.hessian, options).codes)


def test_asymmetric_calibration_lowers_the_error_behind_a_quantized_layer() -> None:
    problem, front = layer_problem(64), layer_problem(64, seed=1)
    quantized = rtn.quantize_weight(front.weight, RTN(bits=4)).dequantize()
    floats, inputs = (F.relu(front.inputs @ weight.T) for weight in (front.weight, quantized))
    hessian, cross = inputs.T @ inputs / len(inputs), floats.T @ inputs / len(inputs)
    wanted = floats @ problem.weight.T

    def error(alpha: float) -> float:
        options = GPTAQ(bits=4, group_size=32, alpha=alpha)
        weight = quantize_weight(problem.weight, hessian, options, cross=cross).dequantize()
        return float((wanted - inputs @ weight.T).square().sum() / wanted.square().sum())

    # Falling in alpha: exact for the unrounded weight, up to the ridge; rounding adds the same to each.
    assert error(1.0) < error(0.5) < error(0.0)


@pytest.mark.parametrize(("activations", "target"), [("static", FAKE_QUANTIZE), ("token", FAKE_QUANTIZE_DYNAMIC)])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_same_as_its_two_passes_in_turn(activations: str, target: object, act_bits: int) -> None:
    inputs = {"x": torch.zeros(4, 5, 12)}
    together, apart, given = (program_of(seeded(FeedForward), inputs) for _ in range(3))
    run(together, GPTAQ(act_bits=act_bits, activations=activations, asymmetric=False))
    run(apart, ActQuant(bits=act_bits, mode=activations), GPTQ(bits=8, group_size=-1, refine=GPTAQ.refine))
    assert torch.equal(outputs(together.graph, together), outputs(apart.graph, apart))
    assert count(together.graph, target) == count(apart.graph, target) == 2
    # With quantized activations in the graph it leaves them as they are.
    run(given, ActQuant(bits=act_bits, mode=activations), GPTAQ(act_bits=8, activations="static", asymmetric=False))
    assert torch.equal(outputs(given.graph, given), outputs(apart.graph, apart))


@pytest.mark.parametrize("activations", ["rtn", "reoptimize", "output"])
def test_kinds_of_static_ranges(activations: Activations) -> None:
    inputs = {"x": torch.zeros(16, 3, 8, 8)}
    together, apart = (program_of(seeded(InvertedResidual), inputs) for _ in range(2))
    result = run(together, GPTAQ(act_bits=4, activations=activations))[-1].result
    method = {"rtn": "minmax", "reoptimize": "mse", "output": "output"}[activations]
    run(apart, ActQuant(bits=4, method=method), GPTAQ(act_bits=4))
    if activations == "reoptimize":
        assert result.measured["refitted_ranges"] == len(refit_ranges(apart)) > 0
    assert torch.equal(outputs(together.graph, together), outputs(apart.graph, apart))


def test_eigenvalues_shrink_the_scales_that_gptq_then_uses() -> None:
    problem = layer_problem(64)
    plain = quantize_weight(problem.weight, problem.hessian, GPTAQ(bits=4, refine=0, scale_search="mse"))
    options = GPTAQ(bits=4, refine=0, scale_search="mse", eig=True)
    adjusted = quantize_weight(problem.weight, problem.hessian, options)
    eigenvalues = torch.linalg.eigvalsh(problem.hessian.double())
    factor = float(eigenvalues.mean() / eigenvalues[-1]) ** POWER
    assert torch.allclose(adjusted.scale, plain.scale * factor, rtol=4 * 2.0**-23, atol=0)
    assert problem.error(adjusted.dequantize()) > problem.error(plain.dequantize())


def test_defaults_are_eight_bits_per_channel_and_static() -> None:
    options = GPTAQ()
    assert (options.bits, options.act_bits, options.group_size, options.activations) == (8, 8, -1, "static")
    assert options.symmetric
    assert options.asymmetric
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
    result = run(program, GPTAQ())[-1].result
    assert reasons(result) == {"fc1": "left in float by the recipe"}
    assert len(result.skipped) == 1


def test_what_cannot_be_asked() -> None:
    with pytest.raises(PassError, match="gptaq: activations=dynamic is no kind"):
        GPTAQ(activations="dynamic")
    with pytest.raises(PassError, match=r"alpha=1.5 is not between 0 and 1"):
        GPTAQ(alpha=1.5)
    with pytest.raises(PassError, match=r"ridge=-1.0 is negative"):
        GPTAQ(ridge=-1.0)
    program = program_of(seeded(FeedForward), {"x": torch.zeros(4, 5, 12)})
    with pytest.raises(PassError, match="3-bit activations"):
        GPTAQ(act_bits=3).requires(program)
    program.rules = dataclasses.replace(RULES, dynamic_activations=False)
    with pytest.raises(PassError, match="no per-token activations"):
        GPTAQ(activations="token").requires(program)


def test_weights_alone_make_up_for_each_other() -> None:
    program = program_of(seeded(InvertedResidual), {"x": torch.zeros(16, 3, 8, 8)})
    run(program, GPTAQ(bits=4, act_bits=0))
    plain = program_of(seeded(InvertedResidual), {"x": torch.zeros(16, 3, 8, 8)})
    run(plain, GPTQ(bits=4, group_size=-1))
    assert count(program.graph, DEQUANTIZE) == count(plain.graph, DEQUANTIZE) == 5
    assert count(program.graph, FAKE_QUANTIZE) == 0
    wanted = outputs(program.reference, program)
    error, before = ((outputs(each.graph, each) - wanted).square().sum() for each in (program, plain))
    assert error < before


def test_float_activations_have_no_kind() -> None:
    with pytest.raises(PassError, match="act_bits=0"):
        GPTAQ(act_bits=0, activations="token")
