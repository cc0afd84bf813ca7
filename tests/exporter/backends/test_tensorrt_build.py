"""Engines from small ONNX models: what stays compressed, and how refusals, crashes and delays of the builder end."""

import hashlib
import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.backends.tensorrt import build, builder
from exporter.backends.tensorrt.build import BuildError, EngineBuild, available_flavor, build_engine
from exporter.backends.tensorrt.folding import PackedWeight, folded_weights, packed_weights, stored_weights

BATCHES = (1, 4, 8)  # min, opt, max of a dynamic batch


class Graph:
    """A small ONNX graph under construction; methods return the name of the value they add."""

    def __init__(self, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def const(self, name: str, value: Any, dtype: Any) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=f"n_{output}", **attributes))
        return output

    def qdq(self, value: str, name: str, zero_type: Any = np.int8, zero: int = 0) -> str:
        """Per-tensor Quantize and Dequantize."""
        scale, zero_point = self.const(f"{name}_s", 0.05, np.float32), self.const(f"{name}_z", zero, zero_type)
        codes = self.op("QuantizeLinear", [value, scale, zero_point], f"{name}_q")
        return self.op("DequantizeLinear", [codes, scale, zero_point], f"{name}_dq")

    def int8_weight(self, name: str, shape: tuple[int, ...], axis: int) -> str:
        """Random codes, one scale per index of `axis`."""
        codes = self.const(name, self.random.integers(-127, 128, shape), np.int8)
        scale = self.const(f"{name}_s", self.random.random(shape[axis]) + 0.1, np.float32)
        return self.op("DequantizeLinear", [codes, scale], f"{name}_dq", axis=axis)

    def save(self, path: Path, x_shape: Sequence[int | str], y_shape: Sequence[int | str]) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
            self.initializers,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        return path


def int8_matmul(path: Path) -> Path:
    g = Graph()
    g.op("MatMul", [g.qdq("x", "a"), g.int8_weight("w", (64, 48), axis=1)], "y")
    return g.save(path, ["N", 64], ["N", 48])


def int8_conv_net(path: Path) -> Path:
    """Convolution, depthwise convolution, pointwise with a residual add, pooling, linear: all int8."""
    g = Graph()
    first = g.op("Conv", [g.qdq("x", "a0"), g.int8_weight("w1", (16, 3, 3, 3), axis=0)], "c1", pads=[1] * 4)
    first = g.qdq(g.op("Relu", [first], "r1"), "a1")
    depthwise = g.op("Conv", [first, g.int8_weight("w2", (16, 1, 3, 3), axis=0)], "c2", pads=[1] * 4, group=16)
    depthwise = g.qdq(g.op("Relu", [depthwise], "r2"), "a2")
    pointwise = g.qdq(g.op("Conv", [depthwise, g.int8_weight("w3", (16, 16, 1, 1), axis=0)], "c3"), "a3")
    pooled = g.op("GlobalAveragePool", [g.qdq(g.op("Add", [pointwise, first], "sum"), "a4")], "pool")
    flat = g.qdq(g.op("Flatten", [pooled], "flat"), "a5")
    g.op("MatMul", [flat, g.int8_weight("w4", (16, 10), axis=1)], "y")
    return g.save(path, ["N", 3, 8, 8], ["N", 10])


def int4_matmul(path: Path) -> Path:
    """Weight-only, blocks of 32 along K."""
    g = Graph()
    codes = helper.make_tensor("w", TensorProto.INT4, (128, 64), g.random.integers(-8, 8, 128 * 64).tolist())
    g.initializers.append(codes)
    scale = g.const("w_s", g.random.random((4, 64)) + 0.1, np.float32)
    g.op("MatMul", ["x", g.op("DequantizeLinear", ["w", scale], "w_dq", axis=0, block_size=32)], "y")
    return g.save(path, ["N", 128], ["N", 64])


def attention_projections(path: Path) -> Path:
    """Three int8 matmuls of one input, which TensorRT merges into one with the weights side by side."""
    g = Graph()
    x = g.qdq("x", "a")
    q, k, v = (g.op("MatMul", [x, g.int8_weight(f"w{n}", (64, 64), axis=1)], n) for n in "qkv")
    scores = g.op("MatMul", [q, g.op("Transpose", [k], "kt", perm=[0, 2, 1])], "scores")
    g.op("MatMul", [g.op("Softmax", [scores], "p", axis=-1), v], "y")
    return g.save(path, ["N", 8, 64], ["N", 8, 64])


