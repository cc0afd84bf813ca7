"""Which stage each layer's loss came from: quantization, lowering, the runtime's own arithmetic, TensorRT's dialect.

Rules over the noises of `exporter.stage_noise`, n = 10^(-dB / 10):

    fault      lowering and dialect should change nothing: a typical row further off than the order of float sums
               explains (FLOAT_SUMS_DB), or more noise than quantization makes at this layer, arises here
    otherwise  the largest of own and inherited noises, inherited = total - own; of other stages than quantization only
               what goes beyond twice that of quantization: two networks that round differently, both as far from
               float, are up to so far apart, and neither is worse for it

So a fault is said of the layer where it arises. Layers behind it say of which stage's noise they have most, inherited.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from exporter.metrics import EXACT_DB
from exporter.report import LayerDiff, Stage

QUANTIZATION, LOWERING, RUNTIME, DIALECT = "quantization", "lowering", "runtime", "tensorrt dialect"

FLOAT_SUMS_DB = 100.0
"""Sums of K products in float32 differ by about sqrt(K) 2^-24 of their size in another order: 108 dB at K = 16384."""

EXACT_STAGES = (LOWERING, DIALECT)


@dataclasses.dataclass(frozen=True)
class Noises:
    """{stage: dB} of one layer, as in `report.Stage`, and the layers whose outputs it is computed from."""

    after: tuple[str, ...]
    own: Mapping[str, float]
    total: Mapping[str, float]
    typical: Mapping[str, float]


def with_stages(layers: Iterable[LayerDiff], noises: Mapping[str, Noises]) -> tuple[LayerDiff, ...]:
    """The layers, each with its stage."""
    return tuple(
        dataclasses.replace(layer, stage=stage_of(noises[layer.name])) if layer.name in noises else layer
        for layer in layers
    )


def stage_of(noises: Noises) -> Stage:
    """The stage that most of a layer's noise comes from."""
    name, inherited = _largest(noises)
    return Stage(name, inherited, noises.after, noises.own, noises.total, noises.typical)


def _largest(noises: Noises) -> tuple[str, bool]:
    own = {stage: _energy(value) for stage, value in noises.own.items()}
    usual = max(own.get(QUANTIZATION, 0.0), _energy(FLOAT_SUMS_DB))
    for stage in EXACT_STAGES:
        if own.get(stage, 0.0) > usual or noises.typical.get(stage, EXACT_DB) < FLOAT_SUMS_DB:
            return stage, False
    total = {stage: _energy(value) for stage, value in noises.total.items()}
    shares = {}
    for stage in own:
        allowed = 0.0 if stage == QUANTIZATION else 2.0
        shares[stage, False] = own[stage] - allowed * own.get(QUANTIZATION, 0.0)
        shares[stage, True] = total.get(stage, 0.0) - own[stage] - allowed * total.get(QUANTIZATION, 0.0)
    return max(shares, key=lambda key: shares[key])


def _energy(db: float) -> float:
    """Noise relative to the signal."""
    return 0.0 if db >= EXACT_DB else float(10 ** (-db / 10))


def faults(layers: Sequence[LayerDiff]) -> tuple[LayerDiff, ...]:
    """The layers where a stage that should change nothing does, in network order."""
    return tuple(
        entry for entry in layers if entry.stage and entry.stage.name in EXACT_STAGES and not entry.stage.inherited
    )
