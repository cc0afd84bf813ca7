"""The likely causes of a layer's error: rules over its figures, each named with what speaks for it.

    lowering          here the file begins to differ from the graph it was written from; see `exporter.stages`
    inherited         at least half of the noise at its output came in with its input: own > accumulated + 3 dB
    clipping          a quarter or more of a quantizer's error comes from values outside its range
    outlier channels  one channel is OUTLIER_RATIO times the median one: it takes 3 bits from the others
    coarse bits       4 bits or fewer, and nothing else stands out
    rounding          more bits than that, and nothing stands out
    folding           the runtime computes a quantized layer with float kernels: no accuracy is lost, speed is

clipping, outlier channels, coarse bits and rounding are said of the weight or of the input, whichever makes more noise
at the layer's own output, and of both when the smaller is a quarter of the larger or more (6 dB).
"""

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from exporter.metrics import EXACT_DB
from exporter.report import Cause, Evidence, LayerDiff
from exporter.stages import describe, is_fault

LOWERING, INHERITED, CLIPPING, OUTLIERS = "lowering", "inherited", "clipping", "outlier channels"
COARSE, ROUNDING, FOLDING = "coarse bits", "rounding", "folding"

HALF_DB = 3.0
QUARTER_DB = 6.0
CLIP_NOISE = 0.25
OUTLIER_RATIO = 8.0
COARSE_BITS = 4
WORTH_A_LOOK = 12

FLOAT_OPERATORS = frozenset({"Conv", "ConvTranspose", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
"""onnxruntime's float kernels for layers."""


@dataclasses.dataclass(frozen=True)
class _Side:
    """One of a layer's two quantizers."""

    what: str
    noise_db: float | None
    bits: float | None
    clipped: float | None
    clip_noise: float | None
    ratio: float | None
    channel: str


def explain(
    layers: Iterable[LayerDiff], evidence: Mapping[str, Evidence], folded: Collection[str] = ()
) -> tuple[LayerDiff, ...]:
    """The layers with their evidence, {layer: evidence}, and the causes it speaks for.

    `folded` names the layers none of whose codes is left in the graph that the runtime runs.
    """
    given = [dataclasses.replace(layer, evidence=evidence.get(layer.name)) for layer in layers]
    return tuple(dataclasses.replace(layer, causes=likely_causes(layer, layer.name in folded)) for layer in given)


def worth_a_look(layers: Sequence[LayerDiff], limit: int = WORTH_A_LOOK) -> tuple[str, ...]:
    """`limit` layers at most: in turns the worst in the network and the worst alone, which may be the source."""
    total = {entry.name: entry.output_sqnr_db.worst for entry in layers}
    own = {entry.name: entry.output_sqnr_db.own for entry in layers}
    turns = itertools.zip_longest(_lowest_first(total), _lowest_first(own))
    return tuple(dict.fromkeys(name for pair in turns for name in pair if name is not None))[:limit]


def _lowest_first(figures: Mapping[str, float | None]) -> list[str]:
    return [name for _, name in sorted((db, name) for name, db in figures.items() if db is not None)]


def likely_causes(layer: LayerDiff, folded: bool = False) -> tuple[Cause, ...]:
    """Causes, the likeliest first; () for a layer that is exact or was not measured."""
    return (*_lowering(layer), *_inherited(layer), *_own(layer), *_folding(layer, folded))


def _lowering(layer: LayerDiff) -> Iterator[Cause]:
    if is_fault(layer.stage):
        yield Cause(LOWERING, describe(layer.stage))


def _inherited(layer: LayerDiff) -> Iterator[Cause]:
    own, total = layer.output_sqnr_db.own, layer.output_sqnr_db.accumulated
    if own is None or total is None or own <= total + HALF_DB:
        return
    share = 1 - 10 ** ((total - own) / 10)
    alone = "alone it is exact" if own >= EXACT_DB else f"alone it is {own:.1f} dB, in the network {total:.1f}"
    yield Cause(INHERITED, f"{100 * share:.0f} % of its noise comes from layers before it ({alone})")


def _own(layer: LayerDiff) -> Iterator[Cause]:
    if layer.evidence is None:
        return
    sides = [(side.noise_db, side) for side in _sides(layer.evidence)]
    known = sorted(((noise, side) for noise, side in sides if noise is not None), key=lambda pair: pair[0])
    for noise, side in known:
        if noise <= known[0][0] + QUARTER_DB and noise < EXACT_DB:
            yield from _of_side(side, noise)


def _sides(evidence: Evidence) -> tuple[_Side, _Side]:
    weight = _Side(
        "weight",
        evidence.weight_only_db,
        evidence.weight_bits,
        evidence.weight_clipped,
        evidence.weight_clip_noise,
        evidence.weight_outlier_ratio,
        f"{evidence.weight_outlier_axis} channel {evidence.weight_outlier_channel}",
    )
    value = _Side(
        "input",
        evidence.input_only_db,
        evidence.input_bits,
        evidence.input_clipped,
        evidence.input_clip_noise,
        evidence.input_outlier_ratio,
        f"channel {evidence.input_outlier_channel}",
    )
    return weight, value


def _of_side(side: _Side, noise_db: float) -> Iterator[Cause]:
    found = False
    if side.clip_noise is not None and side.clipped is not None and side.clip_noise >= CLIP_NOISE:
        found = True
        share = f"{100 * side.clipped:.2g} % of the {side.what}'s values lie outside its range"
        yield Cause(CLIPPING, f"{share} and make {100 * side.clip_noise:.0f} % of its error")
    if side.ratio is not None and side.ratio >= OUTLIER_RATIO:
        found = True
        times = f"{side.ratio:.0f}" if side.ratio >= 10 else f"{side.ratio:.1f}"
        yield Cause(OUTLIERS, f"{side.channel} of the {side.what} is {times} times as wide as the median one")
    if not found and side.bits is not None:
        kind = COARSE if side.bits <= COARSE_BITS else ROUNDING
        yield Cause(kind, f"{side.bits:.3g} bits of the {side.what} leave {noise_db:.1f} dB at its own output")


def _folding(layer: LayerDiff, folded: bool) -> Iterator[Cause]:
    if layer.evidence is None or layer.evidence.weight_bits is None:
        return
    parts = set((layer.kernel or "").replace(", ", "+").split("+"))
    if folded:
        yield Cause(FOLDING, "the runtime keeps none of its codes: it turned them to float while loading")
    elif "DequantizeLinear" in parts:
        yield Cause(FOLDING, f"{layer.kernel}: the weight is decoded to float at every run")
    elif parts & FLOAT_OPERATORS:
        yield Cause(FOLDING, f"{layer.kernel} computes in float")
