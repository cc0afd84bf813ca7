"""Calibration data, and walking a graph over it one node at a time.

Sums over calibration data are bit-reproducible: the data is cut into the same batches whatever the number of threads,
and partial sums are added in batch order.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.graph import inputs_of

Batch = Mapping[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Samples, cut into batches {input name: tensor [batch, ...]}.

    batches  what passes may look at
    holdout  what validation looks at, and no pass
    source   where they came from, for the report
    """

    batches: tuple[Batch, ...]
    holdout: tuple[Batch, ...]
    source: str


class Stream:
    """Runs a graph over batches node by node, keeping only the values that later nodes still need.

    The graph may be edited in front of nodes that have not run yet.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Batch]) -> None:
        self._interpreters = [fx.Interpreter(graph, garbage_collect_values=False) for _ in batches]
        self._feeds = [iter([batch[node.name] for node in inputs_of(graph)]) for batch in batches]
        for interpreter, feed in zip(self._interpreters, self._feeds, strict=True):
            interpreter.args_iter = feed
        self._next: fx.Node = next(iter(graph.graph.nodes))

    def advance(self, until: fx.Node) -> None:
        """Run everything in front of `until`."""
        while self._next is not until:
            self._run(self._next)
            self._next = self._next.next

    def values(self, node: fx.Node) -> list[Tensor]:
        """The value of a node that has run, for each batch."""
        return [interpreter.env[node] for interpreter in self._interpreters]

    def _run(self, node: fx.Node) -> None:
        for interpreter in self._interpreters:
            with torch.no_grad():
                interpreter.env[node] = interpreter.run_node(node)
            for value in node.all_input_nodes:
                # A get_attr costs nothing to keep; anything else goes once its last reader has run.
                if value.op != "get_attr" and all(user in interpreter.env for user in value.users):
                    interpreter.env.pop(value, None)
            if not node.users and node.op != "output":
                del interpreter.env[node]


def run_graph(graph: fx.GraphModule, batches: Sequence[Batch]) -> list[tuple[Tensor, ...]]:
    """The graph's outputs for each batch."""
    names = [node.name for node in inputs_of(graph)]
    with torch.no_grad():
        return [tuple(graph(*(batch[name] for name in names))) for batch in batches]


class _Tap(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, watch: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(graph)
        self._watch = watch

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self._watch(n, value)
        return value


def watch_values(graph: fx.GraphModule, batches: Sequence[Batch], watch: Callable[[fx.Node, Any], None]) -> None:
    """Run the graph batch by batch and show `watch` every node's value as it is computed."""
    names = [node.name for node in inputs_of(graph)]
    for batch in batches:
        with torch.no_grad():
            _Tap(graph, watch).run(*(batch[name] for name in names))


def cut(samples: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Cut samples {name: [n, ...]} into batches of at most `size`, in order."""
    count = len(next(iter(samples.values())))
    for start in range(0, count, size):
        yield {name: value[start : start + size] for name, value in samples.items()}
