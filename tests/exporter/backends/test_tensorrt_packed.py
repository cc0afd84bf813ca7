"""Zero points, few bits, groups of outputs and codebooks in native layers: same values, and engines that stay small."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from exporter.backends.tensorrt.bundle import EngineResult, finish
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.backends.tensorrt.packed import pack_plane, unpacking_table
from exporter.lowering.lowered import Lowered
from passes.act_quant import ActQuant
from passes.base import Program
from passes.calibration import run_graph
from passes.fold_bn import FoldBatchNorm
from runtimes.ort import OnnxRuntime
from tests.exporter.backends.test_onnx_lowbit import Make, affine, codebooks, with_weights
from tests.exporter.compiled import program_of, quantized, sqnr
from tests.passes.nets import seeded

SAME = 95.0
"""dB between two float32 evaluations: sums of 512 products carry a relative error of about 3e-6 (110 dB); 15 dB for
cancellation of the two products of a weight with zero points."""

SIZE = 512


class Pair(nn.Module):
    """Two linear layers."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(columns, rows), nn.Linear(rows, columns, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, columns] -> [N, T, columns]."""
        y: Tensor = self.second(torch.relu(self.first(x)))
        return y


class Others(nn.Module):
    """An embedding, a convolution and a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, 32)
        self.conv = nn.Conv1d(32, 48, 3, padding=1)
        self.up = nn.ConvTranspose1d(48, 16, 2, stride=2)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T] -> [N, 16, 2 T]."""
        y: Tensor = self.up(torch.relu(self.conv(self.table(tokens).transpose(1, 2))))
        return y


def numbers(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(7))}


def pair(make: Make, columns: int = SIZE, rows: int = SIZE) -> Program:
    program = program_of(seeded(lambda: Pair(columns, rows)), numbers(4, 3, columns), rules=TensorRTBackend.rules)
    return with_weights(program, {"first": make, "second": make})


def parity(lowered: Lowered, batch: dict[str, Tensor]) -> float:
    session = OnnxRuntime(optimize=False).load(lowered.artifact)
    (value,) = session.run({name: tensor.numpy() for name, tensor in batch.items()}).values()
    return sqnr(run_graph(lowered.graph, [batch])[0][0], torch.from_numpy(value))


def built(lowered: Lowered, folder: Path) -> EngineResult:
    pytest.importorskip("tensorrt_rtx")
    return finish(lowered.artifact.model.parent, folder / "model.engine", "rtx")


# What the engine's constants may take, over the float16 weights: code bits / 16, scales and zero points as the case
# says (32 bits where they are floats, 8 where they are quantized), 12 KB of unpacking tables or 16 KB of codebooks for
# two matrices of 512 KB, biases of 4 KB.
CASES = {
    "int3 quantized meta": (affine(3, 64, meta=128), (3 + 16 / 64) / 16 + 0.03),
    "int3 float meta": (affine(3, 64), (3 + 64 / 64) / 16 + 0.03),
    "int3 a scale a row": (affine(3, -1), 3 / 16 + 0.04),
    "int3 groups of outputs": (affine(3, 64, axis=0, meta=128), (3 + 16 / 64) / 16 + 0.03),
    "int2 quantized meta": (affine(2, 64, meta=128), (2 + 16 / 64) / 16 + 0.03),
    "int1": (affine(1, 64, meta=0), (1 + 16 / 64) / 16 + 0.03),
    "int4 zeros between codes": (affine(4, 64), (4 + 64 / 64) / 16 + 0.03),
    "int4 groups of outputs": (affine(4, 64, axis=0, meta=128), (4 + 16 / 64) / 16 + 0.03),
    "int8 zeros": (affine(8, -1, zeros="whole"), 8 / 16 + 0.03),
    "codebooks 1x8": (codebooks(1, 8, 8), 1 / 16 + 0.03),
    "codebooks 2x8": (codebooks(2, 8, 8), 2 / 16 + 0.06),
    "codebooks 1x12 of two outputs": (codebooks(1, 12, 8, og=2), 16 / 16 / 16 + 0.53),  # codebook of 256 KB a layer
    "codebooks with tables": (codebooks(2, 8, 8, scale_bits=4, value_bits=8, in_scales=True), (2 + 1) / 16 + 0.09),
}


