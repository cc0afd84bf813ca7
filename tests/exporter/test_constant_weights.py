"""Weights and biases that a model computes at every call: the captured graph has them as constants of its layers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.act_quant import ActQuant
from passes.base import Program
from passes.calibration import run_graph
from passes.gptq import GPTQ
from tests.passes.nets import program_of, seeded

INPUTS, OUTPUTS = 6, 5


class Computed(nn.Module):
    """A network of parameters w [5, 6], square [5, 5], gain [5, 1], bias [5], kernel [4, 1, 2]."""

    def __init__(self, function: Callable[["Computed", Tensor], Tensor]) -> None:
        super().__init__()
        self.w, self.square = nn.Parameter(torch.randn(OUTPUTS, INPUTS)), nn.Parameter(torch.randn(OUTPUTS, OUTPUTS))
        self.gain, self.bias = nn.Parameter(torch.rand(OUTPUTS, 1)), nn.Parameter(torch.randn(OUTPUTS))
        self.kernel = nn.Parameter(torch.randn(4, 1, 2))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """[N, 6] -> what the function says."""
        return self.function(self, x)


FORMS: dict[str, tuple[Callable[[Computed, Tensor], Tensor], int]] = {
    "scaled": (lambda net, x: F.linear(x, net.w * net.gain, net.bias), 1),
    "transposed": (lambda net, x: x @ net.w.t(), 1),
    "a product of two": (lambda net, x: F.linear(x, net.square @ net.w), 1),
    "computed bias": (lambda net, x: F.linear(x, net.w, net.bias.exp() - 1), 1),
    "one weight in two layers": (lambda net, x: F.linear(F.linear(x, net.w * 2), (net.w * 2).t()), 2),
    "standardized kernel": (lambda net, x: F.conv1d(x[:, None], net.kernel / net.kernel.norm(), net.bias[:4] * 2), 1),
    "bias of the input, addmm": (lambda net, x: torch.addmm(x[:, :OUTPUTS], x, net.w.t()), 1),
    "bias of the input, linear": (lambda net, x: F.linear(x, net.w, x.mean(0)[:OUTPUTS]), 1),
}
"""{name: (the function, layers in it)}."""


def _program(name: str) -> tuple[Computed, Program]:
    network = seeded(lambda: Computed(FORMS[name][0]))
    assert isinstance(network, Computed)
    return network, program_of(network, {"x": torch.zeros(8, INPUTS)})


@pytest.mark.parametrize("name", FORMS)
def test_weights_are_constants_and_the_function_stays(name: str) -> None:
    network, program = _program(name)
    layers = program.layers()
    assert len(layers) == FORMS[name][1]
    for layer in layers:
        assert layer.weight.op == "get_attr"
        assert layer.bias is None or layer.bias.op == "get_attr"
    for batch in program.calibration.batches:
        with torch.no_grad():
            torch.testing.assert_close(run_graph(program.graph, [batch])[0][0], network(batch["x"]))


@pytest.mark.parametrize("name", FORMS)
def test_such_layers_are_quantized(name: str) -> None:
    _, program = _program(name)
    result = GPTQ(bits=8, group_size=-1).run(program)
    ActQuant().run(program)
    assert len(result.changed) == FORMS[name][1]
    assert result.skipped == ()


def test_weight_norm_is_one_weight() -> None:
    network = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(INPUTS, OUTPUTS)))
    program = program_of(network, {"input": torch.zeros(2, INPUTS)})
    (layer,) = program.layers()
    assert layer.name == "0"
    calls = [node for node in program.graph.graph.nodes if node.op == "call_function"]
    assert calls == [layer.node]


def test_a_weight_that_depends_on_the_input_is_no_layer() -> None:
    program = program_of(Computed(lambda net, x: F.linear(x, net.w * x.mean())), {"x": torch.zeros(2, INPUTS)})
    assert program.layers() == []


def test_a_convolution_whose_bias_depends_on_the_input_is_no_layer() -> None:
    network = Computed(lambda net, x: F.conv1d(x[:, None], net.kernel, x.mean(0)[:4]))
    assert program_of(network, {"x": torch.zeros(2, INPUTS)}).layers() == []
