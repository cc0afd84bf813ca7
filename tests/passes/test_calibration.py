"""Walking a graph over calibration data: the same values as a plain run, no more of them held than needed."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.calibration import Calibration, Stream, cut, run_graph, watch_values
from passes.graph import aten, call_before, find_layers, set_weight, tidy, weight_of
from passes.ops import FAKE_QUANTIZE_DYNAMIC
from tests.passes.nets import Decoder, InvertedResidual, program_of, seeded


class Chain(nn.Module):
    """Six linear layers in a row, the first one's output read again at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 8]."""
        first = F.relu(self.layers[0](x))
        y = first
        for layer in self.layers[1:]:
            y = F.relu(layer(y))
        return y + first


VECTOR = {"x": torch.zeros(4, 8)}


@pytest.mark.parametrize("net", [InvertedResidual, Decoder, Chain])
def test_stream_shows_the_values_of_a_plain_run(net: type[nn.Module]) -> None:
    inputs = {Chain: VECTOR, Decoder: {"x": torch.zeros(2, 4, 8, 8)}}.get(net, {"x": torch.zeros(2, 3, 8, 8)})
    program = program_of(seeded(net), inputs)
    batches = program.calibration.batches
    plain: dict[str, list[Tensor]] = {}
    watch_values(program.graph, batches, lambda node, value: plain.setdefault(node.name, []).append(value))
    stream = Stream(program.graph, batches)
    for layer in find_layers(program.graph):
        stream.advance(layer.node)
        for found, expected in zip(stream.values(layer.input), plain[layer.input.name], strict=True):
            assert found.equal(expected)
        for found, expected in zip(stream.peek(layer.node), plain[layer.node.name], strict=True):
            assert found.equal(expected)


def test_stream_runs_the_graph_as_it_is_when_it_gets_there() -> None:
    program = program_of(seeded(Chain), VECTOR)
    batches = program.calibration.batches
    stream = Stream(program.graph, batches)
    inputs: list[list[Tensor]] = []
    for layer in find_layers(program.graph):
        stream.advance(layer.node)
        inputs.append(stream.values(layer.input))
        # Edits in front of a node that has not run: a quantizer and a new weight.
        value = layer.input
        rounded = call_before(program.graph, layer.node, FAKE_QUANTIZE_DYNAMIC, (value, 4, -1))
        layer.node.replace_input_with(value, rounded)
        set_weight(program.graph, layer, weight_of(program.graph, layer) * 0.5)
    tidy(program.graph)
    seen: dict[str, list[Tensor]] = {}
    watch_values(program.graph, batches, lambda node, value: seen.setdefault(node.name, []).append(value))
    for layer, found in zip(find_layers(program.graph), inputs, strict=True):
        source = layer.input.args[0]
        for value, expected in zip(found, seen[source.name], strict=True):
            assert value.equal(expected)


def test_stream_runs_what_is_put_behind_the_last_node() -> None:
    program = program_of(seeded(Chain), VECTOR)
    first, second = find_layers(program.graph)[:2]
    stream = Stream(program.graph, program.calibration.batches)
    stream.advance(second.node)
    before = stream.values(second.input)
    doubled = call_before(program.graph, second.node, aten.mul.Tensor, (second.input, 2))
    second.node.replace_input_with(second.input, doubled)
    stream.advance(second.node)
    for value, expected in zip(stream.values(doubled), before, strict=True):
        assert value.equal(2 * expected)
    assert first.node is not None


def test_stream_holds_only_what_is_still_needed() -> None:
    program = program_of(seeded(Chain), VECTOR, batches=1)
    layers = find_layers(program.graph)
    stream = Stream(program.graph, program.calibration.batches)
    held: list[weakref.ref[Tensor]] = []
    for layer in layers:
        stream.advance(layer.node)
        held.append(weakref.ref(stream.values(layer.input)[0]))
    gc.collect()
    alive = [index for index, value in enumerate(held) if value() is not None]
    # The graph's input is the caller's, the first layer's activation is read at the end, the last value is next.
    assert alive == [0, 1, 5]
    with pytest.raises(KeyError):
        stream.values(layers[3].input)


def test_batches_feed_inputs_by_name_whatever_their_order() -> None:
    class Difference(nn.Module):
        def forward(self, input: Tensor, other: Tensor) -> Tensor:
            return input - other

    program = program_of(Difference(), {"input": torch.zeros(2, 3), "other": torch.zeros(2, 3)})
    batch = {"other": torch.ones(2, 3), "input": torch.full((2, 3), 5.0)}
    assert run_graph(program.graph, [batch])[0][0].equal(torch.full((2, 3), 4.0))
    stream = Stream(program.graph, [batch])
    output = program.graph.graph.output_node()
    stream.advance(output)
    assert stream.values(output.args[0][0])[0].equal(torch.full((2, 3), 4.0))


def test_nothing_here_records_gradients() -> None:
    program = program_of(seeded(Chain), VECTOR)
    batch = {"x": torch.zeros(4, 8, requires_grad=True)}
    assert not run_graph(program.graph, [batch])[0][0].requires_grad
    stream = Stream(program.graph, [batch])
    last = find_layers(program.graph)[-1]
    stream.advance(last.node)
    assert not stream.values(last.input)[0].requires_grad
    assert not stream.peek(last.node)[0].requires_grad


def test_an_example_has_two_samples_at_least_where_their_number_is_free() -> None:
    single = {"x": torch.ones(1, 3), "mask": torch.zeros(1), "table": torch.ones(1, 4)}
    free = {"x": {0: "batch", 1: "length"}, "mask": {0: "batch"}, "table": {1: "length"}}
    example = Calibration((single,), (), "x").example(free)
    assert {name: tuple(value.shape) for name, value in example.items()} == {"x": (2, 3), "mask": (2,), "table": (1, 4)}
    several = {"x": torch.ones(5, 3)}
    assert Calibration((several,), (), "x").example({"x": {0: "batch"}})["x"].shape == (5, 3)


def test_cut_keeps_order_and_every_sample() -> None:
    samples = {"x": torch.arange(7), "y": torch.arange(7) * 10}
    pieces = list(cut(samples, 3))
    assert [len(piece["x"]) for piece in pieces] == [3, 3, 1]
    assert torch.cat([piece["y"] for piece in pieces]).equal(samples["y"])
