"""Additive quantization as a function and as a pass: what comes out, what is left alone, what bad input does."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import passes.aq_rows
from exporter.capture import capture, export_module
from exporter.formats import pack_smallest
from passes import PASSES, rtn
from passes.aq import AQ
from passes.aq_fit import quantize_weight, search_codes
from passes.aq_rows import cut_rows, moments_of
from passes.aq_scales import update_scales
from passes.aq_search import sweep
from passes.base import LayerRule, PassError, Program
from passes.calibration import Calibration, run_graph
from passes.graph import weight_of
from passes.rtn import RTN
from passes.weight_nodes import read_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight, value_lines
from tests.passes.nets import RULES, reasons, seeded
from tools.bench.problem import LayerProblem, layer_problem

SMALL = AQ(codebook_bits=4, in_group_size=4, beam_size=4, rounds=3, strengthen=1.0)


def _problem(outputs: int, inputs: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(4 * inputs, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), samples.T @ samples / len(samples)


def _error(weight: Tensor, hessian: Tensor, quantized: CodebookWeight | AffineWeight) -> float:
    difference = (weight - quantized.dequantize()).double()
    total = ((weight.double() @ hessian.double()) * weight.double()).sum()
    return float(((difference @ hessian.double()) * difference).sum() / total)


def _same(one: CodebookWeight, other: CodebookWeight) -> bool:
    pairs = ((one.codes, other.codes), (one.codebooks, other.codebooks), (one.scales, other.scales))
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def problem() -> LayerProblem:
    return layer_problem(256)


@pytest.mark.parametrize(("ig", "og", "books", "bits"), [(8, 1, 1, 6), (4, 2, 2, 4), (2, 4, 3, 5), (1, 1, 1, 3)])
def test_shapes_and_bits(ig: int, og: int, books: int, bits: int) -> None:
    weight, hessian = _problem(64, 32)
    options = AQ(num_codebooks=books, codebook_bits=bits, in_group_size=ig, out_group_size=og, beam_size=2, rounds=1)
    quantized = quantize_weight(weight, hessian, options)
    assert quantized.codes.shape == (64 // og, 32 // ig, books)
    assert quantized.codes.dtype == torch.uint8
    assert int(quantized.codes.max()) < 2**bits
    assert quantized.codebooks.shape == (books, 2**bits, og, ig)
    assert quantized.scales.shape == (64 // og, 1)
    assert quantized.shape == weight.shape
    assert quantized.bits_per_weight == options.bits_per_parameter(64, 32)
    assert _error(weight, hessian, quantized) < 0.5


def test_bits_per_parameter_of_the_usual_sizes() -> None:
    # codes 2 x 8 / 8; codebooks 2 x 256 x 8 x 16 bits and 2048 scales of 16, over 2048^2
    assert AQ().bits_per_parameter(2048, 2048) == 2 + (2 * 256 * 8 * 16 + 2048 * 16) / 2048**2
    tables = AQ(scale_bits=4, codebook_value_bits=8)
    scales = 2048 * (256 * 4 + 16 * 16)
    assert tables.bits_per_parameter(2048, 2048) == 2 + (2 * (2048 * 8 + 256 * 16) + scales) / 2048**2
    assert AQ(scale_bits=8).bits_per_parameter(2048, 2048) == 2 + (2 * 256 * 8 * 16 + 2048 * 256 * 16) / 2048**2


def test_parts_of_a_long_layer_are_told_with_an_error_that_falls() -> None:
    weight, hessian = _problem(64, 32)
    told: list[str] = []
    quantize_weight(weight, hessian, dataclasses.replace(SMALL, tolerance=0.0), on_part=told.append)
    assert told[:2] == ["first codebooks", "first codes"]
    assert [text.partition(",")[0] for text in told[2:]] == ["round 1", "round 2", "round 3"]
    errors = [float(text.rpartition(" ")[2]) for text in told[2:]]
    assert 1 > errors[0] > errors[1] > errors[2] > 0


def test_error_is_far_below_rounding_at_the_same_bits(problem: LayerProblem) -> None:
    """And below half of rounding with one bit more. When written: 0.011, 0.45 and 0.17."""
    quantized = quantize_weight(problem.weight, problem.hessian, AQ(codebook_bits=6, rounds=3))
    error = problem.error(quantized.dequantize())
    assert error < 0.02
    assert error < 0.5 * problem.error(rtn.quantize_weight(problem.weight, RTN(bits=3, group_size=64)).dequantize())


def test_rounds_lower_the_error(problem: LayerProblem) -> None:
    errors = []
    for rounds in (0, 1, 4):
        options = dataclasses.replace(SMALL, rounds=rounds, tolerance=0)
        errors.append(problem.error(quantize_weight(problem.weight, problem.hessian, options).dequantize()))
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.95 * errors[0]


def test_seed_decides_everything_and_threads_nothing() -> None:
    weight, hessian = _problem(96, 48)
    options = dataclasses.replace(SMALL, shuffle=True)
    first = quantize_weight(weight, hessian, options)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert _same(first, quantize_weight(weight, hessian, options))
    finally:
        torch.set_num_threads(threads)
    assert not _same(first, quantize_weight(weight, hessian, dataclasses.replace(options, seed=1)))


def test_runs_of_rows_and_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut into runs that take turns on devices, the result is as good, and the devices do not matter."""
    weight, hessian = _problem(96, 48)
    whole = quantize_weight(weight, hessian, SMALL)
    monkeypatch.setattr(passes.aq_rows, "OUTPUTS_AT_ONCE", 40)
    one = quantize_weight(weight, hessian, SMALL)
    two = quantize_weight(weight, hessian, SMALL, devices=(torch.device("cpu"), torch.device("cpu", 0)))
    assert _same(one, two)
    assert _error(weight, hessian, one) == pytest.approx(_error(weight, hessian, whole), rel=0.1)


