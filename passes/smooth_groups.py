"""Find where scales of channels may move from a normalization or a linear layer into the linear layers behind it.

A group is a source and its readers: every channel c of the source may be divided by s_c and the input columns of the
readers that carry it multiplied by s_c, because all operators in between are linear in it and treat channels alike:

    norm  -> linears        n * w + b             w / s, b / s
    value -> projection     softmax(q k^T) v      rows of v's weight and its bias / s
    up    -> down           f(gate) * up          rows of up's weight and its bias / s

Channels are followed by running the operators on a *probe*: a tensor of the value's shape that holds, at each place,
the index of the source's channel found there. So heads, their repetition for grouped queries and a fused q, k, v need
no rule of their own; channels that something else reads (an activation, q k^T) keep s = 1, and a source all of whose
channels are so read is reported with the first reason. A normalization whose value also goes on as the residual (BERT's
order) can be scaled all the same when these other readers get the value times s: one multiplication, `restored`.
"""

import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from passes.base import Skip
from passes.equalize_pairs import NO_DATA, SHAPES, BlockedError, Shapes
from passes.graph import Layer, aten, find_layers

MOVES = SHAPES | {
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    operator.getitem,
}
CASTS = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout}
ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.matmul.default, aten.bmm.default}

Probe = Tensor | list[Tensor] | tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Norm:
    """A normalization over the last axis: `weight_arg` (a constant or left out) and `bias_arg` of its node."""

    node: fx.Node
    name: str
    weight_arg: int
    bias_arg: int | None

    @property
    def weight(self) -> fx.Node | None:
        """The node that yields the weight [channels]; None stands for ones."""
        return _argument(self.node, self.weight_arg)

    @property
    def bias(self) -> fx.Node | None:
        """The node that yields the bias [channels], if there is one."""
        return None if self.bias_arg is None else _argument(self.node, self.bias_arg)


@dataclasses.dataclass(frozen=True)
class Reader:
    """A linear layer behind a source; `channel` [in]: which channel of the source each of its inputs carries."""

    layer: Layer
    channel: Tensor


@dataclasses.dataclass(frozen=True)
class Group:
    """A source, its readers, and which of its channels [channels] may be scaled.

    restored  nodes that read the source and must get its value as it was
    why       what the first of these does with it
    """

    source: Norm | Layer
    readers: tuple[Reader, ...]
    free: Tensor
    restored: tuple[fx.Node, ...] = ()
    why: str = ""

    @property
    def name(self) -> str:
        """`source -> reader, reader`."""
        return f"{self.source.name} -> {', '.join(reader.layer.name for reader in self.readers)}"


def find_groups(graph: fx.GraphModule, shapes: Shapes, *, restore: bool) -> tuple[list[Group], list[Skip]]:
    """All groups in the graph's order, each reader in one; and for every other candidate why it is none.

    `restore` allows groups with `restored` readers.

    Candidates are the normalizations, and the linear layers that reach a product with another branch.
    """
    layers = {layer.node: layer for layer in find_layers(graph) if layer.kind == "linear"}
    groups, skipped = list[Group](), list[Skip]()
    taken: dict[fx.Node, str] = {}
    for node in graph.graph.nodes:
        source = layers.get(node) or _norm(node)
        if source is None:
            continue
        walk = _Walk(source, layers, shapes)
        if isinstance(source, Layer) and not walk.crossed:
            continue
        try:
            group = walk.group_with_residual() if restore and isinstance(source, Norm) else walk.group()
            for reader in group.readers:
                if reader.layer.node in taken:
                    raise BlockedError(f"{reader.layer.name} is smoothed with {taken[reader.layer.node]}")
        except BlockedError as blocked:
            skipped.append(Skip(source.name, str(blocked)))
            continue
        taken |= dict.fromkeys((reader.layer.node for reader in group.readers), source.name)
        groups.append(group)
    return groups, skipped


def _norm(node: fx.Node) -> Norm | None:
    """The normalization over one axis that `node` ends, if it does."""
    if node.target is aten.layer_norm.default:
        found = Norm(node, "", 2, 3)
    elif node.target is aten.rms_norm.default:
        found = Norm(node, "", 2, None)
    elif node.target is aten.mul.Tensor and all(isinstance(value, fx.Node) for value in node.args):
        normalized = [index for index in (0, 1) if _is_normalized(_argument(node, index))]
        if len(normalized) != 1 or _rank(_argument(node, 1 - normalized[0])) != 1:
            return None
        found = Norm(node, "", 1 - normalized[0], None)
    else:
        return None
    if node.target is not aten.mul.Tensor and len(_sizes(node.args[1])) != 1:
        return None
    owner = "" if found.weight is None else str(found.weight.target).rpartition(".")[0]
    return dataclasses.replace(found, name=owner or node.name)


def _is_normalized(node: fx.Node | None) -> bool:
    """True for x * rsqrt(..), cast or not."""
    while node is not None and node.target in CASTS:
        node = _argument(node, 0)
    if node is None or node.target is not aten.mul.Tensor:
        return False
    return any(value.target is aten.rsqrt.default for value in node.all_input_nodes)


