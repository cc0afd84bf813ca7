"""Plugins of full TensorRT: what the bundle says, what NVIDIA's plugin layer makes of it, what the functions compute.

No engine with a plugin is built here: that takes a GPU.
"""

import functools
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from exporter.backends.tensorrt import bundle
from exporter.backends.tensorrt.build import BuildError
from exporter.backends.tensorrt.bundle import finish, read_bundle
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.backends.tensorrt.plugin import INPUTS, grid_of, register
from exporter.backends.tensorrt.plugin_dialect import PluginDialect, codebook_tensors, int3_tensors
from exporter.backends.tensorrt.widen import in_float32
from exporter.gpu_kernels import ceil_div, codebook_kernels, int3_kernels
from exporter.lowering.lowered import Lowered
from passes.act_quant import ActQuant
from passes.base import Program
from passes.calibration import run_graph
from passes.fold_bn import FoldBatchNorm
from passes.weights import AffineWeight, CodebookWeight
from tests.exporter.backends.tensorrt_stand_in import (
    DataType,
    Dimension,
    DynamicDescription,
    ExpressionBuilder,
    Field,
    FieldType,
    Request,
    Setter,
    TensorFormat,
    plugin_layer,
)
from tests.exporter.backends.test_onnx_lowbit import Make, affine, codebooks, with_weights
from tests.exporter.backends.test_tensorrt_packed import SAME, Pair, numbers, parity
from tests.exporter.compiled import program_of, quantized, sqnr
from tests.passes.nets import seeded

__all__ = ["plugin_layer"]  # a fixture


HALF = 55.0
"""dB left by activations, scales and results that are rounded to float16 once a layer: each rounding is within 2^-11 of
the value, 66 dB below it at worst; three of them in each of two layers lie 8 dB higher, the rest is cancellation."""

PLUGIN_CASES: dict[str, tuple[Make, str]] = {
    "int3": (affine(3, 64), "int3_linear"),
    "int3 symmetric": (affine(3, 64, zeros="none"), "int3_linear"),
    "int3 a scale a row": (affine(3, -1), "int3_linear"),
    "int3 quantized meta": (affine(3, 32, meta=128), "int3_linear_meta"),
    "int3 one meta for all": (affine(3, 32, meta=0), "int3_linear_meta"),
    "int3 odd meta groups": (affine(3, 32, meta=48), "int3_linear"),
    "codebooks 2x8": (codebooks(2, 8, 8), "codebook_linear"),
    "codebooks 1x12": (codebooks(1, 12, 8, og=2), "codebook_linear"),
    "codebooks with group scales": (codebooks(2, 4, 8, scale_bits=4, in_scales=True), "codebook_linear"),
}
COLUMNS, ROWS = 128, 192
TYPES = {
    TensorProto.FLOAT16: DataType.HALF,
    TensorProto.BFLOAT16: DataType.BF16,
    TensorProto.FLOAT: DataType.FLOAT,
    TensorProto.INT32: DataType.INT32,
    TensorProto.INT8: DataType.INT8,
}


class Convolution(nn.Module):
    """A convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 16, T] -> [N, 24, T - 3]."""
        y: Tensor = self.conv(x)
        return y


def pair(make: Make) -> Program:
    program = program_of(seeded(lambda: Pair(COLUMNS, ROWS)), numbers(4, 3, COLUMNS), rules=TensorRTBackend.rules)
    return with_weights(program, {"first": make, "second": make})


def lower(program: Program, folder: Path) -> Lowered:
    return TensorRTBackend(plugins=True).lower(program, folder)


def plugin_nodes(model: Path) -> list[onnx.NodeProto]:
    return [node for node in onnx.load(str(model)).graph.node if node.domain == "qexport"]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Lowered]:
    """Lowers a case once for all tests."""

    @functools.cache
    def lower_case(label: str) -> Lowered:
        return lower(pair(PLUGIN_CASES[label][0]), tmp_path_factory.mktemp("case"))

    return lower_case


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


@pytest.mark.ort
@pytest.mark.parametrize("label", PLUGIN_CASES)
def test_a_layer_is_one_plugin_node_that_any_runtime_can_compute(label: str, lowered: Callable[[str], Lowered]) -> None:
    plugin, result = PLUGIN_CASES[label][1], lowered(label)
    onnx.checker.check_model(str(result.artifact.model), full_check=True)
    nodes = plugin_nodes(result.artifact.model)
    assert [node.op_type for node in nodes] == [plugin, plugin]
    assert {layer.format for layer in result.layers} == {f"plugin {plugin}"}
    for node in nodes:
        assert attributes(node) | {"kernels": b""} == {
            "kernels": b"",
            "plugin_namespace": b"qexport",
            "plugin_version": b"1",
            "aot": 1,
        }
    assert parity(result, numbers(3, 3, COLUMNS)) >= HALF


