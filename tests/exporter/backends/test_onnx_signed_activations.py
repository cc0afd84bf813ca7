"""A program that also serves TensorRT has signed symmetric activations: convolutions stay on onnxruntime's integers."""

from pathlib import Path

import pytest
import torch
from torch import nn

from exporter.backends import backend_for
from exporter.compile import rules_for
from exporter.kernels import kernel_of_layers, optimized_kernels
from exporter.validate import compare_outputs, eager_session
from passes import PASSES
from passes.act_quant import ActQuant
from passes.base import Pipeline
from passes.rtn import RTN
from runtimes.ort import OnnxRuntime
from tests.passes.nets import program_of

pytestmark = pytest.mark.ort


class Net(nn.Module):
    """A convolution in front of each kind of activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(n, 8, 3, padding=1) for n in (1, 8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = nn.functional.hardtanh(self.second(x) * 1.0, 0.0, 0.5)
        x = nn.functional.relu6(self.third(x))
        return self.head(x.mean((2, 3)))


def test_a_quantizer_in_front_of_the_activation_changes_nothing_and_keeps_the_integer_kernel(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backends = [backend_for("onnx"), backend_for("trt")]
    program = program_of(Net().eval(), {"x": torch.randn(8, 1, 8, 8)})
    program.rules = rules_for(backends)
    Pipeline([ActQuant(), RTN()], PASSES).run(program)
    lowered = backends[0].lower(program, tmp_path)

    batches = program.calibration.batches
    plain, graph = eager_session(program, lowered.graph), eager_session(program, program.graph)
    # the same codes on the same grid: rounding to a grid that holds 0 commutes with clamping
    assert compare_outputs(graph, plain, batches)["output"].max_abs == 0.0
    unoptimized = OnnxRuntime(optimize=False).load(lowered.artifact)
    assert compare_outputs(plain, unoptimized, batches)["output"].sqnr_db >= 60
    kernels = kernel_of_layers(lowered.artifact.model, optimized_kernels(lowered.artifact))
    assert kernels["first"] == "QLinearConv"
    assert kernels["third"] == "QLinearConv"
