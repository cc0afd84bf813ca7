"""Networks of the same layers, run side by side and node by node.

Each value lives until its last reader has run, and no longer: comparing the layers of several networks takes what a few
layers need, not what all of them do. Mapped weights are released after each use.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from exporter.lowering.ops import MARK
from passes.calibration import Batch
from passes.graph import Layer, inputs_of
from passes.memory import release
from runtimes.base import Array


def run_nodes(graph: fx.GraphModule, batch: Batch) -> Iterator[tuple[fx.Node, tuple[Any, ...], Any]]:
    """(node, its arguments, its value) of every node, as it is computed."""
    interpreter = fx.Interpreter(graph)
    # A placeholder's target is the input's name; its node's name may differ (fx calls "input" "input_1").
    interpreter.args_iter = iter([batch[str(node.target)] for node in inputs_of(graph)])
    for node in graph.graph.nodes:
        args, _ = interpreter.fetch_args_kwargs_from_env(node)
        with torch.no_grad():
            interpreter.env[node] = interpreter.run_node(node)
        yield node, args, interpreter.env[node]
        release(argument for argument in args if isinstance(argument, Tensor))
        for done in interpreter.user_to_last_uses.get(node, []):
            del interpreter.env[done]
        if not node.users:
            del interpreter.env[node]


def float_layers(
    twin: fx.GraphModule, layers: Mapping[str, Layer], batch: Batch
) -> Iterator[tuple[str, tuple[Tensor, Array]]]:
    """(layer, (input, output)) in the float twin, in its order."""
    by_node = {layer.node: layer for layer in layers.values()}
    for node, args, value in run_nodes(twin, batch):
        layer = by_node.get(node)
        if layer is not None:
            yield layer.name, (args[layer.input_arg], value.numpy())


def marked_layers(graph: fx.GraphModule, batch: Batch) -> Iterator[tuple[str, Array]]:
    """(layer, output) in a lowered graph, in its order."""
    for node, args, value in run_nodes(graph, batch):
        if node.target is MARK:
            yield str(args[1]), value.float().numpy()


class InStep:
    """The layers of a network that runs no further than it is asked for; in another order, some wait."""

    def __init__(self, layers: Iterator[tuple[str, Array]]) -> None:
        self._layers = layers
        self._waiting: dict[str, Array] = {}

    def take(self, name: str) -> Array:
        """The layer's output, once. Raises KeyError when the network has no such layer."""
        while name not in self._waiting:
            found = next(self._layers, None)
            if found is None:
                raise KeyError(name)
            self._waiting[found[0]] = found[1]
        return self._waiting.pop(name)
