"""8-bit floats: rounding, the file in onnxruntime, the engine's kernels and size, the checkpoint, what is refused."""

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from exporter.backends.base import LoweringError
from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.backends.tensorrt.bundle import finish
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.backends.tensorrt.widen import in_float32
from exporter.checkpoint import load_checkpoint, save_checkpoint
from exporter.evidence import gather
from passes.act_quant import ActQuant
from passes.base import PassError, Program
from passes.calibration import run_graph
from passes.ops import E4M3, fake_quantize
from passes.rtn import RTN, to_float8
from passes.weight_nodes import read_weight
from passes.weights import AffineWeight
from tests.exporter.backends.test_tensorrt_packed import SAME, Pair, numbers, parity
from tests.exporter.compiled import program_of, quantized, sqnr
from tests.passes.nets import seeded

FP8 = (RTN(format="fp8"), ActQuant(format="fp8"))
WIDTH = 512

E4M3_DB = 25.0
"""4 bits of a number, so errors of at most 2^-4 of it, 2^-4 / sqrt(3) of it or less when spread: 29 dB. The inputs and
weights of two layers in a row are four times that noise, less what averages out; 25 is below by more than a dB."""


class Convolution(nn.Module):
    """Two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(16, 32, 3, padding=1), nn.Conv2d(32, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 16, H, W] -> the same."""
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


def linear() -> Program:
    return program_of(seeded(lambda: Pair(WIDTH, WIDTH)), numbers(4, 3, WIDTH), rules=TensorRTBackend.rules)


def test_weights_are_the_nearest_floats_of_their_row() -> None:
    matrix = torch.randn(7, 33, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 7)[:, None]
    matrix[3] = 0
    weight = to_float8(matrix)
    assert weight.codes.dtype == E4M3
    expected = (matrix / weight.scale).numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(weight.codes.float().numpy(), expected)
    assert weight.codes.float().abs().amax(1).tolist() == [448.0, 448.0, 448.0, 0.0, 448.0, 448.0, 448.0]
    assert bool(((weight.dequantize() - matrix).abs() <= matrix.abs() / 16 + weight.scale * 2**-10).all())


def test_activations_past_the_largest_number_are_that_number() -> None:
    scale, zero = torch.tensor(0.5), torch.tensor(0, dtype=torch.int32)
    value = torch.tensor([0.0, 1.0, -1.03, 223.0, 300.0, -1e6])
    expected = [0.0, 1.0, -1.0, 224.0, 224.0, -224.0]  # 2.06 lies between 2 and 2.25
    assert fake_quantize(value, scale, zero, -448, 448).tolist() == expected


@pytest.mark.ort
@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_linear_layers_multiply_floats_of_8_bits(dtype: str, tmp_path: Path) -> None:
    program = quantized(linear(), *FP8)
    batch = program.calibration.batches
    assert sqnr(run_graph(program.reference, batch)[0][0], run_graph(program.graph, batch)[0][0]) >= E4M3_DB
    lowered = TensorRTBackend(arch=("sm89",), dtype=dtype).lower(program, tmp_path)  # type: ignore[arg-type]
    onnx.checker.check_model(str(lowered.artifact.model), full_check=True)
    with in_float32(lowered) as wide:
        assert parity(wide, dict(batch[0])) >= SAME
    assert {layer.format for layer in lowered.layers} == {"fp8"}
    model = onnx.load(lowered.artifact.model)
    kinds = [tensor.data_type for tensor in model.graph.initializer if "weight_codes" in tensor.name]
    assert kinds == [TensorProto.FLOAT8E4M3FN] * 2
    pytest.importorskip("tensorrt_rtx")
    result = finish(tmp_path, tmp_path / "model.engine", "rtx")
    assert result.folded == ()
    assert all("gemm (FP8)" in kernel for kernel in result.kernels.values())
    float16 = 2 * 2 * WIDTH * WIDTH
    scales = 2 * WIDTH * 8  # with the biases, in float32
    assert result.build.weights_bytes <= float16 / 2 + scales + 4096


@pytest.mark.ort
def test_convolutions_with_quantized_and_with_float_inputs(tmp_path: Path) -> None:
    for label, passes in (("all", FP8), ("weights", FP8[:1])):
        net = program_of(seeded(Convolution), numbers(2, 16, 6, 6), rules=TensorRTBackend.rules)
        program = quantized(net, *passes)
        (tmp_path / label).mkdir()
        lowered = TensorRTBackend().lower(program, tmp_path / label)
        assert parity(lowered, dict(program.calibration.batches[0])) >= SAME
        assert {layer.format for layer in lowered.layers} == {"fp8"}


def test_the_checkpoint_holds_the_floats(tmp_path: Path) -> None:
    program = quantized(linear(), *FP8)
    checkpoint = load_checkpoint(save_checkpoint(program, tmp_path))
    for layer in program.layers():
        weight, stored = read_weight(program.graph, layer), checkpoint.weights[layer.name]
        assert isinstance(weight, AffineWeight)
        assert isinstance(stored, AffineWeight)
        assert stored.codes.dtype == E4M3
        assert torch.equal(stored.codes.view(torch.uint8), weight.codes.view(torch.uint8))
        assert torch.equal(stored.scale, weight.scale)
        assert checkpoint.layers[layer.name].format == "fp8_channel"


def test_the_report_knows_their_width_and_that_nothing_is_clipped() -> None:
    for evidence in gather(quantized(linear(), *FP8)).values():
        assert (evidence.weight_bits, evidence.input_bits) == (8, 8)
        assert evidence.weight_clipped == 0
        # The range is that of inputs behind quantized layers; one of the 6144 behind float ones lies beyond.
        assert evidence.input_clipped is not None
        assert evidence.input_clipped < 0.001


def test_what_does_not_run_is_refused(tmp_path: Path) -> None:
    for work in FP8:
        onnx_program = program_of(seeded(lambda: Pair(32, 32)), numbers(4, 3, 32), rules=OnnxBackend.rules)
        with pytest.raises(PassError, match="target onnx does not run 8-bit floats") as caught:
            quantized(onnx_program, work)
        assert caught.value.fix == f"use {work.name}:bits=8"
    with pytest.raises(LoweringError, match="first: sm80 has no 8-bit floats; give --trt-arch sm89 or later"):
        TensorRTBackend(arch=("sm80", "sm89")).lower(quantized(linear(), *FP8), tmp_path)
    for passes in ((RTN(), ActQuant(format="fp8")), (RTN(format="fp8"), ActQuant())):
        with pytest.raises(LoweringError, match="first: 8-bit floats do not multiply integers"):
            TensorRTBackend().lower(quantized(linear(), *passes), tmp_path)


@pytest.mark.parametrize("options", [{"bits": 4}, {"group_size": 64}, {"symmetric": False}, {"format": "fp4"}])
def test_what_these_weights_are_not(options: dict[str, object]) -> None:
    with pytest.raises(PassError, match="format="):
        RTN(**{"format": "fp8", **options})  # type: ignore[arg-type]  # of mixed types
