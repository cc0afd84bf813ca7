"""GPTQ as a function: against the paper's own loop, brute force, and what must not change its result."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.gptq
from passes import rtn
from passes.affine_grid import fit_grid
from passes.base import PassError
from passes.gptq import GPTQ, quantize_weight
from passes.rtn import RTN
from passes.weights import AffineWeight, code_range
from tools.bench.problem import layer_problem


def _problem(rows: int, columns: int, seed: int = 0, samples: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the moments of correlated inputs with channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(samples, columns, generator=generator) @ mixing
    inputs *= torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / samples


def _plain(**options: Any) -> GPTQ:
    """GPTQ as published: min-max grids, and nothing after it."""
    return GPTQ(**{"scale_search": "minmax", "refine": 0, **options})


def _error(weight: Tensor, quantized: AffineWeight, hessian: Tensor) -> float:
    difference = (weight - quantized.dequantize()).double()
    return float(((difference @ hessian.double()) * difference).sum())


def _as_published(weight: Tensor, hessian: Tensor, scale: Tensor, bits: int, order: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 in float64, B = 1, symmetric codes [out, in]; scale [out, in]."""
    work, codes = weight.double()[:, order].clone(), torch.empty_like(weight)
    damped = hessian.double()[order][:, order]
    damped += 0.01 * damped.diagonal().mean() * torch.eye(len(order))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    low, high = code_range(bits, symmetric=True)
    for j, column in enumerate(order):
        step = scale[:, column].double()
        codes[:, column] = torch.round(work[:, j] / step).clamp(low, high)
        error = (work[:, j] - codes[:, column] * step) / upper[j, j]
        work[:, j:] -= error[:, None] * upper[j, j:]
    return codes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("group_size", "act_order"), [(-1, True), (-1, False), (0, True), (0, False), (16, True)])
def test_codes_are_those_of_the_published_loop(group_size: int, act_order: bool, seed: int) -> None:
    weight, hessian = _problem(6, 40, seed)
    quantized = quantize_weight(weight, hessian, _plain(bits=4, group_size=group_size, act_order=act_order))
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(40)
    width = 40 if group_size <= 0 else group_size
    scale = quantized.scale.expand(6, -1).repeat_interleave(width, dim=1)[:, :40]
    assert torch.equal(quantized.codes.float(), _as_published(weight, hessian, scale, 4, order))


@pytest.mark.parametrize("symmetric", [True, False])
def test_without_act_order_groups_are_fitted_on_updated_weights(symmetric: bool) -> None:
    weight, hessian = _problem(6, 40)
    options = _plain(bits=3, group_size=16, act_order=False, symmetric=symmetric, block_size=16)
    quantized = quantize_weight(weight, hessian, options)
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(40)
    for group, start in enumerate((0, 16, 32)):
        # The best real-valued rest, given the columns before `start`, solves a least squares problem.
        done, rest = slice(0, start), slice(start, 40)
        error = weight[:, done].double() - quantized.dequantize()[:, done]
        best = weight[:, rest].double() + error @ damped[done, rest] @ torch.linalg.inv(damped[rest, rest])
        alone = rtn.quantize_weight(best[:, :16].float(), RTN(bits=3, symmetric=symmetric))
        # Float32 factorization and solve of a matrix of condition number up to 1e4.
        torch.testing.assert_close(quantized.scale[:, group : group + 1], alone.scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_between_the_best_of_all_codes_and_rounding(seed: int) -> None:
    weight, hessian = _problem(64, 4, seed)
    quantized = quantize_weight(weight, hessian, _plain(bits=3, group_size=-1))
    rounded = rtn.quantize_weight(weight, RTN(bits=3))
    assert torch.equal(rounded.scale, quantized.scale)
    every = torch.tensor(list(itertools.product(range(-4, 4), repeat=4))).float()  # [8^4, in]
    difference = every * quantized.scale[:, :, None] - weight[:, None]  # [out, 8^4, in]
    best = float(((difference @ hessian) * difference).sum(-1).amin(1).sum())
    actual = _error(weight, quantized, hessian)
    assert actual >= best * (1 - 1e-5)  # float32 sums of 16 products
    assert actual < _error(weight, rounded, hessian)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layer_error_is_below_that_of_rounding(bits: int, group_size: int, act_order: bool, symmetric: bool) -> None:
    problem = layer_problem(96)
    options = {"bits": bits, "group_size": group_size, "symmetric": symmetric}
    quantized = quantize_weight(problem.weight, problem.hessian, GPTQ(act_order=act_order, **options))
    rounded = rtn.quantize_weight(problem.weight, RTN(**options))
    assert problem.error(quantized.dequantize()) < problem.error(rounded.dequantize())
    assert quantized.codes.dtype == rounded.codes.dtype
    assert quantized.scale.shape == rounded.scale.shape
    low, high = code_range(bits, symmetric)
    assert low <= int(quantized.codes.min()) <= int(quantized.codes.max()) <= high


def test_act_order_pays_on_inputs_with_outliers() -> None:
    problem = layer_problem(96)
    errors = [
        problem.error(quantize_weight(problem.weight, problem.hessian, _plain(bits=4, act_order=order)).dequantize())
        for order in (True, False)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 16])
