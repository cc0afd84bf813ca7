"""Statistics of layers' inputs as a weight pass walks the graph, one layer at a time.

A layer's inputs are those of the graph as it is when the layer's turn comes: everything before it is quantized already.

With a cache the walk need not begin at the network's input: `finished` leaves snapshots of the values that wait where
it stands, and `passed` finds the newest one among layers that came from the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from passes.base import Program
from passes.calibration import Stream
from passes.graph import Layer, find_layers
from passes.layer_inputs import Part, hessian_of, moments_of
from passes.output_moments import Loss, output_moments
from passes.threads import single_thread

SAMPLES_AT_ONCE = 8
"""Samples the network is run backwards on together."""

OUTER_BYTES = 1 << 31
"""What the outer factors of layers take at once, unless one layer's alone takes more."""


class Walk:
    """Moments of layers' inputs as the graph is when their turn comes; every rank runs its own batches through it.

    Moments are made, and are, on the rank's device. `on_part` is the program's.
    """

    def __init__(self, program: Program) -> None:
        everything = program.calibration.batches
        self.ranks, self.on_part = program.ranks, program.on_part
        self._part = Part(self.ranks, self.ranks.batches(len(everything)), len(everything))
        batches = [everything[index] for index in self._part.batches]
        self._stream = Stream(program.graph, batches, program.memory, self.ranks.device)
        self._streams = [self._stream]
        self._floats: Stream | None = None
        self._twins: dict[str, Layer] = {}
        if program.float_twin is not None:
            self._floats = Stream(program.float_twin, batches, program.memory, self.ranks.device)
            self._streams.append(self._floats)
            self._twins = {layer.name: layer for layer in find_layers(program.float_twin)}
        self._siblings: Sequence[Layer] = ()
        self._reads: list[object] = []
        self._hessian: Tensor | None = None
        self._cross: Tensor | None = None
        self._cache, self._kept = program.cache, ""
        self._program = program
        self._outers: dict[str, Tensor | None] = {}

    def enter(self, siblings: Sequence[Layer]) -> None:
        """The turn of layers with one input has come: the walk stops in front of the first, whichever is asked for.

        Another rank quantizes the first when this one asks for the second; its float weight must not run.
        """
        self._siblings = siblings

    def passed(self, key: str) -> None:
        """The layer of this key has its result; if a snapshot was taken then, the walk goes on from it."""
        if self._cache is not None and self._cache.has_walk(key):
            self._kept = key

    def finished(self, key: str) -> None:
        """The layer of this key was quantized just now: the time for a snapshot."""
        if self._cache is not None and self._stream.has_run:
            self._cache.put_walk(key, [stream.state() for stream in self._streams])

    def hessian(self, layer: Layer) -> Tensor:
        """Xq^T Xq / n of the layer's input, [groups, in, in]."""
        self._turn_to(layer)
        if self._hessian is None:
            self._hessian = hessian_of(layer, self._stream.values(layer.input), self._part)
        return self._hessian

    def cross(self, layer: Layer) -> Tensor:
        """X^T Xq / n, [groups, in, in], X being the layer's input in the float twin, which there must be."""
        self._turn_to(layer)
        if self._cross is None:
            assert self._floats is not None  # the pipeline made a twin in front of the first pass that quantizes
            twin = self._twins[layer.name]
            self._floats.advance(twin.node)
            floats, inputs = self._floats.values(twin.input), self._stream.values(layer.input)
            self._cross = moments_of(layer, floats, inputs, self._part)
        return self._cross

    def outer(self, layer: Layer, loss: Loss) -> Tensor | None:
        """What errors at the layer's outputs cost at the network's, G [out, out] of passes.output_moments.

        Over all batches, on every rank; None where no output of the network feels the layer. Found for as many of the
        layers from this one on as OUTER_BYTES hold, in one go.
        """
        if layer.name not in self._outers:
            self.on_part("what errors cost at the network's outputs")
            program, names = self._program, self._from(layer)
            assert program.float_twin is not None
            batches = program.in_parts(program.calibration.batches, SAMPLES_AT_ONCE)
            generator = torch.Generator().manual_seed(program.seed)
            with single_thread():
                found = output_moments(program.float_twin, names, batches, loss, generator)
            self._outers = {name: found.get(name) for name in names}
        outer = self._outers[layer.name]
        return None if outer is None else outer.to(self.ranks.device)

    def _from(self, layer: Layer) -> list[str]:
        """The layer, and those behind it whose G there is room for."""
        names, room = [layer.name], OUTER_BYTES
        behind = list(self._twins)[list(self._twins).index(layer.name) + 1 :]
        for twin in (self._twins[name] for name in behind):
            if twin.kind == "embedding":
                continue
            room -= 4 * len(twin.to_matrix(twin.weight.meta["val"])) ** 2
            if room < 0:
                break
            names.append(twin.name)
        return names

    def _turn_to(self, layer: Layer) -> None:
        # What the rows depend on: the value, and for a convolution the kernel and how it moves.
        reads: list[object] = [layer.input, layer.kind]
        if layer.kind != "linear":
            reads += [layer.weight.meta["val"].shape[2:], layer.groups, layer.node.args[3:]]
        if self._reads != reads:
            self._reads, self._hessian, self._cross = reads, None, None  # two layers' moments are never held
            self._go_on()
            self._stream.advance(self._siblings[0].node if layer in self._siblings else layer.node)

    def _go_on(self) -> None:
        """Take over the snapshot that `passed` found, before anything runs."""
        if self._cache is None or not self._kept or self._stream.has_run:
            return
        for stream, state in zip(self._streams, self._cache.get_walk(self._kept) or [], strict=False):
            stream.restore(state)
