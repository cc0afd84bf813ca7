"""High-bias absorption (Nagel et al., arXiv 1906.04721, section 4.1.3), exact at padded borders.

Where channel i stays above c_i >= 0, relu is the identity and relu(z) = relu(z - c) + c. So with x = relu(W1 u + b1)

    W2 P x + b2 = W2 P relu(W1 u + (b1 - c)) + (b2 + W2 P c)

where P is what lies between the layers (pooling, padding, reshapes) and c stands for an image that is c_i all over
channel i. The range of the activation shrinks by c; the function changes only where z < c, which is rare for

    c_i = max(0, beta_i - k |gamma_i|)       with the statistics of a folded batch norm, rescaled with its channel,
    c_i = max(0, a low quantile of z_i)      over calibration data, where there are none, or where it is lower.

A cap moves with its channel: min(relu(z), d) - c = min(relu(z - c), d - c) for c <= d.

Padding fills with 0, not with c: near the border W2 P c is less than inside. It is computed as the image it is,
[out, H, W]: the value at the centre goes into the bias, and the rest, if any, is added behind the second layer as a
constant image. That needs a fixed height and width. A target that quantizes a convolution's output does so in front of
that addition and again behind it, so an image is not always worth it.

max(x + c) = max(x) + c holds only where c is the same all over the window: a maximum over a border padded with zeros is
refused.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from passes.base import ChannelStatistics, Pass, PassError, PassResult, Program, Skip
from passes.calibration import Stream, run_graph, watch_values
from passes.equalize_pairs import (
    ADAPTIVE_POOLS,
    AVERAGE_POOLS,
    CLAMPS,
    MAX_POOLS,
    PADS,
    RESIZES,
    SHAPES,
    BlockedError,
    Pair,
    Shapes,
    channel_axis,
    find_pairs,
    is_relu,
    observe_shapes,
    pad_mode,
    set_cap,
)
from passes.graph import (
    Layer,
    add_tensor,
    aten,
    bias_of,
    call_before,
    can_take_bias,
    get_tensor,
    give_bias,
    single_user,
    weight_of,
)

LINEAR = {*SHAPES, *AVERAGE_POOLS, *ADAPTIVE_POOLS, *RESIZES, *PADS, aten.mean.dim}
MAXIMA = {*MAX_POOLS, aten.amax.default}

EXACT = 1e-9
"""Differences in a float64 image below this part of its largest value are rounding, not a border."""


@dataclasses.dataclass(frozen=True)
class AbsorbBias(Pass):
    """Move high biases of ReLU channels into the next layer; reports how far the float output moves.

    sigmas    standard deviations of the channel left below its mean, where batch-norm statistics are known; the paper
              leaves 3, which cuts off more than the finer steps are worth
    quantile  part of the calibration data that may fall below c; 1 trusts the statistics alone, as the paper does
    border    gain: an image is added only where calibration says that it pays (see _paying); always: where it can be
    """

    name: ClassVar[str] = "absorb-bias"
    summary: ClassVar[str] = "move high biases of ReLU channels into the next layer"
    paper: ClassVar[str] = "arXiv 1906.04721"
    prerequisites: ClassVar[tuple[str, ...]] = ("fold-bn",)
    quantizes: ClassVar[bool] = False

    sigmas: float = 4.0
    quantile: float = 0.001
    border: Literal["gain", "always"] = "gain"

    def requires(self, program: Program) -> None:
        """There must be data to choose c by, and to measure the shift with."""
        if not program.calibration.batches:
            raise PassError("absorb-bias needs calibration data", fix="give --calib")

    def run(self, program: Program) -> PassResult:
        """Plan every move on the graph as it is, then make them."""
        graph, batches = program.graph, program.calibration.batches
        before = run_graph(graph, batches)
        shapes = observe_shapes(graph, batches[0])
        pairs, skipped = find_pairs(graph, shapes)
        lows = self._lows(program, [pair.first for pair in pairs])
        moves = []
        for pair in pairs:
            try:
                moves.append(_plan(graph, pair, lows[pair.first.name], shapes))
            except BlockedError as blocked:
                skipped.append(Skip(pair.name, str(blocked)))
        if self.border == "gain" and program.rules.conv_outputs:
            moves, unpaid = _paying(program, moves)
            skipped += unpaid
        _apply(program, moves)
        graph.recompile()
        after = run_graph(graph, batches)
        shifts = [
            float((new - old).abs().max())
            for new_batch, old_batch in zip(after, before, strict=True)
            for new, old in zip(new_batch, old_batch, strict=True)
            if new.is_floating_point()
        ]
        return PassResult(
            tuple(move.pair.name for move in moves),
            tuple(skipped),
            {
                "float_shift_max_abs": max(shifts, default=0.0),
                "channels": sum(int((move.shift > 0).sum()) for move in moves),
                "border_images": sum(move.border is not None for move in moves),
            },
        )

    def _lows(self, program: Program, layers: list[Layer]) -> dict[str, Tensor]:
        """What each layer's output channels [out] stay above, almost always."""
        lows: dict[str, Tensor] = {}
        stream = Stream(program.graph, program.calibration.batches)
        for layer in layers:
            stream.advance(layer.node.next)
            values = [
                value.movedim(channel_axis(layer, value.dim()), 0).flatten(1) for value in stream.values(layer.node)
            ]
            samples = torch.cat(values, 1)  # [out, samples and places]
            rank = max(1, math.ceil(self.quantile * samples.shape[1]))
            low = samples.kthvalue(rank, 1).values.double()
            statistics = program.channel_stats.get(layer.name)
            if statistics is not None:
                # Channels are not Gaussian: a tail on the data that is longer than k |gamma| would shift the output.
                low = torch.minimum(low, statistics.mean.double() - self.sigmas * statistics.std.double())
            lows[layer.name] = low
        return lows