class _Walk:
    """Everything that reads a source's channels, found in the graph's order."""

    def __init__(
        self,
        source: Norm | Layer,
        layers: dict[fx.Node, Layer],
        shapes: Shapes,
        users: Iterable[fx.Node] | None = None,
    ) -> None:
        self.source, self.layers, self.shapes = source, layers, shapes
        self.crossed = False
        self.readers: list[Reader] = []
        self.reasons: list[str] = []
        shape = self._shape(source.node)
        self.free = torch.ones(shape[-1], dtype=torch.bool)
        self.probes: dict[fx.Node, Probe] = {source.node: torch.arange(shape[-1], dtype=torch.int32).expand(shape)}
        waiting = dict.fromkeys(source.node.users if users is None else users)
        while waiting:
            node = min(waiting)
            del waiting[node]
            if node.target not in NO_DATA and self._passes(node):
                waiting |= dict.fromkeys(node.users)

    def group(self) -> Group:
        """The group; raises BlockedError when there is nothing to scale."""
        for value in (self.source.weight, self.source.bias):
            if value is not None and value.op != "get_attr":
                raise BlockedError("its weight or bias is computed in the graph")
        reached = torch.zeros_like(self.free)
        for reader in self.readers:
            reached[reader.channel.long()] = True
        free = self.free & reached
        if not bool(free.any()):
            raise BlockedError(self.reasons[0] if self.reasons else "no linear layer reads it")
        return Group(self.source, tuple(self.readers), free)

    def group_with_residual(self) -> Group:
        """The group; readers that block its channels are to be restored. Raises BlockedError as `group`."""
        users = [user for user in self.source.node.users if user.target not in NO_DATA]
        passing = [user for user in users if not self._from([user]).reasons]
        together = self._from(passing)
        if together.reasons or not self.reasons:
            return self.group()
        restored = tuple(user for user in users if user not in passing)
        return dataclasses.replace(together.group(), restored=restored, why=self.reasons[0])

    def _from(self, users: Iterable[fx.Node]) -> "_Walk":
        return _Walk(self.source, self.layers, self.shapes, users)

    def _passes(self, node: fx.Node) -> bool:
        """True when the channels are found again in the value of `node`; else it is noted what becomes of them."""
        values = [value for value in node.all_input_nodes if value in self.probes]
        if node.target is ATTENTION and node.args[2] in values:
            # Of a fused q, k, v only the values pass.
            self._block([value for value in values if value is not node.args[2]])
            values = [value for value in values if value is node.args[2]]
        try:
            if len(values) > 1:
                raise BlockedError(f"{node.name} ({node.target}) multiplies or adds it to itself")
            probe = self.probes[values[0]]
            layer = self.layers.get(node)
            if layer is not None and layer.input is values[0] and layer.weight.op == "get_attr":
                assert isinstance(probe, Tensor)
                self.readers.append(Reader(layer, _constant_row(probe, node)))
                return False
            self.probes[node] = self._through(node, values[0], probe)
        except BlockedError as blocked:
            self.reasons.append(str(blocked))
            self._block(values)
            return False
        return True

    def _block(self, values: Iterable[fx.Node]) -> None:
        for value in values:
            for part in _parts(self.probes[value]):
                self.free[part.unique().long()] = False

    def _through(self, node: fx.Node, value: fx.Node, probe: Probe) -> Probe:
        """The probe behind `node`, which reads `value` and no other value with channels of the source."""
        target, places = node.target, [index for index, argument in enumerate(node.args) if argument is value]
        if places == [0] and target in MOVES and not node.kwargs:
            assert callable(target)
            arguments = fx.node.map_arg(node.args[1:], lambda size: self.shapes[size])
            moved: Probe = target(probe.contiguous() if isinstance(probe, Tensor) else probe, *arguments)
            return moved
        if places == [0] and target in CASTS:
            return probe
        if isinstance(probe, Tensor) and not isinstance(self.shapes.get(node), int | None):
            shape = self._shape(node)
            if (target is ATTENTION and places == [2]) or (target in PRODUCTS and places == [1]):
                probe = _mixed(probe, shape, node)
                self.crossed = True
                return probe
            if len(places) == 1 and (target is aten.mul.Tensor or (target is aten.div.Tensor and places == [0])):
                other = _argument(node, 1 - places[0])
                if probe.shape == shape and (other is None or self.shapes[other] == shape):
                    self.crossed |= other is not None
                    return probe
        if node.op == "output":
            raise BlockedError("it feeds an output of the model")
        raise BlockedError(f"{node.name} ({target}) reads it too")

    def _shape(self, node: fx.Node) -> torch.Size:
        shape = self.shapes[node]
        assert isinstance(shape, torch.Size)
        return shape


def _mixed(probe: Tensor, shape: torch.Size, node: fx.Node) -> Tensor:
    """The probe behind a product a v, which sums over rows of v [.., rows, channels]; a head of v may serve several."""
    first = probe.narrow(-2, 0, 1)
    if not bool((probe == first).all()):
        raise BlockedError(f"{node.name} ({node.target}) sums over its channels")
    if first.dim() > 2 and shape[-3] != first.shape[-3]:
        first = first.repeat_interleave(shape[-3] // first.shape[-3], -3)
    return first.expand(shape)


def _constant_row(probe: Tensor, node: fx.Node) -> Tensor:
    """[in]: the channels along the last axis, if they are the same everywhere."""
    rows = probe.reshape(-1, probe.shape[-1])
    if not bool((rows == rows[:1]).all()):
        raise BlockedError(f"its channels are mixed with other axes on the way to {node.name}")
    return rows[0].clone()


def _parts(probe: Probe) -> Iterable[Tensor]:
    return [probe] if isinstance(probe, Tensor) else probe


def _argument(node: fx.Node, index: int) -> fx.Node | None:
    value = node.args[index] if len(node.args) > index else None
    return value if isinstance(value, fx.Node) else None


def _rank(node: fx.Node | None) -> int:
    value = None if node is None or node.op != "get_attr" else node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 0


def _sizes(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]
