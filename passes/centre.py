"""Centre the channels of values that only sums and layers read: residual streams without an activation.

A layer's output y may be handed on as y - c, one number a channel, when every reader of it can give c back:

    W (y - c) + (b + W c) = W y + b          a layer that does not pad
    (y - c) + x = (y + x) - c                a sum, whose readers then have to

This is exact and takes any sign, unlike high-bias absorption (passes.absorb_bias, the same move through a ReLU). One
range serves all channels of a tensor, so it must reach from the lowest channel's low end to the highest one's high end.
With

    c_i = (low_i + high_i) / 2               quantiles of channel i over calibration data

it is as wide as the widest channel and no wider. Where padding reads y, the border sees 0 instead of -c: such a layer
gives nothing back, and what it reads stays. So does what a normalization, an activation or an output reads.
"""

import dataclasses
import math
from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor, fx

from passes.base import ChannelStatistics, Pass, PassError, PassResult, Program, Skip
from passes.calibration import Stream
from passes.channels import kernels_of, per_kernel
from passes.equalize_pairs import NO_DATA, Shapes, channel_axis, observe_shapes
from passes.graph import Layer, aten, bias_of, can_take_bias, give_bias, weight_of


@dataclasses.dataclass(frozen=True)
class Centre(Pass):
    """Centre the channels of residual streams; the float function stays.

    quantile  part of a channel's values beyond either of the two ends whose middle becomes 0
    """

    name: ClassVar[str] = "centre"
    summary: ClassVar[str] = "centre the channels of residual streams, exactly"
    prerequisites: ClassVar[tuple[str, ...]] = ("fold-bn",)
    quantizes: ClassVar[bool] = False

    quantile: float = 0.001

    def requires(self, program: Program) -> None:
        """There must be data to see the channels on."""
        if not 0 <= self.quantile < 0.5:
            raise PassError(f"centre: quantile={self.quantile} is no part below a half", fix="use quantile=0.001")
        if not program.calibration.batches:
            raise PassError("centre needs calibration data", fix="give --calib")

    def run(self, program: Program) -> PassResult:
        """Find the layers whose readers can give a shift back, then shift them; reports by how much ranges shrink."""
        graph = program.graph
        streams = _Streams(program, observe_shapes(graph, program.calibration.batches[0]))
        shifts, shrunk = self._middles(program, streams)
        biases = {layer.node: -shifts[layer.node] for layer in streams.free}
        for reader, carried in streams.readers.items():
            shift = sum((count * shifts[source] for source, count in carried.items()), torch.zeros(()))
            layer = streams.layers[reader]
            kernels = kernels_of(graph, layer).sum(2)  # [out, in / groups]
            given_back = (kernels * per_kernel(shift, layer.groups, len(kernels))).sum(1)
            biases[reader] = biases.get(reader, torch.zeros(())) + given_back
        for node, change in biases.items():
            _add_bias(program, streams.layers[node], change)
        for layer in streams.free:
            statistics = program.channel_stats.get(layer.name)
            if statistics is not None:
                mean = (statistics.mean - shifts[layer.node]).float()
                program.channel_stats[layer.name] = ChannelStatistics(mean, statistics.std)
        skipped = tuple(Skip(streams.layers[node].name, why) for node, why in streams.blocked.items())
        measured = {"range_ratio": math.exp(sum(map(math.log, shrunk)) / len(shrunk))} if shrunk else {}
        return PassResult(tuple(layer.name for layer in streams.free), skipped, measured)

    def _middles(self, program: Program, streams: "_Streams") -> tuple[dict[fx.Node, Tensor], list[float]]:
        """c [channels] of each free layer, and the width of its output's range with it as a part of that without."""
        stream = Stream(program.graph, program.calibration.batches)
        middles, shrunk = {}, []
        for layer in streams.free:
            stream.advance(layer.node.next)
            samples = torch.cat(
                [value.movedim(streams.axes[layer.node], 0).flatten(1) for value in stream.values(layer.node)], 1
            )  # [out, samples and places]
            if not bool(torch.isfinite(samples).all()):
                raise PassError("its output is not finite on the calibration data", node=layer.name)
            count = samples.shape[1]
            rank = 1 + int(self.quantile * (count - 1))
            low, high = (samples.kthvalue(place, 1).values.double() for place in (rank, count + 1 - rank))
            middles[layer.node] = (low + high) / 2
            width = samples.amax() - samples.amin()
            if width > 0:
                shrunk.append(float((samples.amax(1) - samples.amin(1)).max() / width))
        return middles, shrunk


