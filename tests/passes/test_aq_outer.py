"""Errors that count at the network's outputs: how near to the best of all codes, that no step raises the error."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import passes.walk
from passes import PASSES
from passes.aq import AQ, Where
from passes.aq_fit import quantize_weight
from passes.aq_outer import damped_outer, first_codes_by_rows, sweep_coupled
from passes.aq_rows import Rows, cut_rows, moments_of
from passes.aq_scales import update_scales
from passes.aq_start import feedback_of
from passes.base import PassError, Pipeline, Program
from passes.calibration import run_graph
from passes.output_moments import Loss
from passes.walk import Walk
from passes.weight_nodes import read_weight
from passes.weights import CodebookWeight
from tests.passes.nets import program_of
from tests.passes.numbers import moments, normal

SMALL = AQ(codebook_bits=4, in_group_size=4, beam_size=4)
CPU = torch.device("cpu")


def _rows(outputs: int, groups: int, books: int, entries: int, seed: int, ig: int = 2) -> tuple[Rows, Tensor]:
    """Rows that couple, with random codes, and codebooks for them."""
    inputs = groups * ig
    of_inputs = moments_of(moments(inputs, inputs, seed), ig, 1)
    (rows,) = cut_rows(normal(outputs, inputs, seed=seed + 1), [of_inputs], 1, books, (CPU,))
    rows.codes = torch.randint(entries, rows.codes.shape, generator=torch.Generator().manual_seed(seed + 2))
    rows.outer = damped_outer(moments(outputs, max(1, outputs // 4), seed + 3))
    codebooks = normal(books, ig, entries, seed=seed + 4)
    rows.refresh(codebooks)
    return rows, codebooks


def _error(rows: Rows, codebooks: Tensor) -> float:
    """tr(E^T H E outer) from the codes, in float64."""
    assert rows.outer is not None
    errors = (rows.weight - rows.scaled(rows.decode(codebooks))).double()
    return float((rows.moments.hessian.double() @ errors @ rows.outer.double() * errors).sum())


def _cost(weight: Tensor, hessian: Tensor, outer: Tensor, quantized: CodebookWeight) -> float:
    errors = (weight - quantized.dequantize()).double()
    return float(((outer.double() @ errors @ hessian.double()) * errors).sum())


def test_codes_come_close_to_the_best_of_all() -> None:
    reached, best = 0.0, 0.0
    for seed in range(10):
        rows, codebooks = _rows(3, 2, 1, 3, seed)
        first_codes_by_rows(rows, feedback_of(rows.moments.hessian, 2, 1, 0.01), codebooks, 4, 0.0, None)
        for _ in range(4):
            sweep_coupled(rows, codebooks, 4, None)
        found = _error(rows, codebooks)
        errors = []
        for choice in itertools.product(range(3), repeat=6):
            rows.codes = torch.tensor(choice).view(1, 2, 3)
            errors.append(_error(rows, codebooks))
        assert found >= min(errors) * (1 - 1e-5)
        reached, best = reached + found, best + min(errors)
    assert reached < 1.15 * best


@pytest.mark.parametrize("seed", range(6))
def test_error_never_rises(seed: int) -> None:
    rows, codebooks = _rows(100, 12, 2, 16, seed)
    for step in range(4):
        before = _error(rows, codebooks)
        generator = torch.Generator().manual_seed(seed) if seed % 2 else None
        if step == 0:
            first_codes_by_rows(rows, feedback_of(rows.moments.hessian, 2, 1, 0.01), codebooks, 4, 0.03, generator)
        elif step == 2:
            update_scales(rows, codebooks, steps=3)
        else:
            sweep_coupled(rows, codebooks, 4, generator)
        # Errors are kept in float32 and compared by sums of 2400 terms.
        assert _error(rows, codebooks) <= before * (1 + 1e-5)
        assert rows.error() == pytest.approx(_error(rows, codebooks), rel=1e-3)
    errors = rows.weight - rows.scaled(rows.decode(codebooks))
    assert torch.allclose(rows.errors, errors, atol=1e-4)
    assert torch.allclose(rows.gradient, rows.product(errors), atol=1e-3 * float(rows.gradient.abs().max()))


def test_a_search_that_raises_the_error_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are all the same to the outputs move together too far when each is taken by itself."""
    rows, codebooks = _rows(128, 8, 1, 16, 0)
    rows.outer = torch.ones(128, 128) + 0.01 * torch.eye(128)
    rows.refresh(codebooks)
    monkeypatch.setattr("passes.aq_outer.PARTS", 1)
    monkeypatch.setattr("passes.aq_outer._stiffness", lambda outer, parts: outer.diagonal())
    before, codes = rows.error(), rows.codes.clone()
    sweep_coupled(rows, codebooks, 1, None)
    assert rows.error() == before
    assert torch.equal(rows.codes, codes)
    monkeypatch.undo()
    sweep_coupled(rows, codebooks, 1, None)
    assert rows.error() < before


