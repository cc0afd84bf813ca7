"""Networks side by side: the values they give, and how few of them are alive at a time."""

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from exporter.lockstep import InStep, float_layers, run_nodes
from passes.graph import find_layers
from tests.passes.nets import program_of, seeded

DEPTH = 12


def _chain() -> tuple[nn.Module, fx.GraphModule, dict[str, Tensor]]:
    layers = [part for _ in range(DEPTH) for part in (nn.Linear(32, 32), nn.ReLU())]
    model = seeded(lambda: nn.Sequential(*layers))
    batch = {"input": torch.randn(8, 32)}
    return model, program_of(model, batch).graph, batch


def test_every_layer_is_seen_with_its_input_and_output() -> None:
    model, graph, batch = _chain()
    layers = {layer.name: layer for layer in find_layers(graph)}
    value, names = batch["input"], []
    for name, (given, output) in float_layers(graph, layers, batch):
        linear = model.get_submodule(name)
        assert torch.equal(given, value)
        expected = nn.functional.linear(value, linear.weight, linear.bias)
        assert torch.equal(torch.from_numpy(output), expected)
        value = expected.relu()
        names.append(name)
    assert names == list(layers)


def test_a_value_is_gone_once_its_last_reader_has_run() -> None:
    _, graph, batch = _chain()
    computed: list[weakref.ref[Tensor]] = []
    most = 0
    for node, _, value in run_nodes(graph, batch):
        if node.op == "call_function":
            computed.append(weakref.ref(value))
        del value
        most = max(most, sum(entry() is not None for entry in computed))
    # A node's value and its argument's; all 24 are kept if nothing is let go.
    assert len(computed) == 2 * DEPTH
    assert most == 2


def test_a_network_runs_no_further_than_it_is_asked_for() -> None:
    ran: list[str] = []

    def network() -> Any:
        for name in ("a", "b", "c"):
            ran.append(name)
            yield name, torch.zeros(1).numpy()

    side = InStep(network())
    side.take("b")
    assert ran == ["a", "b"]
    side.take("a")
    assert ran == ["a", "b"]
    with pytest.raises(KeyError):
        side.take("d")