def built(model: Path, x_dims: tuple[int, ...]) -> EngineBuild:
    """The engine for a dynamic batch of inputs of `x_dims`, beside the model."""
    low, opt, high = ((batch, *x_dims) for batch in BATCHES)
    return build_engine(model, model.with_suffix(".engine"), "rtx", profiles={"x": (low, opt, high)})


@pytest.fixture
def rtx() -> None:
    pytest.importorskip("tensorrt_rtx")


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_int8_convolutions_stay_int8_and_run_as_integer_kernels(tmp_path: Path) -> None:
    model = int8_conv_net(tmp_path / "net.onnx")
    made = built(model, (3, 8, 8))
    stored = stored_weights(made, packed_weights(model))
    assert [(s.weight.name, s.state, s.kernels) for s in stored] == [
        ("w1", "compressed", ("correlation (Int8)",)),
        ("w2", "compressed", ("correlation (Int8)",)),
        ("w3", "compressed", ("correlation (Int8)",)),
        ("w4", "compressed", ("gemm (Int8)",)),
    ]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_engine_file_is_what_the_build_says(tmp_path: Path) -> None:
    made = built(int8_matmul(tmp_path / "m.onnx"), (64,))
    data = made.engine.read_bytes()
    assert made.engine_bytes == len(data)
    assert made.sha256 == hashlib.sha256(data).hexdigest()
    assert made.weights_bytes >= 64 * 48
    assert made.scratch_bytes > 0
    assert made.version
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.engine", "m.onnx"]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_two_builds_give_the_same_bytes(tmp_path: Path) -> None:
    model = int8_matmul(tmp_path / "m.onnx")
    assert built(model, (64,)).sha256 == built(model, (64,)).sha256


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_int4_blocks_stay_int4_in_one_fused_kernel(tmp_path: Path) -> None:
    model = int4_matmul(tmp_path / "m.onnx")
    (stored,) = stored_weights(built(model, (128,)), packed_weights(model))
    assert stored.weight == PackedWeight("w", "int4", (128, 64), "n_w_dq", ("n_y",))
    assert stored.state == "compressed"
    assert stored.kernels == ("runtime_fusion ReplCastMulCastFc (Float)",)


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_merged_projections_are_found_in_the_stacked_constant(tmp_path: Path) -> None:
    model = attention_projections(tmp_path / "m.onnx")
    made = built(model, (8, 64))
    stacked = [c.dims for layer in made.layers for c in layer.constants if c.dtype == "Int8"]
    assert stacked == [(64, 192)]
    assert folded_weights(made, packed_weights(model)) == []


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_float_weight_behind_quantize_and_transpose_is_reported_as_folded(tmp_path: Path) -> None:
    g = Graph()
    w = g.qdq(g.const("w", g.random.standard_normal((48, 64)), np.float32), "w8")
    g.op("MatMul", ["x", g.op("Transpose", [w], "wt", perm=[1, 0])], "y")
    made = built(g.save(tmp_path / "m.onnx", ["N", 64], ["N", 48]), (64,))
    expected = PackedWeight("w", "int8", (48, 64), "n_w8_dq", ("n_y",))
    assert made.weights_bytes >= 4 * 48 * 64
    assert [s.state for s in stored_weights(made, [expected])] == ["folded"]
    assert folded_weights(made, [expected]) == ["w"]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("make", [int8_matmul, int8_conv_net])