def test_inputs_that_do_not_correlate_mean_plain_rounding(group_size: int, act_order: bool, symmetric: bool) -> None:
    weight, hessian = _problem(6, 40)
    options = {"bits": 3, "group_size": group_size, "symmetric": symmetric}
    quantized = quantize_weight(weight, hessian.diagonal().diag(), _plain(act_order=act_order, **options))
    rounded = rtn.quantize_weight(weight, RTN(**options))
    assert torch.equal(quantized.codes, rounded.codes)
    assert torch.equal(quantized.scale, rounded.scale)


def test_act_order_does_not_care_how_the_columns_come() -> None:
    weight, hessian = _problem(6, 40)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    options = _plain(bits=3, group_size=-1)
    there = quantize_weight(weight[:, order], hessian[order][:, order], options)
    assert torch.equal(there.codes, quantize_weight(weight, hessian, options).codes[:, order])


@pytest.mark.parametrize("act_order", [True, False])
def test_dead_inputs_get_zero_weights_and_change_nothing_else(act_order: bool) -> None:
    weight, hessian = _problem(6, 40)
    dead = torch.tensor([3, 17, 39])
    alive = torch.tensor([column for column in range(40) if column not in dead])
    weight[:, dead] *= 100
    hessian[dead, :] = 0
    hessian[:, dead] = 0
    options = _plain(bits=3, group_size=-1, act_order=act_order)
    quantized = quantize_weight(weight, hessian, options)
    without = quantize_weight(weight[:, alive], hessian[alive][:, alive], options)
    assert torch.equal(quantized.dequantize()[:, dead], torch.zeros(6, 3))
    assert torch.equal(quantized.codes[:, alive], without.codes)
    assert torch.equal(quantized.scale, without.scale)


def test_all_inputs_dead() -> None:
    quantized = quantize_weight(torch.ones(2, 5), torch.zeros(5, 5), GPTQ())
    assert torch.equal(quantized.dequantize(), torch.zeros(2, 5))


def test_damping_leads_to_plain_rounding() -> None:
    weight, hessian = _problem(6, 40)
    rounded = rtn.quantize_weight(weight, RTN(bits=3, symmetric=False))
    same = []
    for damp in (0.01, 1.0, 1e6):
        quantized = quantize_weight(weight, hessian, _plain(bits=3, group_size=-1, symmetric=False, damp=damp))
        same.append(float((quantized.codes == rounded.codes).float().mean()))
    assert same[0] < same[1] < same[2] == 1.0


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_fewer_samples_than_inputs(damp: float) -> None:
    weight, hessian = _problem(6, 40, samples=10)
    quantized = quantize_weight(weight, hessian, GPTQ(bits=3, damp=damp))
    assert _error(weight, quantized, hessian) < _error(weight, rtn.quantize_weight(weight, RTN(bits=3)), hessian)


