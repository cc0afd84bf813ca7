"""Codebooks, 3 bits, zero points between codes, quantized scales, groups along outputs: every form, same values."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.backends.onnx_qdq.decode import ROUNDED_BLOCK
from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.kernels import optimized_kernels
from exporter.lowering.lowered import WeightsAs
from passes.base import Program
from passes.graph import tidy, weight_of
from passes.weight_nodes import write_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight
from tests.exporter.compiled import Compiled, program_of, sqnr
from tests.passes.nets import seeded

pytestmark = pytest.mark.ort

SAME = 95.0
"""dB between two float32 evaluations of one network: sums of up to 256 products carry a relative error of about 2e-6
(114 dB); 20 dB for cancellation."""

Make = Callable[[int, int, torch.Generator], QuantWeight]


def affine(
    bits: int,
    group_size: int,
    *,
    zeros: str = "between",
    axis: int = 1,
    meta: int | None = None,
) -> Make:
    """Random codes; zeros: none, whole or between codes; meta: group size of 8-bit scales and zero points."""

    def make(rows: int, columns: int, generator: torch.Generator) -> AffineWeight:
        size = (rows, columns)
        low = -(2 ** (bits - 1)) if zeros == "none" else 0
        codes = torch.randint(low, low + 2**bits, size, generator=generator)
        codes = codes.to(torch.int8 if zeros == "none" else torch.uint8)
        width = group_size if 0 < group_size < columns else columns
        shape = (rows, -(-columns // width)) if axis == 1 else (rows // group_size, columns)
        scale = torch.rand(shape, generator=generator) * 0.05 + 0.01
        zero = None if zeros == "none" else torch.rand(shape, generator=generator) * (2**bits - 1)
        if zero is not None and zeros == "whole":
            zero = zero.round()
        weight = AffineWeight(codes, scale, zero, bits, group_size, axis)
        return weight if meta is None else with_meta(weight, meta)

    return make


def with_meta(weight: AffineWeight, group_size: int) -> AffineWeight:
    """The weight with scales and zero points of 8 bits, in groups of `group_size` (0: one group)."""
    stored: dict[str, AffineWeight | None] = {}
    values: dict[str, Tensor | None] = {}
    for name, value in (("scale", weight.scale), ("zero", weight.zero_point)):
        stored[name], values[name] = None, None
        if value is None:
            continue
        flat = value.reshape(1, -1)
        size = group_size or flat.shape[1]
        groups = -(-flat.shape[1] // size)
        index = torch.arange(flat.shape[1]) // size
        parts = [flat[:, index == group] for group in range(groups)]
        step = torch.stack([(part.amax() - part.amin()) / 255 + 1e-6 for part in parts])[None]
        zero = torch.stack([-part.amin() / one for part, one in zip(parts, step[0], strict=True)])[None]
        codes = (flat / step[:, index] + zero[:, index]).round().clamp(0, 255).to(torch.uint8)
        quantized_values = AffineWeight(codes, step, zero, 8, group_size or -1)
        stored[name], values[name] = quantized_values, quantized_values.dequantize().view_as(value)
    return dataclasses.replace(
        weight,
        scale=values["scale"],
        zero_point=values["zero"],
        scale_codes=stored["scale"],
        zero_codes=stored["zero"],
    )


def codebooks(
    count: int, bits: int, ig: int, *, og: int = 1, scale_bits: int = 0, value_bits: int = 0, in_scales: bool = False
) -> Make:
    """Random codes and entries; values out of tables where bits of them are given."""

    def make(rows: int, columns: int, generator: torch.Generator) -> CodebookWeight:
        outs, ins = rows // og, columns // ig
        codes = torch.randint(0, 2**bits, (outs, ins, count), generator=generator)
        entries = torch.randn(count, 2**bits, og, ig, generator=generator)
        scales = torch.rand(outs, ins if in_scales else 1, generator=generator) * 0.05 + 0.01
        if scale_bits:
            table = torch.rand(outs, 2**scale_bits, generator=generator) * 0.05 + 0.01
            scales = table.gather(1, torch.randint(0, 2**scale_bits, tuple(scales.shape), generator=generator))
        if value_bits:
            table = torch.randn(count, 2**value_bits, generator=generator)
            which = torch.randint(0, 2**value_bits, (count, 2**bits * og * ig), generator=generator)
            entries = table.gather(1, which).view_as(entries)
        kind = torch.uint8 if bits <= 8 else torch.int32
        return CodebookWeight(codes.to(kind), entries, scales, scale_bits, value_bits)

    return make


def with_weights(program: Program, makers: Mapping[str, Make]) -> Program:
    """The program with a random quantized weight for each layer named."""
    generator = torch.Generator().manual_seed(1)
    for layer in program.layers():
        make = makers.get(layer.name)
        if make is not None:
            rows, columns = layer.to_matrix(weight_of(program.graph, layer)).shape
            write_weight(program.graph, layer, make(rows, columns, generator))
    tidy(program.graph)
    return program


class Wide(nn.Module):
    """Independent layers of one input, each with an activation behind it: an output a layer."""

    def __init__(self, names: list[str], rows: int, columns: int) -> None:
        super().__init__()
        layers = {name: nn.Linear(columns, rows, bias=index % 2 == 0) for index, name in enumerate(names)}
        self.layers = nn.ModuleDict(layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[..., columns] -> {layer: [..., rows]}."""
        return {name: F.relu(layer(x)) for name, layer in self.layers.items()}


