"""onnxruntime sessions: right values, settings that take effect, and no provider other than the one asked for."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from runtimes.base import Artifact, RuntimeFault
from runtimes.ort import OnnxRuntime

pytestmark = pytest.mark.ort

ROWS, K, N, BLOCK = 4, 64, 8, 32


@pytest.fixture(scope="module")
def weight() -> np.ndarray:
    """4-bit codes [K, N] times one scale a block [K / BLOCK, N]."""
    random = np.random.default_rng(0)
    codes = random.integers(-8, 8, (K, N)).astype(np.float32)
    return codes * np.repeat(SCALE, BLOCK, axis=0)


SCALE = np.full((K // BLOCK, N), 0.05, np.float32)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, weight: np.ndarray) -> Artifact:
    """y = x W with W dequantized from 4-bit blocks, which onnxruntime fuses into MatMulNBits; z = x + 1."""
    codes = np.rint(weight / np.repeat(SCALE, BLOCK, axis=0)).astype(int)
    nodes = [
        helper.make_node("DequantizeLinear", ["fc.weight_codes", "scale"], ["w"], axis=0, block_size=BLOCK),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
        helper.make_node("Add", ["x", "one"], ["z"]),
    ]
    constants = [
        helper.make_tensor("fc.weight_codes", TensorProto.INT4, (K, N), codes.flatten()),
        numpy_helper.from_array(SCALE, "scale"),
        numpy_helper.from_array(np.float32(1), "one"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", size]) for name, size in SHAPES.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    path = tmp_path_factory.mktemp("ort") / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return Artifact("onnxruntime", path, ("x",), ("y", "z"))


SHAPES = {"x": K, "y": N, "z": K}


@pytest.fixture(scope="module")
def x() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, K)).astype(np.float32)


def rounding(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Bound of a float32 dot product of K terms in any order: K 2^-24 sum |x| |w|, and as much for the weight's own."""
    return 2 * K * 2.0**-24 * (np.abs(x) @ np.abs(weight))


def test_outputs_by_name_in_the_artifacts_order(artifact, x):
    outputs = OnnxRuntime(threads=1).load(artifact).run({"x": x})
    assert list(outputs) == ["y", "z"]
    np.testing.assert_array_equal(outputs["z"], x + 1)


@pytest.mark.parametrize("runtime", [OnnxRuntime(threads=1, optimize=False), OnnxRuntime(threads=1, accuracy_level=1)])
def test_unoptimized_and_accuracy_level_1_compute_in_float(artifact, x, weight, runtime):
    y = runtime.load(artifact).run({"x": x})["y"]
    assert np.all(np.abs(y - x.astype(np.float64) @ weight) <= rounding(x, weight))


def test_the_default_rounds_activations_to_int8(artifact, x, weight):
    """The settings above are not without effect: MatMulNBits at accuracy level 4 is far outside float rounding."""
    y = OnnxRuntime(threads=1, accuracy_level=4).load(artifact).run({"x": x})["y"]
    error = np.abs(y - x.astype(np.float64) @ weight)
    assert np.any(error > 10 * rounding(x, weight))
    # Each x is off by at most half a step of its block, max|x| / 127 (plus the rounding of float).
    half_step = np.abs(x).max(axis=1, keepdims=True) / 127 / 2
    assert np.all(error <= half_step * np.abs(weight).sum(axis=0) + rounding(x, weight))


def test_write_optimized_writes_the_fused_graph(artifact, tmp_path):
    OnnxRuntime().write_optimized(artifact, tmp_path / "fused.onnx")
    assert "MatMulNBits" in [node.op_type for node in onnx.load(tmp_path / "fused.onnx").graph.node]
    OnnxRuntime(optimize=False).write_optimized(artifact, tmp_path / "plain.onnx")
    assert [node.op_type for node in onnx.load(tmp_path / "plain.onnx").graph.node].count("DequantizeLinear") == 1


def test_placement_counts_nodes(artifact, x):
    assert OnnxRuntime(optimize=False).placement(artifact, {"x": x}) == {"CPUExecutionProvider": 3}


def test_nothing_is_printed(artifact, x, tmp_path, capfd):
    OnnxRuntime().load(artifact).run({"x": x})
    OnnxRuntime().write_optimized(artifact, tmp_path / "fused.onnx")
    assert capfd.readouterr() == ("", "")


def test_missing_onnxruntime_names_the_extra(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeFault, match=r"not installed; pip install 'qexport\[cpu\]'"):
        OnnxRuntime().load(artifact)


@pytest.mark.parametrize(
    ("provider", "name"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")]
)
def test_a_provider_this_build_lacks(artifact, monkeypatch, provider, name):
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeFault, match=rf"no {name} \(it has CPUExecutionProvider\).*qexport\[gpu\]"):
        OnnxRuntime(provider=provider).load(artifact)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_silent_fallback_is_a_fault(artifact, monkeypatch):
    """The library claims CUDA; the session then runs on the CPU, as it does when CUDA's libraries do not load."""
    import onnxruntime

    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CUDAExecutionProvider"])
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(
        "onnxruntime.InferenceSession",
        lambda path, options, providers: real(path, options, providers=["CPUExecutionProvider"]),
    )
    with pytest.raises(RuntimeFault, match=r"CUDAExecutionProvider was asked for.*fell back to CPUExecutionProvider"):
        OnnxRuntime(provider="cuda").load(artifact)


def test_a_file_that_is_no_model(tmp_path: Path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(RuntimeFault, match=r"cannot load model\.onnx") as caught:
        OnnxRuntime().load(Artifact("onnxruntime", path, ("x",), ("y",)))
    assert "\n" not in str(caught.value)


def test_a_feed_of_another_type(artifact, x):
    with pytest.raises(RuntimeFault, match=r"onnxruntime failed:.*double") as caught:
        OnnxRuntime().load(artifact).run({"x": x.astype(np.float64)})
    assert "\n" not in str(caught.value)


def test_a_feed_that_is_missing(artifact):
    with pytest.raises(RuntimeFault, match="missing x"):
        OnnxRuntime().load(artifact).run({})
