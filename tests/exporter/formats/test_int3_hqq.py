"""3-bit words: where HQQ's layout puts every code, and the hqq package reads ours and we read its."""

import pytest
import torch
from torch import Tensor

from exporter.formats import FORMATS
from exporter.formats.int3_hqq import grouped_shape, pack_codes, unpack_codes
from passes.weights import AffineWeight

SHAPES = [(1, 1), (3, 5), (9, 4), (10, 4), (11, 4), (64, 48), (97, 3), (640, 64)]


def _codes(rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(8, (rows, columns), generator=generator).to(torch.uint8)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_a_word_holds_the_same_row_of_ten_slabs(rows: int, columns: int) -> None:
    codes = _codes(rows, columns)
    packed = pack_codes(codes)
    step = -(-rows // 10)
    assert packed.shape == (step, columns)
    assert packed.dtype == torch.int32
    for r in range(step):
        for c in range(min(columns, 3)):
            slabs = [int(codes[k * step + r, c]) if k * step + r < rows else 0 for k in range(10)]
            assert int(packed[r, c]) == int("".join(f"{code:03b}" for code in slabs), 2)
    assert torch.equal(unpack_codes(packed, rows), codes)


def test_groups_are_the_rows_of_what_is_packed() -> None:
    codes = _codes(20, 12)
    for axis, group_size, shape in (
        (1, 4, (60, 4)),
        (0, 4, (60, 4)),
        (0, 5, (20, 12)),
        (1, -1, (20, 12)),
        (1, 5, (20, 12)),
    ):
        assert grouped_shape((20, 12), group_size) == shape
        scales = (20 // group_size, 12) if axis == 0 else (20, {4: 3, 5: 3, -1: 1}[group_size])
        weight = AffineWeight(codes, torch.ones(scales), torch.zeros(scales), 3, group_size, axis)
        stored = FORMATS["int3_hqq"].pack(weight).tensors["codes"]
        assert torch.equal(stored, pack_codes(codes.reshape(shape)))


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_hqq_package_reads_ours_and_we_read_its(rows: int, columns: int) -> None:
    bitpack = pytest.importorskip("hqq.core.bitpack").BitPack
    codes = _codes(rows, columns)
    theirs = bitpack.pack_3bit_32(codes)
    ours = pack_codes(codes)
    assert theirs.dtype == ours.dtype
    assert torch.equal(theirs, ours)
    assert torch.equal(bitpack.unpack_3bit_32(ours)[:rows].to(torch.uint8), codes)
    assert torch.equal(unpack_codes(theirs, rows), codes)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_layer_quantized_by_the_hqq_package(axis: int) -> None:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed, meta = quantizer.quantize(
        weight, nbits=3, group_size=16, axis=axis, compute_dtype=torch.float32, device="cpu"
    )
    rows = 16 if axis == 0 else 48 * 128 // 16
    codes = unpack_codes(packed, rows).view(48, 128)
    shape = (48, 8) if axis == 1 else (3, 128)
    scale, zero = (meta[key].float().view(shape) for key in ("scale", "zero"))
    ours = AffineWeight(codes, scale, zero, 3, 16, axis)
    if axis == 1:  # along the outputs it is our own order of rows, which its unpacking reads
        assert torch.equal(FORMATS["int3_hqq"].pack(ours).tensors["codes"], packed)
    # both compute (code - zero) scale in float32, the same operations in the same order
    assert torch.equal(ours.dequantize(), quantizer.dequantize(packed, meta))
