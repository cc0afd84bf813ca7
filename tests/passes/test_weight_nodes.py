"""Quantized weights on the graph: what is written is read back, and is what the layer multiplies by."""

import dataclasses

import pytest
import torch
from torch import Tensor, fx, nn

from passes.graph import find_layers
from passes.weight_nodes import is_quantized, read_weight, write_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight, from_value_lines, value_lines


def _graph() -> fx.GraphModule:
    torch.manual_seed(0)
    program = torch.export.export(nn.Sequential(nn.Linear(8, 6)), (torch.randn(2, 8),))
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    return module


def _uint8(*shape: int, most: int = 7) -> Tensor:
    return torch.randint(0, most + 1, shape, dtype=torch.uint8)


def _meta(count: int) -> AffineWeight:
    return AffineWeight(_uint8(1, count, most=255), torch.rand(1, 2), torch.rand(1, 2), 8, -(-count // 2))


def _affine(axis: int, quantized: bool) -> AffineWeight:
    shape = (6, 2) if axis == 1 else (3, 8)
    group_size = 4 if axis == 1 else 2
    scale_codes, zero_codes = (_meta(shape[0] * shape[1]), _meta(shape[0] * shape[1])) if quantized else (None, None)
    scale = torch.rand(shape) if scale_codes is None else scale_codes.dequantize().view(shape)
    zero = torch.rand(shape) if zero_codes is None else zero_codes.dequantize().view(shape)
    return AffineWeight(_uint8(6, 8), scale, zero, 3, group_size, axis, scale_codes, zero_codes)


def _codebook(columns: int) -> CodebookWeight:
    return CodebookWeight(_uint8(3, 2, 2, most=3), torch.randn(2, 4, 2, 4), torch.rand(3, columns), scale_bits=2)


def _shared() -> CodebookWeight:
    """A scale for all three blocks of outputs; values of a codebook's halves from tables."""
    values = torch.rand(2 * 2 * 8, 1).expand(-1, 2)  # 2 codebooks, 2 runs, 8 places in a block; 2 entries each
    books = from_value_lines(values, (2, 4, 2, 4), 2)
    return CodebookWeight(
        _uint8(3, 2, 2, most=3), books, torch.rand(1, 2), codebook_value_bits=1, codebook_value_groups=2
    )


CASES: dict[str, QuantWeight] = {
    "groups of inputs": _affine(1, False),
    "groups of outputs": _affine(0, False),
    "quantized scales and zero points": _affine(1, True),
    "groups of outputs, quantized scales": _affine(0, True),
    "codebooks": _codebook(1),
    "codebooks with a scale for each block": _codebook(2),
    "codebooks with shared scales and grouped tables": _shared(),
}


def _same(one: QuantWeight | None, other: QuantWeight | None) -> bool:
    if one is None or other is None or type(one) is not type(other):
        return one is other
    for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True):
        if isinstance(mine, AffineWeight):
            same = _same(mine, theirs)
        else:
            same = torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs
        if not same:
            return False
    return True


@pytest.mark.parametrize("weight", CASES.values(), ids=CASES)
def test_what_is_written_is_read_back(weight: QuantWeight) -> None:
    graph = _graph()
    layer = find_layers(graph)[0]
    assert not is_quantized(layer)
    write_weight(graph, layer, weight)
    graph.recompile()
    layer = find_layers(graph)[0]
    assert is_quantized(layer)
    assert _same(read_weight(graph, layer), weight)
    x = torch.randn(2, 8)
    bias = dict(graph.named_parameters())["0.bias"]
    assert torch.equal(graph(x), nn.functional.linear(x, weight.dequantize(), bias))


def test_a_float_weight_is_none() -> None:
    graph = _graph()
    assert read_weight(graph, find_layers(graph)[0]) is None


@pytest.mark.parametrize("axis", [0, 1])
def test_affine_groups_by_hand(axis: int) -> None:
    weight = _affine(axis, False)
    assert weight.zero_point is not None
    for row in range(6):
        for column in range(8):
            group = (row, column // 4) if axis == 1 else (row % 3, column)
            expected = (weight.codes[row, column].float() - weight.zero_point[group]) * weight.scale[group]
            assert weight.dequantize()[row, column] == expected


@pytest.mark.parametrize("columns", [1, 2])
def test_codebooks_by_hand(columns: int) -> None:
    weight = _codebook(columns)
    assert weight.shape == (6, 8)
    for row in range(6):
        for column in range(8):
            a, r, b, c = row // 2, row % 2, column // 4, column % 4
            entries = [weight.codebooks[m, int(weight.codes[a, b, m]), r, c] for m in range(2)]
            scale = weight.scales[a, b if columns > 1 else 0]
            # One rounding per addition and multiplication, in either order.
            assert torch.isclose(weight.dequantize()[row, column], scale * (entries[0] + entries[1]), rtol=1e-6)


def test_blocks_share_scales_and_values_tables() -> None:
    weight = _shared()
    single = dataclasses.replace(weight, scales=weight.scales[[0, 0, 0]])
    assert torch.equal(weight.block_scales, single.scales)
    assert torch.equal(weight.dequantize(), single.dequantize())
    lines = value_lines(weight.codebooks, 2)
    assert all(len(line.unique()) == 1 for line in lines)
    assert torch.equal(lines[9], weight.codebooks[0, 2:, 0, 1])  # the second run's place (0, 1)
    # 12 codes of 2 bits, 64 values of 1 bit into 32 tables of 2, 2 scales
    assert weight.bits_per_weight == (12 * 2 + 64 + 32 * 2 * 16 + 2 * 16) / 48


def test_nominal_bits() -> None:
    assert _affine(1, False).bits_per_weight == 3 + 2 * 16 * 12 / 48
    # 12 groups, in 8 bits each and two 16-bit scales and zero points: twice, once for scales and once for zero points.
    assert _affine(1, True).bits_per_weight == pytest.approx(3 + 2 * (12 * 8 + 2 * 2 * 16) / 48)
    codebook = _codebook(2)
    assert codebook.codebook_bits == 2
    # 12 codes of 2 bits, 64 values of 16 bits, 6 scales of 2 bits into 3 tables of 4 values.
    assert codebook.bits_per_weight == (12 * 2 + 64 * 16 + 6 * 2 + 3 * 4 * 16) / 48
