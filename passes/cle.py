"""Cross-layer equalization (Nagel et al., arXiv 1906.04721, section 4.1; Meller et al., arXiv 1902.01917).

    relu(s z) = s relu(z), s > 0:   W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1),   S = diag(s)

With r1_i the range (largest magnitude) of output channel i of the first layer and r2_i that of input channel i of the
second,

    s_i = sqrt(r1_i r2_i) / r2_i

makes both equal to sqrt(r1_i r2_i), the choice that maximizes the product of the channels' precisions. Pairs that share
a layer (a depthwise convolution is second of one pair and first of the next) disturb each other, so all pairs are
visited again until no scale moves. A dead channel (no range on one side) keeps s_i = 1.

That serves the weights. The rounding of the activation between the layers costs least when its own channels have equal
ranges a_i (largest magnitudes on calibration data), which s_i = a_i would bring about. `activations` t mixes the two:

    s_i = (a_i / max a)^t (r1_i / r2_i)^((1 - t) / 2)

A cap is scaled with its channel: min(relu(z), c) / s = min(relu(z / s), c / s). It becomes relu followed by a minimum
with a constant per channel; the activation between the two can be quantized, which keeps the convolution on integers.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, fx

from passes.base import Pass, PassError, PassResult, Program, Skip
from passes.calibration import watch_values
from passes.channels import kernels_of, per_kernel, rescale
from passes.equalize_pairs import Pair, channel_axis, find_pairs, observe_shapes, set_cap
from passes.graph import Layer, aten

DEAD = 2.0**-20
"""A channel whose range is below this part of its layer's largest is dead: no code of 8 bits would ever tell it from 0,
and equalizing it would multiply its bias by a thousand and more."""

QUIET = 1 / 16
"""A channel whose activation stays below this part of the largest counts as if it reached it: the less a channel is
seen, the less is known about it, and its weights would grow out of proportion."""

KEEP_CAP = 0.05
"""A capped pair whose scales all lie within this many octaves of 1 stays as it is: not worth a minimum."""


@dataclasses.dataclass(frozen=True)
class CrossLayerEqualization(Pass):
    """Equalize the channel ranges of neighbouring layers; the float function stays.

    iterations     most visits to every pair
    tolerance      converged when no scale moves by more than this many octaves in one visit
    activations    t above; 0 is the paper's rule, for weights alone
    replace_relu6  drop the cap of a ReLU6 (any clamp from 0) that calibration never reaches; changes the float function
                   for inputs beyond it
    """

    name: ClassVar[str] = "cle"
    summary: ClassVar[str] = "equalize the channel ranges of neighbouring layers (cross-layer equalization)"
    paper: ClassVar[str] = "arXiv 1906.04721"
    prerequisites: ClassVar[tuple[str, ...]] = ("fold-bn",)
    quantizes: ClassVar[bool] = False

    iterations: int = 40
    tolerance: float = 1e-3
    activations: float = 0.5
    replace_relu6: bool = False

    def requires(self, program: Program) -> None:
        """One batch must be there to know the shapes by, and the share must be one."""
        if not 0 <= self.activations <= 1:
            raise PassError(
                f"cle: activations={self.activations} is not between 0 and 1", fix="use cle:activations=0.5"
            )
        if not program.calibration.batches:
            raise PassError("cle needs calibration data", fix="give --calib")

    def run(self, program: Program) -> PassResult:
        """Find the pairs, equalize copies of their ranges, then write every weight once."""
        graph = program.graph
        pairs, skipped = find_pairs(graph, observe_shapes(graph, program.calibration.batches[0]))
        measured: dict[str, float | str] = {"pairs": len(pairs)}
        if self.replace_relu6:
            dropped, kept = _drop_unreached_caps(program, pairs)
            pairs = [_without(pair, dropped) for pair in pairs]
            measured["caps_replaced"] = len(dropped)
            skipped += kept
        ranges = {layer.node: _Ranges(graph, layer) for pair in pairs for layer in (pair.first, pair.second)}
        before = _figures(pairs, ranges)
        scales, visits = self._equalize(pairs, ranges, _activation_ranges(program, pairs, ranges))
        for pair, scale in zip(pairs, scales, strict=True):
            if pair.caps and float(scale.log2().abs().max()) < KEEP_CAP:
                ranges[pair.first.node].scale_outputs(scale)
                ranges[pair.second.node].scale_inputs(1 / scale[pair.channel])
                scale.fill_(1)
        for key, value in before.items():
            measured[f"{key}_before"] = value
            measured[f"{key}_after"] = _figures(pairs, ranges)[key]
        measured["iterations"] = visits
        _write(program, pairs, scales)
        return PassResult(tuple(pair.name for pair in pairs), tuple(skipped), measured)

    def _equalize(
        self, pairs: list[Pair], ranges: Mapping[fx.Node, "_Ranges"], activations: list[Tensor]
    ) -> tuple[list[Tensor], int]:
        """Scales [channels] of each pair, and how often all pairs were visited."""
        live = [_live(*_pair_ranges(pair, ranges)) for pair in pairs]
        scales = [torch.ones(mask.shape, dtype=torch.float64) for mask in live]
        for visit in range(self.iterations):
            moved = 0.0
            for pair, mask, total, seen in zip(pairs, live, scales, activations, strict=True):
                r1, r2 = _pair_ranges(pair, ranges)
                a = _relative(seen / total)
                scale = a**self.activations * (r1 / r2) ** ((1 - self.activations) / 2)
                scale = torch.where(mask, scale, torch.ones_like(r1))
                ranges[pair.first.node].scale_outputs(1 / scale)
                ranges[pair.second.node].scale_inputs(scale[pair.channel])
                total *= scale
                moved = max(moved, float(scale.log2().abs().max()))
            if moved <= self.tolerance:
                return scales, visit + 1
        return scales, self.iterations


class _Ranges:
    """Largest magnitude [out, in / groups] of each kernel of a layer: all that the iteration needs of its weight."""

    def __init__(self, graph: fx.GraphModule, layer: Layer) -> None:
        self.groups = layer.groups
        self.kernels = kernels_of(graph, layer).abs().amax(2)

    def outputs(self) -> Tensor:
        """[out]"""
        ranges: Tensor = self.kernels.amax(1)
        return ranges

    def inputs(self) -> Tensor:
        """[in]"""
        ranges: Tensor = self.kernels.unflatten(0, (self.groups, -1)).amax(1).flatten()
        return ranges

    def scale_outputs(self, factor: Tensor) -> None:
        self.kernels = self.kernels * factor[:, None]

    def scale_inputs(self, factor: Tensor) -> None:
        self.kernels = self.kernels * per_kernel(factor, self.groups, len(self.kernels))


def _pair_ranges(pair: Pair, ranges: Mapping[fx.Node, _Ranges]) -> tuple[Tensor, Tensor]:
    """(r1, r2), each [channels of the pair]."""
    r1 = ranges[pair.first.node].outputs()
    columns = ranges[pair.second.node].inputs()
    return r1, torch.zeros_like(r1).scatter_reduce(0, pair.channel, columns, "amax")


def _activation_ranges(program: Program, pairs: list[Pair], ranges: Mapping[fx.Node, "_Ranges"]) -> list[Tensor]:
    """Largest magnitude [channels] on calibration data of what each pair's second layer reads."""
    sources: dict[fx.Node, list[int]] = {}
    for index, pair in enumerate(pairs):
        sources.setdefault(pair.second.input, []).append(index)
    seen = [torch.zeros_like(ranges[pair.first.node].outputs()) for pair in pairs]

    def watch(node: fx.Node, value: Tensor) -> None:
        for index in sources.get(node, []):
            pair = pairs[index]
            rows = value.movedim(channel_axis(pair.second, value.dim()), 0).flatten(1)
            seen[index].scatter_reduce_(0, pair.channel, rows.abs().amax(1).double(), "amax")

    watch_values(program.graph, program.calibration.batches, watch)
    return seen