def test_rows_of_int8_codes_are_found_in_the_engine_without_a_table(tmp_path: Path, make: Any) -> None:
    model = make(tmp_path / "m.onnx")
    made = built(model, (64,) if make is int8_matmul else (3, 8, 8))
    graph = onnx.load(str(model)).graph
    codes = {t.name: numpy_helper.to_array(t) for t in graph.initializer if t.data_type == TensorProto.INT8 and t.dims}
    blind = EngineBuild(**{**vars(made), "layers": ()})
    expected = [weight for weight in packed_weights(model) if weight.name in ("w", "w3")]  # rows of 16 and unpadded
    assert folded_weights(blind, expected) == [weight.name for weight in expected]
    assert folded_weights(blind, expected, codes) == []
    other = {name: np.roll(value, 1) for name, value in codes.items()}
    assert folded_weights(blind, expected, other) == [weight.name for weight in expected]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_architectures_are_named(tmp_path: Path) -> None:
    model, engine = int4_matmul(tmp_path / "m.onnx"), tmp_path / "m.engine"
    profiles = {"x": ((1, 128), (4, 128), (8, 128))}
    two = build_engine(model, engine, "rtx", arch=["sm80", "sm89"], profiles=profiles)
    assert two.sha256 != build_engine(model, engine, "rtx", arch=["sm80"], profiles=profiles).sha256
    with pytest.raises(BuildError, match=r"m\.onnx for these architectures: unknown: sm81; .* knows .*sm80"):
        build_engine(model, engine, "rtx", arch=["sm80", "sm81"], profiles=profiles)
    with pytest.raises(BuildError, match=r"builder refuses m\.onnx: .*sm75.*int4"):
        build_engine(model, engine, "rtx", arch=["sm75"], profiles=profiles)


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("profiles", "reason"),
    [
        ({}, r"input 'x' has dynamic shape \[-1, 64\] and no \(min, opt, max\) shapes are given"),
        ({"x": ((1, 32), (4, 32), (8, 32))}, r"\[8, 32\] \(min, opt, max\) do not fit input 'x' of shape \[-1, 64\]"),
        ({"x": ((4, 64), (1, 64), (8, 64))}, r"do not fit input 'x'"),
        ({"x": ((1,), (4,), (8,))}, r"do not fit input 'x'"),
        ({"z": ((1, 64), (4, 64), (8, 64))}, r"there is no input 'z'"),
    ],
)
def test_dynamic_input_needs_a_profile_that_fits(tmp_path: Path, profiles: Any, reason: str) -> None:
    model, engine = int8_matmul(tmp_path / "m.onnx"), tmp_path / "m.engine"
    with pytest.raises(BuildError, match=reason):
        build_engine(model, engine, "rtx", profiles=profiles)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_parse_error_names_the_node_and_the_reason_and_keeps_the_old_engine(tmp_path: Path) -> None:
    g = Graph()
    g.op("Relu", [g.qdq("x", "act", np.uint8, 128)], "y")
    model, engine = g.save(tmp_path / "m.onnx", [4, 64], [4, 64]), tmp_path / "m.engine"
    engine.write_bytes(b"an earlier engine")
    with pytest.raises(BuildError) as caught:
        build_engine(model, engine, "rtx", profiles={})
    assert "parser refuses m.onnx: node 'n_act_q' (QuantizeLinear): " in str(caught.value)
    assert "Non-zero zero point is not supported" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert engine.read_bytes() == b"an earlier engine"
    assert sorted(tmp_path.iterdir()) == [engine, model]


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("content", "reason"), [(b"", "no graph with an output"), (b"not an onnx file", "parser refuses")]
)
def test_file_that_is_no_model_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(content)
    with pytest.raises(BuildError, match=reason):
        build_engine(model, tmp_path / "m.engine", "rtx", profiles={})


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_crash_of_the_builder_is_an_error_message(tmp_path: Path) -> None:
    g = Graph()
    quotient = g.op("Div", [g.const("one", [1], np.int32), g.const("zero", [0], np.int32)], "quotient")
    g.op("Add", ["x", g.op("Cast", [quotient], "f", to=TensorProto.FLOAT)], "y")
    model = g.save(tmp_path / "m.onnx", [4, 64], [4, 64])
    with pytest.raises(BuildError, match=r"crashed \(SIGFPE\) on m\.onnx; an integer Div or Mod by a constant zero"):
        build_engine(model, tmp_path / "m.engine", "rtx", profiles={})
    assert list(tmp_path.iterdir()) == [model]