@pytest.mark.parametrize("grouped_scales", [False, True])
def test_codes_of_selected_rows_are_searched_as_with_all(grouped_scales: bool) -> None:
    weight, hessian = _problem(64, 32)
    options = dataclasses.replace(SMALL, out_group_size=2, rounds=0, scale_bits=16 if grouped_scales else 0)
    quantized = quantize_weight(weight, hessian, options)
    shaken = dataclasses.replace(quantized, codes=(quantized.codes + 3) % 16)
    everything = search_codes(weight, hessian, shaken, options)
    picked = torch.tensor([3, 30, 7])
    assert torch.equal(search_codes(weight, hessian, shaken, options, outputs=picked), everything[picked])
    assert torch.equal(search_codes(weight, hessian, shaken, options, outputs=slice(5, 20)), everything[5:20])
    better = dataclasses.replace(shaken, codes=everything)
    assert _error(weight, hessian, better) < _error(weight, hessian, shaken)


def test_scales_of_groups_and_their_tables() -> None:
    weight, hessian = _problem(64, 64)
    weight[:, ::7] *= 5
    errors = {}
    for bits in (0, 2, 4, 16):
        quantized = quantize_weight(weight, hessian, dataclasses.replace(SMALL, scale_bits=bits))
        errors[bits] = _error(weight, hessian, quantized)
        free = 2**bits >= 16  # as many numbers as an output group has groups
        assert quantized.scales.shape == (64, 16 if bits else 1)
        assert quantized.scale_bits == (0 if free else bits)
        if bits and not free:
            assert max(len(row.unique()) for row in quantized.scales) <= 2**bits
        expected = dataclasses.replace(SMALL, scale_bits=bits).bits_per_parameter(64, 64)
        assert quantized.bits_per_weight == expected
    assert errors[4] == pytest.approx(errors[16])
    assert errors[16] < errors[2] < errors[0]


def test_codebook_values_from_a_table() -> None:
    weight, hessian = _problem(96, 48)
    plain, quantized = (
        quantize_weight(weight, hessian, dataclasses.replace(SMALL, codebook_value_bits=bits)) for bits in (0, 5)
    )
    assert quantized.codebook_value_bits == 5
    assert all(len(book.unique()) <= 32 for book in quantized.codebooks)
    assert _error(weight, hessian, quantized) < 1.2 * _error(weight, hessian, plain)


def test_code_penalties() -> None:
    weight, hessian = _problem(96, 48)
    free = quantize_weight(weight, hessian, SMALL)
    used = torch.bincount(free.codes.flatten().int(), minlength=16)
    assert (used > 0).all()
    penalties = torch.zeros(2, 16)
    penalties[:, 3:] = 1e9
    few = quantize_weight(weight, hessian, SMALL, code_penalties=penalties)
    assert int(few.codes.max()) <= 2
    # A penalty of the layer error itself cannot pay off; one that is nothing changes nothing.
    assert _same(free, quantize_weight(weight, hessian, SMALL, code_penalties=torch.zeros(2, 16)))