@pytest.mark.ort
@pytest.mark.parametrize("label", PLUGIN_CASES)
def test_the_cast_in_front_of_a_plugin_is_in_the_graph(label: str, lowered: Callable[[str], Lowered]) -> None:
    """So that comparing the two does not show it: in float32 they are one, and `simulated` has the roundings."""
    result, program = lowered(label), pair(PLUGIN_CASES[label][0])
    with in_float32(result) as wide:
        assert parity(wide, numbers(4, 3, COLUMNS)) >= SAME
    (exact,), (rounded,) = (run_graph(graph, [numbers(4, 3, COLUMNS)])[0] for graph in (result.graph, result.simulated))
    assert HALF <= sqnr(exact, rounded) < 80  # not one value of the result has more than 11 bits: 77 dB
    assert torch.equal(rounded, rounded.half().float())
    (unrounded,) = run_graph(program.graph, [numbers(4, 3, COLUMNS)])[0]
    assert sqnr(unrounded, exact) >= HALF


@pytest.mark.ort
def test_a_convolution_of_codebooks_has_its_weight_decoded_in_front(tmp_path: Path) -> None:
    batch = numbers(4, 16, 9)
    program = program_of(seeded(Convolution), batch, rules=TensorRTBackend.rules)
    lowered = lower(with_weights(program, {"conv": codebooks(2, 8, 8)}), tmp_path)
    (node,) = plugin_nodes(lowered.artifact.model)
    assert (node.op_type, len(node.input)) == ("codebook_decode", 3)
    assert parity(lowered, batch) >= HALF


def test_what_plugins_do_not_take_stays_in_native_layers(tmp_path: Path) -> None:
    for group_size, taken in ((64, True), (2, False), (72, False)):
        weight = affine(3, group_size)(ROWS, COLUMNS, torch.Generator().manual_seed(0))
        assert isinstance(weight, AffineWeight)
        assert (int3_tensors(weight, np.dtype(ml_dtypes.bfloat16)) is not None) is taken
    for index, make in enumerate([affine(4, 64), affine(3, 32, axis=0), affine(2, 64), affine(3, 72)]):
        folder = tmp_path / str(index)
        folder.mkdir()
        assert plugin_nodes(lower(pair(make), folder).artifact.model) == []

    def huge(rows: int, columns: int, generator: torch.Generator) -> CodebookWeight:
        weight = codebooks(1, 8, 8)(rows, columns, generator)
        assert isinstance(weight, CodebookWeight)
        return CodebookWeight(weight.codes, weight.codebooks * 1e6, weight.scales)

    assert plugin_nodes(lower(pair(huge), tmp_path).artifact.model) == []
    assert read_bundle(tmp_path).kernels == {}
    assert not (tmp_path / "kernels").exists()


def test_layers_on_integers_stay_native(tmp_path: Path) -> None:
    program = quantized(
        program_of(seeded(lambda: Pair(COLUMNS, ROWS)), numbers(4, 3, COLUMNS), rules=TensorRTBackend.rules),
        FoldBatchNorm(),
        ActQuant(),
    )
    make = affine(3, -1, zeros="none")
    lowered = lower(with_weights(program, {"first": make, "second": make}), tmp_path)
    assert {layer.format for layer in lowered.layers} == {"int8"}


def test_wide_codes_are_bytes_with_the_low_one_first() -> None:
    weight = codebooks(2, 12, 8)(4, 16, torch.Generator().manual_seed(0))
    assert isinstance(weight, CodebookWeight)
    stored = codebook_tensors(weight, np.dtype(np.float16))["codes"]
    assert stored.shape == (4, 2, 4)
    assert stored.dtype == np.int8
    whole = stored.view(np.uint8).astype(np.int32).reshape(4, 2, 2, 2)
    np.testing.assert_array_equal(whole[..., 0] + 256 * whole[..., 1], weight.codes.numpy())


# ---- the bundle ----------------------------------------------------------------------------------------------------


