"""Layers found again in the graph that onnxruntime really runs, whatever fusion did to their names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.kernels import kernel_of_layers, kernels_in, optimized_kernels, weight_dequantize_left
from runtimes.base import Artifact
from runtimes.ort import OnnxRuntime

pytestmark = pytest.mark.ort


class Graph:
    """A QDQ graph under construction; methods return the name of the value they add."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes))
        return output

    def qdq(self, value: str, name: str, zero: int = 128) -> str:
        scale, zero_point = self.constant(f"{name}.s", np.float32(0.02)), self.constant(f"{name}.z", np.uint8(zero))
        codes = self.op("QuantizeLinear", [value, scale, zero_point], f"{name}.q")
        return self.op("DequantizeLinear", [codes, scale, zero_point], f"{name}.dq")

    def codes(self, layer: str, shape: tuple[int, ...]) -> str:
        return self.constant(f"{layer}.weight_codes", self.random.integers(-127, 128, shape).astype(np.int8))

    def weight(self, layer: str, shape: tuple[int, ...], axis: int) -> str:
        codes = self.codes(layer, shape)
        scale = self.constant(f"{layer}.weight_scale", np.full(shape[axis], 0.01, np.float32))
        zero = self.constant(f"{layer}.weight_zero_point", np.zeros(shape[axis], np.int8))
        return self.op("DequantizeLinear", [codes, scale, zero], f"{layer}.weight", axis=axis)

    def blocks(self, layer: str, shape: tuple[int, int], size: int) -> str:
        codes = self.random.integers(-8, 8, shape).flatten()
        self.constants.append(helper.make_tensor(f"{layer}.weight_codes", TensorProto.INT4, shape, codes))
        scale = self.constant(f"{layer}.weight_scale", np.full((shape[0] // size, shape[1]), 0.01, np.float32))
        inputs = [f"{layer}.weight_codes", scale]
        return self.op("DequantizeLinear", inputs, f"{layer}.weight", axis=0, block_size=size)

    def save(self, path: Path, inputs: dict[str, list[int | str]], output: str) -> Artifact:
        kinds = {"ids": TensorProto.INT64}
        given = [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()]
        made = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "g", given, made, self.constants)
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
        return Artifact("onnxruntime", path, tuple(inputs), (output,))


def kernels_of(artifact: Artifact) -> dict[str, str | None]:
    return kernel_of_layers(artifact.model, optimized_kernels(artifact, OnnxRuntime(threads=1)))


def test_static_int8_layers_run_on_integers(tmp_path):
    g = Graph()
    y = g.op("Conv", [g.qdq("x", "a"), g.weight("conv", (8, 3, 3, 3), 0)], "conv.y", pads=[1, 1, 1, 1])
    y = g.qdq(g.op("Relu", [y], "relu"), "b", zero=0)
    y = g.op("Conv", [y, g.weight("depthwise", (8, 1, 3, 3), 0)], "depthwise.y", pads=[1, 1, 1, 1], group=8)
    y = g.qdq(y, "c")
    y = g.op("MatMul", [y, g.weight("head", (6, 5), 1)], "head.y")
    artifact = g.save(tmp_path / "m.onnx", {"x": ["n", 3, 6, 6]}, y)
    optimized = optimized_kernels(artifact)
    assert kernel_of_layers(artifact.model, optimized) == {
        "conv": "QLinearConv",
        "depthwise": "QLinearConv",
        "head": "MatMulIntegerToFloat",
    }
    assert weight_dequantize_left(optimized) == ()


def test_weights_repacked_under_another_name_are_found(tmp_path):
    g = Graph()
    y = g.op("MatMul", ["x", g.blocks("fc", (64, 16), 32)], "fc.y")
    y = g.op(
        "MatMul", [y, g.blocks("fc.weight_codes_T", (16, 16), 16)], "trap.y"
    )  # a layer named like the repacked codes
    artifact = g.save(tmp_path / "m.onnx", {"x": ["n", 64]}, y)
    optimized = optimized_kernels(artifact)
    (packed,) = (k for k in optimized if k.name == "node_fc.y")
    assert "fc.weight_codes" not in packed.constants  # else this test shows nothing
    assert kernel_of_layers(artifact.model, optimized) == {"fc": "MatMulNBits", "fc.weight_codes_T": "MatMulNBits"}


def test_weights_transposed_while_loading_are_found_by_their_node(tmp_path):
    g = Graph()
    w = g.op("Transpose", [g.weight("fc", (8, 16), 0)], "fc.t", perm=[1, 0])
    artifact = g.save(tmp_path / "m.onnx", {"x": ["n", 2, 16]}, g.op("MatMul", [g.qdq("x", "a"), w], "fc.y"))
    (kernel,) = (k for k in optimized_kernels(artifact) if k.op == "MatMulIntegerToFloat")
    assert not any("fc.weight_codes" in name for name in kernel.constants)  # else this test shows nothing
    assert kernels_of(artifact) == {"fc": "MatMulIntegerToFloat"}


def test_weights_decoded_while_loading_are_found_by_their_node(tmp_path):
    g = Graph()
    w = g.op("Cast", [g.codes("fc", (16, 8))], "fc.float", to=TensorProto.FLOAT)
    w = g.op("Mul", [w, g.constant("s", np.full(8, 0.01, np.float32))], "fc.w")
    artifact = g.save(tmp_path / "m.onnx", {"x": ["n", 16]}, g.op("MatMul", ["x", w], "fc.y"))
    optimized = optimized_kernels(artifact)
    assert kernel_of_layers(artifact.model, optimized) == {"fc": "MatMul"}
    assert weight_dequantize_left(optimized) == ()


def test_dynamic_quantization(tmp_path):
    g = Graph()
    g.op("DynamicQuantizeLinear", ["x"], "q")
    g.nodes[-1].output.extend(["q.s", "q.z"])
    y = g.op("MatMulInteger", ["q", g.codes("fc", (16, 8)), "q.z"], "fc.i")
    y = g.op("Cast", [y], "fc.f", to=TensorProto.FLOAT)
    scale = g.op("Mul", ["q.s", g.constant("s", np.full(8, 0.01, np.float32))], "fc.s")
    artifact = g.save(tmp_path / "m.onnx", {"x": ["n", 16]}, g.op("Mul", [y, scale], "fc.y"))
    assert kernels_of(artifact) == {"fc": "DynamicQuantizeMatMul"}


def test_an_embedding_gathers_packed_rows(tmp_path):
    g = Graph()
    y = g.op("Gather", [g.codes("embedding", (50, 8)), "ids"], "rows")
    y = g.op("Cast", [y], "float", to=TensorProto.FLOAT)
    y = g.op("Mul", [y, g.constant("s", np.float32(0.01))], "embedding.y")
    assert kernels_of(g.save(tmp_path / "m.onnx", {"ids": ["n"]}, y)) == {"embedding": "Gather"}


def test_a_weight_dequantized_at_every_run_shows(tmp_path):
    """A float bias in Gemm keeps onnxruntime from fusing it."""
    g = Graph()
    bias = g.constant("bias", np.zeros(8, np.float32))
    y = g.op("Gemm", [g.qdq("x", "a"), g.weight("fc", (16, 8), 1), bias], "fc.y")
    artifact = g.save(tmp_path / "m.onnx", {"x": ["n", 16]}, y)
    optimized = optimized_kernels(artifact)
    assert kernel_of_layers(artifact.model, optimized) == {"fc": "DequantizeLinear+Gemm"}
    assert [kernel.name for kernel in weight_dequantize_left(optimized)] == ["node_fc.weight"]


def test_a_whole_chain_of_constants_is_repeated_work(tmp_path):
    g = Graph()
    w = g.op("Transpose", [g.weight("fc", (8, 16), 0)], "fc.t", perm=[1, 0])
    artifact = g.save(tmp_path / "m.onnx", {"x": ["n", 16]}, g.op("MatMul", ["x", w], "fc.y"))
    left = weight_dequantize_left(kernels_in(onnx.load(artifact.model)))
    assert [kernel.op for kernel in left] == ["DequantizeLinear", "Transpose"]
    runtime = OnnxRuntime(optimize=False)
    kernels = kernel_of_layers(artifact.model, optimized_kernels(artifact, runtime))
    assert kernels == {"fc": "DequantizeLinear+Transpose+MatMul"}


def test_a_weight_used_twice_names_both_kernels(tmp_path):
    g = Graph()
    codes = g.codes("embedding", (50, 16))
    y = g.op("Cast", [g.op("Gather", [codes, "ids"], "rows")], "float", to=TensorProto.FLOAT)
    y = g.op("Mul", [y, g.constant("s", np.float32(0.01))], "hidden")
    w = g.op("DequantizeLinear", [codes, "s"], "head.w")
    w = g.op("Transpose", [w], "head.t", perm=[1, 0])
    artifact = g.save(tmp_path / "m.onnx", {"ids": ["n"]}, g.op("MatMul", [y, w], "head.y"))
    # onnxruntime transposes a copy of the codes while loading, but fuses no per-tensor weight without zero point.
    expected = "Gather, DequantizeLinear+FusedMatMul"
    assert kernels_of(artifact) == {"embedding": expected}
    by_layer = {"embedding": codes, "head": codes}
    kernels = kernel_of_layers(artifact.model, optimized_kernels(artifact), by_layer)
    assert kernels == {"embedding": expected, "head": expected}


def test_an_overridable_initializer_is_no_constant():
    node = helper.make_node("Relu", ["w"], ["y"])
    value = helper.make_tensor_value_info("w", TensorProto.FLOAT, [1])
    w = numpy_helper.from_array(np.ones(1, np.float32), "w")
    for inputs, constants in (([], ("w",)), ([value], ())):
        (kernel,) = kernels_in(helper.make_model(helper.make_graph([node], "g", inputs, [], [w])))
        assert kernel.constants == constants
