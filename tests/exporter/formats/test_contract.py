"""The contract of every stored weight format: exact round trip, nothing changed, bytes counted, damage refused."""

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.formats import FORMATS, pack_smallest
from exporter.formats.base import Packed, WeightFormat
from exporter.formats.bit_stream import pack_bits, packed_width, unpack_bits
from passes.weights import (
    AffineWeight,
    CodebookWeight,
    QuantWeight,
    code_dtype,
    code_range,
    from_value_lines,
    group_columns,
)

WIDTHS = {"int2_group": (1, 2), "int3_hqq": (3,), "int4_group": (3, 4), "int8_channel": (5, 6, 7, 8)}
"""Formats of affine weights."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _quantized_values(count: int, symmetric: bool, dtype: torch.dtype, bits: int, seed: int) -> AffineWeight:
    """Scales or zero points that are quantized themselves."""
    return dataclasses.replace(_weight(1, count, bits, 5, symmetric, dtype=dtype, seed=seed, floats=True))


def _weight(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    axis: int = 1,
    fill: str = "random",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    floats: bool = False,
    halves: bool = False,
    quantized: int = 0,
) -> AffineWeight:
    """A weight of random codes, or of the smallest or largest ones.

    floats      its zero points are no whole numbers
    halves      its values are numbers of 16 bits, in `dtype`
    quantized   its scales and zero points are codes of so many bits
    """
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(bits, symmetric)
    bounds = {"random": (low, high), "min": (low, low), "max": (high, high)}[fill]
    codes = torch.randint(bounds[0], bounds[1] + 1, (rows, columns), generator=generator)
    if axis == 0:
        shape = (rows // group_size, columns)
    else:
        shape = (1 if group_size == 0 else rows, -(-columns // group_columns(columns, group_size)))
    scale = torch.rand(shape, generator=generator) + 0.01
    zero_point = torch.randint(bounds[0], bounds[1] + 1, shape, generator=generator).float()
    if floats:
        zero_point += torch.rand(shape, generator=generator) - 0.5
    if halves:
        scale, zero_point = scale.half(), zero_point.half()
    scale, zero_point = scale.to(dtype), zero_point.to(dtype)
    scale_codes = zero_codes = None
    if quantized:
        scale_codes = _quantized_values(scale.numel(), False, dtype, quantized, seed)
        zero_codes = None if symmetric else _quantized_values(scale.numel(), seed % 2 == 0, dtype, quantized, seed + 1)
        scale = scale_codes.dequantize().view(shape)
        zero_point = zero_point if zero_codes is None else zero_codes.dequantize().view(shape)
    return AffineWeight(
        codes.to(code_dtype(symmetric)),
        scale,
        None if symmetric else zero_point,
        bits,
        group_size,
        axis,
        scale_codes,
        zero_codes,
    )


def _codebooks(
    blocks: tuple[int, int],
    block: tuple[int, int],
    count: int,
    bits: int,
    *,
    scale_rows: int = 0,
    scale_columns: int = 1,
    scale_bits: int = 0,
    value_bits: int = 0,
    value_groups: int = 0,
    dtype: torch.dtype = torch.float32,
    halves: bool = False,
    seed: int = 0,
) -> CodebookWeight:
    """A weight of random codes and codebooks; scale_rows 0: as many as rows of blocks."""
    generator = torch.Generator().manual_seed(seed)

    def values(rows: int, columns: int, table_bits: int) -> Tensor:
        distinct = torch.randn(rows, 2**table_bits if table_bits else columns, generator=generator)
        distinct = (distinct.half() if halves else distinct).to(dtype)
        if not table_bits:
            return distinct
        return distinct.gather(1, torch.randint(2**table_bits, (rows, columns), generator=generator))

    codes = torch.randint(2**bits, (*blocks, count), generator=generator)
    shape = (count, 2**bits, *block)
    lines = count * (value_groups * block[0] * block[1] or 1)
    codebooks = from_value_lines(values(lines, math.prod(shape) // lines, value_bits), shape, value_groups)
    return CodebookWeight(
        codes.to(torch.uint8 if bits <= 8 else torch.int32),
        codebooks,
        values(scale_rows or blocks[0], scale_columns, scale_bits),
        scale_bits,
        value_bits,
        value_groups,
    )


def _tensors(weight: QuantWeight) -> list[Tensor]:
    found: list[Tensor] = []
    for value in vars(weight).values():
        found += _tensors(value) if isinstance(value, AffineWeight) else [value] * isinstance(value, Tensor)
    return found


def _assert_same(actual: QuantWeight, expected: QuantWeight) -> None:
    assert type(actual) is type(expected)
    for (name, ours), theirs in zip(vars(actual).items(), vars(expected).values(), strict=True):
        if isinstance(theirs, AffineWeight):
            _assert_same(ours, theirs)
        elif isinstance(theirs, Tensor):
            assert ours.dtype == theirs.dtype, name
            floats = ours.dtype == torch.float8_e4m3fn  # torch compares none of these
            assert (
                torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) if floats else torch.equal(ours, theirs)
            )
        else:
            assert ours == theirs, name


def _through_json(form: WeightFormat, packed: Packed) -> Packed:
    """The packed weight with its metadata as a file gives it back."""
    entry: Mapping[str, Any] = json.loads(json.dumps(dataclasses.asdict(packed.meta)))
    return Packed(packed.tensors, form.read_meta(entry))


def test_every_format_is_under_contract() -> None:
    assert set(FORMATS) == {*WIDTHS, "aq_codebook", "fp8_channel"}
    assert all(form.name == name for name, form in FORMATS.items())


@pytest.mark.parametrize("rows", [1, 5])
def test_floats_of_eight_bits_round_trip_and_no_other_format_takes_them(rows: int) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = every[every.float().isfinite()].repeat(rows, 1)
    weight = AffineWeight(codes, torch.rand(rows, 1) + 0.1, None, 8, -1)
    assert [name for name, form in FORMATS.items() if not form.accepts(weight)] == ["fp8_channel"]
    form = FORMATS["fp8_channel"]
    _assert_same(form.unpack(_through_json(form, form.pack(weight))), weight)
    assert form.accepts(dataclasses.replace(weight, bits=4))
    assert form.accepts(dataclasses.replace(weight, codes=every.repeat(rows, 1)))  # which holds NaN
    assert form.accepts(dataclasses.replace(weight, scale=weight.scale * torch.inf))
    assert form.accepts(_weight(6, 5, 8, -1, True))


@st.composite
def _affine_weights(draw: st.DrawFn) -> tuple[WeightFormat, QuantWeight]:
    name = draw(st.sampled_from(sorted(WIDTHS)))
    axis = draw(st.sampled_from((1, 1, 0)))
    group_size = draw(st.sampled_from((-1, 0, 1, 3, 8, 16, 64) if axis else (1, 2, 3, 8)))
    rows = draw(st.integers(1, 24)) if axis else group_size * draw(st.integers(1, 5))
    weight = _weight(
        rows,
        draw(st.integers(1, 41)),
        draw(st.sampled_from(WIDTHS[name])),
        group_size,
        draw(st.booleans()),
        axis=axis,
        fill=draw(st.sampled_from(("random", "min", "max"))),
        dtype=draw(st.sampled_from(FLOATS)),
        seed=draw(st.integers(0, 2**16)),
        floats=draw(st.booleans()),
        halves=draw(st.booleans()),
        quantized=draw(st.sampled_from((0, 0, 8, 5))),
    )
    return FORMATS[name], weight


@st.composite
def _codebook_weights(draw: st.DrawFn) -> tuple[WeightFormat, QuantWeight]:
    scales, shared = ((draw(st.integers(1, 4)), draw(st.integers(1, 4))) for _ in range(2))
    bits = draw(st.integers(1, 12))
    weight = _codebooks(
        (scales[0] * shared[0], scales[1] * shared[1]),
        (draw(st.integers(1, 3)), draw(st.integers(1, 8))),
        draw(st.integers(1, 3)),
        bits,
        scale_rows=scales[0],
        scale_columns=scales[1],
        scale_bits=draw(st.sampled_from((0, 1, 3, 8))),
        value_bits=draw(st.sampled_from((0, 2, 5, 8))),
        value_groups=draw(st.sampled_from((0, 1, 2, 2**bits))),
        dtype=draw(st.sampled_from(FLOATS)),
        halves=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )
    return FORMATS["aq_codebook"], weight


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.one_of(_affine_weights(), _affine_weights(), _codebook_weights()))
def test_round_trip(case: tuple[WeightFormat, QuantWeight]) -> None:
    form, weight = case
    before = [tensor.clone() for tensor in _tensors(weight)]
    assert form.accepts(weight) == ""
    packed = form.pack(weight)
    _assert_same(form.unpack(_through_json(form, packed)), weight)
    for tensor, copy in zip(_tensors(weight), before, strict=True):
        assert torch.equal(tensor, copy)
    smallest, least = pack_smallest(weight)
    assert FORMATS[smallest.name] is smallest
    assert least.bits_per_weight <= packed.bits_per_weight
    _assert_same(smallest.unpack(least), weight)
    rows, columns = weight.shape
    assert packed.bits_per_weight == 8 * sum(tensor.nbytes for tensor in packed.tensors.values()) / (rows * columns)
    for name, other in FORMATS.items():
        if isinstance(weight, CodebookWeight) != (name == "aq_codebook"):
            assert "codebooks" in other.accepts(weight)


@pytest.mark.parametrize("name", sorted(WIDTHS))
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_that_is_a_view_round_trips(name: str, symmetric: bool) -> None:
    weight = _weight(6, 5, WIDTHS[name][-1], -1, symmetric)
    turned = dataclasses.replace(weight, codes=weight.codes.t().contiguous().t())
    assert not turned.codes.is_contiguous()
    _assert_same(FORMATS[name].unpack(FORMATS[name].pack(turned)), weight)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def _size(weight: QuantWeight) -> tuple[str, float]:
    """The format a weight is stored in, and the bits per weight its bytes come to."""
    form, packed = pack_smallest(weight)
    return form.name, packed.bits_per_weight


def test_bits_of_wide_layers() -> None:
    # groups of 128: 32-bit scales add 1/4 bit, 4-bit zero points 1/32; scales of 16 bits half as much
    assert _size(_weight(64, 1024, 4, 128, False)) == ("int4_group", 4.28125)
    assert _size(_weight(64, 1024, 4, 128, False, halves=True)) == ("int4_group", 4.15625)
    assert _size(_weight(64, 1024, 8, -1, True)) == ("int8_channel", 8.03125)
    assert _size(_weight(64, 1024, 2, 128, True, halves=True)) == ("int2_group", 2.125)
    assert _size(_weight(64, 1024, 1, 128, False, halves=True)) == ("int2_group", 1 + (16 + 1) / 128)
    # ten codes in 32 bits; 512 rows are 1280 words of 10 without padding, scales and 3-bit zero points beside them
    assert _size(_weight(80, 1024, 3, 128, False, halves=True)) == ("int3_hqq", 3.2 + (16 + 3) / 128)
    # 16 rows of a layer without groups fill 20: 32 bits for 8 codes, no gain over nibbles
    assert _size(_weight(3, 1024, 3, -1, True))[0] == "int4_group"


def _quantized_in(weight: AffineWeight, group_size: int) -> AffineWeight:
    """The weight with 8-bit scales and zero points, in groups whose own scale and zero point are of 16 bits."""

    def codes() -> AffineWeight:
        return _weight(1, weight.scale.numel(), 8, group_size, False, floats=True, halves=True)

    scale_codes, zero_codes = codes(), codes()
    shape = weight.scale.shape
    scale, zero_point = scale_codes.dequantize().view(shape), zero_codes.dequantize().view(shape)
    return dataclasses.replace(
        weight, scale=scale, zero_point=zero_point, scale_codes=scale_codes, zero_codes=zero_codes
    )


def test_three_bits_with_quantized_scales_take_less_than_three_and_a_half() -> None:
    weight = _quantized_in(_weight(2048, 2048, 3, 64, False), 128)
    words, groups = 4 * 6554 * 64, 2048 * 32  # 65536 rows of 64 codes in slabs of 6554
    stored = words + 2 * (groups + groups // 128 * (2 + 2))
    assert _size(weight) == ("int3_hqq", 8 * stored / 2048**2)
    assert 8 * stored / 2048**2 < 3.5
    along_outputs = _quantized_in(_weight(2048, 2048, 3, 64, False, axis=0), 128)
    assert _size(along_outputs) == ("int3_hqq", 8 * stored / 2048**2)


def test_two_codebooks_take_less_than_two_and_a_tenth() -> None:
    weight = _codebooks((2048, 256), (1, 8), 2, 8, halves=True)
    stored = 2048 * 256 * 2 + 2 * 256 * 8 * 2 + 2048 * 2
    assert _size(weight) == ("aq_codebook", 8 * stored / 2048**2)
    assert 8 * stored / 2048**2 < 2.1
    by_table = _codebooks((16, 64), (1, 8), 2, 6, scale_columns=64, scale_bits=3, value_bits=4)
    stored = 16 * 64 * 2 * 6 // 8 + 2 * (2**4 * 4 + 64 * 8 * 4 // 8) + 16 * (2**3 * 4 + 64 * 3 // 8)
    assert _size(by_table) == ("aq_codebook", 8 * stored / (16 * 512))
    tables = {"scale_bits": 2, "value_bits": 3, "value_groups": 2}
    shared = _codebooks((16, 64), (1, 8), 2, 6, scale_rows=4, scale_columns=16, **tables)
    stored = 16 * 64 * 2 * 6 // 8 + 2 * (2 * 8 * 2**3 * 4 + 64 * 8 * 3 // 8) + 4 * (2**2 * 4 + 16 * 2 // 8)
    assert _size(shared) == ("aq_codebook", 8 * stored / (16 * 512))
    assert shared.bits_per_weight == (8 * stored - 16 * (2 * 2 * 8 * 2**3 + 4 * 2**2)) / (16 * 512)  # tables of 16 bits


# ---- what is refused ------------------------------------------------------------------------------------------------


def _contradictions(weight: AffineWeight) -> dict[str, AffineWeight]:
    """{reason: the weight with one thing wrong}; the weight is asymmetric and in groups."""
    scale, zero_point = weight.scale, weight.zero_point
    assert zero_point is not None
    values = _quantized_values(scale.numel(), False, scale.dtype, 8, 0)
    fewer = dataclasses.replace(values, codes=values.codes[:, 1:], scale=values.scale[:, :1], zero_point=None)
    return {
        "not [out, in]": dataclasses.replace(weight, codes=weight.codes[None]),
        "codes are torch.int32": dataclasses.replace(weight, codes=weight.codes.to(torch.int32)),
        "codes are torch.uint8": dataclasses.replace(weight, zero_point=None),
        "outside of": dataclasses.replace(weight, codes=torch.full_like(weight.codes, 2**weight.bits % 256)),
        "scale has shape": dataclasses.replace(weight, scale=scale[:, :1]),
        "scale is not finite": dataclasses.replace(weight, scale=torch.full_like(scale, math.nan)),
        "differ in shape": dataclasses.replace(weight, zero_point=zero_point[:1]),
        "differ in shape or type": dataclasses.replace(weight, zero_point=zero_point.double()),
        "zero point is not finite": dataclasses.replace(weight, zero_point=torch.full_like(zero_point, math.inf)),
        "axis 2": dataclasses.replace(weight, axis=2),
        "3 outputs do not fall into groups of 2": dataclasses.replace(weight, axis=0, group_size=2),
        "scale has shape [3, 3], not [1, 7]": dataclasses.replace(weight, axis=0),
        "quantized scale: the values are not": dataclasses.replace(weight, scale_codes=values),
        "quantized zero point: the values are not": dataclasses.replace(weight, zero_codes=values),
        "quantized scale: codes are torch.uint8": dataclasses.replace(weight, scale_codes=fewer),
    }


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_what_contradicts_itself_is_refused(name: str) -> None:
    form = FORMATS[name]
    bits = min(WIDTHS[name][0], 7)  # 256 is no code of a byte
    for reason, weight in _contradictions(_weight(3, 7, bits, 3, False)).items():
        assert reason in form.accepts(weight)
        with pytest.raises(ValueError, match=re.escape(reason)):
            form.pack(weight)


def test_codebooks_that_contradict_themselves_are_refused() -> None:
    weight = _codebooks((3, 4), (1, 8), 2, 4, scale_columns=4)
    form = FORMATS["aq_codebook"]
    wrong = {
        "codes have shape [3, 4]": {"codes": weight.codes[..., 0]},
        "codebooks have shape [1, 16, 1, 8], not [2, entries, og, ig]": {"codebooks": weight.codebooks[:1]},
        "codebooks have 1 entries": {"codebooks": weight.codebooks[:, :1]},
        "codes are torch.int32, not torch.uint8": {"codes": weight.codes.int()},
        "codes from 16 to 16 are outside of 0 to 15": {"codes": torch.full_like(weight.codes, 16)},
        "scales have shape [3, 3], which does not divide the [3, 4] blocks": {"scales": weight.scales[:, :3]},
        "scales have shape [2, 4], which does not divide": {"scales": weight.scales[:2]},
        "scales have shape [3, 0], which does not divide": {"scales": weight.scales[:, :0]},
        "16 entries of a codebook do not fall into 3 groups": {"codebook_value_groups": 3},
        "do not fall into -1 groups": {"codebook_value_groups": -1},
        "not of one floating-point type": {"scales": weight.scales.double()},
        "are not finite": {"codebooks": weight.codebooks * math.inf},
        "4 distinct values do not fit the 2 of scale_bits 1": {"scale_bits": 1},
        "128 distinct values do not fit the 64 of codebook_value_bits 6": {"codebook_value_bits": 6},
        "scale_bits 17 is not 0 to 16": {"scale_bits": 17},
    }
    for reason, change in wrong.items():
        broken = dataclasses.replace(weight, **change)  # type: ignore[arg-type]  # fields by name
        assert reason in form.accepts(broken)
        with pytest.raises(ValueError, match=re.escape(reason)):
            form.pack(broken)


@pytest.mark.parametrize("bits", [0, 9])
def test_no_format_for_a_width(bits: int) -> None:
    weight = dataclasses.replace(_weight(2, 4, 4, -1, False), bits=bits)
    with pytest.raises(ValueError, match=f"int4_group: {bits} bits are not 3 to 4; int8_channel: {bits} bits"):
        pack_smallest(weight)


CUT: dict[str, QuantWeight] = {
    **{name: _weight(12, 11, widths[0], 3, False) for name, widths in WIDTHS.items()},
    "int3_hqq along outputs": _weight(12, 11, 3, 6, False, axis=0),
    "int3_hqq quantized": _weight(12, 11, 3, 3, False, quantized=8),
    "int4_group floats": _weight(12, 11, 4, 3, False, floats=True),
    "aq_codebook": _codebooks((6, 5), (2, 4), 2, 8, scale_columns=5),
    "aq_codebook tables": _codebooks((6, 5), (2, 4), 2, 5, scale_columns=5, scale_bits=2, value_bits=3),
    "aq_codebook shared": _codebooks((6, 6), (2, 4), 2, 5, scale_rows=3, scale_columns=2, value_bits=3, value_groups=4),
}


@pytest.mark.parametrize("case", CUT)
def test_tensors_that_are_cut_missing_or_of_another_type_are_refused(case: str) -> None:
    form = FORMATS[case.split()[0]]
    packed = form.pack(CUT[case])
    for role, tensor in packed.tensors.items():
        missing = {key: value for key, value in packed.tensors.items() if key != role}
        with pytest.raises(ValueError, match=r"^stored are .*, not .*codes"):
            form.unpack(Packed(missing, packed.meta))
        for changed in (tensor[:-1], tensor[..., :-1], tensor[None], tensor.to(torch.complex64)):
            with pytest.raises(ValueError, match=r"not|differ"):
                form.unpack(Packed({**packed.tensors, role: changed}, packed.meta))


@pytest.mark.parametrize("case", CUT)
def test_metadata_that_does_not_fit_the_tensors_is_refused(case: str) -> None:
    form = FORMATS[case.split()[0]]
    packed = form.pack(CUT[case])
    rows, columns = packed.meta.shape
    changes: list[dict[str, Any]] = [{"shape": shape} for shape in ((columns, rows), (0, 0), (-rows, -columns))]
    if "quantized" not in case:  # whose values have a type of their own
        changes += [{"dtype": "float3"}]
    if case.startswith("aq_codebook"):
        changes += [{"num_codebooks": 3}, {"entries": 2**17}, {"entries": 3}, {"block": (5, 4)}, {"block": (0, 0)}]
        changes += [{"scale_shape": (6, 2)}, {"scale_shape": (6, 0)}, {"scale_bits": 18}, {"codebook_value_bits": -1}]
        changes += [{"codebook_value_groups": 3}, {"codebook_value_groups": -1}]
    else:
        changes += [{"bits": 9}, {"group_size": 4}, {"symmetric": True}, {"axis": 2}, {"axis": 0, "group_size": 0}]
    for change in changes:
        with pytest.raises(ValueError, match=r"\w"):
            form.unpack(Packed(packed.tensors, dataclasses.replace(packed.meta, **change)))


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_a_zero_point_too_many_is_refused(name: str) -> None:
    packed = FORMATS[name].pack(_weight(4, 11, WIDTHS[name][-1], 3, False))
    symmetric = dataclasses.replace(packed.meta, symmetric=True)
    with pytest.raises(ValueError, match=r"^stored are codes, scale, zero_point, not codes, scale$"):
        FORMATS[name].unpack(Packed(packed.tensors, symmetric))


def test_codes_out_of_range_in_a_file_are_refused() -> None:
    packed = FORMATS["int4_group"].pack(_weight(2, 6, 3, -1, True))
    fours = {**packed.tensors, "codes": torch.full_like(packed.tensors["codes"], 0x44)}
    with pytest.raises(ValueError, match="codes from 4 to 4 are outside of -4 to 3"):
        FORMATS["int4_group"].unpack(Packed(fours, packed.meta))
    packed = FORMATS["int3_hqq"].pack(_weight(20, 6, 3, -1, True))
    high = {**packed.tensors, "codes": packed.tensors["codes"] | (1 << 30)}
    with pytest.raises(ValueError, match="bits above the ten codes"):
        FORMATS["int3_hqq"].unpack(Packed(high, packed.meta))
    packed = FORMATS["aq_codebook"].pack(dataclasses.replace(_three_entries(), codes=torch.ones_like(_THREE_CODES)))
    threes = {**packed.tensors, "codes": torch.full_like(packed.tensors["codes"], 0xFF)}
    with pytest.raises(ValueError, match="codes from 3 to 3 are outside of 0 to 2"):
        FORMATS["aq_codebook"].unpack(Packed(threes, packed.meta))


_THREE_CODES = torch.zeros(2, 4, 1, dtype=torch.uint8)


def _three_entries() -> CodebookWeight:
    return CodebookWeight(_THREE_CODES, torch.ones(1, 3, 1, 2), torch.ones(2, 1))


# ---- how the bits lie -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 17))
def test_codes_follow_each_other_lowest_bit_first(bits: int) -> None:
    for columns in (1, 7, 8, 19):
        codes = torch.randint(2**bits, (3, columns), generator=torch.Generator().manual_seed(columns))
        packed = pack_bits(codes, bits)
        assert packed.shape == (3, packed_width(columns, bits))
        for row, stored in zip(codes.tolist(), packed.tolist(), strict=True):
            number = sum(code << (position * bits) for position, code in enumerate(row))
            assert int.from_bytes(bytes(stored), "little") == number
        unpacked = unpack_bits(packed, columns, bits)
        assert unpacked.dtype == (torch.uint8 if bits <= 8 else torch.int32)
        assert torch.equal(unpacked.long(), codes)


def test_nibbles_lie_low_first() -> None:
    codes = torch.tensor([[-8, 7, -1], [0, 1, 2]], dtype=torch.int8)
    weight = AffineWeight(codes, torch.ones(2, 1), None, 4, -1)
    assert FORMATS["int4_group"].pack(weight).tensors["codes"].tolist() == [[0x78, 0x0F], [0x10, 0x02]]


def test_bytes_are_shifted_by_their_middle() -> None:
    codes = torch.tensor([[0, 128, 255]], dtype=torch.uint8)
    weight = AffineWeight(codes, torch.ones(1, 1), torch.tensor([[3.0]]), 8, -1)
    tensors = FORMATS["int8_channel"].pack(weight).tensors
    assert tensors["codes"].tolist() == [[-128, 0, 127]]
    assert tensors["zero_point"].tolist() == [[-125]]