def test_penalties_are_counted_once() -> None:
    """A change of code is worth a penalty up to exactly what it lowers the error by."""
    weight, hessian = torch.tensor([[1.0]]), torch.tensor([[1.0]])
    quantized = CodebookWeight(
        torch.zeros(1, 1, 1, dtype=torch.uint8), torch.tensor([0.0, 1.0]).view(1, 2, 1, 1), torch.ones(1, 1)
    )
    for penalty, code in ((0.9, 1), (1.1, 0)):  # entry 1 lowers the error by 1
        penalties = torch.tensor([[0.0, penalty]])
        found = search_codes(weight, hessian, quantized, SMALL, code_penalties=penalties)
        assert int(found) == code


@pytest.mark.parametrize("bits", [0, 3])
def test_sixteen_bits_hold_the_numbers(bits: int) -> None:
    weight, hessian = _problem(96, 48)
    options = dataclasses.replace(SMALL, scale_bits=bits, codebook_value_bits=bits)
    for dtype, short in ((torch.float32, torch.float16), (torch.float16, torch.float16), (torch.bfloat16,) * 2):
        quantized = quantize_weight(weight.to(dtype), hessian, options)
        for values in (quantized.codebooks, quantized.scales):
            assert values.dtype == torch.float32
            assert torch.equal(values, values.to(short).float())
        stored = pack_smallest(quantized)[1]
        if short == torch.float16:
            assert stored.bits_per_weight == quantized.bits_per_weight == options.bits_per_parameter(96, 48)


def test_scales_beyond_sixteen_bits_stay() -> None:
    weight, hessian = _problem(96, 48)
    weight[3] *= 1e-6
    quantized = quantize_weight(weight, hessian, SMALL)
    assert torch.equal(quantized.codebooks, quantized.codebooks.half().float())
    row = (weight[3] - quantized.dequantize()[3]).square().sum() / weight[3].square().sum()
    assert row < 0.5  # to 16 bits its scale would have two


def test_blocks_share_scales() -> None:
    weight, hessian = _problem(64, 64)
    weight[:, ::7] *= 5
    errors = {}
    for scale_bits, inputs, outputs in ((16, 4, 2), (16, 16, 2), (16, 16, 8), (2, 4, 4), (2, 16, 4), (0, 0, 8)):
        sizes = {"scale_in_group_size": inputs, "scale_out_group_size": outputs}
        options = dataclasses.replace(SMALL, out_group_size=2, scale_bits=scale_bits, **sizes)
        quantized = quantize_weight(weight, hessian, options)
        errors[scale_bits, inputs, outputs] = _error(weight, hessian, quantized)
        columns = 64 // inputs if inputs else 1
        assert quantized.scales.shape == (64 // outputs, columns)
        tables = 0 < 2**scale_bits < columns
        assert quantized.scale_bits == (scale_bits if tables else 0)
        if tables:
            assert max(len(row.unique()) for row in quantized.scales) <= 2**scale_bits
        assert quantized.bits_per_weight == options.bits_per_parameter(64, 64)
        searched = search_codes(weight, hessian, quantized, options)
        better = dataclasses.replace(quantized, codes=searched)
        assert _error(weight, hessian, better) <= errors[scale_bits, inputs, outputs] * (1 + 1e-5)
    assert errors[16, 4, 2] < errors[16, 16, 2] < errors[0, 0, 8]


def test_shared_scales_are_the_best_for_their_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """One scale for whole rows: no other lowers their error; runs end where a scale's rows do."""
    weight, hessian = _problem(48, 32)
    monkeypatch.setattr(passes.aq_rows, "OUTPUTS_AT_ONCE", 20)
    (first, *others) = cut_rows(weight, [moments_of(hessian, 4, 2)], 2, 1, (weight.device,), (3, 1))
    assert [rows.codes.shape[2] for rows in (first, *others)] == [9, 9, 6]
    codebooks = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(1))
    first.codes = torch.randint(16, first.codes.shape, generator=torch.Generator().manual_seed(2))
    first.refresh(codebooks)
    sweep(first, codebooks, 1)
    update_scales(first, codebooks)
    assert torch.equal(first.scales[0, ::3].repeat_interleave(3), first.scales[0])
    reached, best = first.error(), first.scales
    for change in (0.99, 1.01):
        first.scales = best * change
        first.refresh(codebooks)
        assert first.error() > reached


