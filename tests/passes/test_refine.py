"""refine: no step raises the error, every one finds its parabola's lowest point, and nothing else changes."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import passes.refine
from passes import gptq
from passes.affine_grid import AffineGrid, fit_grid
from passes.gptq import GPTQ
from passes.refine import refine
from passes.weights import AffineWeight, code_range, group_columns
from tests.passes.nets import FLOAT32_EPS
from tools.bench.problem import layer_problem


def _problem(rows: int, columns: int, seed: int = 0, samples: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the moments of correlated inputs with channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    inputs *= torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(rows, columns, generator=generator), inputs.T @ inputs / samples


def _rounded(weight: Tensor, bits: int = 3, group_size: int = -1, symmetric: bool = True) -> AffineWeight:
    return fit_grid(weight, bits, group_size, symmetric).round(weight)


def _errors(target: Tensor, quantized: AffineWeight, hessian: Tensor) -> Tensor:
    """Error of each output, [out] float64; one Hessian [in, in], or one a run of rows."""
    hessians = hessian.double().view(-1, *hessian.shape[-2:])
    difference = (target.double() - quantized.dequantize().double()).unflatten(0, (len(hessians), -1))
    return ((difference @ hessians) * difference).sum(-1).flatten()


def _noise(target: Tensor, hessian: Tensor) -> float:
    """How far float32 sums can move an error: each of its in^2 products, rounded a few times."""
    size = target.double().abs()
    hessians = hessian.double().abs().view(-1, *hessian.shape[-2:])
    grouped = size.unflatten(0, (len(hessians), -1))
    return 8 * FLOAT32_EPS * float(((grouped @ hessians) * grouped).sum())


GRIDS = list(itertools.product((2, 3, 4, 8), (-1, 0, 8, 7), (True, False)))


@pytest.mark.parametrize("samples", [400, 6])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_error_never_rises_and_codes_stay_in_range(bits: int, group_size: int, symmetric: bool, samples: int) -> None:
    for seed in range(3):
        weight, hessian = _problem(6, 20, seed, samples)
        start = _rounded(weight, bits, group_size, symmetric)
        noise = _noise(weight, hessian)
        errors = [_errors(weight, start, hessian)]
        for rounds in range(1, 5):
            better = refine(weight, hessian, start, rounds)
            errors.append(_errors(weight, better, hessian))
            low, high = code_range(bits, symmetric)
            assert low <= int(better.codes.min()) <= int(better.codes.max()) <= high
            assert bool((better.scale > 0).all())
        # Over-relaxed rounds may raise it, but none ends behind the first, which cannot.
        totals = [float(error.sum()) for error in errors]
        assert totals[1] <= totals[0] + noise
        assert all(later <= totals[1] + noise for later in totals[2:])
        assert totals[-1] < totals[0]
        if group_size:  # outputs share no scale, so none pays for another
            assert bool((errors[1] <= errors[0] + noise).all())
            assert all(bool((later <= errors[1] + noise).all()) for later in errors[2:])


def test_rounds_that_go_wrong_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = _problem(6, 20)
    start = _rounded(weight, 3, 8)
    first = refine(weight, hessian, start, rounds=1)
    monkeypatch.setattr(passes.refine, "RELAXATION", 20.0)  # past 2 a step leads uphill
    after = refine(weight, hessian, start, rounds=3)
    assert bool((_errors(weight, after, hessian) <= _errors(weight, first, hessian) + _noise(weight, hessian)).all())


def test_over_relaxed_rounds_lead_further(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [layer_problem(96, seed) for seed in range(4)]

    def error() -> float:
        starts = [_rounded(problem.weight) for problem in problems]
        pairs = zip(problems, starts, strict=True)
        return sum(p.error(refine(p.weight, p.hessian, start, 10).dequantize()) for p, start in pairs)

    relaxed = error()
    monkeypatch.setattr(passes.refine, "RELAXATION", 1.0)
    assert relaxed < error()


@pytest.mark.parametrize(("bits", "group_size", "symmetric"), GRIDS)
def test_only_codes_and_scales_change(bits: int, group_size: int, symmetric: bool) -> None:
    weight, hessian = _problem(6, 20)
    start = _rounded(weight, bits, group_size, symmetric)
    kept = [value.clone() for value in (weight, hessian, start.codes, start.scale)]
    better = refine(weight, hessian, start)
    assert all(map(torch.equal, kept, (weight, hessian, start.codes, start.scale)))
    assert (better.codes.shape, better.codes.dtype) == (start.codes.shape, start.codes.dtype)
    assert (better.scale.shape, better.scale.dtype) == (start.scale.shape, torch.float32)
    assert better.zero_point is start.zero_point
    assert (better.bits, better.group_size) == (bits, start.group_size)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_no_single_code_is_worth_changing_at_the_end(group_size: int, symmetric: bool) -> None:
    weight, hessian = _problem(4, 12)
    better = refine(weight, hessian, _rounded(weight, 3, group_size, symmetric), rounds=50, scales=False)
    least = float(_errors(weight, better, hessian).sum())
    low, high = code_range(3, symmetric)
    for row, column, code in itertools.product(range(4), range(12), range(low, high + 1)):
        codes = better.codes.clone()
        codes[row, column] = code
        other = dataclasses.replace(better, codes=codes)
        assert float(_errors(weight, other, hessian).sum()) >= least - _noise(weight, hessian)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_scales_solve_the_least_squares_problem_of_their_codes(group_size: int, symmetric: bool) -> None:
    weight, hessian = _problem(5, 16)
    # Codes stop changing long before the end; rounds of single scales then converge to the joint solution.
    better = refine(weight, hessian, _rounded(weight, 2, group_size, symmetric), rounds=200)
    width = group_columns(16, better.group_size)
    groups = 16 // width
    centred = dataclasses.replace(better, scale=torch.ones_like(better.scale)).dequantize()  # codes less zero point
    root = torch.linalg.cholesky(hessian.double())  # tr(E H E^T) = |E root|^2
    basis = centred.double().view(5, groups, width)
    columns = [basis[:, g] @ root[g * width : (g + 1) * width] for g in range(groups)]  # each [out, in]
    wanted = weight.double() @ root
    if group_size == 0:
        solved = (columns[0] * wanted).sum() / (columns[0] * columns[0]).sum()
        solved = solved.view(1, 1)
    else:
        solved = torch.linalg.lstsq(torch.stack(columns, dim=2), wanted[:, :, None]).solution[:, :, 0]
    # Float32 gradients, and up to 200 steps of one scale at a time.
    torch.testing.assert_close(better.scale.double(), solved, rtol=1e-4, atol=0)


def test_one_column_gets_its_best_codes_and_scale() -> None:
    weight = torch.tensor([[0.9], [-2.1], [0.2]])
    start = AffineGrid(torch.ones(3, 1), None, 4, -1).with_centred_codes(torch.tensor([[3.0], [3.0], [0.0]]))
    better = refine(weight, torch.tensor([[2.0]]), start, rounds=1)
    assert better.codes.tolist() == [[1], [-2], [0]]
    # 0.9 = 1 * 0.9, -2.1 = -2 * 1.05; a code of zero says nothing about its scale.
    torch.testing.assert_close(better.scale, torch.tensor([[0.9], [1.05], [1.0]]))


def test_scale_that_would_turn_negative_stays() -> None:
    weight, hessian = torch.tensor([[0.0, -1.0]]), torch.eye(2)
    start = AffineWeight(torch.tensor([[0, 1]], dtype=torch.uint8), torch.ones(1, 1), torch.full((1, 1), -1.0), 2, -1)
    better = refine(weight, hessian, start, rounds=1)
    # Codes stand for one step and more: both weights get one (codes 0), and the best step would be -0.5.
    assert better.codes.tolist() == [[0, 0]]
    assert better.scale.tolist() == [[1.0]]


def test_levels_stay_when_scales_are_not_to_change() -> None:
    weight, hessian = _problem(6, 20)
    start = _rounded(weight, 3, 8)
    better = refine(weight, hessian, start, scales=False)
    assert torch.equal(better.scale, start.scale)
    assert float(_errors(weight, better, hessian).sum()) < float(_errors(weight, start, hessian).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 8])
def test_groups_of_a_convolution_are_problems_of_their_own(group_size: int, symmetric: bool) -> None:
    weights, hessians = zip(*(_problem(4, 18, seed) for seed in range(3)), strict=True)
    start = [_rounded(weight, 3, group_size, symmetric) for weight in weights]
    alone = [refine(weight, hessian, q) for weight, hessian, q in zip(weights, hessians, start, strict=True)]
    whole = _rounded(torch.cat(weights), 3, group_size, symmetric)
    together = refine(torch.cat(weights), torch.stack(hessians), whole)
    assert torch.equal(together.codes, torch.cat([part.codes for part in alone]))
    torch.testing.assert_close(together.scale, torch.cat([part.scale for part in alone]))  # sums in another order


def test_depthwise_convolution_with_one_scale_for_all() -> None:
    weights, hessians = zip(*(_problem(1, 9, seed) for seed in range(40)), strict=True)
    weight, hessian = torch.cat(weights), torch.stack(hessians)
    for group_size in (0, -1):
        start = _rounded(weight, 4, group_size)
        better = refine(weight, hessian, start)
        assert better.scale.shape == start.scale.shape
        assert float(_errors(weight, better, hessian).sum()) < float(_errors(weight, start, hessian).sum())


@pytest.mark.parametrize("group_size", [-1, 0, 8])
def test_target_may_lie_off_the_weight(group_size: int) -> None:
    weight, hessian = _problem(6, 20)
    target = weight + 0.1 * torch.randn(6, 20, generator=torch.Generator().manual_seed(5))
    start = _rounded(weight, 4, group_size)
    at_target, at_weight = refine(target, hessian, start), refine(weight, hessian, start)
    assert float(_errors(target, at_target, hessian).sum()) < float(_errors(target, at_weight, hessian).sum())


def test_codes_of_dead_inputs_stay() -> None:
    weight, hessian = _problem(6, 20)
    hessian[[3, 17], :] = 0
    hessian[:, [3, 17]] = 0
    start = _rounded(weight, 3, 8)
    better = refine(weight, hessian, start)
    assert torch.equal(better.codes[:, [3, 17]], start.codes[:, [3, 17]])
    assert torch.isfinite(better.dequantize()).all()
    nothing = refine(weight, torch.zeros(20, 20), start)
    assert torch.equal(nothing.codes, start.codes)
    assert torch.equal(nothing.scale, start.scale)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_and_runs_of_outputs_do_not_change_the_result(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = _problem(10, 20)
    for group_size, symmetric in itertools.product((-1, 0, 8), (True, False)):
        start = _rounded(weight, 3, group_size, symmetric)
        expected = refine(weight, torch.stack([hessian, 2 * hessian.flip(0, 1)]), start)
        with monkeypatch.context() as patch:
            patch.setattr(passes.refine, "BLOCK", block)
            patch.setattr(passes.refine, "OUTPUTS_AT_ONCE", 2)
            actual = refine(weight, torch.stack([hessian, 2 * hessian.flip(0, 1)]), start)
        assert torch.equal(actual.codes, expected.codes)
        torch.testing.assert_close(actual.scale, expected.scale)  # sums in another order


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_fit_the_targets_own_type(dtype: torch.dtype) -> None:
    weight, hessian = _problem(6, 20)
    weight = weight.to(dtype)
    start = _rounded(weight, 3, 8)
    better = refine(weight, hessian, start)
    assert torch.equal(better.scale.to(dtype).float(), better.scale)
    assert not torch.equal(better.scale, start.scale)
    before, after = (float(_errors(weight, quantized, hessian).sum()) for quantized in (start, better))
    assert after < before


def test_bits_do_not_depend_on_threads() -> None:
    problem = layer_problem(96)
    start = _rounded(problem.weight)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(refine(problem.weight, problem.hessian, start))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0].codes, results[1].codes)
    assert torch.equal(results[0].scale, results[1].scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (3, 32), (4, -1), (4, 0)])
def test_gptq_refines_and_chooses_scales_for_less_error(bits: int, group_size: int, symmetric: bool) -> None:
    problems = [layer_problem(96, seed) for seed in range(4)]

    def error(**options: Any) -> float:
        chosen = GPTQ(bits=bits, group_size=group_size, symmetric=symmetric, **options)
        return sum(p.error(gptq.quantize_weight(p.weight, p.hessian, chosen).dequantize()) for p in problems)

    refined = error()
    assert refined < error(refine=0)
    assert refined < error(scale_search="minmax")
    assert refined < error(scale_search="minmax", refine=0)


def test_gptq_leaves_levels_that_are_given() -> None:
    weight, hessian = _problem(6, 20)
    grid = fit_grid(weight, 3, 8, symmetric=False)
    plain = gptq.quantize_weight(weight, hessian, GPTQ(bits=3, group_size=8, symmetric=False, refine=0), grid)
    refined = gptq.quantize_weight(weight, hessian, GPTQ(bits=3, group_size=8, symmetric=False), grid)
    assert torch.equal(refined.scale, grid.scale)
    assert float(_errors(weight, refined, hessian).sum()) < float(_errors(weight, plain, hessian).sum())
