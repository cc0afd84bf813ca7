"""The contract of every stored weight format: exact round trip, nothing changed, bytes counted, damage refused."""

import dataclasses
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exporter.formats import FORMATS, choose_format, int4_group, int8_channel
from exporter.formats.base import Packed, WeightFormat
from passes.weights import AffineWeight, code_dtype, code_range, group_columns

WIDTHS = {"int4_group": (2, 3, 4), "int8_channel": (5, 6, 7, 8)}
CODE_BYTES = {"int4_group": 2, "int8_channel": 1}
"""Codes in a byte."""


def _weight(
    rows: int,
    columns: int,
    bits: int,
    group_size: int,
    symmetric: bool,
    *,
    fill: str = "random",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AffineWeight:
    """A weight of random codes, or of the smallest or largest ones."""
    generator = torch.Generator().manual_seed(seed)
    low, high = code_range(bits, symmetric)
    bounds = {"random": (low, high), "min": (low, low), "max": (high, high)}[fill]
    codes = torch.randint(bounds[0], bounds[1] + 1, (rows, columns), generator=generator)
    scales = (1 if group_size == 0 else rows, -(-columns // group_columns(columns, group_size)))
    scale = (torch.rand(scales, generator=generator) + 0.01).to(dtype)
    zero_point = torch.randint(bounds[0], bounds[1] + 1, scales, generator=generator).to(dtype)
    return AffineWeight(codes.to(code_dtype(symmetric)), scale, None if symmetric else zero_point, bits, group_size)


def _tensors(weight: AffineWeight) -> list[Tensor]:
    return [tensor for tensor in (weight.codes, weight.scale, weight.zero_point) if tensor is not None]


def _assert_same(actual: AffineWeight, expected: AffineWeight) -> None:
    assert (actual.bits, actual.group_size) == (expected.bits, expected.group_size)
    assert (actual.zero_point is None) == (expected.zero_point is None)
    for ours, theirs in zip(_tensors(actual), _tensors(expected), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_every_format_is_under_contract() -> None:
    assert set(FORMATS) == set(WIDTHS)
    assert all(form.name == name for name, form in FORMATS.items())


@st.composite
def _weights(draw: st.DrawFn) -> tuple[WeightFormat, AffineWeight]:
    name = draw(st.sampled_from(sorted(WIDTHS)))
    weight = _weight(
        draw(st.integers(1, 9)),
        draw(st.integers(1, 41)),
        draw(st.sampled_from(WIDTHS[name])),
        draw(st.sampled_from((-1, 0, 1, 3, 8, 16, 64))),
        draw(st.booleans()),
        fill=draw(st.sampled_from(("random", "min", "max"))),
        dtype=draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))),
        seed=draw(st.integers(0, 2**16)),
    )
    return FORMATS[name], weight


@settings(max_examples=300, deadline=None, derandomize=True)
@given(_weights())
def test_round_trip(case: tuple[WeightFormat, AffineWeight]) -> None:
    form, weight = case
    before = [tensor.clone() for tensor in _tensors(weight)]
    assert form.accepts(weight) == ""
    assert choose_format(weight) is form
    packed = form.pack(weight)
    _assert_same(form.unpack(packed), weight)
    for tensor, copy in zip(_tensors(weight), before, strict=True):
        assert torch.equal(tensor, copy)
    rows, columns = weight.codes.shape
    per_byte = CODE_BYTES[form.name]
    zeros = 0 if weight.zero_point is None else math.ceil(weight.zero_point.numel() / per_byte)
    stored = rows * math.ceil(columns / per_byte) + weight.scale.nbytes + zeros
    assert packed.bits_per_weight == 8 * stored / (rows * columns)
    assert packed.meta.shape == (rows, columns)
    assert packed.meta.symmetric == (weight.zero_point is None)


@pytest.mark.parametrize("name", sorted(WIDTHS))
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_that_is_a_view_round_trips(name: str, symmetric: bool) -> None:
    weight = _weight(6, 5, WIDTHS[name][-1], -1, symmetric)
    turned = dataclasses.replace(weight, codes=weight.codes.t().contiguous().t())
    assert not turned.codes.is_contiguous()
    _assert_same(FORMATS[name].unpack(FORMATS[name].pack(turned)), weight)


def test_nibbles_lie_low_first() -> None:
    codes = torch.tensor([[-8, 7, -1], [0, 1, 2]], dtype=torch.int8)
    packed = int4_group.pack_codes(codes)
    assert packed.tolist() == [[0x78, 0x0F], [0x10, 0x02]]
    assert int4_group.pack_codes(torch.tensor([[15, 0, 9]], dtype=torch.uint8)).tolist() == [[0x0F, 0x09]]


def test_bytes_are_shifted_by_their_middle() -> None:
    assert int8_channel.pack_codes(torch.tensor([0, 128, 255], dtype=torch.uint8)).tolist() == [-128, 0, 127]
    assert int8_channel.pack_codes(torch.tensor([-128, 3], dtype=torch.int8)).tolist() == [-128, 3]


def test_bits_of_a_wide_layer() -> None:
    # groups of 128: 32-bit scales add 1/4 bit, 4-bit zero points 1/32
    assert int4_group.Int4Group().pack(_weight(64, 1024, 4, 128, False)).bits_per_weight == 4.28125
    assert int8_channel.Int8Channel().pack(_weight(64, 1024, 8, -1, True)).bits_per_weight == 8.03125


def _contradictions(weight: AffineWeight) -> dict[str, AffineWeight]:
    """{reason: the weight with one thing wrong}; the weight is asymmetric and in groups."""
    scale, zero_point = weight.scale, weight.zero_point
    assert zero_point is not None
    return {
        "not [out, in]": dataclasses.replace(weight, codes=weight.codes[None]),
        "codes are torch.int32": dataclasses.replace(weight, codes=weight.codes.to(torch.int32)),
        "codes are torch.uint8": dataclasses.replace(weight, zero_point=None),
        "outside of": dataclasses.replace(weight, codes=torch.full_like(weight.codes, 2**weight.bits)),
        "scale has shape": dataclasses.replace(weight, scale=scale[:, :1]),
        "not finite": dataclasses.replace(weight, scale=torch.full_like(scale, math.nan)),
        "differ in shape": dataclasses.replace(weight, zero_point=zero_point[:1]),
        "differ in shape or type": dataclasses.replace(weight, zero_point=zero_point.double()),
        "not whole": dataclasses.replace(weight, zero_point=zero_point + 0.5),
        "numbers from 0": dataclasses.replace(weight, zero_point=torch.full_like(zero_point, 2**weight.bits)),
    }


@pytest.mark.parametrize("name", sorted(WIDTHS))
def test_what_contradicts_itself_is_refused(name: str) -> None:
    form = FORMATS[name]
    for reason, weight in _contradictions(_weight(3, 7, WIDTHS[name][0], 3, False)).items():
        assert reason in form.accepts(weight)
        with pytest.raises(ValueError, match=re.escape(reason)):
            form.pack(weight)


@pytest.mark.parametrize("bits", [1, 9])
def test_no_format_for_a_width(bits: int) -> None:
    weight = dataclasses.replace(_weight(2, 4, 4, -1, False), bits=bits)
    with pytest.raises(ValueError, match=f"int4_group: {bits} bits are not 2 to 4; int8_channel: {bits} bits"):
        choose_format(weight)


@pytest.mark.parametrize("name", sorted(WIDTHS))
@pytest.mark.parametrize("role", ["codes", "scale", "zero_point"])
def test_packed_tensors_that_do_not_fit_are_refused(name: str, role: str) -> None:
    form = FORMATS[name]
    packed = form.pack(_weight(4, 11, WIDTHS[name][0], 3, False))
    missing = {key: value for key, value in packed.tensors.items() if key != role}
    with pytest.raises(ValueError, match=r"^stored are .*, not codes, scale, zero_point$"):
        form.unpack(Packed(missing, packed.meta))
    short = {**packed.tensors, role: packed.tensors[role][:-1]}
    with pytest.raises(ValueError, match=r"\], not torch\."):
        form.unpack(Packed(short, packed.meta))


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
