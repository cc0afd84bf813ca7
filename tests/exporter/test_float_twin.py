"""The float twin computes what the network with the same weights and without rounded activations does."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from exporter.float_twin import make_float
from passes.act_quant import ActQuant
from passes.base import Pass
from passes.rtn import RTN
from runtimes.base import Artifact
from runtimes.ort import OnnxRuntime
from tests.exporter.compiled import compiled, first, program_of, quantized

pytestmark = pytest.mark.ort

CLOSE = 1e-4
"""Relative: float32 sums of up to 64 products in another order, 2^-24 * 64, with room for cancellation."""


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.second(torch.relu(self.first(x)))
        return value


class Convs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, groups=8)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = self.second(torch.relu(self.first(x)))
        return value


@pytest.mark.parametrize(
    ("network", "shape", "activations", "weights"),
    [
        (Linears, (6, 64), [ActQuant()], RTN()),
        (Linears, (6, 64), [ActQuant(mode="token")], RTN()),
        (Linears, (6, 64), [], RTN(bits=4, group_size=32)),
        (Linears, (6, 64), [], RTN(bits=4, symmetric=False)),
        (Convs, (4, 3, 9, 9), [ActQuant()], RTN()),
        (Convs, (4, 3, 9, 9), [ActQuant()], RTN(group_size=0)),
    ],
)
def test_only_the_rounding_of_activations_is_gone(
    tmp_path: Path, network: type[nn.Module], shape: tuple[int, ...], activations: list[Pass], weights: RTN
) -> None:
    torch.manual_seed(0)
    module, batch = network(), {"x": torch.randn(shape)}
    done = compiled(quantized(program_of(module, batch), *activations, weights), tmp_path)
    expected = first(quantized(program_of(module, batch), weights).graph, batch)

    model = ir.load(done.path)
    assert make_float(model) == 2
    left = {node.op_type for node in model.graph}
    assert not left & {"QuantizeLinear", "DequantizeLinear", "MatMulInteger"}
    twin = tmp_path / "twin.onnx"
    ir.save(model, twin)
    artifact = done.lowered.artifact
    found = OnnxRuntime(threads=1).load(Artifact("onnxruntime", twin, artifact.inputs, artifact.outputs))
    output = found.run({"x": batch["x"].numpy()})[artifact.outputs[0]]
    assert np.abs(output - expected.numpy()).max() <= CLOSE * float(expected.abs().max())


def test_a_network_in_float_has_no_quantized_layers(tmp_path: Path) -> None:
    done = compiled(program_of(Linears(), {"x": torch.randn(2, 64)}), tmp_path)
    assert make_float(ir.load(done.path)) == 0