ROWS, COLUMNS = 48, 256
BLOCKS, FLOAT = "MatMulNBits", "MatMul"
AT_LOAD = " decoded at load to "
IN_BLOCKS = f"int8 blocks of {ROUNDED_BLOCK}"
SUMS = "uint4 blocks and a product of group sums"

Stored = tuple[str, str, str]
"""A layer's format under auto, fast and compact."""


def sums(name: str, container: str = SUMS) -> Stored:
    """In the kernel's blocks, zero points between codes."""
    return f"{name}{AT_LOAD}{container}", container, f"{name} in a function, folded at load"


def blocks(name: str, auto: str, fast: str) -> Stored:
    """In the kernel's blocks."""
    return f"{name}{AT_LOAD}{auto}", fast, f"{name} in a function, folded at load"


def rounded(name: str) -> Stored:
    """Rounded again."""
    return f"{name}{AT_LOAD}{IN_BLOCKS}", f"{name} rounded to {IN_BLOCKS}", f"{name} in a function, folded at load"


FORMS: dict[str, tuple[Make, Stored]] = {
    "hqq3_g64": (affine(3, 64), sums("uint3")),
    "hqq3_meta": (affine(3, 64, meta=128), sums("uint3")),
    "hqq3_meta_one": (affine(3, 64, meta=0), sums("uint3")),
    "hqq3_meta_ragged": (affine(3, 64, meta=100), sums("uint3")),
    "hqq2_g64": (affine(2, 64, meta=128), sums("uint2")),
    "hqq1_g64": (affine(1, 64), sums("uint1")),
    "hqq4_g64": (affine(4, 64, meta=128), sums("uint4")),
    "hqq8_g64": (affine(8, 64), sums("uint8", "uint8 blocks and a product of group sums")),
    "hqq3_channel": (affine(3, -1), sums("uint3")),
    "hqq3_g128_in_two": (affine(3, 128), sums("uint3")),
    "hqq3_g256_as_one": (affine(3, 256), sums("uint3")),
    "hqq3_g48": (affine(3, 48), rounded("uint3")),
    "hqq3_g8": (affine(3, 8), rounded("uint3")),
    "hqq3_axis0": (affine(3, 16, axis=0, meta=64), rounded("uint3")),
    "hqq8_axis0": (
        affine(8, 16, axis=0),
        ("uint8 folded at load", "uint8 folded at load", "uint8 in a function, folded at load"),
    ),
    "gptq3_g64": (affine(3, 64, zeros="none"), blocks("int3", "uint4", "int4")),
    "gptq3_u": (affine(3, 32, zeros="whole"), blocks("uint3", "uint4", "uint4")),
    "gptq2_g64": (affine(2, 64, zeros="none"), blocks("int2", "uint4", "int4")),
    "gptq3_channel": (affine(3, -1, zeros="none"), blocks("int3", "uint4", "int4")),
    "gptq3_g96": (affine(3, 96, zeros="whole"), blocks("uint3", "uint4", "uint4")),
    "rtn4_g64": (affine(4, 64, zeros="none"), ("int4", "int4", "int4")),
    "rtn4_meta": (affine(4, 64, zeros="none", meta=128), blocks("int4", "int4", "int4")),
    "aq_2x8_g8": (codebooks(2, 8, 8), rounded("aq_codebook")),
    "aq_1x8_g8": (codebooks(1, 8, 8), rounded("aq_codebook")),
    "aq_1x10_g8": (codebooks(1, 10, 8), rounded("aq_codebook")),
    "aq_2x5_g4": (codebooks(2, 5, 4), rounded("aq_codebook")),
    "aq_3x4_o2_g4": (codebooks(3, 4, 4, og=2), rounded("aq_codebook")),
    "aq_2x8_o4_g1": (codebooks(2, 8, 1, og=4), rounded("aq_codebook")),
    "aq_scales_in": (codebooks(2, 8, 8, in_scales=True), rounded("aq_codebook")),
    "aq_scales_table": (codebooks(2, 8, 8, in_scales=True, scale_bits=3), rounded("aq_codebook")),
    "aq_values_table": (codebooks(2, 6, 8, value_bits=4), rounded("aq_codebook")),
}


