"""Find pairs of layers between which channels may be rescaled, and follow each channel from one to the other.

A pair is (first, second) with nothing on the way from first's output to second's input but operators f that pass a
positive scale of each channel through, f(s x) = s f(x), and that nothing else reads. Channels are followed by running
the shape operators on a *probe*: a tensor of the value's shape that holds, at each place, the index of the output
channel of `first` found there. So a flatten, a permutation or a pixel order needs no rule of its own: what counts is
that the probe at `second` is the same for every sample and place.
"""

import dataclasses

import torch
from torch import Tensor, fx

from passes.base import Skip
from passes.calibration import Batch, watch_values
from passes.graph import Layer, add_tensor, aten, call_before, find_layers, get_tensor

RELUS = {aten.relu.default}
LEAKY = {aten.leaky_relu.default, aten.prelu.default}
CLAMPS = {aten.hardtanh.default, aten.relu6.default, aten.clamp.default, aten.clamp_min.default}
SHAPES = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
}
MAX_POOLS = {aten.max_pool1d.default: 1, aten.max_pool2d.default: 2, aten.max_pool3d.default: 3}
AVERAGE_POOLS = {aten.avg_pool1d.default: 1, aten.avg_pool2d.default: 2, aten.avg_pool3d.default: 3}
ADAPTIVE_POOLS = {
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
}
RESIZES = {aten.upsample_nearest2d.vec: 2, aten.upsample_bilinear2d.vec: 2}
POOLS = MAX_POOLS | AVERAGE_POOLS | ADAPTIVE_POOLS | RESIZES
PADS = {aten.pad.default, aten.constant_pad_nd.default}
REDUCTIONS = {aten.mean.dim, aten.amax.default}
JOINS = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.cat.default}
NO_DATA = {aten.sym_size.int}
"""Readers that look at a shape only."""

Shapes = dict[fx.Node, torch.Size | int]
"""Shape of every tensor and value of every size that a graph computes for one batch."""


@dataclasses.dataclass(frozen=True)
class Cap:
    """A node that computes min(relu(x), c) or min(x, c).

    limit    c: a number, or a tensor that broadcasts to the node's value
    channel  which channel of the pair's first layer is where; axes along which that is the same have size 1
    """

    node: fx.Node
    limit: float | Tensor
    channel: Tensor


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two layers whose common channels can be rescaled.

    path     the nodes between them, in order
    channel  [in channels of second]: which output channel of first each of them carries
    caps     the nodes of the path that compare channels with a constant
    """

    first: Layer
    second: Layer
    path: tuple[fx.Node, ...]
    channel: Tensor
    caps: tuple[Cap, ...]

    @property
    def name(self) -> str:
        """`first -> second`."""
        return f"{self.first.name} -> {self.second.name}"


class BlockedError(Exception):
    """Why channels cannot be followed, or a value not moved along them, from a layer to the next."""


def observe_shapes(graph: fx.GraphModule, batch: Batch) -> Shapes:
    """Shapes of the graph's tensors and values of its sizes, for one batch."""
    shapes: Shapes = {}

    def note(node: fx.Node, value: object) -> None:
        if isinstance(value, Tensor):
            shapes[node] = value.shape
        elif isinstance(value, int):
            shapes[node] = value

    watch_values(graph, [batch], note)
    return shapes


def find_pairs(graph: fx.GraphModule, shapes: Shapes) -> tuple[list[Pair], list[Skip]]:
    """All pairs in the graph's order, and for every other layer why no pair starts at it."""
    walk = _Walk(graph, shapes)
    pairs, skipped = [], []
    for layer in walk.layers.values():
        try:
            pairs.append(walk.follow(layer))
        except BlockedError as blocked:
            skipped.append(Skip(layer.name, str(blocked)))
    return pairs, skipped


def channel_axis(layer: Layer, dim: int) -> int:
    """Axis of the channels in a layer's input or output with `dim` axes."""
    return dim - 1 if layer.kind == "linear" else dim + 1 - layer.weight.meta["val"].dim()


