"""Codebooks, 3 bits, zero points between codes, quantized scales, groups along outputs: every form, same values."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.backends.base import LoweringError
from exporter.backends.onnx_qdq.decode import ROUNDED_BLOCK
from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.backends.onnx_qdq.planes import pack_planes, plane_widths
from exporter.kernels import optimized_kernels
from exporter.lowering.lowered import WeightsAs
from passes.act_quant import ActQuant
from passes.base import LayerRule, Program
from passes.graph import tidy, weight_of
from passes.weight_nodes import read_weight, write_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight, from_value_lines
from tests.exporter.compiled import Compiled, array, initializers, program_of, quantized, sqnr, typical_sqnr
from tests.passes.nets import seeded

pytestmark = pytest.mark.ort

SAME = 95.0
"""dB between two float32 evaluations of one network: sums of up to 256 products carry a relative error of about 2e-6
(114 dB); 20 dB for cancellation."""

STEP = 45.0
"""dB where values may fall to the other side of a rounding boundary: as in test_onnx_qdq."""

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
    count: int,
    bits: int,
    ig: int,
    *,
    og: int = 1,
    scale_bits: int = 0,
    value_bits: int = 0,
    value_groups: int = 0,
    in_scales: bool = False,
    shared: tuple[int, int] = (1, 1),
) -> Make:
    """Random codes and entries; values out of tables where bits of them are given; `shared` blocks have one scale."""

    def make(rows: int, columns: int, generator: torch.Generator) -> CodebookWeight:
        outs, ins = rows // og, columns // ig
        codes = torch.randint(0, 2**bits, (outs, ins, count), generator=generator)
        entries = torch.randn(count, 2**bits, og, ig, generator=generator)
        high, wide = shared
        scales = torch.rand(outs // high, ins // wide if in_scales else 1, generator=generator) * 0.05 + 0.01
        if scale_bits:
            table = torch.rand(len(scales), 2**scale_bits, generator=generator) * 0.05 + 0.01
            scales = table.gather(1, torch.randint(0, 2**scale_bits, tuple(scales.shape), generator=generator))
        if value_bits:
            lines = count * (value_groups * og * ig or 1)
            table = torch.randn(lines, 2**value_bits, generator=generator)
            which = torch.randint(0, 2**value_bits, (lines, entries.numel() // lines), generator=generator)
            entries = from_value_lines(table.gather(1, which), entries.shape, value_groups)
        kind = torch.uint8 if bits <= 8 else torch.int32
        return CodebookWeight(codes.to(kind), entries, scales, scale_bits, value_bits, value_groups)

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
    "aq_values_tables": (codebooks(2, 6, 8, og=2, value_bits=2, value_groups=4), rounded("aq_codebook")),
    "aq_scales_shared": (codebooks(2, 6, 8, in_scales=True, shared=(2, 4)), rounded("aq_codebook")),
    "aq_scales_rows": (codebooks(2, 8, 8, shared=(4, 1)), rounded("aq_codebook")),
    "aq_scales_all": (
        codebooks(2, 6, 8, in_scales=True, scale_bits=2, shared=(2, 2), value_bits=2, value_groups=2),
        rounded("aq_codebook"),
    ),
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


def test_file_holds_the_packed_codes(tmp_path: Path) -> None:
    """Bits per weight from the file's size, constants of the decoding included: what is promised of wide layers."""
    size = 1024  # codebooks take as much as in 2048, for a quarter of the weights
    makes = {"hqq": affine(3, 64, meta=128), "aq": codebooks(2, 8, 8)}
    limits = {"hqq": 3.7, "aq": 2.3}
    for name, make in makes.items():
        folder = tmp_path / name
        folder.mkdir()
        program = program_of(seeded(lambda: Wide(["only"], size, size)), draw(2, size))
        result = lower(with_weights(program, {"layers.only": make}), folder)
        (layer,) = result.lowered.layers
        assert layer.bits_per_weight <= limits[name]
        # Beside the weight stands the graph itself: some fifty nodes of a few hundred bytes.
        assert 0 < result.path.stat().st_size - layer.bits_per_weight * size**2 / 8 < 20_000
        weights = result.program.layers()[0]
        tensors = initializers(result.model)
        stored = read_weight(result.program.graph, weights)
        if isinstance(stored, AffineWeight):
            planes = pack_planes(stored.codes.numpy().T, 3)
            found = [array(tensors[name]) for name in (layer.codes, f"{layer.codes}_plane1")]
            for plane, written in zip(planes, found, strict=True):
                assert np.array_equal(plane, written.reshape(plane.shape))
        elif stored is not None:
            first, second = (stored.codes[:, :, index].numpy().astype(np.uint16).T for index in range(2))
            assert np.array_equal(array(tensors[layer.codes]), (first << 8) + second)  # into the joined table


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8, 12, 16])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_planes_hold_every_bit(bits: int, rows: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (rows, 5)).astype(np.uint32)
    planes = pack_planes(codes, bits)
    assert sum(plane_widths(bits)) == bits
    assert [plane.shape for plane in planes] == [(-(-rows * width // 8), 5) for width in plane_widths(bits)]
    found, below = np.zeros_like(codes), 0
    for width, plane in zip(plane_widths(bits), planes, strict=True):
        for row in range(rows):
            place, step = divmod(row, len(plane))
            found[row] |= (plane[step].astype(np.uint32) >> (width * place) & (2**width - 1)) << below
        below += width
    assert np.array_equal(found, codes)


def test_compact_is_a_function_of_standard_operators(wide: Program, tmp_path: Path) -> None:
    model = lower(wide, tmp_path, "compact").model
    assert {function.domain for function in model.functions} == {"qexport"}
    assert {node.domain for function in model.functions for node in function.node} == {""}
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", 21), ("qexport", 1)}
    calls = [node for node in model.graph.node if node.domain == "qexport"]
    assert len(calls) == len(FORMS) - 1  # rtn4_g64 is as the kernel reads it
    assert len(model.functions) < len(calls)  # layers stored alike share one
    books = {function.name: function for function in model.functions}
    (plain,) = [node for node in calls if node.name.startswith("layers.aq_2x8_g8/")]
    assert sum(node.op_type == "Gather" for node in books[plain.op_type].node) == 2
    assert not any(node.op_type == "Mul" for node in books[plain.op_type].node)  # the scale is on the output
    here = str(Path(__file__).resolve().parent).encode()
    assert here not in (tmp_path / "model.onnx").read_bytes()


def test_the_recipe_chooses_for_single_layers(tmp_path: Path) -> None:
    rules = (
        LayerRule("layers.a", options={"weights_as": "fast"}),
        LayerRule("layers.b", options={"weights_as": "compact"}),
    )
    module = seeded(lambda: Wide(["a", "b", "c"], ROWS, COLUMNS))
    program = program_of(module, draw(2, COLUMNS), layer_rules=rules)
    with_weights(program, dict.fromkeys(("layers.a", "layers.b", "layers.c"), codebooks(2, 8, 8)))
    layers = {layer.name: layer for layer in lower(program, tmp_path).lowered.layers}
    stored = dict(zip(("layers.c", "layers.a", "layers.b"), rounded("aq_codebook"), strict=True))
    assert {name: layer.format for name, layer in layers.items()} == stored
    assert (
        layers["layers.c"].why
        == "no kernel multiplies codebook entries, so it is rounded again, to 8 bits in blocks of 128"
    )
    assert layers["layers.b"].why == "asked for compact: onnxruntime folds it to float when it loads the file"


# ---- other kinds of layers -----------------------------------------------------------------------------------------


class Maps(nn.Module):
    """Convolutions of several kinds, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 16, 3, padding=1, stride=2)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 3, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 9, 9] -> [N, 5]."""
        x = F.relu(self.grouped(F.relu(self.strided(x))))
        return self.head(F.relu(self.up(x)).mean((2, 3)))


MAPS: dict[str, dict[str, Make]] = {
    "codebooks": {"strided": codebooks(2, 4, 3), "grouped": codebooks(2, 4, 8), "up": codebooks(1, 5, 9)},
    "between": {"strided": affine(3, 9), "grouped": affine(3, 24, meta=16), "up": affine(3, -1)},
    "outputs": {"strided": affine(3, 4, axis=0), "grouped": affine(2, 8, axis=0), "up": affine(3, 4, axis=0)},
}


@pytest.mark.parametrize("weights_as", ["auto", "compact"])
@pytest.mark.parametrize("case", MAPS)
def test_weight_only_convolutions(case: str, weights_as: WeightsAs, tmp_path: Path) -> None:
    program = program_of(seeded(Maps), draw(6, 3, 9, 9))
    result = lower(with_weights(program, MAPS[case]), tmp_path, weights_as)
    assert {layer.name for layer in result.lowered.layers} == set(MAPS[case])
    assert all(layer.format.endswith("folded at load") for layer in result.lowered.layers)
    assert set(result.kernel_of.values()) <= {"Conv", "FusedConv", "ConvTranspose"}
    assert result.repeated == ()
    outputs = result.outputs(draw(6, 3, 9, 9, seed=2))
    assert sqnr(outputs.graph, outputs.unoptimized) >= SAME
    assert sqnr(outputs.graph, outputs.optimized) >= SAME


@pytest.mark.parametrize("case", MAPS)
def test_convolutions_on_quantized_activations_run_on_integers(case: str, tmp_path: Path) -> None:
    program = quantized(program_of(seeded(Maps), draw(6, 3, 9, 9)), ActQuant())
    result = lower(with_weights(program, MAPS[case]), tmp_path)
    layers = {layer.name: layer.format for layer in result.lowered.layers}
    name = "aq_codebook" if case == "codebooks" else "uint3"
    assert layers["strided"] == f"{name} decoded at load to int8"
    kernels = result.kernel_of
    assert (kernels["strided"], kernels["grouped"], kernels["up"]) == ("QLinearConv", "QLinearConv", "ConvTranspose")
    assert result.repeated == ()
    outputs = result.outputs(draw(6, 3, 9, 9, seed=2))
    assert typical_sqnr(outputs.plain, outputs.unoptimized) >= SAME
    assert sqnr(outputs.simulated, outputs.optimized) >= STEP
    # One scale a channel for a weight of a few levels: 2 to 4 bits beyond them are left of 8.
    assert sqnr(outputs.graph, outputs.plain) >= 25


class Words(nn.Module):
    """Tables under one head."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: nn.Embedding(50, 40) for name in TABLES})

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """[N, T] -> {table: [N, T, 40]}."""
        return {name: table(ids) for name, table in self.tables.items()}


TABLES: dict[str, tuple[Make, str, str]] = {
    "int3": (affine(3, -1, zeros="none"), "int3 rows", "Gather"),
    "int2_whole": (affine(2, -1, zeros="whole"), "int2 rows", "Gather"),
    "groups": (affine(3, 8), "int3 rows", "Gather"),
    "ragged_groups": (affine(4, 16), "int4 rows", "Gather"),
    "meta": (affine(3, 8, meta=16), "int3 rows", "Gather"),
    "int8_groups": (affine(8, 20), "int8 rows", "Gather"),
    "codebooks": (codebooks(2, 8, 8), "aq_codebook rows", "Gather"),
    "narrow_codebooks": (codebooks(3, 5, 4), "aq_codebook rows", "Gather"),
    "shared_scales": (codebooks(2, 5, 4, in_scales=True, shared=(2, 2)), "aq_codebook rows", "Gather"),
    "wide_codebook": (codebooks(1, 10, 8, in_scales=True), "aq_codebook rows", "Gather"),
    "tall_codebooks": (codebooks(2, 4, 8, og=2), "aq_codebook folded at load", "Gather"),
    "outputs": (affine(3, 10, axis=0), "uint3 folded at load", "Gather"),
}


def test_rows_of_tables_are_decoded_when_they_are_picked(tmp_path: Path) -> None:
    ids = {"ids": torch.randint(0, 50, (4, 9), generator=torch.Generator().manual_seed(0))}
    program = program_of(seeded(Words), ids)
    result = lower(with_weights(program, {f"tables.{name}": form[0] for name, form in TABLES.items()}), tmp_path)
    layers, kernels = {layer.name: layer for layer in result.lowered.layers}, result.kernel_of
    for name, (_, stored, kernel) in TABLES.items():
        layer = layers[f"tables.{name}"]
        assert (layer.format, kernels[layer.name]) == (stored, kernel), name
    for name, outputs in result.all_outputs(ids).items():
        assert sqnr(outputs.graph, outputs.unoptimized) >= SAME, name
        assert sqnr(outputs.graph, outputs.optimized) >= SAME, name
    sizes = {tensor.name: int(np.prod(tensor.dims)) for tensor in onnx.load(result.path).graph.initializer}
    assert sizes["tables.int3.weight_codes"] + sizes["tables.int3.weight_codes_plane1"] == 50 * 40 * 3 / 8


# ---- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["static", "token"])
@pytest.mark.parametrize("make", [codebooks(2, 8, 8), affine(3, 64), affine(3, -1)], ids=["aq", "hqq", "hqq channel"])
def test_kernels_that_quantize_their_input_do_so_alone(make: Make, mode: str, tmp_path: Path) -> None:
    """The graph's own quantizer of 8 bits is taken off, as for every block-wise weight."""
    module = seeded(lambda: Wide(["only"], ROWS, COLUMNS))
    program = quantized(program_of(module, draw(4, 3, COLUMNS)), ActQuant(mode=mode))
    result = lower(with_weights(program, {"layers.only": make}), tmp_path)
    assert result.kernel_of == {"layers.only": BLOCKS}
    outputs = result.outputs(draw(4, 3, COLUMNS, seed=2))
    assert sqnr(outputs.simulated, outputs.optimized) >= SAME


def test_4_bit_activations_are_refused_with_the_nearest() -> None:
    module = seeded(lambda: Wide(["only"], ROWS, COLUMNS))
    for make, reason in {
        codebooks(
            2, 8, 8
        ): "4-bit activations do not run on a codebook weight here; use gptq:bits=4:group_size=-1 or bits=8",
        affine(3, 64): "4-bit activations do not run on a block-wise weight here; use group_size=-1 or bits=8",
        affine(3, -1): "4-bit activations do not run on a weight with zero points between its codes here; use gptq:",
    }.items():
        program = quantized(program_of(module, draw(4, 3, COLUMNS)), ActQuant(bits=4))
        with pytest.raises(LoweringError, match="only: ") as caught:
            OnnxBackend().lower(with_weights(program, {"layers.only": make}), Path("unused"))
        assert caught.value.reasons["layers.only"].startswith(reason)


def test_same_bytes_twice(wide: Program, tmp_path: Path) -> None:
    for weights_as in get_args(WeightsAs):
        files = []
        for name in ("one", "two"):
            folder = tmp_path / f"{weights_as}-{name}"
            folder.mkdir()
            OnnxBackend(weights_as).lower(wide, folder)
            files.append((folder / "model.onnx").read_bytes())
        assert files[0] == files[1]