@pytest.mark.ort
@pytest.mark.tensorrt
@pytest.mark.parametrize("label", CASES)
def test_the_engine_stays_as_small_as_the_format(label: str, tmp_path: Path) -> None:
    make, most = CASES[label]
    program = pair(make)
    lowered = TensorRTBackend().lower(program, tmp_path)
    onnx.checker.check_model(str(lowered.artifact.model), full_check=True)
    assert parity(lowered, numbers(3, 3, SIZE)) >= SAME  # another batch than the one captured
    result = built(lowered, tmp_path)
    assert result.folded == ()
    float16 = 2 * 2 * SIZE * SIZE
    assert result.build.weights_bytes <= most * float16
    for layer in lowered.layers:  # no kernel of a layer is left out of the report
        assert result.kernels[layer.name]
        assert 0 < result.bytes[layer.name] <= most * float16 / 2


@pytest.mark.ort
@pytest.mark.parametrize(
    "make",
    [
        affine(3, 16),
        affine(3, 50),
        affine(2, 48),
        affine(4, 64),
        affine(8, 16, zeros="whole"),
        codebooks(3, 4, 5),
        codebooks(2, 4, 5, in_scales=True, scale_bits=2, shared=(5, 1), value_bits=1, value_groups=2),
    ],
)
def test_rows_that_bytes_and_groups_do_not_divide(make: Make, tmp_path: Path) -> None:
    lowered = TensorRTBackend().lower(pair(make, columns=100, rows=35), tmp_path)
    assert parity(lowered, numbers(2, 3, 100)) >= SAME
    assert built(lowered, tmp_path).folded == ()


@pytest.mark.ort
@pytest.mark.tensorrt
@pytest.mark.parametrize(
    "makes",
    [
        {"table": affine(4, -1), "conv": affine(3, 16), "up": affine(2, 12, zeros="whole")},
        {"table": affine(8, -1, zeros="whole"), "conv": codebooks(2, 8, 8), "up": codebooks(1, 8, 4)},
        {"table": codebooks(2, 8, 8), "conv": affine(4, -1), "up": affine(3, 12, axis=0)},
    ],
    ids=["affine", "codebooks", "mixed"],
)
def test_other_layers(makes: dict[str, Make], tmp_path: Path) -> None:
    tokens = {"tokens": torch.arange(24).reshape(4, 6)}
    program = program_of(seeded(Others), tokens, rules=TensorRTBackend.rules)
    lowered = TensorRTBackend().lower(with_weights(program, makes), tmp_path)
    assert parity(lowered, tokens) >= SAME
    assert built(lowered, tmp_path).folded == ()


@pytest.mark.ort
def test_integer_layers_take_zero_points_through_sums(tmp_path: Path) -> None:
    program = quantized(
        program_of(seeded(lambda: Pair(64, 48)), numbers(4, 3, 64), rules=TensorRTBackend.rules),
        FoldBatchNorm(),
        ActQuant(),
    )
    make = affine(4, -1, zeros="whole")
    lowered = TensorRTBackend().lower(with_weights(program, {"first": make, "second": make}), tmp_path)
    # One rounding boundary crossed by another order of sums: a step in 255 of one of 576 values, about 70 dB.
    assert parity(lowered, numbers(4, 3, 64)) >= 60
    assert {layer.format for layer in lowered.layers} == {"int8 and a product of block sums"}
    result = built(lowered, tmp_path)
    assert result.folded == ()
    assert all("gemm (Int8)" in kernel for kernel in result.kernels.values())


def test_planes_are_unpacked_by_the_table() -> None:
    for width in (1, 2):
        codes = np.random.default_rng(0).integers(0, 2**width, (5, 19)).astype(np.uint8)
        unpacked = unpacking_table(width)[pack_plane(codes, width)].reshape(5, -1)
        np.testing.assert_array_equal(unpacked[:, :19], codes)
        assert unpacked.shape[1] == 24
