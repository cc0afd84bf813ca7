"""HQQ on a matrix and as a pass: axes, groups, quantized scales, codes by GPTQ, what is refused, and the package."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from exporter.formats import pack_smallest
from passes.base import LayerRule, PassError
from passes.calibration import Calibration
from passes.hqq import HQQ, quantize_values, quantize_weight
from passes.weight_nodes import read_weight
from passes.weights import AffineWeight
from tests.passes.nets import Decoder, Flattening, InvertedResidual, outputs, program_of, seeded
from tools.bench.problem import layer_problem


def _weight(rows: int = 32, columns: int = 48, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.02


def _relative(quantized: AffineWeight, weight: Tensor) -> float:
    return float((quantized.dequantize() - weight).square().sum() / weight.square().sum())


PLAIN = {"quant_zero": False, "quant_scale": False}


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(("axis", "group_size"), [(1, 16), (1, -1), (1, 0), (1, 20), (0, 8), (0, 32)])
@pytest.mark.parametrize("quantized", [True, False])
def test_codes_are_the_nearest_and_all_is_in_shape(bits: int, axis: int, group_size: int, quantized: bool) -> None:
    weight = _weight()
    options = HQQ(bits=bits, group_size=group_size, axis=axis, quant_zero=quantized, quant_scale=quantized)
    found = quantize_weight(weight, options)
    assert (found.bits, found.axis, found.group_size) == (bits, axis, group_size)
    assert found.zero_point is not None
    assert found.zero_point.shape == found.scale.shape
    shape = {16: (32, 3), -1: (32, 1), 0: (1, 1), 20: (32, 3), 8: (4, 48), 32: (1, 48)}[group_size]
    assert tuple(found.scale.shape) == shape
    assert (found.scale_codes is not None) == (found.zero_codes is not None) == quantized
    for change in (-1, 1):  # no other code is nearer, but for the rounding of float32
        moved = (found.codes.int() + change).clamp(0, 2**bits - 1).to(torch.uint8)
        other = AffineWeight(moved, found.scale, found.zero_point, bits, group_size, axis)
        gain = (found.dequantize() - weight).abs() - (other.dequantize() - weight).abs()
        assert float(gain.max()) <= 1e-6 * float(weight.abs().max())
    # of a normal distribution, at most what 2^bits uniform levels over 4 deviations leave, twice over for groups' ends
    assert _relative(found, weight) < {1: 0.5, 2: 0.2, 3: 0.06, 4: 0.02, 8: 1e-4}[bits]


def test_axis_0_groups_the_columns_of_the_reshaped_matrix() -> None:
    weight = _weight(8, 6)
    found = quantize_weight(weight, HQQ(bits=3, group_size=4, axis=0, **PLAIN))
    turned = quantize_weight(weight.reshape(4, -1).t().contiguous(), HQQ(bits=3, group_size=-1, **PLAIN))
    assert torch.equal(found.scale.flatten(), turned.scale.flatten())
    assert torch.equal(found.codes.reshape(4, -1).t(), turned.codes)


def _half_quadratic(weight: Tensor, bits: int, axis: int) -> Tensor:
    """`weight` through the solver of the HQQ paper, its parameters, groups of 64: |r|^0.7 split by a shrinkage.

    The scale is that of the range. It stops where the mean error rises, as the hqq package does (0.2.8, whose weights
    these are).
    """
    groups = weight.reshape(-1, 64) if axis == 1 else weight.reshape(64, -1).t()
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    per_step = (2**bits - 1) / (high - low)
    zero, beta, least = -low * per_step, 10.0, math.inf
    for _ in range(20):
        codes = (groups * per_step + zero).round().clamp(0, 2**bits - 1)
        residuals = groups - (codes - zero) / per_step
        shrunk = residuals.sign() * (residuals.abs() - residuals.abs() ** (0.7 - 1) / beta).clamp_min(0)
        zero = (codes - (groups - shrunk) * per_step).mean(1, keepdim=True)
        error, beta = float(residuals.abs().mean()), 1.01 * beta
        if error >= least:
            break
        least = error
    codes = (groups * per_step + zero).round().clamp(0, 2**bits - 1)
    dequantized: Tensor = (codes - zero) / per_step
    return (dequantized if axis == 1 else dequantized.t()).reshape(weight.shape)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("bits", "bound"), [(1, 0.6), (2, 0.6), (3, 0.65), (4, 0.65), (8, 0.75)])
def test_better_by_a_quarter_at_the_bits_of_the_paper(bits: int, bound: float, axis: int) -> None:
    """It has a scale and a zero point of 16 bits for 64 weights; two of 7 bits for 32 take no more."""
    problem = layer_problem(512)
    theirs = problem.error(_half_quadratic(problem.weight, bits, axis))
    ours = quantize_weight(problem.weight, HQQ(bits=bits, group_size=32, meta_bits=7, axis=axis))
    packed = 3.2 if bits == 3 else bits  # ten codes of 3 bits in 32
    assert pack_smallest(ours)[1].bits_per_weight <= packed + 2 * 16 / 64
    assert problem.error(ours.dequantize()) < bound * theirs


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("bits", "bound"), [(1, 0.7), (2, 0.75), (3, 0.87), (4, 0.9), (8, 1.0)])
def test_better_with_the_same_groups(bits: int, bound: float, axis: int) -> None:
    """By the weights themselves: the layer's error sees a few inputs most, and moves by some percent by chance.

    At 4 bits the best levels that an exhaustive search finds leave .89 of the error.
    """
    weight = layer_problem(512).weight
    theirs = (_half_quadratic(weight, bits, axis) - weight).square().sum()
    ours = quantize_weight(weight, HQQ(bits=bits, axis=axis))
    assert float((ours.dequantize() - weight).square().sum()) < bound * float(theirs)


def test_quantized_scales_cost_next_to_nothing() -> None:
    problem = layer_problem(256)
    plain = quantize_weight(problem.weight, HQQ(bits=3, **PLAIN))
    stored = quantize_weight(problem.weight, HQQ(bits=3))
    assert _relative(stored, problem.weight) < 1.01 * _relative(plain, problem.weight)
    assert stored.bits_per_weight < plain.bits_per_weight - 0.2


def test_scales_and_zero_points_have_sixteen_bits_where_these_do() -> None:
    plain = quantize_weight(_weight(), HQQ(bits=3, group_size=16, **PLAIN))
    assert plain.zero_point is not None
    for values in (plain.scale, plain.zero_point):
        assert values.dtype == torch.float32
        assert torch.equal(values.half().float(), values)
    tiny = quantize_weight(_weight() * 1e-6, HQQ(bits=3, group_size=16, **PLAIN))
    assert _relative(tiny, _weight() * 1e-6) < 0.06  # where 16 bits would round the scales to nothing


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    weight = _weight().to(dtype)
    for options in (HQQ(bits=4, group_size=16), HQQ(bits=4, group_size=16, **PLAIN)):
        found = quantize_weight(weight, options)
        assert found.scale.dtype == dtype
        assert found.dequantize().dtype == dtype
        # 4 bits leave 0.01; bfloat16 rounds products to 2^-9 of themselves, (2^-9)^2 is nothing beside that, but its
        # zero points to a sixteenth of a step
        assert _relative(found, weight.float()) < 0.02


def test_values_of_groups() -> None:
    values = torch.rand(3, 70) + 0.01
    found = quantize_values(values, 8, 64)
    assert found.shape == (1, 210)
    assert found.scale.shape == (1, 4)
    # half of one of 255 steps of a range of at most 1
    assert float((found.dequantize().view(3, 70) - values).abs().max()) <= 0.5 / 255 * (1 + 1e-3)
    whole = quantize_values(values, 8, 0)
    assert (whole.group_size, tuple(whole.scale.shape)) == (0, (1, 1))
    for value in (0.0, 0.25, -3.0):
        constant = torch.full((2, 5), value)
        assert torch.equal(quantize_values(constant, 8, 4).dequantize().view(2, 5), constant)


@pytest.mark.parametrize(("axis", "group_size"), [(1, 64), (1, 50), (1, -1), (0, 32)])
@pytest.mark.parametrize("bits", [1, 3])
def test_codes_by_gptq_on_the_same_levels(axis: int, group_size: int, bits: int) -> None:
    problem = layer_problem(128)
    options = HQQ(bits=bits, group_size=group_size, axis=axis)
    rounded = quantize_weight(problem.weight, options)
    found = quantize_weight(problem.weight, options, problem.hessian)
    assert torch.equal(found.scale, rounded.scale)
    assert found.zero_point is not None
    assert rounded.zero_point is not None
    assert torch.equal(found.zero_point, rounded.zero_point)
    assert problem.error(found.dequantize()) < 0.5 * problem.error(rounded.dequantize())


@pytest.mark.parametrize("axis", [0, 1])
def test_groups_with_nothing_in_them(axis: int) -> None:
    weight = _weight()
    groups = weight.view(32, 3, 16) if axis == 1 else weight.view(8, 4, 48).transpose(0, 1)
    for index, value in enumerate((0.0, 0.01, -0.01)):
        if axis == 1:
            groups[5, index] = value
        else:
            groups[0, :, index] = value
    group_size = 16 if axis == 1 else 8
    plain = quantize_weight(weight, HQQ(bits=3, group_size=group_size, axis=axis, **PLAIN))
    assert bool((plain.scale > 0).all())
    assert not plain.dequantize()[weight == 0].any()
    for value in (0.01, -0.01):  # a scale of 16 bits
        met = plain.dequantize()[weight == value]
        assert len(met) == group_size
        torch.testing.assert_close(met, torch.full_like(met, value), rtol=2.0**-11, atol=0)
    stored = quantize_weight(weight, HQQ(bits=3, group_size=group_size, axis=axis))
    # zero points lie in a range of at most 21 steps, and are off by half of a 255th of it
    assert float(stored.dequantize()[weight == 0].abs().max()) <= 0.5 * 21 / 255 * float(stored.scale.max()) * 1.001
    assert _relative(stored, weight) < 0.06


def test_all_zeros_stay_zeros() -> None:
    for options in (HQQ(group_size=8), HQQ(group_size=8, **PLAIN), HQQ(group_size=4, axis=0)):
        assert not quantize_weight(torch.zeros(8, 16), options).dequantize().any()


def test_a_group_far_from_zero_does_not_spoil_the_others() -> None:
    weight = _weight(16, 64)
    clean = _relative(quantize_weight(weight[1:], HQQ(bits=4, group_size=16)), weight[1:])
    weight[0, :16] = 5 + 0.001 * torch.arange(16)
    found = quantize_weight(weight, HQQ(bits=4, group_size=16, quant_scale=False)).dequantize()
    others = float((found[1:] - weight[1:]).square().sum() / weight[1:].square().sum())
    assert others < 1.2 * clean
    assert float((found[0, :16] - weight[0, :16]).abs().max()) < 5.015 / 30 * 0.51  # half of a step of 1 / 30 of it


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(value: float) -> None:
    weight = _weight()
    weight[3, 4] = value
    with pytest.raises(PassError, match="its weight is not finite"):
        quantize_weight(weight, HQQ())


def test_groups_of_outputs_that_do_not_divide_are_refused() -> None:
    with pytest.raises(PassError, match="its 32 outputs do not fall into groups of 12"):
        quantize_weight(_weight(), HQQ(axis=0, group_size=12))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bits": 5}, "bits=5 is not possible"),
        ({"axis": 2}, "axis=2 is not possible"),
        ({"meta_bits": 3}, "meta_bits=3 is not possible"),
        ({"group_size": -2}, "group_size=-2 is no size of groups along axis 1"),
        ({"group_size": -1, "axis": 0}, "group_size=-1 is no size of groups along axis 0"),
        ({"lp_norm": -1.0}, "lp_norm=-1.0 is no norm"),
        ({"lp_norm": math.nan}, "lp_norm=nan is no norm"),
        ({"meta_group_size": -1}, "meta_group_size=-1 is negative"),
        ({"embeddings": 3}, "embeddings=3 is no width"),
    ],
)
def test_options_that_are_refused(options: dict[str, int], reason: str) -> None:
    with pytest.raises(PassError, match=reason):
        HQQ(**options)  # type: ignore[arg-type]  # fields by name


# ---- the pass -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "shape"), [(InvertedResidual, (2, 3, 8, 8)), (Flattening, (2, 1, 10, 10)), (Decoder, (2, 4, 8, 8))]
)
@pytest.mark.parametrize("hessian", [False, True])
def test_networks_run_on_what_is_read_back(net: type, shape: tuple[int, ...], hessian: bool) -> None:
    program = program_of(seeded(net), {"x": torch.zeros(shape)})
    data = program.calibration
    if not hessian:
        program.calibration = Calibration((), (), "none")
    options = HQQ(bits=4, group_size=8, hessian=hessian)
    options.requires(program)
    result = options.run(program)
    assert not result.skipped
    widths = {}
    for layer in program.layers():
        weight = read_weight(program.graph, layer)
        assert isinstance(weight, AffineWeight)
        assert weight.scale_codes is not None
        widths[layer.name] = (weight.bits, weight.group_size)
    *inner, head = widths.values()
    assert head == (8, -1)
    assert {bits for bits, _ in inner} == {4}
    program.calibration = data
    expected = torch.cat([program.reference(batch["x"])[0] for batch in data.batches]).detach()
    actual = outputs(program.graph, program)
    # 4 bits leave a relative amplitude of about 0.1 in each of five layers, here as if all errors added up
    assert float((actual - expected).norm() / expected.norm()) < 5 * 0.1


def test_a_recipe_sets_what_one_layer_gets() -> None:
    rules = (LayerRule("classifier", options={"bits": 2, "group_size": 4}), LayerRule("expand", options={"axis": 0}))
    program = program_of(seeded(InvertedResidual), {"x": torch.zeros(2, 3, 8, 8)}, layer_rules=rules)
    HQQ(bits=3, group_size=8).run(program)
    found = {layer.name: read_weight(program.graph, layer) for layer in program.layers()}
    classifier, expand = found["classifier"], found["expand"]
    assert isinstance(classifier, AffineWeight)
    assert isinstance(expand, AffineWeight)
    assert (classifier.bits, classifier.group_size) == (2, 4)
    assert (expand.bits, expand.axis, tuple(expand.scale.shape)) == (3, 0, (3, 8))


def test_a_layer_that_does_not_divide_is_named() -> None:
    program = program_of(seeded(InvertedResidual), {"x": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(PassError, match="its 8 outputs do not fall into groups of 16") as caught:
        HQQ(bits=3, group_size=16, axis=0).run(program)
    assert caught.value.node == "stem"


def test_what_the_target_must_be_able_to_do() -> None:
    program = program_of(seeded(InvertedResidual), {"x": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(PassError, match="target test cannot run hqq with bits=1") as caught:
        HQQ(bits=1).requires(program)
    assert caught.value.fix == "the nearest it can is hqq:bits=2"
    rules = program.rules
    program.rules = dataclasses.replace(rules, weight_zero_point=False)
    with pytest.raises(PassError, match="has no weights with zero points"):
        HQQ().requires(program)
    program.rules = dataclasses.replace(rules, conv_groups=False, conv_bits=frozenset({4}))
    HQQ(bits=4, group_size=4).run(program)
    expand = next(layer for layer in program.layers() if layer.name == "expand")
    weight = read_weight(program.graph, expand)
    assert isinstance(weight, AffineWeight)
    assert weight.group_size == -1


def test_codes_by_gptq_need_data() -> None:
    program = program_of(seeded(InvertedResidual), {"x": torch.zeros(2, 3, 8, 8)})
    program.calibration = Calibration((), (), "none")
    with pytest.raises(PassError, match="hessian=true needs calibration data"):
        HQQ(hessian=True).run(program)


# ---- against the package --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_package_leaves_what_its_paper_leaves(bits: int, axis: int) -> None:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    problem = layer_problem(256)
    packed, meta = quantizer.quantize(
        problem.weight, nbits=bits, group_size=64, axis=axis, compute_dtype=torch.float32, device="cpu"
    )
    theirs = problem.error(quantizer.dequantize(packed, meta))
    # a code at the edge of two goes either way by the rounding of float32
    assert theirs == pytest.approx(problem.error(_half_quadratic(problem.weight, bits, axis)), rel=1e-2)


def test_the_package_dequantizes_ours() -> None:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    from exporter.formats.int3_hqq import pack_codes

    found = quantize_weight(_weight(), HQQ(bits=3, group_size=16, **PLAIN))
    assert found.zero_point is not None
    meta = {
        "nbits": 3,
        "group_size": 16,
        "shape": torch.Size((32, 48)),
        "scale": found.scale.reshape(-1, 1),
        "zero": found.zero_point.reshape(-1, 1),
        "axis": 1,
        "packing": "3bit_32",
        "view_as_float": False,
        "compute_dtype": torch.float32,
    }
    # (code - zero) scale in float32, the same operations in the same order
    assert torch.equal(quantizer.dequantize(pack_codes(found.codes.reshape(-1, 16)), meta), found.dequantize())
