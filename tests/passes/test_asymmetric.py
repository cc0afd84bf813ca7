"""Asymmetric calibration: the shifted weight is the ridge regression of the float outputs on the quantized inputs."""

import pytest
import torch
from torch import Tensor, nn

from passes.asymmetric import shifted_weight
from passes.base import PassError
from passes.graph import find_layers
from passes.layer_inputs import hessian_of, moments_of
from tests.passes.nets import FLOAT32_EPS, program_of, seeded

ROWS, IN, OUT = 64, 12, 5


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [OUT, IN], inputs [ROWS, IN], and the inputs as a quantized network might deliver them."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs, noise = (torch.randn(rows, IN, generator=generator) for rows in (OUT, ROWS, ROWS))
    return weight, inputs, inputs + 0.2 * noise + 0.1


def moments(inputs: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
    """The Hessian and the cross term."""
    return changed.T @ changed / len(changed), inputs.T @ changed / len(changed)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_least_squares_with_a_ridge_around_the_weight(ridge: float) -> None:
    weight, inputs, changed = problem()
    hessian, cross = moments(inputs, changed)
    shifted = shifted_weight(weight, hessian, cross, ridge=ridge)
    # The same problem as plain least squares: one more row per input asks for the weight itself.
    size = (ridge * hessian.diagonal().mean() * ROWS).sqrt()
    rows = torch.cat([changed, size * torch.eye(IN)]).double()
    wanted = torch.cat([inputs @ weight.T, size * weight.T]).double()
    expected = torch.linalg.lstsq(rows, wanted).solution.T
    # Normal equations lose eps times the condition number of H, under 100 here; 8 for the sums of a dozen terms.
    assert torch.linalg.cond(hessian) < 100
    assert torch.allclose(shifted.double(), expected, rtol=0, atol=8 * 100 * FLOAT32_EPS * float(weight.abs().max()))


def test_what_rounding_then_costs_is_the_hessian_distance_to_the_shifted_weight() -> None:
    weight, inputs, changed = problem()
    hessian, cross = moments(inputs, changed)
    shifted = shifted_weight(weight, hessian, cross, ridge=0.0)

    def error(candidate: Tensor) -> float:
        return float((inputs @ weight.T - changed @ candidate.T).square().sum() / ROWS)

    other = torch.round(weight)
    distance = float((((shifted - other) @ hessian) * (shifted - other)).sum())
    assert error(other) == pytest.approx(error(shifted) + distance, rel=1e-4)  # float32 sums of 64 rows, twice
    assert error(shifted) < error(weight)


def test_alpha_goes_part_of_the_way() -> None:
    weight, inputs, changed = problem()
    hessian, cross = moments(inputs, changed)
    whole = shifted_weight(weight, hessian, cross, ridge=0.01)
    assert torch.equal(shifted_weight(weight, hessian, cross, ridge=0.01, alpha=0.0), weight)
    half = shifted_weight(weight, hessian, cross, ridge=0.01, alpha=0.5)
    assert torch.allclose(half, (weight + whole) / 2, rtol=0, atol=4 * FLOAT32_EPS * float(weight.abs().max()))


def test_equal_inputs_leave_the_weight_as_it_is() -> None:
    weight, inputs, _ = problem()
    hessian, cross = moments(inputs, inputs)
    assert torch.equal(shifted_weight(weight, hessian, cross, ridge=0.01), weight)


def test_each_group_has_its_own_moments_and_the_weight_keeps_its_dtype() -> None:
    parts = [problem(seed) for seed in (0, 1)]
    pairs = [moments(inputs, changed) for _, inputs, changed in parts]
    weight = torch.cat([part[0] for part in parts]).half()
    hessian, cross = (torch.stack([pair[index] for pair in pairs]) for index in (0, 1))
    together = shifted_weight(weight, hessian, cross, ridge=0.01)
    apart = [shifted_weight(weight[i * OUT :][:OUT], *pairs[i], ridge=0.01) for i in (0, 1)]
    assert together.dtype == torch.float16
    # One step of float16 (2^-10 of the value, here below 4), should a batched factorization round otherwise.
    assert torch.allclose(together.float(), torch.cat(apart).float(), rtol=0, atol=4 * 2.0**-10)


def test_dead_and_dependent_inputs() -> None:
    weight, inputs, changed = problem()
    changed[:, 3] = 0  # dead: nothing can be said about its weight, but others make up for it
    changed[:, 5] = changed[:, 4]  # without a ridge the Hessian is singular
    hessian, cross = moments(inputs, changed)
    shifted = shifted_weight(weight, hessian, cross, ridge=0.0)
    assert torch.isfinite(shifted).all()
    assert torch.equal(shifted[:, 3], weight[:, 3])
    before = (inputs @ weight.T - changed @ weight.T).square().sum()
    assert (inputs @ weight.T - changed @ shifted.T).square().sum() < before


def test_inputs_that_are_not_finite() -> None:
    weight, inputs, changed = problem()
    inputs[0, 0] = float("inf")
    with pytest.raises(PassError, match="not finite"):
        shifted_weight(weight, *moments(inputs, changed), ridge=0.01)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (lambda: nn.Linear(6, 4), (5, 3, 6)),
        (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 7, 7)),
        (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (5, 4, 5, 5)),
    ],
)
def test_the_cross_term_of_a_layer(module: type[nn.Module], shape: tuple[int, ...]) -> None:
    program = program_of(seeded(module), {"input": torch.zeros(shape)})
    (layer,) = find_layers(program.graph)
    batches = [batch["input"] for batch in program.calibration.batches]
    hessian = hessian_of(layer, batches)
    assert torch.equal(moments_of(layer, batches, batches), hessian)
    # Linear in its first argument, and the Hessian's transpose when the two change places.
    assert torch.equal(moments_of(layer, [2 * batch for batch in batches], batches), 2 * hessian)
    changed = [torch.round(batch) for batch in batches]
    one, other = moments_of(layer, batches, changed), moments_of(layer, changed, batches)
    # Float32 sums of up to a few hundred products of a few units each, taken in another order.
    assert torch.allclose(one, other.mT, rtol=0, atol=32 * FLOAT32_EPS * float(hessian.abs().max()))
    assert not torch.allclose(one, hessian, rtol=0, atol=1e-3 * float(hessian.abs().max()))


def test_no_data() -> None:
    program = program_of(seeded(lambda: nn.Linear(6, 4)), {"input": torch.zeros(5, 6)})
    (layer,) = find_layers(program.graph)
    with pytest.raises(PassError, match="no calibration data"):
        moments_of(layer, [], [])