@pytest.mark.parametrize("groups", [1, 4])
def test_tables_of_values_at_each_place(groups: int) -> None:
    weight, hessian = _problem(96, 48)
    options = dataclasses.replace(SMALL, codebook_value_bits=2, codebook_value_groups=groups)
    quantized = quantize_weight(weight, hessian, options)
    lines = value_lines(quantized.codebooks, groups)
    assert lines.shape == (2 * groups * 4, 16 // groups)
    assert max(len(line.unique()) for line in lines) <= 4
    assert quantized.bits_per_weight == options.bits_per_parameter(96, 48)
    if groups == 4:  # runs of four entries: as many as a table has numbers
        plain = quantize_weight(weight, hessian, SMALL)
        assert torch.equal(quantized.codebooks, plain.codebooks)


def test_rows_of_zeros_and_constants() -> None:
    weight, hessian = _problem(96, 48)
    weight[5] = 0
    weight[6] = 3.0
    quantized = quantize_weight(weight, hessian, SMALL)
    assert (quantized.dequantize()[5] == 0).all()
    assert torch.isfinite(quantized.dequantize()).all()
    assert _error(weight, hessian, quantized) < 0.2
    nothing = quantize_weight(torch.zeros(96, 48), hessian, SMALL)
    assert (nothing.dequantize() == 0).all()
    constant = torch.full((96, 48), 0.7)
    assert _error(constant, hessian, quantize_weight(constant, hessian, SMALL)) < 1e-6


def test_poor_statistics() -> None:
    weight, hessian = _problem(96, 48)
    sample = torch.randn(1, 48, generator=torch.Generator().manual_seed(1))
    once = quantize_weight(weight, sample.T @ sample, SMALL)  # of rank one
    assert _error(weight, sample.T @ sample, once) < 0.01
    assert torch.isfinite(once.dequantize()).all()
    dead = hessian.clone()
    dead[:, 7] = dead[7] = 0
    assert _error(weight, dead, quantize_weight(weight, dead, SMALL)) < 0.2
    silent = quantize_weight(weight, torch.zeros(48, 48), SMALL)  # no input ever: weights count by themselves
    assert _error(weight, torch.eye(48), silent) < 0.3


def test_what_is_refused() -> None:
    weight, hessian = _problem(96, 48)
    for options, what in (
        (dataclasses.replace(SMALL, in_group_size=5), "48 inputs do not divide into in_group_size=5"),
        (dataclasses.replace(SMALL, out_group_size=7), "96 outputs do not divide into out_group_size=7"),
        (dataclasses.replace(SMALL, scale_in_group_size=20, scale_bits=4), "do not divide into scale_in_group_size=20"),
        (dataclasses.replace(SMALL, scale_out_group_size=36), "do not divide into scale_out_group_size=36"),
        (dataclasses.replace(SMALL, codebook_bits=11), "1152 blocks are fewer than the 2048 entries"),
        (dataclasses.replace(SMALL, codebook_bits=9), "bits a weight, more than 8-bit weights"),
    ):
        with pytest.raises(PassError, match=what):
            quantize_weight(weight, hessian, options)
    for bad in (float("nan"), float("inf")):
        broken = weight.clone()
        broken[3, 4] = bad
        with pytest.raises(PassError, match="its weight is not finite"):
            quantize_weight(broken, hessian, SMALL)
        broken = hessian.clone()
        broken[3, 4] = bad
        with pytest.raises(PassError, match="inputs are not finite"):
            quantize_weight(weight, broken, SMALL)
    with pytest.raises(PassError, match=r"beam_size=0 is not in 1\.\.256"):
        AQ(beam_size=0)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"scale_in_group_size": 12, "scale_bits": 4}, "scale_in_group_size=12 is no multiple of in_group_size=8"),
        ({"scale_out_group_size": 3, "out_group_size": 2}, "scale_out_group_size=3 is no multiple of out_group_size=2"),
        ({"scale_in_group_size": 16}, "scale_in_group_size needs scale_bits"),
        ({"codebook_value_groups": 4}, "codebook_value_groups needs codebook_value_bits"),
        (
            {"codebook_value_groups": 3, "codebook_value_bits": 4},
            "256 entries do not divide into codebook_value_groups=3",
        ),
        ({"scale_in_group_size": -8, "scale_bits": 4}, "scale_in_group_size=-8 is not in 0"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, int], what: str) -> None:
    with pytest.raises(PassError, match=what):
        AQ(**options)  # type: ignore[arg-type]  # all of these are numbers