class _Walk:
    def __init__(self, graph: fx.GraphModule, shapes: Shapes) -> None:
        self.graph = graph
        self.shapes = shapes
        self.layers = {layer.node: layer for layer in find_layers(graph) if layer.kind != "embedding"}

    def follow(self, first: Layer) -> Pair:
        """The pair that starts at `first`."""
        _check_constants(first)
        node, path, caps = first.node, list[fx.Node](), list[Cap]()
        shape = self.shapes[node]
        assert isinstance(shape, torch.Size)
        axis = channel_axis(first, len(shape))
        index = torch.arange(shape[axis]).view([-1 if a == axis else 1 for a in range(len(shape))])
        probe = index.expand(shape)
        while True:
            reader = _only_reader(node)
            second = self.layers.get(reader)
            if second is not None and second.input is node:
                _check_constants(second)
                return Pair(first, second, tuple(path), self._arrive(second, probe), tuple(caps))
            limit = cap_limit(self.graph, reader)
            if limit is not None:
                caps.append(Cap(reader, limit, self._per_channel(reader, probe)))
            else:
                probe = self._through(node, reader, probe)
            path.append(reader)
            node = reader

    def _arrive(self, second: Layer, probe: Tensor) -> Tensor:
        rows = probe.movedim(channel_axis(second, probe.dim()), -1).flatten(0, -2)
        if not bool((rows == rows[:1]).all()):
            raise BlockedError(f"its channels are mixed with other axes on the way to {second.name}")
        return rows[0].clone()

    def _per_channel(self, node: fx.Node, probe: Tensor) -> Tensor:
        for axis in range(probe.dim()):
            if _constant(probe, [axis]):
                probe = probe.narrow(axis, 0, 1)
        shape = node.meta["val"].shape
        if any(size > 1 and not isinstance(shape[axis], int) for axis, size in enumerate(probe.shape)):
            raise BlockedError(f"its channels lie along an axis without a fixed size at {node.name}")
        return probe.clone()

    def _through(self, node: fx.Node, reader: fx.Node, probe: Tensor) -> Tensor:
        """The probe behind `reader`, an operator without a cap."""
        target = reader.target
        if reader.args[0] is node:
            if target in RELUS or target in LEAKY or is_relu(reader):
                return probe
            if target in SHAPES:
                arguments = fx.node.map_arg(reader.args[1:], lambda size: self.shapes[size])
                result: Tensor = target(probe.contiguous(), *arguments, **reader.kwargs)
                return result
            if target in POOLS:
                return self._resize(reader, probe, list(range(-POOLS[target], 0)))
            if target in PADS:
                if pad_mode(reader) == "constant" and pad_value(reader) != 0:
                    raise BlockedError(f"{reader.name} pads with {pad_value(reader)}")
                widths = reader.args[1]
                assert isinstance(widths, list | tuple)
                return self._resize(reader, probe, list(range(-(len(widths) // 2), 0)))
            if target in REDUCTIONS:
                return self._reduce(reader, probe)
        if target in JOINS:
            raise BlockedError(f"{reader.name} ({target}) joins another branch")
        if target in CLAMPS:
            raise BlockedError(f"{reader.name} ({target}) clamps from below at a value that is not 0")
        raise BlockedError(f"{reader.name} ({target}) does not pass a scale of its channels through")

    def _resize(self, reader: fx.Node, probe: Tensor, axes: list[int]) -> Tensor:
        if not _constant(probe, axes):
            raise BlockedError(f"{reader.name} ({reader.target}) works across channels")
        for axis in axes:
            probe = probe.narrow(axis, 0, 1)
        shape = self.shapes[reader]
        assert isinstance(shape, torch.Size)
        return probe.expand(shape)

    def _reduce(self, reader: fx.Node, probe: Tensor) -> Tensor:
        axes = reader.args[1] if len(reader.args) > 1 else None
        axes = [axes] if isinstance(axes, int) else axes
        if not isinstance(axes, list | tuple) or not axes or not _constant(probe, list(axes)):
            raise BlockedError(f"{reader.name} ({reader.target}) works across channels")
        return probe.amax(axes, keepdim=bool(reader.args[2]) if len(reader.args) > 2 else False)


def _constant(probe: Tensor, axes: list[int]) -> bool:
    """True when the probe does not change along `axes`."""
    first = probe
    for axis in axes:
        first = first.narrow(axis, 0, 1)
    return bool((probe == first).all())


def _only_reader(node: fx.Node) -> fx.Node:
    readers = [user for user in node.users if user.target not in NO_DATA]
    if len(readers) != 1:
        raise BlockedError(f"{node.name} has {len(readers)} readers")
    if readers[0].op == "output":
        raise BlockedError("it feeds an output of the model")
    return readers[0]


def _check_constants(layer: Layer) -> None:
    if layer.weight.op != "get_attr" or (layer.bias is not None and layer.bias.op != "get_attr"):
        raise BlockedError(f"the weight or bias of {layer.name} is computed")


def clamp_bounds(node: fx.Node) -> tuple[object, object]:
    """(low, high) of a node in CLAMPS as written in the graph."""
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min")
    high = node.args[2] if len(node.args) > 2 else node.kwargs.get("max")
    if node.target is aten.hardtanh.default:
        return -1.0 if low is None else low, 1.0 if high is None else high
    return low, high


def is_relu(node: fx.Node) -> bool:
    """True for max(x, 0) in any spelling."""
    return node.target in RELUS or (node.target in CLAMPS and clamp_bounds(node) == (0, None))


def cap_limit(graph: fx.GraphModule, node: fx.Node) -> float | Tensor | None:
    """c when the node computes min(relu(x), c), or min(x, c) with a constant c; else None."""
    if node.target in CLAMPS:
        low, high = clamp_bounds(node)
        return float(high) if low == 0 and isinstance(high, int | float) else None
    if node.target is aten.minimum.default and isinstance(node.args[1], fx.Node) and node.args[1].op == "get_attr":
        return get_tensor(graph, node.args[1])
    return None


def pad_mode(node: fx.Node) -> str:
    """`constant`, `reflect`, `replicate` or `circular`."""
    mode = node.args[2] if node.target is aten.pad.default and len(node.args) > 2 else "constant"
    return str(mode)


def pad_value(node: fx.Node) -> float:
    """What a constant padding fills with."""
    index = 3 if node.target is aten.pad.default else 2
    value = node.args[index] if len(node.args) > index else 0
    return float(value) if isinstance(value, int | float) else 0.0


def set_cap(graph: fx.GraphModule, layer: Layer, cap: Cap, limit: Tensor) -> None:
    """Make the node compute min(relu(x), limit), or min(x, limit) if it had no relu in it."""
    node = cap.node
    value = node.meta["val"]
    x = node.args[0]
    if node.target in CLAMPS:
        x = call_before(graph, node, aten.relu.default, (x,))
        x.meta["val"] = value
    constant = add_tensor(graph, f"{layer.name.replace('@', '_')}.cap", limit.to(value.dtype), node)
    minimum = call_before(graph, node, aten.minimum.default, (x, constant))
    minimum.meta["val"] = value
    node.replace_all_uses_with(minimum)
    graph.graph.erase_node(node)