def test_hessian_that_damping_cannot_save() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 100.0
    with pytest.raises(PassError, match="not positive definite"):
        quantize_weight(torch.ones(2, 4), hessian, GPTQ())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_hessian_that_is_not_finite(value: float) -> None:
    with pytest.raises(PassError, match="not finite"):
        quantize_weight(torch.ones(2, 4), torch.eye(4) * value, GPTQ())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_groups_of_a_convolution_are_problems_of_their_own(group_size: int, act_order: bool, symmetric: bool) -> None:
    weights, hessians = zip(*(_problem(4, 18, seed) for seed in range(3)), strict=True)
    hessians[1][5, :] = hessians[1][:, 5] = 0  # a dead input in one of them
    options = _plain(bits=3, group_size=group_size, act_order=act_order, symmetric=symmetric)
    together = quantize_weight(torch.cat(weights), torch.stack(hessians), options)
    alone = [quantize_weight(weight, hessian, options) for weight, hessian in zip(weights, hessians, strict=True)]
    assert torch.equal(together.codes, torch.cat([part.codes for part in alone]))
    assert torch.equal(together.scale, torch.cat([part.scale for part in alone]))
    assert together.group_size == alone[0].group_size


def test_only_the_singular_problem_is_damped_more() -> None:
    weight, hessian = _problem(4, 18)
    singular = torch.ones(18, 18)
    together = quantize_weight(torch.cat([weight, weight]), torch.stack([hessian, singular]), _plain(damp=0.0))
    assert torch.equal(together.codes[:4], quantize_weight(weight, hessian, _plain(damp=0.0)).codes)


@pytest.mark.parametrize("block_size", [1, 7, 64])
@pytest.mark.parametrize("group_size", [-1, 16])
def test_block_size_does_not_change_the_result(group_size: int, block_size: int) -> None:
    weight, hessian = _problem(6, 40)
    options = [GPTQ(bits=3, group_size=group_size, block_size=size) for size in (128, block_size)]
    expected, actual = (quantize_weight(weight, hessian, chosen) for chosen in options)
    assert torch.equal(actual.codes, expected.codes)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_outputs_at_once_do_not_change_the_result(
    group_size: int, act_order: bool, symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = _problem(10, 18)
    options = _plain(bits=3, group_size=group_size, act_order=act_order, symmetric=symmetric)
    expected = quantize_weight(weight, torch.stack([hessian, 2 * hessian.flip(0, 1)]), options)
    monkeypatch.setattr(passes.gptq, "OUTPUTS_AT_ONCE", 2)
    actual = quantize_weight(weight, torch.stack([hessian, 2 * hessian.flip(0, 1)]), options)
    assert torch.equal(actual.codes, expected.codes)
    assert torch.equal(actual.scale, expected.scale)
    assert torch.equal(actual.dequantize(), expected.dequantize())


def test_neither_inputs_nor_threads_are_changed_and_bits_do_not_depend_on_them() -> None:
    problem = layer_problem(96)
    weight, hessian = problem.weight.clone(), problem.hessian.clone()
    before = torch.get_num_threads()
    codes = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            codes.append(quantize_weight(weight, hessian, GPTQ(bits=3)).codes)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*codes)
    assert torch.equal(weight, problem.weight)
    assert torch.equal(hessian, problem.hessian)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 is no width"),
        ({"embeddings": 3}, "embeddings=3 is no width"),
        ({"group_size": -2}, "group_size=-2 is negative"),
        ({"damp": -0.1}, r"damp=-0\.1 is negative"),
        ({"block_size": 0}, "block_size=0 is not positive"),
        ({"refine": -1}, "refine=-1 is negative"),
        ({"scale_search": "best"}, "scale_search=best is no search"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, float], message: str) -> None:
    with pytest.raises(PassError, match=f"gptq: {message}") as caught:
        GPTQ(**options)
    assert caught.value.fix


def test_scale_search_weighs_errors_by_what_making_up_for_them_leaves() -> None:
    weight, hessian = _problem(6, 40)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(40, dtype=torch.float64)
    # Given the columns behind it: the last pivot of the Cholesky factor of its block of the Hessian with theirs.
    rest = [damped[order[k:]][:, order[k:]] for k in range(40)]
    pivots = torch.stack([1 / torch.linalg.inv(block)[0, 0] for block in rest])
    importance = torch.empty(40, dtype=torch.float64)
    importance[order] = (pivots * hessian.diagonal()[order]).sqrt()
    expected = fit_grid(weight, 3, 8, False, "hessian", importance.float().expand(6, -1))
    actual = quantize_weight(weight, hessian, GPTQ(bits=3, group_size=8, symmetric=False, refine=0))
    assert torch.equal(actual.zero_point, expected.zero_point)
    assert torch.equal(actual.scale, expected.scale)
