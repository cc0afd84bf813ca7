"""The custom operators: rounding, ranges, blocks, zero rows; and onnxruntime's QuantizeLinear to the last bit."""

import numpy as np
import pytest
import torch
from torch import Tensor

from passes.ops import TINY_SCALE, dequantize, fake_quantize, fake_quantize_dynamic


def static(x: Tensor, scale: float, zero_point: int, low: int = 0, high: int = 255) -> Tensor:
    return fake_quantize(x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), low, high)


def test_ties_go_to_even_and_codes_are_clamped() -> None:
    x = torch.tensor([-3.0, -1.5, -0.5, 0.5, 1.5, 2.5, 3.6, 99.0])
    assert static(x, 1.0, 2, 0, 7).tolist() == [-2.0, -2.0, 0.0, 0.0, 2.0, 2.0, 4.0, 5.0]
    assert x[0] == -3.0  # the input is left alone


def test_zero_is_exact_and_the_grid_is_fixed() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = static(x, 0.0371, 113)
    assert static(torch.zeros(3), 0.0371, 113).tolist() == [0.0, 0.0, 0.0]
    assert static(once, 0.0371, 113).equal(once)


@pytest.mark.ort
@pytest.mark.parametrize("zero_point", [0, 37, 128, 255])
@pytest.mark.parametrize("scale", [0.5, 0.1, 0.0371, 1 / 3, 1e-3])
def test_onnxruntime_crosses_the_same_boundaries(scale: float, zero_point: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    step = np.float32(scale)
    ties = (np.arange(-300, 300, dtype=np.float32) + np.float32(0.5)) * step
    noise = np.random.default_rng(0).normal(0, 100 * scale, 5000).astype(np.float32)
    near = [np.nextafter(ties, np.float32(sign * np.inf)) for sign in (1, -1)]
    x = np.concatenate([ties, *near, noise])
    constants = [numpy_helper.from_array(step, "s"), numpy_helper.from_array(np.uint8(zero_point), "z")]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = torch.from_numpy(session.run(None, {"x": x})[0])
    assert static(torch.from_numpy(x), float(step), zero_point).equal(expected)


def test_dynamic_scales_each_row_by_its_largest_value() -> None:
    x = torch.tensor([[1.0, -127.0, 0.4], [0.5, 0.25, 1.27]])
    expected = torch.tensor([[1.0, -127.0, 0.0], [0.5, 0.25, 1.27]])
    torch.testing.assert_close(fake_quantize_dynamic(x, 8, -1), expected, rtol=1e-6, atol=0)
    four = fake_quantize_dynamic(x, 4, -1)
    assert (four[0] / (127 / 7)).round().tolist() == [0, -7, 0]


def test_dynamic_rows_of_zeros_stay_zeros() -> None:
    x = torch.zeros(2, 3, 8)
    x[1, 1] = TINY_SCALE / 100  # below the floor of a scale
    assert fake_quantize_dynamic(x, 8, -1).equal(torch.zeros(2, 3, 8))
    assert fake_quantize_dynamic(x, 8, 4).equal(torch.zeros(2, 3, 8))


def test_dynamic_blocks_are_rows_of_their_own() -> None:
    x = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0))
    blocks = [fake_quantize_dynamic(part.contiguous(), 8, -1) for part in x.split(4, dim=-1)]
    assert fake_quantize_dynamic(x, 8, 4).equal(torch.cat(blocks, -1))  # the last block is short
    assert fake_quantize_dynamic(x, 8, 10).equal(fake_quantize_dynamic(x, 8, -1))


def test_dequantize_per_tensor_channel_and_group() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5], [-1, -2, -3, -4, -5]], dtype=torch.int8)
    tensor = dequantize(codes, torch.tensor([[0.5]]), None, 8, 0)
    assert tensor.equal(codes * 0.5)
    channel = dequantize(codes, torch.tensor([[0.5], [2.0]]), None, 8, -1)
    assert channel.equal(codes * torch.tensor([[0.5], [2.0]]))
    scale = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    grouped = dequantize(codes, scale, None, 8, 2)
    assert grouped.tolist() == [[1, 2, 30, 40, 500], [-2, -4, -60, -80, -1000]]


def test_dequantize_takes_zero_points_off_first() -> None:
    codes = torch.tensor([[0, 15, 7]], dtype=torch.uint8)
    grouped = dequantize(codes, torch.tensor([[1.0, 2.0]]), torch.tensor([[8.0, 3.0]]), 4, 2)
    assert grouped.tolist() == [[-8.0, 7.0, 8.0]]
    assert codes.tolist() == [[0, 15, 7]]


def test_operators_keep_their_promises_to_torch() -> None:
    x = torch.randn(4, 6)
    torch.library.opcheck(
        torch.ops.qexport.fake_quantize.default,
        (x, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), 0, 255),
        test_utils=("test_schema", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.qexport.fake_quantize_dynamic.default, (x, 8, 4), test_utils=("test_schema", "test_faketensor")
    )
    codes = torch.ones(4, 6, dtype=torch.int8)
    torch.library.opcheck(
        torch.ops.qexport.dequantize.default,
        (codes, torch.ones(4, 3), None, 8, 2),
        test_utils=("test_schema", "test_faketensor"),
    )