def test_more_steps_fit_scales_of_rows_that_couple_better() -> None:
    errors = []
    for steps in (1, 4):
        rows, codebooks = _rows(64, 8, 1, 16, 1)
        sweep_coupled(rows, codebooks, 1, None)
        update_scales(rows, codebooks, steps=steps)
        errors.append(rows.error())
    assert errors[1] < 0.98 * errors[0]


@pytest.mark.parametrize("options", [{}, {"scale_bits": 3}, {"codebook_value_bits": 4}, {"shuffle": True}])
def test_outputs_feel_less(options: dict[str, Any]) -> None:
    weight, hessian, outer = normal(64, 48, seed=0), moments(48, 48, 1), moments(64, 8, 2)
    alone = quantize_weight(weight, hessian, dataclasses.replace(SMALL, **options))
    together = quantize_weight(weight, hessian, dataclasses.replace(SMALL, **options), outer=outer)
    assert _cost(weight, hessian, outer, together) < 0.6 * _cost(weight, hessian, outer, alone)
    assert together.codes.shape == alone.codes.shape


def test_groups_of_a_convolution_couple_each_by_itself() -> None:
    weight = normal(64, 16, seed=0)
    hessians = torch.stack([moments(16, 16, 1), moments(16, 16, 2)])
    outer = moments(64, 8, 3)
    apart = torch.block_diag(outer[:32, :32], outer[32:, 32:])
    one, other = (quantize_weight(weight, hessians, SMALL, outer=each) for each in (outer, apart))
    assert torch.equal(one.codes, other.codes)


def test_outputs_that_feel_nothing_leave_a_layer_to_itself() -> None:
    weight, hessian = normal(64, 32, seed=0), moments(32, 32, 1)
    found = quantize_weight(weight, hessian, SMALL, outer=torch.zeros(64, 64))
    alone = quantize_weight(weight, hessian, SMALL)
    identity = torch.eye(64)
    assert _cost(weight, hessian, identity, found) <= _cost(weight, hessian, identity, alone)


def test_what_does_not_go_together() -> None:
    weight, hessian = normal(64, 32, seed=0), moments(32, 32, 1)
    with pytest.raises(PassError, match="row by row"):
        AQ(loss="kl", out_group_size=2)
    with pytest.raises(PassError, match="loss=l2 is none"):
        AQ(loss="l2")  # type: ignore[arg-type]
    with pytest.raises(PassError, match="code_penalties"):
        quantize_weight(weight, hessian, SMALL, outer=torch.eye(64), code_penalties=torch.zeros(2, 16))


class Network(nn.Module):
    """Wide layers and few outputs: most of what a layer computes is not felt. One is not felt at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.conv, self.unfelt = nn.Conv1d(1, 32, 4, stride=4), nn.Linear(32, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = self.conv(x[:, None]).mean(-1)
        y: Tensor = self.head(torch.relu(self.second(torch.relu(self.first(x + seen)))))
        return y, self.unfelt(x).argmax(-1)


class Largest(nn.Module):
    """The place of the largest number."""

    def forward(self, x: Tensor) -> Tensor:
        return x.argmax(-1)


def _program() -> Program:
    return program_of(Network(), {"x": torch.zeros(256, 32)}, batches=2)


def _lost(loss: Where) -> tuple[float, Program]:
    """The squared error of the outputs, relative, with codebooks fitted to this loss."""
    program = _program()
    Pipeline([dataclasses.replace(SMALL, loss=loss)], PASSES).run(program)
    wanted, found = (
        torch.cat([batch[0] for batch in run_graph(graph, program.calibration.batches)])
        for graph in (program.reference, program.graph)
    )
    return float((wanted - found).square().sum() / wanted.square().sum()), program


def test_a_network_loses_less() -> None:
    (alone, _), (together, program) = _lost("layer"), _lost("mse")
    assert together < 0.6 * alone
    kinds = {layer.name: read_weight(program.graph, layer) for layer in program.layers()}
    assert all(isinstance(kinds[name], CodebookWeight) for name in ("first", "second", "unfelt"))


def test_a_network_without_such_outputs_is_refused() -> None:
    program = program_of(nn.Sequential(nn.Linear(32, 96), Largest()), {"input": torch.zeros(4, 32)})
    with pytest.raises(PassError, match="floating-point outputs"):
        Pipeline([dataclasses.replace(SMALL, loss="kl")], PASSES).run(program)


@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_moments_of_a_walk_do_not_depend_on_how_many_fit(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> dict[str, Tensor | None]:
        program = _program()
        program.float_twin = program.reference
        walk = Walk(program)
        return {layer.name: walk.outer(layer, loss) for layer in program.layers()}

    together = found()
    monkeypatch.setattr(passes.walk, "OUTER_BYTES", 1)
    apart = found()
    assert together["unfelt"] is None
    assert apart["unfelt"] is None
    for name in ("first", "second", "head", "conv"):
        one, other = together[name], apart[name]
        assert one is not None
        assert other is not None
        assert torch.equal(one, other)
    conv = together["conv"]
    assert conv is not None
    assert conv.shape == (32, 32)