class Net(nn.Module):
    """A table, a convolution with 3 x 4 inputs, a grouped one, layers of all kinds of fit, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 16)
        self.conv = nn.Conv1d(16, 64, 3, padding=1)
        self.grouped = nn.Conv1d(64, 64, 3, padding=1, groups=4)
        self.odd = nn.Linear(64, 30)
        self.after_odd = nn.Linear(30, 64)
        self.tiny = nn.Linear(64, 4)
        self.wide = nn.Linear(4, 64)
        self.head = nn.Linear(64, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T] -> [N, T, 16]."""
        x = self.table(tokens).mT
        x = torch.relu(self.grouped(torch.relu(self.conv(x)))).mT
        x = self.after_odd(torch.relu(self.odd(x)))
        logits: Tensor = self.head(self.wide(self.tiny(x)))
        return logits


def _tokens() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"tokens": torch.randint(64, (8, 20), generator=generator)} for _ in range(4)]


def _program(layer_rules: tuple[LayerRule, ...] = ()) -> Program:
    data = _tokens()
    exported = export_module(seeded(Net), data[0], {"tokens": {0: "batch"}})
    return capture(exported, Calibration(tuple(data), tuple(data[:1]), "random"), RULES, layer_rules=layer_rules)


def _weights(program: Program) -> dict[str, QuantWeight | None]:
    return {layer.name: read_weight(program.graph, layer) for layer in program.layers()}


def test_pass_takes_the_layers_that_fit_and_says_why_not_the_others() -> None:
    program = _program()
    result = SMALL.run(program)
    left = reasons(result)
    assert set(left) == {"after_odd", "tiny", "wide"}
    assert left["after_odd"] == "its 30 inputs do not divide into in_group_size=4"
    assert "bits a weight, more than 8-bit weights" in left["tiny"]
    assert "bits a weight, more than 8-bit weights" in left["wide"]
    weights = _weights(program)
    assert {name for name, weight in weights.items() if isinstance(weight, CodebookWeight)} == {
        "conv",
        "grouped",
        "odd",
    }
    assert {name: weight.bits for name, weight in weights.items() if isinstance(weight, AffineWeight)} == {
        "table": 8,
        "head": 8,
    }
    grouped = weights["grouped"]
    assert grouped is not None
    assert grouped.shape == (64, 16 * 3)


def test_graph_computes_with_the_dequantized_matrices() -> None:
    program = _program()
    SMALL.run(program)
    net = seeded(Net)
    for name, weight in _weights(program).items():
        if weight is not None:
            original = net.get_parameter(f"{name}.weight")
            original.data = weight.dequantize().view(original.shape)
    batch = _tokens()[0]
    expected = net(batch["tokens"])
    program.graph.recompile()
    (actual,) = run_graph(program.graph, [batch])[0]
    assert torch.allclose(actual, expected, atol=float(expected.detach().abs().max()) * 1e-5)


def test_head_gets_codebooks_when_named_and_layers_their_own_options() -> None:
    rules = (LayerRule("head", options={"num_codebooks": 1}), LayerRule("conv", options={"codebook_bits": 3}))
    program = _program(rules)
    SMALL.run(program)
    weights = _weights(program)
    head, conv = weights["head"], weights["conv"]
    assert isinstance(head, CodebookWeight)
    assert head.codes.shape[2] == 1
    assert isinstance(conv, CodebookWeight)
    assert conv.codebook_bits == 3


def test_tables_get_codebooks_when_asked() -> None:
    program = _program()
    floats = {layer.name: weight_of(program.graph, layer) for layer in program.layers()}
    dataclasses.replace(SMALL, embedding_codebooks=True).run(program)
    table = _weights(program)["table"]
    assert isinstance(table, CodebookWeight)
    assert _error(floats["table"], torch.eye(16), table) < 0.2
    program = _program()
    result = dataclasses.replace(SMALL, embedding_codebooks=True, in_group_size=3).run(program)
    assert reasons(result)["table"] == "its 16 inputs do not divide into in_group_size=3"
    program = _program()
    assert "table" in reasons(dataclasses.replace(SMALL, embeddings=0).run(program))


def test_an_error_names_the_layer() -> None:
    program = _program()
    layer = next(layer for layer in program.layers() if layer.name == "conv")
    weight_of(program.graph, layer).data[0] = float("nan")
    with pytest.raises(PassError, match="conv: its weight is not finite"):
        SMALL.run(program)


def test_pass_is_in_the_table() -> None:
    assert PASSES["aq"] is AQ
