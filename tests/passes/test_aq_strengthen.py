"""Weights made stronger where codes keep too little of them."""

import dataclasses

import pytest
import torch
from torch import Tensor

from passes.aq import AQ
from passes.aq_fit import quantize_weight
from passes.aq_outer import damped_outer
from passes.aq_rows import Rows, cut_rows, moments_of
from passes.aq_start import Directions
from passes.aq_strengthen import LEAST, LEVELS, strengthened
from passes.base import PassError
from tests.passes.numbers import moments, normal

SMALL = AQ(codebook_bits=4, in_group_size=4, beam_size=4)
CPU = torch.device("cpu")


def _rows(outputs: int, inputs: int, coupled: bool) -> Rows:
    (rows,) = cut_rows(normal(outputs, inputs, seed=1), [moments_of(moments(inputs, 24, 2), 4, 1)], 1, 1, (CPU,))
    rows.outer = damped_outer(moments(outputs, 12, 3)) if coupled else None
    return rows


def _kept(weight: Tensor, found: Tensor) -> float:
    return float((found * weight).sum() / weight.square().sum())


@pytest.mark.parametrize("coupled", [False, True])
def test_each_level_gets_stronger_by_what_it_lost(coupled: bool) -> None:
    rows = _rows(256, 96, coupled)
    along = Directions.of(rows, 0.01)
    weight = along.into(rows.weight)
    levels = along.costs.flatten().argsort().chunk(LEVELS)
    kept = torch.empty_like(along.costs)
    for level, alike in enumerate(levels):
        kept.view(-1)[alike] = [0.2, 0.9, 1.0][level // 8]
    rows.errors = along.back((1 - kept) * weight)
    factors = along.into(strengthened(rows, 1.25, 0.01)) / weight
    for level, alike in enumerate(levels):
        wanted = [1.25, 1 / 0.9, 1.0][level // 8]
        assert factors.view(along.costs.numel(), -1)[alike].median() == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("coupled", [False, True])
def test_directions_give_the_cost_and_the_matrix_back(coupled: bool) -> None:
    rows = _rows(32, 16, coupled)
    along = Directions.of(rows, 0.0)
    parts = along.into(rows.weight)
    assert torch.allclose(along.back(parts), rows.weight, atol=1e-4)
    cost = float((rows.product(rows.weight) * rows.weight).sum())
    assert float((along.costs * parts.square()).sum()) == pytest.approx(cost, rel=1e-4)


def test_few_numbers_are_one_level() -> None:
    """What each of a few codes happens to lose is noise, and not to be put on top of the weight."""
    rows = _rows(4, 8, False)
    assert rows.weight.numel() < LEAST
    rows.errors = 0.5 * normal(8, 4, seed=4) * rows.weight
    ratios = strengthened(rows, 4.0, 0.01) / rows.weight
    assert torch.allclose(ratios, ratios[0, 0], atol=1e-4)


@pytest.mark.parametrize("coupled", [False, True])
def test_codes_keep_more(coupled: bool) -> None:
    weight, hessian, outer = normal(96, 96, seed=0), moments(96, 24, 1), moments(96, 12, 2)

    def kept(strengthen: float) -> float:
        options = dataclasses.replace(SMALL, loss="kl" if coupled else "layer", strengthen=strengthen)
        return _kept(weight, quantize_weight(weight, hessian, options, outer=outer if coupled else None).dequantize())

    assert kept(1.25) > 1.05 * kept(1.0)


def test_rows_stay_in_their_places() -> None:
    """Blocks of two outputs, two problems, and runs on two devices: what is fitted last is this weight."""
    weight, hessians = normal(64, 32, seed=0), torch.stack([moments(32, 8, 1), moments(32, 8, 2)])
    options = dataclasses.replace(SMALL, out_group_size=2, in_group_size=2, strengthen=2.0)
    found = quantize_weight(weight, hessians, options, devices=(CPU, CPU)).dequantize()
    for run in (slice(0, 32), slice(32, 64)):
        assert 0.5 < _kept(weight[run], found[run]) < 1.2


def test_the_default_follows_the_loss() -> None:
    """Squares of the outputs' errors are least with the least error."""
    assert [AQ(loss=loss).strengthened for loss in ("layer", "kl", "mse")] == [1.5, 1.5, 1.0]
    assert AQ(loss="mse", strengthen=1.25).strengthened == 1.25
    weight, hessian, outer = normal(96, 96, seed=0), moments(96, 24, 1), moments(96, 12, 2)
    first, again, once = (
        quantize_weight(weight, hessian, dataclasses.replace(SMALL, loss=loss, strengthen=strengthen), outer=outer)
        for loss, strengthen in (("kl", 0.0), ("kl", 1.5), ("mse", 0.0))
    )
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codes, once.codes)


def test_weaker_is_refused() -> None:
    with pytest.raises(PassError, match=r"strengthen=0\.5 would make weights weaker"):
        AQ(strengthen=0.5)


def test_runs_of_a_problem_share_its_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    solve = torch.linalg.eigh

    def counted(matrix: Tensor) -> object:
        found.append(len(matrix))
        return solve(matrix)

    monkeypatch.setattr("passes.aq_rows.OUTPUTS_AT_ONCE", 24)
    monkeypatch.setattr(torch.linalg, "eigh", counted)
    quantize_weight(normal(96, 64, seed=0), moments(64, 24, 1), SMALL)
    assert found == [64]


def test_a_table_is_fitted_once() -> None:
    """Its rows are looked up alone: no direction costs less than others."""
    table = normal(96, 32, seed=0)
    found = dataclasses.replace(SMALL, embedding_codebooks=True).quantize_table(table).dequantize()
    once = quantize_weight(table, torch.eye(32), dataclasses.replace(SMALL, strengthen=1.0)).dequantize()
    assert torch.equal(found, once)
    assert not torch.equal(found, quantize_weight(table, torch.eye(32), SMALL).dequantize())
