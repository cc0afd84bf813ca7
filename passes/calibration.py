"""Calibration data, and walking a graph over it one node at a time.

Sums over calibration data are bit-reproducible: the data is cut into the same batches whatever the number of threads,
and partial sums are added in batch order.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from passes.graph import inputs_of
from passes.memory import Memory, release
from passes.snapshot import StreamState

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

    def example(self, dynamic: Mapping[str, Mapping[int, str]]) -> Batch:
        """A batch; where `dynamic` (Program) leaves axis 0 free it is at least 2 long, as torch.export wants."""
        return {
            name: value.repeat_interleave(2, 0) if 0 in dynamic.get(name, {}) and len(value) == 1 else value
            for name, value in self.batches[0].items()
        }


class Stream:
    """Runs a graph over batches node by node, keeping only the values that later nodes still need.

    The graph may be edited in front of nodes that have not run yet. Values past what `memory` holds wait on disk.
    Nodes run on `device`, where their values stay; constants come there for one node at a time. A node that reads
    constants only, as that of a weight from its codes, runs once for all batches.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        batches: Sequence[Batch],
        memory: Memory | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._memory, self._device = memory or Memory(), device or torch.device("cpu")
        self._interpreters = [_Interpreter(graph, self._device) for _ in batches]
        self._constant: set[fx.Node] = set()
        for interpreter, batch in zip(self._interpreters, batches, strict=True):
            interpreter.args_iter = iter(_arguments(graph, batch))
        self._nodes = graph.graph.nodes
        self._last: fx.Node | None = None  # the last node that ran: what is inserted behind it still runs

    def advance(self, until: fx.Node) -> None:
        """Run everything in front of `until`."""
        node = next(iter(self._nodes)) if self._last is None else self._last.next
        while node is not until:
            self._run(node)
            self._last, node = node, node.next

    def peek(self, node: fx.Node) -> list[Tensor]:
        """What `node`, the next to run, yields for each batch; it has not run yet and may still be changed."""
        with torch.no_grad(), self._constants_of(node):
            return [interpreter.run_node(node) for interpreter in self._interpreters]

    def values(self, node: fx.Node) -> list[Tensor]:
        """The value of a node that has run, for each batch."""
        return [interpreter.env[node] for interpreter in self._interpreters]

    @property
    def has_run(self) -> bool:
        """True when it no longer stands in front of the graph."""
        return self._last is not None

    def state(self) -> StreamState:
        """Where it stands, for `restore`."""
        values = [
            {node.name: value for node, value in interpreter.env.items() if node.op != "get_attr"}
            for interpreter in self._interpreters
        ]
        return StreamState("" if self._last is None else self._last.name, values)

    def restore(self, state: StreamState) -> None:
        """Go to where the stream of an equal graph stood, over the same batches; nothing may have run yet."""
        if not state.last:
            return
        named = {node.name: node for node in self._nodes}
        last = self._last = named[state.last]
        before = [*itertools.takewhile(lambda node: node is not last, self._nodes), last]
        placeholders = sum(node.op == "placeholder" for node in before)
        for node in before:
            self._note_constant(node)
        for interpreter, values in zip(self._interpreters, state.values, strict=True):
            interpreter.args_iter = itertools.islice(interpreter.args_iter, placeholders, None)
            interpreter.env.update({node: interpreter.run_node(node) for node in before if node.op == "get_attr"})
            interpreter.env.update({named[name]: value for name, value in values.items()})

    def _run(self, node: fx.Node) -> None:
        spills = node.op != "get_attr" and self._waiting() > self._memory.activations
        constant = self._note_constant(node)
        with torch.no_grad(), self._constants_of(node):
            for interpreter in self._interpreters:
                first = self._interpreters[0]
                value = first.env[node] if constant and interpreter is not first else interpreter.run_node(node)
                interpreter.env[node] = self._memory.spill(value.cpu()) if spills and _is_tensor(value) else value
        for interpreter in self._interpreters:
            release(_tensors(interpreter, node.all_input_nodes))
            for value in node.all_input_nodes:
                # A get_attr costs nothing to keep; anything else goes once its last reader has run.
                if value.op != "get_attr" and not any(user > node for user in value.users):
                    interpreter.env.pop(value, None)
            if not node.users and node.op != "output":
                del interpreter.env[node]

    def _note_constant(self, node: fx.Node) -> bool:
        """True when the node's value is the same for every batch."""
        reads = node.all_input_nodes
        constant = node.op == "get_attr" or (bool(reads) and all(value in self._constant for value in reads))
        if constant:
            self._constant.add(node)
        return constant

    @contextlib.contextmanager
    def _constants_of(self, node: fx.Node) -> Iterator[None]:
        """The graph's tensors that the node reads, on the device inside the block, once for all batches."""
        kept = {read: self._interpreters[0].env[read] for read in node.all_input_nodes if read.op == "get_attr"}
        self._set({read: value.to(self._device) for read, value in kept.items()})
        yield
        self._set(kept)

    def _set(self, values: Mapping[fx.Node, Any]) -> None:
        for interpreter in self._interpreters:
            interpreter.env.update(values)

    def _waiting(self) -> int:
        """Bytes of the values that wait for their readers, in memory or on disk."""
        return sum(
            tensor.nbytes
            for interpreter in self._interpreters
            for tensor in _tensors(interpreter, [node for node in interpreter.env if node.op != "get_attr"])
        )


class _Interpreter(fx.Interpreter):
    """Runs nodes on a device, wherever what they read is."""

    def __init__(self, graph: fx.GraphModule, device: torch.device) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self._device = device

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """What a node's arguments stand for."""
        values = super().map_nodes_to_values(args, n)
        return fx.node.map_aggregate(values, lambda value: value.to(self._device) if _is_tensor(value) else value)


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    return isinstance(value, Tensor)


def _tensors(interpreter: fx.Interpreter, nodes: Iterable[fx.Node]) -> list[Tensor]:
    """The values of those nodes that are still there and are tensors."""
    return [value for value in (interpreter.env.get(node) for node in nodes) if _is_tensor(value)]


def run_graph(graph: fx.GraphModule, batches: Sequence[Batch]) -> list[tuple[Tensor, ...]]:
    """The graph's outputs for each batch."""
    with torch.no_grad():
        return [tuple(graph(*_arguments(graph, batch))) for batch in batches]


def _arguments(graph: fx.GraphModule, batch: Batch) -> list[Tensor]:
    # A placeholder's target is the input's name; its node's name may differ (fx calls "input" "input_1").
    return [batch[str(node.target)] for node in inputs_of(graph)]


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
    for batch in batches:
        with torch.no_grad():
            _Tap(graph, watch).run(*_arguments(graph, batch))


def cut(samples: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Cut samples {name: [n, ...]} into batches of at most `size`, in order."""
    count = len(next(iter(samples.values())))
    for start in range(0, count, size):
        yield {name: value[start : start + size] for name, value in samples.items()}