def draw(*shape: int, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(shape, generator=torch.Generator().manual_seed(seed))}


def lower(program: Program, folder: Path, weights_as: WeightsAs = "auto") -> Compiled:
    lowered = OnnxBackend(weights_as).lower(program, folder)
    onnx.checker.check_model(str(lowered.artifact.model), full_check=True)
    return Compiled(program, lowered, optimized_kernels(lowered.artifact))


@pytest.fixture(scope="module")
def wide() -> Program:
    """One layer for each of FORMS."""
    program = program_of(seeded(lambda: Wide(list(FORMS), ROWS, COLUMNS)), draw(5, 3, COLUMNS))
    return with_weights(program, {f"layers.{name}": form[0] for name, form in FORMS.items()})


@pytest.mark.parametrize("weights_as", ["auto", "fast", "compact"])
def test_linear_forms(weights_as: WeightsAs, wide: Program, tmp_path: Path) -> None:
    result = lower(wide, tmp_path, weights_as)
    layers, kernels = {layer.name: layer for layer in result.lowered.layers}, result.kernel_of
    for name, (_, stored) in FORMS.items():
        layer = layers[f"layers.{name}"]
        expected = stored[["auto", "fast", "compact"].index(weights_as)]
        assert layer.format == expected, name
        assert layer.why, name
        assert kernels[layer.name] == (FLOAT if "folded" in expected else BLOCKS), name
    assert result.repeated == ()
    left = {kernel.op for kernel in result.kernels}
    assert not left & {"Gather", "BitShift", "BitwiseAnd", "QuantizeLinear", "DequantizeLinear", "Cast"}
    for name, outputs in result.all_outputs(draw(4, 3, COLUMNS, seed=2)).items():
        assert sqnr(outputs.plain, outputs.unoptimized) >= SAME, name
        assert sqnr(outputs.simulated, outputs.optimized) >= SAME, name
        again = 100 if not any(word in layers[f"layers.{name}"].format for word in ("rounded", "int8 blocks")) else 40
        assert sqnr(outputs.graph, outputs.plain) >= again, name


def test_fast_and_auto_are_the_same_numbers(wide: Program, tmp_path: Path) -> None:
    """What is decoded at load is what fast stores."""
    outputs = []
    for weights_as in ("auto", "fast"):
        folder = tmp_path / weights_as
        folder.mkdir()
        outputs.append(lower(wide, folder, weights_as).all_outputs(draw(4, 3, COLUMNS, seed=2)))
    for name in FORMS:
        assert sqnr(outputs[0][name].optimized, outputs[1][name].optimized) >= SAME, name