@dataclasses.dataclass(frozen=True)
class _Move:
    """c [out of first], what it becomes behind second: a bias [out] and, with a border, an image [1, out, *places]."""

    pair: Pair
    shift: Tensor
    bias: Tensor
    border: Tensor | None


def _plan(graph: fx.GraphModule, pair: Pair, low: Tensor, shapes: Shapes) -> _Move:
    """The move for a pair, or BlockedError with the reason why there is none."""
    if not any(is_relu(node) or node.target in CLAMPS for node in pair.path):
        raise BlockedError("there is no relu between them")
    for layer in (pair.first, pair.second):
        if not can_take_bias(layer):
            raise BlockedError(f"{layer.name} cannot take a bias")
    shift = low.clamp(min=0)
    for cap in pair.caps:
        limit, channel = torch.broadcast_tensors(torch.as_tensor(cap.limit, dtype=torch.float64), cap.channel)
        shift = shift.scatter_reduce(0, channel.flatten(), limit.flatten().clamp(min=0), "amin")
    if not bool((shift > 0).any()):
        raise BlockedError("no channel stays above 0")
    image = _behind(graph, pair, shift, shapes)  # [N, ..., out, ...]
    if not _same(image, image[:1]):
        raise BlockedError("its bias would depend on the place along the first axis")
    rows = image.movedim(channel_axis(pair.second, image.dim()), -1)[0]  # [*places, out]
    centre = rows[tuple(size // 2 for size in rows.shape[:-1])]
    border = rows - centre
    border[border.abs() <= EXACT * rows.abs().max()] = 0
    free = _has_free_places(pair)
    if free and _pads(pair):
        raise BlockedError("its padding makes the bias depend on the place, and the height or width is free")
    if not bool(border.any()):
        return _Move(pair, shift, centre, None)
    return _Move(pair, shift, centre, border.movedim(-1, channel_axis(pair.second, image.dim()) - 1)[None])


def _behind(graph: fx.GraphModule, pair: Pair, shift: Tensor, shapes: Shapes) -> Tensor:
    """W2 P c: the shift as it arrives behind the second layer, computed by the operators of the graph in float64."""
    node = pair.first.node
    shape = shapes[node]
    assert isinstance(shape, torch.Size)
    axis = channel_axis(pair.first, len(shape))
    image = shift.view([-1 if a == axis else 1 for a in range(len(shape))]).expand(shape)
    caps = {cap.node: cap for cap in pair.caps}
    for reader in pair.path:
        if reader in caps:
            if not _same(image, shift[caps[reader].channel]):
                raise BlockedError(f"the cap {reader.name} lies behind padding")
        elif reader.target in LINEAR:
            image = _call(reader, node, image, shapes)
        elif reader.target in MAXIMA:
            image = _maximum(reader, node, image, shapes)
        elif not is_relu(reader):
            raise BlockedError(f"{reader.name} ({reader.target}) is not a relu")
        node = reader
    second = pair.second
    constants: dict[fx.Node, Tensor] = {second.weight: weight_of(graph, second).double()}
    if second.bias is not None:
        constants[second.bias] = torch.zeros_like(get_tensor(graph, second.bias), dtype=torch.float64)
    return _call(second.node, node, image, {**shapes, **constants})


def _call(node: fx.Node, source: fx.Node, image: Tensor, values: Mapping[fx.Node, Any]) -> Tensor:
    """`node` computed with `image` in place of `source`."""

    def value_of(arg: fx.Node) -> Any:
        return image.contiguous() if arg is source else values[arg]

    arguments = fx.node.map_arg(node.args, value_of)
    result: Tensor = node.target(*arguments, **node.kwargs)  # type: ignore[operator]  # an ATen operator
    return result


def _maximum(node: fx.Node, source: fx.Node, image: Tensor, shapes: Shapes) -> Tensor:
    """A maximum of x + image is a maximum of x, plus the image, where that does not change within a window."""
    largest, smallest = _call(node, source, image, shapes), -_call(node, source, -image, shapes)
    if not _same(largest, smallest):
        raise BlockedError(f"{node.name} ({node.target}) takes a maximum over a padded border")
    return largest


def _same(image: Tensor, other: Tensor) -> bool:
    """Equal but for rounding."""
    return bool(((image - other).abs() <= EXACT * image.abs().max()).all())


def _has_free_places(pair: Pair) -> bool:
    """True when an axis other than the batch has no fixed size anywhere on the way."""
    shapes = [node.meta["val"].shape for node in (pair.first.node, *pair.path, pair.second.node)]
    return any(not isinstance(size, int) for shape in shapes for size in shape[1:])


def _pads(pair: Pair) -> bool:
    """True when W2 P c may depend on the place: zero padding, average pooling that counts it, or overlapping taps."""
    if pair.second.kind == "conv_transpose" or any(
        (node.target in PADS and pad_mode(node) == "constant")
        or (node.target in AVERAGE_POOLS and _is_set(node.args[3:4] + node.args[6:]))
        for node in pair.path
    ):
        return True
    return pair.second.kind == "conv" and _is_set(pair.second.node.args[4:5])


def _is_set(arguments: tuple[object, ...]) -> bool:
    """True when a padding (a number, numbers or `same`) or divisor is more than nothing."""
    return any(
        any(value) if isinstance(value, list | tuple) else value not in (0, None, "valid") for value in arguments
    )


def _paying(program: Program, moves: list[_Move]) -> tuple[list[_Move], list[Skip]]:
    """Keep the moves without a border image, and of the others those whose image pays.

    With f the range in front of the second layer, as a part of what it was, and w that of the convolution's output: the
    noise in front shrinks by f, the one behind grows by sqrt(w^2 + 1), as there are two roundings. Without an image
    that output is rounded behind its relu, with it in front of the addition. What it hands on is gone from it anyway.
    """
    bordered = {move.pair.second.node: move for move in moves if move.border is not None}
    handed_on = {move.pair.first.node: move.shift for move in moves}
    sources = {move.pair.second.input: move for move in bordered.values()}
    ranges: dict[tuple[fx.Node, str], tuple[float, float]] = {}

    def see(node: fx.Node, what: str, value: Tensor) -> None:
        low, high = ranges.get((node, what), (0.0, 0.0))
        ranges[node, what] = min(low, float(value.min())), max(high, float(value.max()))

    def watch(node: fx.Node, value: Any) -> None:
        if node in sources:
            pair, shift = sources[node].pair, sources[node].shift
            see(node, "before", value)
            see(node, "after", (value - _along(shift[pair.channel], pair.second, value)).relu())
        if node in bordered:
            move = bordered[node]
            assert move.border is not None
            left = value - _along(handed_on[node], move.pair.second, value) if node in handed_on else value
            reader = single_user(node)
            rectified = reader is not None and (is_relu(reader) or reader.target in CLAMPS)
            see(node, "before", left.relu() if rectified else left)
            see(node, "after", left - move.border)

    watch_values(program.graph, program.calibration.batches, watch)

    def widened(node: fx.Node) -> float:
        (low, high), (low_before, high_before) = ranges[node, "after"], ranges[node, "before"]
        return (high - low) / max(high_before - low_before, torch.finfo(torch.float32).tiny)

    kept, skipped = [], []
    for move in moves:
        second = move.pair.second
        if move.border is None:
            kept.append(move)
            continue
        front, behind = widened(second.input), widened(second.node)
        if front * math.hypot(behind, 1) < 1:
            kept.append(move)
        else:
            parts = f"{front:.2f} of the range in front of it, {behind:.2f} behind"
            skipped.append(Skip(move.pair.name, f"its border would cost more than it gains ({parts})"))
    return kept, skipped


def _along(values: Tensor, layer: Layer, like: Tensor) -> Tensor:
    """`values` per channel, shaped to broadcast to an input or output of the layer."""
    axis = channel_axis(layer, like.dim())
    return values.view([-1 if a == axis else 1 for a in range(like.dim())])


def _apply(program: Program, moves: list[_Move]) -> None:
    graph = program.graph
    layers = {layer.node: layer for move in moves for layer in (move.pair.first, move.pair.second)}

    def add_bias(node: fx.Node, value: Tensor) -> None:
        layer = layers[node]
        weight, bias = weight_of(graph, layer), bias_of(graph, layer)
        total = value if bias is None else bias.double() + value
        layers[node] = give_bias(graph, layer, total.to(weight.dtype))

    for move in moves:
        first, second = move.pair.first, move.pair.second
        add_bias(first.node, -move.shift)
        add_bias(second.node, move.bias)
        for cap in move.pair.caps:
            set_cap(graph, first, cap, cap.limit - move.shift[cap.channel])
        if move.border is not None:
            _add_image(graph, second, move.border)
        statistics = program.channel_stats.get(first.name)
        if statistics is not None:
            mean = (statistics.mean - move.shift).float()
            program.channel_stats[first.name] = ChannelStatistics(mean, statistics.std)


def _add_image(graph: fx.GraphModule, layer: Layer, image: Tensor) -> None:
    """Add a constant image [1, out, *places] to the layer's output."""
    node, following = layer.node, layer.node.next
    value = node.meta["val"]
    constant = add_tensor(graph, f"{layer.name.replace('@', '_')}.border", image.to(value.dtype), following)
    total = call_before(graph, following, aten.add.Tensor, (node, constant))
    total.meta.update(val=value, nn_module_stack=node.meta.get("nn_module_stack", {}))
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