def test_the_bundle_can_be_read_by_hand(tmp_path: Path) -> None:
    lower(pair(affine(3, 32, meta=128)), tmp_path)
    sets = json.loads((tmp_path / "build.json").read_text(encoding="utf-8"))["kernels"]
    assert list(sets) == ["int3_linear_meta.0", "int3_linear_meta.1"]  # two widths
    listed = sets["int3_linear_meta.0"]
    assert listed["types"] == ["FP16", "INT32", "INT8", "FP32", "FP32", "INT8", "FP32", "FP32", "FP16", "FP16"]
    assert listed["kernels"][0]["entry"] == "int3_gemv"
    named = {kernel["ptx"] for one in sets.values() for kernel in one["kernels"]}
    assert named == {f"kernels/{path.name}" for path in (tmp_path / "kernels").iterdir()}
    assert len(named) == 6  # both widths share them


def test_the_same_program_gives_the_same_bundle(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        lower(pair(codebooks(2, 8, 8)), tmp_path / name)
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        found.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    assert found[0] == found[1]


def test_rtx_refuses_a_bundle_of_plugins(tmp_path: Path) -> None:
    lower(pair(affine(3, 64)), tmp_path)
    with pytest.raises(BuildError, match="compile it with --trt-flavor rtx"):
        finish(tmp_path, tmp_path / "e", "rtx")


def test_tensorrt_gets_the_model_without_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lower(pair(affine(3, 64)), tmp_path)
    assert onnx.load(str(tmp_path / "model.onnx")).functions
    seen: list[onnx.ModelProto] = []

    def builder(model: Path, engine: Path, flavor: str, **options: Any) -> None:
        seen.append(onnx.load(str(model)))
        assert options["plugins"] == (tmp_path, read_bundle(tmp_path).kernels)
        raise BuildError("enough")

    monkeypatch.setattr(bundle, "build_engine", builder)
    with pytest.raises(BuildError, match="enough"):
        finish(tmp_path, tmp_path / "e", "tensorrt")
    assert not seen[0].functions
    assert [node.op_type for node in seen[0].graph.node if node.domain == "qexport"] == ["int3_linear"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build.json", "kernels", "model.onnx"]


@pytest.mark.parametrize("rows", [1, 7, 33, 1000])
def test_grids_are_those_of_the_kernels(rows: int) -> None:
    kernels = (
        *int3_kernels("float16", COLUMNS, 64, bias=True),
        *codebook_kernels("bfloat16", COLUMNS, num_codebooks=2, codebook_bits=8, in_group=8, bias=True),
    )
    for kernel in kernels:
        sizes = {"rows": rows} if "x" in kernel.inputs else {}
        fields = {"block_outputs": kernel.block_outputs, "block_rows": kernel.block_rows}
        grid = grid_of(fields, {**sizes, "out": ROWS, "columns": COLUMNS}, ceil_div)
        assert (*grid, 1) == kernel.launch(rows, ROWS, ceil_div).grid


def test_inputs_are_the_kernels_parameters() -> None:
    meta = int3_kernels("float16", COLUMNS, 64, bias=True, quant_scale=True, quant_zero=True)
    *linear, decode = codebook_kernels("float16", COLUMNS, num_codebooks=1, codebook_bits=8, in_group=8, bias=True)
    for plugin, kernels in {
        "int3_linear": int3_kernels("float16", COLUMNS, 64, bias=True),
        "int3_linear_meta": meta,
        "codebook_linear": linear,
        "codebook_decode": [decode],
    }.items():
        assert {kernel.inputs for kernel in kernels} == {INPUTS[plugin]}


# ---- NVIDIA's plugin layer -----------------------------------------------------------------------------------------


def parameters(ptx: bytes, entry: str) -> list[str]:
    """The kinds of a kernel's parameters, in order."""
    found = re.search(rf"\.entry {entry}\((.*?)\)", ptx.decode(), re.DOTALL)
    assert found is not None, entry
    return re.findall(r"\.param \.(\w+)", found[1])


def driven(layer: ModuleType, folder: Path, node: onnx.NodeProto, x_shape: tuple[int, ...]) -> list[dict[str, Any]]:
    """What the builder would learn of a node: its output's shape and, for each tactic, how the kernel is started."""
    described = json.loads((folder / "build.json").read_text(encoding="utf-8"))["kernels"]
    constants = {tensor.name: tensor for tensor in onnx.load(str(folder / "model.onnx")).graph.initializer}
    asked = attributes(node)
    activation = TYPES[TensorProto.FLOAT16]
    shapes = [tuple(constants[name].dims) if name in constants else x_shape for name in node.input]
    types = [TYPES[constants[name].data_type] if name in constants else activation for name in node.input]
    lib, creators = importlib.import_module("tensorrt.plugin._lib"), layer.__dict__
    assert "register" in creators
    creator = lib.QDP_CREATORS[f"{asked['plugin_namespace'].decode()}::{node.op_type}"]
    assert (creator.plugin_version, creator.plugin_namespace) == ("1", "qexport")
    names = [field.name for field in creator.field_names]
    fields = [Field(name, np.frombuffer(asked[name], np.int8), FieldType.CHAR) for name in names]
    plugin = creator.create_plugin(node.op_type, "qexport", fields, None, Request.STRICT_AOT)
    assert plugin.get_output_data_types(types, [len(shape) for shape in shapes]) == [activation]
    dims = [
        [Dimension(size, constant=name in constants) for size in shape]
        for name, shape in zip(node.input, shapes, strict=True)
    ]
    (output,) = plugin.get_output_shapes(dims, [], ExpressionBuilder())
    out_shape = tuple(size.value for size in output)
    every = [DynamicDescription(shape, kind) for shape, kind in zip(shapes, types, strict=True)]
    every.append(DynamicDescription(out_shape, activation))
    formats = plugin.get_supported_format_combinations(every, len(shapes))
    assert [one.type for one in formats] == [one.desc.type for one in every]
    assert {one.format for one in formats} == {TensorFormat.LINEAR}
    plugin.configure_plugin(every[:-1], every[-1:])
    kernel_set = described[asked["kernels"].decode()]
    tactics = sorted(plugin.get_valid_tactics())
    assert tactics == list(range(1, len(kernel_set["kernels"]) + 1))
    learned = []
    for tactic, kernel in zip(tactics, kernel_set["kernels"], strict=True):
        plugin.set_tactic(tactic)
        launch, extra = type("Launch", (), {})(), Setter()
        plugin.get_launch_params(dims, every, len(shapes), launch, extra, ExpressionBuilder())
        name, ptx = plugin.get_kernel([one.desc for one in every[:-1]], [every[-1].desc])
        assert (name, ptx) == (kernel["entry"], (folder / kernel["ptx"]).read_bytes())
        assert parameters(ptx, name) == ["u64"] * len(shapes) + ["u32"] * extra.nbSymExprs + ["u64"]
        grid = tuple(getattr(launch, f"grid_{axis}").expr.value for axis in "xyz")
        block = tuple(getattr(launch, f"block_{axis}").expr.value for axis in "xyz")
        assert launch.shared_mem.expr.value == 0
        assert block == (kernel["threads"], 1, 1)
        learned.append({"shape": out_shape, "grid": grid, "sizes": extra.ints()})
    return learned


@pytest.mark.parametrize("label", PLUGIN_CASES)
def test_nvidias_plugin_layer_drives_the_plugins(
    label: str, lowered: Callable[[str], Lowered], plugin_layer: ModuleType
) -> None:
    folder = lowered(label).artifact.model.parent
    sets = read_bundle(folder).kernels
    register(folder, sets)
    first, second = plugin_nodes(folder / "model.onnx")
    for node, columns, out in ((first, COLUMNS, ROWS), (second, ROWS, COLUMNS)):
        kernels = sets[attributes(node)["kernels"].decode()]["kernels"]
        for batch in (1, 5, 700):
            for kernel, learned in zip(kernels, driven(plugin_layer, folder, node, (batch, 3, columns)), strict=True):
                assert learned["shape"] == (batch, 3, out)
                assert learned["sizes"] == [3 * batch, out, columns]
                blocks = (ceil_div(out, kernel["block_outputs"]), ceil_div(3 * batch, kernel["block_rows"]), 1)
                assert learned["grid"] == blocks


def test_nvidias_plugin_layer_drives_the_decoder(tmp_path: Path, plugin_layer: ModuleType) -> None:
    program = program_of(seeded(Convolution), numbers(4, 16, 9), rules=TensorRTBackend.rules)
    lower(with_weights(program, {"conv": codebooks(2, 8, 8)}), tmp_path)
    register(tmp_path, read_bundle(tmp_path).kernels)
    (node,) = plugin_nodes(tmp_path / "model.onnx")
    (learned,) = driven(plugin_layer, tmp_path, node, ())
    assert learned == {"shape": (24, 64), "grid": (2, 1, 1), "sizes": [24, 64]}


def test_plugins_can_be_registered_where_there_is_no_registry(tmp_path: Path, plugin_layer: ModuleType) -> None:
    register(tmp_path, {}, lazily=True)
    lib = importlib.import_module("tensorrt.plugin._lib")
    assert set(lib.QDP_REGISTRY) == {f"qexport::{name}" for name in INPUTS}
    assert PluginDialect().kernel_sets == {}
    assert plugin_layer.__name__ == "tensorrt.plugin"