def impostor(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str) -> None:
    """Put a module named `tensorrt_rtx` with this code before the real one, for child processes."""
    folder.mkdir()
    (folder / "tensorrt_rtx.py").write_text(code, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize(
    ("code", "timeout_s", "reason"),
    [
        ("import time; time.sleep(60)", 0.5, r"did not finish m\.onnx in 0\.5 s"),
        ("import os; os.kill(os.getpid(), 11)", 60.0, r"crashed \(SIGSEGV\) on m\.onnx; very deep graphs"),
        ("import os; os.write(2, b'a last word\\n'); os.abort()", 60.0, r"crashed \(SIGABRT\) on m\.onnx; a last word"),
        ("raise OSError('no space left')", 60.0, r"failed on m\.onnx: OSError: no space left"),
    ],
)
def test_every_end_of_the_child_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, timeout_s: float, reason: str
) -> None:
    impostor(monkeypatch, tmp_path / "modules", code)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(BuildError, match=reason):
        build_engine(tmp_path / "m.onnx", out / "m.engine", "rtx", profiles={}, timeout_s=timeout_s)
    assert list(out.iterdir()) == []


def test_child_runs_with_a_deep_stack_and_drops_no_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = "import resource as r; raise OSError(r.getrlimit(r.RLIMIT_STACK)[0], r.getrlimit(r.RLIMIT_CORE)[0])"
    impostor(monkeypatch, tmp_path / "modules", report)
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = builder.STACK_BYTES if hard == resource.RLIM_INFINITY else min(builder.STACK_BYTES, hard)
    with pytest.raises(BuildError, match=rf"OSError: \[Errno {stack}\] 0$"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", "rtx", profiles={})


def test_folder_that_does_not_exist_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        build_engine(tmp_path / "m.onnx", tmp_path / "none" / "m.engine", "rtx", profiles={})


def test_architectures_are_refused_for_full_tensorrt(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="architectures are for rtx"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.engine", "tensorrt", arch=["sm80"], profiles={})


@pytest.mark.parametrize(
    ("working", "requested", "flavor"),
    [
        (("tensorrt", "tensorrt_rtx"), "auto", "tensorrt"),
        (("tensorrt_rtx",), "auto", "rtx"),
        ((), "auto", None),
        (("tensorrt_rtx",), "tensorrt", None),
        (("tensorrt", "tensorrt_rtx"), "rtx", "rtx"),
    ],
)
def test_flavor_is_the_first_that_works(
    monkeypatch: pytest.MonkeyPatch, working: tuple[str, ...], requested: Any, flavor: str | None
) -> None:
    monkeypatch.setattr(build, "_works", working.__contains__)
    assert available_flavor(requested) == flavor


def test_module_that_does_not_import_is_no_flavor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    impostor(monkeypatch, tmp_path / "modules", "raise ImportError('libnvinfer.so: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    assert available_flavor("rtx") is None


@pytest.mark.tensorrt
@pytest.mark.usefixtures("rtx")
def test_probing_imports_no_engine_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")  # the fixture imported it
    assert available_flavor("rtx") == "rtx"
    assert "tensorrt_rtx" not in sys.modules


def test_full_tensorrt_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(Builder=object))
    monkeypatch.setattr(builder, "gpu_count", lambda: 0)
    assert not builder.can_build("tensorrt")
    assert builder.can_build("tensorrt_rtx")
    monkeypatch.setattr(builder, "gpu_count", lambda: 1)
    assert builder.can_build("tensorrt")


def test_library_that_logs_no_table_is_asked_through_its_inspector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = MagicMock(__version__="11.4")
    trt.ILogger = type("ILogger", (), {"__init__": lambda self: None})
    trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED = 1
    network = trt.Builder.return_value.create_network.return_value
    network.num_inputs, network.num_outputs = 0, 1
    trt.Builder.return_value.build_serialized_network.return_value = b"engine"
    inspector = trt.Runtime.return_value.deserialize_cuda_engine.return_value.create_engine_inspector.return_value
    inspector.get_engine_information.return_value = "Layers:\nName: a, LayerType: gemm"
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    request = {"module": "tensorrt", "model": "m", "engine": str(tmp_path / "e"), "arch": [], "profiles": {}}
    request["plugins"] = None
    result = builder.build(request)
    assert result["layer_table"] == "Layers:\nName: a, LayerType: gemm"
    assert result["version"] == "11.4"
    assert (tmp_path / "e").read_bytes() == b"engine"
    config = trt.Builder.return_value.create_builder_config.return_value
    config.set_compute_capability.assert_not_called()
    assert config.max_aux_streams == 0