def _relative(activations: Tensor) -> Tensor:
    """Each channel's range as a part of the largest; 1 for channels that were never seen to be active."""
    largest = activations.max()
    return torch.where(activations > DEAD * largest, activations / largest, 1.0).clamp_min(QUIET)


def _live(r1: Tensor, r2: Tensor) -> Tensor:
    return (r1 > DEAD * r1.max()) & (r2 > DEAD * r2.max())


def _figures(pairs: list[Pair], ranges: Mapping[fx.Node, _Ranges]) -> dict[str, float]:
    """Over all pairs: how far ranges of one layer's channels lie apart, and the two ranges of one channel."""
    spread = mismatch = 1.0
    for pair in pairs:
        r1, r2 = _pair_ranges(pair, ranges)
        mask = _live(r1, r2)
        if mask.any():
            r1, r2 = r1[mask], r2[mask]
            spread = max(spread, float(r1.max() / r1.min()), float(r2.max() / r2.min()))
            mismatch = max(mismatch, float((r1 / r2).max()), float((r2 / r1).max()))
    return {"spread": spread, "mismatch": mismatch}


def _write(program: Program, pairs: list[Pair], scales: list[Tensor]) -> None:
    """Rescale weights, biases, caps and statistics."""
    layers = {layer.node: layer for pair in pairs for layer in (pair.first, pair.second)}
    outputs = {pair.first.node: scale for pair, scale in zip(pairs, scales, strict=True)}
    inputs = {pair.second.node: scale[pair.channel] for pair, scale in zip(pairs, scales, strict=True)}
    for node, layer in layers.items():
        rescale(program, layer, outputs.get(node), inputs.get(node))
    for pair, scale in zip(pairs, scales, strict=True):
        if bool((scale != 1).any()):
            for cap in pair.caps:
                set_cap(program.graph, pair.first, cap, cap.limit / scale[cap.channel])


def _drop_unreached_caps(program: Program, pairs: list[Pair]) -> tuple[set[fx.Node], list[Skip]]:
    """Turn clamps that calibration never reaches into relus; the others are reported with what was seen."""
    clamps = {cap.node: cap.limit for pair in pairs for cap in pair.caps if isinstance(cap.limit, float)}
    sources = {node.args[0]: node for node in clamps}
    largest = dict.fromkeys(clamps, -torch.inf)

    def note(node: fx.Node, value: object) -> None:
        if node in sources and isinstance(value, Tensor):
            largest[sources[node]] = max(largest[sources[node]], float(value.max()))

    watch_values(program.graph, program.calibration.batches, note)
    dropped, kept = set(), []
    for node, limit in clamps.items():
        if largest[node] >= limit:
            kept.append(Skip(node.name, f"calibration reaches its cap of {limit:g} ({largest[node]:.4g})"))
            continue
        node.target, node.args, node.kwargs = aten.relu.default, (node.args[0],), {}
        dropped.add(node)
    return dropped, kept


def _without(pair: Pair, dropped: set[fx.Node]) -> Pair:
    return dataclasses.replace(pair, caps=tuple(cap for cap in pair.caps if cap.node not in dropped))
