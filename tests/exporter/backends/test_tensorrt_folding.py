"""The evidence for compressed and folded weights, on layer tables written by hand: no engine is needed."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.backends.tensorrt.build import EngineBuild
from exporter.backends.tensorrt.folding import PackedWeight, folded_weights, packed_weights, stored_weights
from exporter.backends.tensorrt.layer_table import EngineLayer, EngineTensor, parse_layer_table

TABLE = (
    "Layers:\n"
    "Name: __mye1_0_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, "
    "Metadata: \n"
    "Name: n_y_myl0_1, LayerType: gemm, Inputs: [ { Name: a], {b, Dimensions: [-1,64], Strides: [64,1], "
    "StrideOrder: [1,0], Datatype: Int8, Format: (Linear) Row major linear format }], Constants: [ "
    "{ Name: w], {,_constantInt8_myl0, Dimensions: [64,48], Strides: [48,1], StrideOrder: [1,0], Datatype: Int8, "
    "Format: (Linear) Row major linear format }, { Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], "
    "Datatype: Float, Format: (Linear) Row major linear format }], Outputs: [ { Name: o, Dimensions: [-1,48], "
    "Strides: [48,1], StrideOrder: [1,0], Datatype: Float, Format: (Linear) Row major linear format }], "
    "TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: n_y][ONNX Layer: a[0], Metadata: ]b/{c}]\n"
    "Name: __myl_MulAdd_myl0_2, LayerType: kgen, Inputs: [], Constants: [], Outputs: [], "
    "TacticName: __myl_MulAdd_0x1d2b03b1ff19ba30edd39ba0cc44d663, StreamId: 0, Metadata: [ONNX Layer: n_y]\n"
    "\n"
    "I/O Tensors:\n"
    " Name: x, IOMode: Input, DataType: Float, Dimensions: [-1,64]\n"
)


def layer(
    nodes: tuple[str, ...], *constants: tuple[str, tuple[int, ...]], kind: str = "gemm", inputs: str = "Int8"
) -> EngineLayer:
    tensors = tuple(EngineTensor(f"c{index}", dtype, dims) for index, (dtype, dims) in enumerate(constants))
    return EngineLayer("n_myl0_0", kind, "", nodes, (EngineTensor("a", inputs, (-1, 64)),), tensors)


def engine_of(*layers: EngineLayer, path: Path = Path("none")) -> EngineBuild:
    return EngineBuild(path, "rtx", "1", 1, "", layers, 0, 0, (), 0.0)


def weight(name: str, *dims: int, dtype: str = "int8") -> PackedWeight:
    return PackedWeight(name, dtype, dims, f"{name}_dq", (f"{name}_mm",))  # type: ignore[arg-type]  # a literal


def test_table_is_read_whatever_the_names_hold() -> None:
    shapes, gemm, epilogue = parse_layer_table(TABLE)
    assert (shapes.kind, shapes.nodes, shapes.constants) == ("shape_call", (), ())
    assert gemm == EngineLayer(
        name="n_y_myl0_1",
        kind="gemm",
        tactic="",
        nodes=("n_y", "a[0], Metadata: ]b/{c}"),
        inputs=(EngineTensor("a], {b", "Int8", (-1, 64)),),
        constants=(EngineTensor("w], {,_constantInt8_myl0", "Int8", (64, 48)), EngineTensor("alpha", "Float", (1,))),
    )
    assert (gemm.kernel, epilogue.kernel) == ("gemm (Int8)", "kgen MulAdd")
    assert parse_layer_table("") == ()


@pytest.mark.parametrize(
    ("packed", "stored"),
    [
        ((64, 48), (64, 48)),
        ((48, 64), (64, 48)),  # transposed
        ((63, 47), (64, 48)),  # padded
        ((16, 1, 3, 3), (16, 4, 3, 3)),  # depthwise, padded to 4 channels
        ((32, 16, 3), (32, 16, 3, 1)),  # one-dimensional convolution
        ((64, 48), (2, 32, 48)),  # in blocks
        ((64, 48), (1, 64, 48)),
    ],
)
def test_packed_constant_of_any_layout_is_the_weight(packed: tuple[int, ...], stored: tuple[int, ...]) -> None:
    assert folded_weights(engine_of(layer(("w_dq",), ("Int8", stored))), [weight("w", *packed)]) == []
    assert folded_weights(engine_of(layer(("w_dq",), ("Float", stored))), [weight("w", *packed)]) == ["w"]


@pytest.mark.parametrize("stored", [(64, 16), (128,), (1,), (12, 3, 8, 8)])
def test_other_packed_constants_are_not_the_weight(stored: tuple[int, ...]) -> None:
    (found,) = stored_weights(engine_of(layer(("w_dq",), ("Int8", stored))), [weight("w", 64, 48)])
    assert found.state == "missing"


def test_zeros_that_pad_an_activation_are_not_the_weight() -> None:
    padding = layer(("w_dq",), ("Int8", (1, 12, 3, 8, 8)), kind="kgen")
    assert folded_weights(engine_of(padding), [weight("w", 12, 1, 3, 3)]) == ["w"]


def test_type_matters() -> None:
    int4 = weight("w", 64, 48, dtype="int4")
    assert folded_weights(engine_of(layer(("w_dq",), ("Int8", (64, 48)))), [int4]) == ["w"]
    assert folded_weights(engine_of(layer(("w_dq",), ("Int4", (64, 48)))), [int4]) == []


def test_stacked_weights_share_a_constant_that_has_room_for_all() -> None:
    q, k, v = weight("q", 64, 64), weight("k", 64, 16), weight("v", 64, 16)
    names = ("q_dq", "k_dq", "v_dq")
    assert folded_weights(engine_of(layer(names, ("Int8", (64, 96)))), [q, k, v]) == []
    assert len(folded_weights(engine_of(layer(names, ("Int8", (64, 80)))), [q, k, v])) == 1


def test_one_constant_does_not_stand_for_two_weights() -> None:
    both = layer(("a_dq", "b_dq"), ("Int8", (64, 48)), ("Half", (64, 48)))
    assert len(folded_weights(engine_of(both), [weight("a", 64, 48), weight("b", 64, 48)])) == 1


def test_a_constant_stands_for_all_weights_of_its_codes() -> None:
    merged = engine_of(layer(("b_dq", "a_mm"), ("FP8", (64, 48))), layer(("b_dq", "b_mm"), ("FP8", (64, 48))))
    a, b = (weight(name, 64, 48, dtype="fp8") for name in "ab")
    codes = np.arange(64 * 48).reshape(64, 48).clip(max=400).astype(ml_dtypes.float8_e4m3fn)
    assert folded_weights(merged, [a, b], {"a": codes, "b": codes}) == []
    assert folded_weights(merged, [a, b], {"a": codes, "b": codes[::-1]}) == ["a"]


def test_a_single_number_is_not_missed() -> None:
    scaled = layer(("w_dq", "scale_dq", "w_mm"), ("Int8", (64, 1)), ("Float", (1,)), kind="kgen")
    found = stored_weights(engine_of(scaled), [weight("w", 64, 1), weight("scale", 1, 1)])
    assert [part.state for part in found] == ["compressed", "compressed"]


def test_layers_without_names_are_counted_by_shape() -> None:
    three = [weight(name, 64, 48) for name in "abc"]
    two = engine_of(layer((), ("Int8", (64, 48))), layer((), ("Int8", (64, 48))))
    assert folded_weights(two, three) == ["c"]


def test_second_use_of_a_weight_that_is_folded_counts() -> None:
    gather = layer(("w_dq",), ("Int8", (300, 64)), kind="kgen")
    head = layer(("w_dq", "w_mm"), ("Float", (64, 300)))
    position = layer(("w_dq",), ("Float", (300, 64)), kind="kgen")
    assert folded_weights(engine_of(gather, head), [weight("w", 300, 64)]) == ["w"]
    assert folded_weights(engine_of(gather, position), [weight("w", 300, 64)]) == []


def test_kernels_name_the_separate_dequantization_too() -> None:
    unpack = layer(("w_dq",), ("Int4", (64, 48)), kind="kgen", inputs="Float")
    matmul = layer(("w_mm",), inputs="Half")
    (found,) = stored_weights(engine_of(unpack, matmul), [weight("w", 64, 48, dtype="int4")])
    assert found.kernels == ("kgen (Float)", "gemm (Half)")


def test_rows_too_short_to_prove_anything_prove_nothing(tmp_path: Path) -> None:
    codes = np.arange(64, dtype=np.int8).reshape(8, 8)
    engine = tmp_path / "m.engine"
    engine.write_bytes(codes.tobytes())
    assert folded_weights(engine_of(path=engine), [weight("w", 8, 8)], {"w": codes}) == ["w"]
    wide = codes.reshape(4, 16)
    assert folded_weights(engine_of(path=engine), [weight("w", 4, 16)], {"w": wide}) == []


def test_packed_weights_are_read_from_the_model(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=0),
        helper.make_node("Transpose", ["d"], ["t"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["h"], name="first"),
        helper.make_node("MatMul", ["h", "d"], ["y"], name="second"),
        helper.make_node("DequantizeLinear", ["codes", "one"], ["input_dq"], name="of_an_input"),
    ]
    floats = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y", "input_dq")]
    codes = helper.make_tensor_value_info("codes", TensorProto.INT8, [4])
    constants = {"w": np.zeros((6, 8), np.int8), "s": np.ones(6, np.float32), "one": np.float32(1)}
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", [floats[0], codes], floats[1:], initializers)
    onnx.save(helper.make_model(graph), str(tmp_path / "m.onnx"))
    expected = PackedWeight("w", "int8", (6, 8), "node_of_d", ("first", "second"))
    assert packed_weights(tmp_path / "m.onnx") == (expected,)