class _Streams:
    """Which layers may be shifted.

    layers   every layer by its node
    free     the layers whose shift all readers give back, in the graph's order
    readers  {layer node: {free layer node: times its shift arrives}}
    blocked  {layer node: why its shift would not be given back}
    axes     axis of the channels in the value of every node that carries a shift
    """

    def __init__(self, program: Program, shapes: Shapes) -> None:
        self.layers = {layer.node: layer for layer in program.layers() if layer.kind != "embedding"}
        self.axes: dict[fx.Node, int] = {}
        self.blocked: dict[fx.Node, str] = {}
        self._shapes = shapes
        self._carried: dict[fx.Node, Counter[fx.Node]] = {}
        for node in program.graph.graph.nodes:
            self._reach(node)
        self.free = [self.layers[node] for node in self._carried if node in self.layers and node not in self.blocked]
        free = {layer.node for layer in self.free}
        arriving = {
            node: Counter({source: count for source, count in self._carried[layer.input].items() if source in free})
            for node, layer in self.layers.items()
            if layer.input in self._carried
        }
        self.readers = {node: carried for node, carried in arriving.items() if carried}

    def _reach(self, node: fx.Node) -> None:
        """Carry shifts on to `node`, or block them there."""
        carriers = [value for value in node.all_input_nodes if value in self._carried]
        layer = self.layers.get(node)
        if node.target is aten.add.Tensor and carriers and not node.kwargs:
            self._join(node, carriers)
        elif node.target not in NO_DATA:
            reads = layer is not None and carriers == [layer.input]
            why = self._refusal(layer) if layer is not None and reads else f"{node.name} ({node.target}) reads it"
            if why or not reads:
                self._block(carriers, why)
        if layer is not None:
            shape = self._shapes[node]
            assert isinstance(shape, torch.Size)
            self.axes[node] = channel_axis(layer, len(shape))
            self._carried[node] = Counter([node])
            if not can_take_bias(layer):
                self._block([node], "it cannot take a bias")
            elif layer.bias is not None and layer.bias.op != "get_attr":
                self._block([node], "its bias is computed")

    def _join(self, node: fx.Node, carriers: list[fx.Node]) -> None:
        """A sum hands the shifts of its operands on, where they keep their shape and agree where the channels are."""
        axes = {self.axes[value] for value in carriers}
        if len(axes) > 1 or any(self._shapes[value] != self._shapes[node] for value in carriers):
            self._block(carriers, f"{node.name} ({node.target}) changes its shape")
            return
        self.axes[node] = axes.pop()
        self._carried[node] = sum(
            (self._carried[arg] for arg in node.args if isinstance(arg, fx.Node) and arg in carriers),
            Counter[fx.Node](),
        )

    def _refusal(self, layer: Layer) -> str:
        """Why a layer cannot give back what its input was shifted by; empty when it can."""
        if layer.weight.op != "get_attr" or (layer.bias is not None and layer.bias.op != "get_attr"):
            return f"the weight or bias of {layer.name} is computed"
        if not can_take_bias(layer):
            return f"{layer.name} reads it and cannot take a bias"
        if layer.kind == "conv_transpose" or (layer.kind == "conv" and _pads(layer)):
            return f"{layer.name} reads it with padding"
        shape = self._shapes[layer.input]
        assert isinstance(shape, torch.Size)
        if self.axes[layer.input] != channel_axis(layer, len(shape)):
            return f"{layer.name} reads its channels along another axis"
        return ""

    def _block(self, carriers: list[fx.Node], why: str) -> None:
        for value in carriers:
            for source in self._carried[value]:
                self.blocked.setdefault(source, why)


def _pads(layer: Layer) -> bool:
    padding = layer.node.args[4] if len(layer.node.args) > 4 else 0
    return any(padding) if isinstance(padding, list | tuple) else padding not in (0, "valid")


def _add_bias(program: Program, layer: Layer, change: Tensor) -> None:
    """Add `change` [out] to the layer's bias."""
    bias = bias_of(program.graph, layer)
    dtype = weight_of(program.graph, layer).dtype
    give_bias(program.graph, layer, (change if bias is None else bias.double() + change).to(dtype))
