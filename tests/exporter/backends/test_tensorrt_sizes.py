"""Codebooks of layers as narrow as 256: what the file and the engine take, beside float16 weights."""

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from exporter.backends.tensorrt.bundle import finish, read_bundle
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.capture import Dynamic
from exporter.lowering.lowered import Dtype, Lowered
from passes.base import LayerRule, Program
from passes.weights import CodebookWeight
from tests.exporter.backends.test_onnx_lowbit import affine, codebooks, with_weights
from tests.exporter.backends.test_tensorrt_packed import SAME, SIZE, Pair, numbers, parity
from tests.exporter.compiled import program_of
from tests.passes.nets import seeded

WIDTH, HIDDEN = 256, 1024


class Block(nn.Module):
    """The layers of a transformer block of width 256, without what does not matter to their size."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 256] -> [N, T, 256]."""
        y: Tensor = self.fc2(torch.relu(self.fc1(self.out(self.q(x) + self.k(x) * self.v(x)))))
        return y


def in_16_bits(rows: int, columns: int, generator: torch.Generator) -> CodebookWeight:
    """Two codebooks of 256 entries of 8 values, all numbers exact in float16."""
    weight = codebooks(2, 8, 8)(rows, columns, generator)
    assert isinstance(weight, CodebookWeight)
    books, scales = weight.codebooks.half().float(), weight.scales.half().float()
    return dataclasses.replace(weight, codebooks=books, scales=scales)


def block() -> Program:
    program = program_of(seeded(Block), numbers(2, 3, WIDTH), rules=TensorRTBackend.rules)
    return with_weights(program, dict.fromkeys(("q", "k", "v", "out", "fc1", "fc2"), in_16_bits))


def share(lowered: Lowered) -> float:
    """Bytes of all weights over those of float16 ones."""
    params = {name: WIDTH * (HIDDEN if name.startswith("fc") else WIDTH) for name in lowered.taps}
    return sum(layer.bits_per_weight * params[layer.name] for layer in lowered.layers) / (16 * sum(params.values()))


@pytest.mark.ort
@pytest.mark.tensorrt
def test_two_codebooks_stay_below_sixteen_hundredths_in_native_layers(tmp_path: Path) -> None:
    lowered = TensorRTBackend().lower(block(), tmp_path)
    assert parity(lowered, numbers(2, 3, WIDTH)) >= SAME
    # Codes 1/8; of six codebooks of 8 KB 1/32; scales of 16 bits 0.003; shapes and factors of the nodes.
    assert share(lowered) <= 0.16
    pytest.importorskip("tensorrt_rtx")
    result = finish(tmp_path, tmp_path / "model.engine", "rtx")
    assert result.folded == ()
    biases = 4 * (4 * WIDTH + HIDDEN + WIDTH)
    assert (result.build.weights_bytes - biases) / (2 * (4 * WIDTH + 2 * HIDDEN) * WIDTH) <= 0.165  # and its own zeros


def test_two_codebooks_stay_below_sixteen_hundredths_in_plugins(tmp_path: Path) -> None:
    assert share(TensorRTBackend(plugins=True).lower(block(), tmp_path)) <= 0.16


@pytest.mark.ort
@pytest.mark.parametrize("bits", [2, 3])
def test_symmetric_codes_take_their_own_bits_where_that_is_asked_for(bits: int, tmp_path: Path) -> None:
    program = program_of(seeded(Block), numbers(2, 3, WIDTH), rules=TensorRTBackend.rules)
    program = with_weights(program, {"fc1": affine(bits, 64, zeros="none"), "fc2": affine(bits, 64, zeros="none")})
    program.layer_rules = (LayerRule("fc2", options={"weights_as": "fast"}),)
    lowered = TensorRTBackend(weights_as="compact").lower(program, tmp_path)
    assert parity(lowered, numbers(2, 3, WIDTH)) >= SAME
    taken = {layer.name: layer.bits_per_weight for layer in lowered.layers}
    scales = 32 / 64
    assert bits + scales <= taken["fc1"] <= bits + scales + 0.1
    assert 4 + scales <= taken["fc2"] <= 4 + scales + 0.1


def few(rows: tuple[int, ...], dynamic: Dynamic | None = None) -> Program:
    """Two layers of packed weights that see so many rows."""
    program = program_of(
        seeded(lambda: Pair(SIZE, SIZE)), numbers(*rows, SIZE), dynamic=dynamic, rules=TensorRTBackend.rules
    )
    return with_weights(program, {"first": affine(3, 64), "second": codebooks(2, 8, 8)})


def operators(lowered: Lowered) -> set[str]:
    return {node.op_type for node in onnx.load(lowered.artifact.model).graph.node}


@pytest.mark.ort
@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_weights_that_few_rows_read_take_no_scratch_memory(dtype: Dtype, tmp_path: Path) -> None:
    program = few((2, 1), dynamic={})
    lowered = TensorRTBackend(dtype=dtype).lower(program, tmp_path)
    assert "MatMul" not in operators(lowered)
    assert layers_of(lowered) == {"int3 decoded at every run", "aq_codebook decoded at every run"}
    if dtype == "float32":
        assert parity(lowered, numbers(2, 1, SIZE)) >= SAME
    pytest.importorskip("tensorrt_rtx")
    result = finish(tmp_path, tmp_path / "model.engine", "rtx")
    assert result.folded == ()
    assert result.build.scratch_bytes < 2 * SIZE * SIZE  # one weight in float16


def layers_of(lowered: Lowered) -> set[str]:
    return {layer.format for layer in lowered.layers}


@pytest.mark.parametrize(("largest", "tiny"), [(4, True), (5, False), (None, False)])
def test_the_largest_batch_decides(largest: int | None, tiny: bool, tmp_path: Path) -> None:
    profiles = {} if largest is None else {"x": ((1, 1, SIZE), (1, 1, SIZE), (largest, 1, SIZE))}
    program = few((2, 1), dynamic={"x": {0: "batch"}})
    lowered = TensorRTBackend(profiles=profiles).lower(program, tmp_path)
    assert ("MatMul" not in operators(lowered)) == tiny
    read = read_bundle(tmp_path).profiles["x"]
    assert read == (profiles["x"] if largest else ((1, 1, SIZE), (8, 1, SIZE), (32, 1, SIZE)))
