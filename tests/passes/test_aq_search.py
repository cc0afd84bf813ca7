"""The code search: against brute force, what never rises, and what it does not depend on."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import passes.aq_search
from passes.aq_rows import Rows, cut_rows, moments_of
from passes.aq_search import GroupBooks, score_buffer, search_group, sweep
from passes.aq_start import feedback_of, first_codes

CPU = torch.device("cpu")


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _hessian(inputs: int, seed: int) -> Tensor:
    samples = _normal(3 * inputs, inputs, seed=seed) @ _normal(inputs, inputs, seed=seed + 1)
    return samples.T @ samples / len(samples)


def _rows(
    outputs: int, groups: int, ig: int, og: int, books: int, entries: int, seed: int, grouped_scales: bool = False
) -> tuple[Rows, Tensor]:
    """Rows with random codes, and codebooks."""
    weight, hessian = _normal(outputs * og, groups * ig, seed=seed), _hessian(groups * ig, seed)
    (rows,) = cut_rows(weight, [moments_of(hessian, ig, og)], og, books, (CPU,))
    codebooks = _normal(books, ig * og, entries, seed=seed + 2) / books**0.5
    rows.codes = torch.randint(entries, (books, groups, outputs), generator=torch.Generator().manual_seed(seed + 3))
    if grouped_scales:
        rows.scales = 0.5 + torch.rand(groups, outputs, generator=torch.Generator().manual_seed(seed + 4))
    rows.refresh(codebooks)
    return rows, codebooks


def _costs(group: GroupBooks, targets: Tensor) -> Tensor:
    """Costs [choices, n] of all choices of codes, in float64."""
    choices = itertools.product(range(group.norms.shape[1]), repeat=len(group.books))
    totals = torch.stack(
        [sum(group.books[m, :, k] for m, k in enumerate(choice)) + torch.zeros(()) for choice in choices]
    ).double()
    quadratic = ((totals @ group.metric.double()) * totals).sum(1)
    return quadratic[:, None] - 2 * totals @ targets.double()


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("books", [1, 2, 3])
def test_a_beam_as_wide_as_all_choices_finds_the_best(books: int, start: bool) -> None:
    entries, n = 5, 40
    group = GroupBooks.of(_normal(books, 3, entries, seed=1), _hessian(3, 2))
    targets = _normal(3, n, seed=3) * 2
    codes = torch.randint(entries, (books, n), generator=torch.Generator().manual_seed(4))
    before = group.cost(codes, targets, None)
    scratch = score_buffer(n, entries, CPU)
    search_group(group, targets, codes, scratch, start=start, beam_size=entries**books, order=range(books))
    costs = _costs(group, targets)
    reached = group.cost(codes, targets, None).double()
    if start:  # codebooks are changed one after the other from where they are: never worse, not always the best
        assert (reached <= before).all()
    else:
        # An entry's number stands in the last 3 of a cost's 23 bits: 2^-20 of what costs come to.
        assert (reached - costs.amin(0)).max() <= costs.abs().max() * 2**-19


def test_one_codebook_is_searched_exactly_with_more_entries_than_fit_into_a_cost() -> None:
    group = GroupBooks.of(_normal(1, 4, 700, seed=1), _hessian(4, 2))
    targets, codes = _normal(4, 33, seed=3), torch.zeros(1, 33, dtype=torch.int64)
    search_group(group, targets, codes, score_buffer(33, 700, CPU), start=False, beam_size=1, order=(0,))
    assert (codes[0] == _costs(group, targets).argmin(0)).float().mean() == 1


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 9),
    groups=st.integers(1, 20),  # more than a block holds
    ig=st.integers(1, 3),
    og=st.integers(1, 3),
    books=st.integers(1, 3),
    entries=st.integers(1, 6),
    beam_size=st.integers(1, 7),
    seed=st.integers(0, 1000),
    grouped_scales=st.booleans(),
    shuffled=st.booleans(),
    penalized=st.booleans(),
)
def test_error_never_rises(
    outputs: int,
    groups: int,
    ig: int,
    og: int,
    books: int,
    entries: int,
    beam_size: int,
    seed: int,
    grouped_scales: bool,
    shuffled: bool,
    penalized: bool,
) -> None:
    rows, codebooks = _rows(outputs, groups, ig, og, books, entries, seed, grouped_scales)
    penalties = _normal(books, entries, seed=seed + 5).abs() if penalized else None

    def losses() -> Tensor:
        """Of each output group, in float64 from the codes."""
        quantized = rows.scaled(rows.decode(codebooks))
        errors = (rows.weight - quantized).double()
        loss = rows.vectors((rows.moments.hessian.double() @ errors) * errors).sum((0, 1))
        if penalties is not None:
            loss += torch.stack([penalties[m][rows.codes[m]] for m in range(books)]).double().sum((0, 1))
        return loss

    size = (rows.moments.hessian.double() @ rows.weight.double() * rows.weight.double()).sum()
    for _ in range(2):
        before = losses()
        generator = torch.Generator().manual_seed(seed) if shuffled else None
        sweep(rows, codebooks, beam_size, penalties, generator)
        # Costs are compared in float32: sums of a few dozen terms of the size of the loss, or of the weights' energy.
        assert (losses() <= before * (1 + 1e-5) + size * 1e-5).all()
    expected = rows.moments.hessian @ (rows.weight - rows.scaled(rows.decode(codebooks)))
    assert torch.allclose(rows.gradient, expected, atol=float(size.sqrt() * expected.abs().max() * 1e-4))


def test_sweeps_come_close_to_the_best_of_all_codes() -> None:
    outputs, groups, entries = 64, 4, 4
    rows, codebooks = _rows(outputs, groups, 2, 1, 1, entries, 7)
    first_codes(rows, feedback_of(rows.moments.hessian, 2, 1, 0.01), codebooks, 1)
    for _ in range(4):
        sweep(rows, codebooks, 1)
    reached = rows.vectors(rows.errors * rows.gradient).sum((0, 1))
    best = torch.full((outputs,), float("inf"))
    for choice in itertools.product(range(entries), repeat=groups):
        rows.codes = torch.tensor(choice)[None, :, None].expand(1, groups, outputs).contiguous()
        rows.refresh(codebooks)
        best = torch.minimum(best, rows.vectors(rows.errors * rows.gradient).sum((0, 1)))
    assert (reached >= best * (1 - 1e-5)).all()
    assert (reached <= best * (1 + 1e-5)).float().mean() > 0.5  # 0.75 of rows when written
    assert reached.sum() < 1.25 * best.sum()  # 1.10 when written


def test_a_wider_beam_does_better() -> None:
    errors = {}
    for beam_size in (1, 8):
        rows, codebooks = _rows(200, 8, 4, 1, 2, 16, 3)
        first_codes(rows, feedback_of(rows.moments.hessian, 4, 1, 0.01), codebooks, beam_size)
        errors[beam_size] = rows.error()
    assert errors[8] < 0.9 * errors[1]


def test_first_codes_make_up_for_earlier_errors() -> None:
    rows, codebooks = _rows(200, 12, 4, 1, 1, 16, 5)
    feedback = feedback_of(rows.moments.hessian, 4, 1, 0.01)
    first_codes(rows, feedback, codebooks, 1)
    with_feedback = rows.error()
    expected = rows.errors.clone()
    rows.refresh(codebooks)
    assert torch.allclose(rows.errors, expected, atol=1e-5)
    for g in range(rows.groups):  # every vector to its nearest under its own metric
        group = GroupBooks.of(codebooks, rows.moments.metrics[g])
        targets = group.metric @ (rows.vectors(rows.weight)[g] * rows.inverse_scales()[0])
        search_group(group, targets, rows.codes[:, g], score_buffer(200, 16, CPU), start=False, beam_size=1, order=(0,))
    rows.refresh(codebooks)
    assert with_feedback < 0.85 * rows.error()  # 0.78 when written


def test_error_splits_into_those_of_the_groups() -> None:
    """tr(E^T (H + damping) E) is the sum over groups of |(w' - q) R_gg|^2."""
    hessian = _hessian(12, 1).double()
    feedback = feedback_of(hessian.float(), 3, 1, 0.01)
    lines = (feedback.order[:, None] * 3 + torch.arange(3)).view(-1)
    errors = _normal(12, 7, seed=2).double()
    total = 0.0
    for place in range(4):
        here, before = slice(3 * place, 3 * place + 3), slice(0, 3 * place)
        off = errors[lines][here] + feedback.carry[here, before].double() @ errors[lines][before]
        total += float(((feedback.metrics[place].double() @ off) * off).sum())
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12)
    assert total == pytest.approx(float(((damped @ errors) * errors).sum()), rel=1e-4)  # a float32 factor


def test_result_does_not_depend_on_how_many_vectors_are_searched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for at_once in (1 << 19, 64):
        monkeypatch.setattr(passes.aq_search, "SCORES_AT_ONCE", at_once)
        rows, codebooks = _rows(30, 6, 2, 2, 2, 8, 1)
        sweep(rows, codebooks, 3)
        found.append(rows.error())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
