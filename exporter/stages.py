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
from typing import TypeGuard

from exporter.metrics import EXACT_DB
from exporter.report import LayerDiff, Stage

QUANTIZATION, LOWERING, RUNTIME, DIALECT = "quantization", "lowering", "runtime", "tensorrt dialect"

FLOAT_SUMS_DB = 100.0
"""Sums of K products in float32 differ by about sqrt(K) 2^-24 of their size in another order: 108 dB at K = 16384."""

EXACT_STAGES = (LOWERING, DIALECT)
WRITTEN = {LOWERING: "file", DIALECT: "file for TensorRT"}


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
    for stage in EXACT_STAGES:
        if _is_off(stage, noises):
            return stage, False
    own = {stage: _energy(value) for stage, value in noises.own.items()}
    total = {stage: _energy(value) for stage, value in noises.total.items()}
    shares = {}
    for stage in own:
        allowed = 0.0 if stage == QUANTIZATION else 2.0
        shares[stage, False] = own[stage] - allowed * own.get(QUANTIZATION, 0.0)
        shares[stage, True] = total.get(stage, 0.0) - own[stage] - allowed * total.get(QUANTIZATION, 0.0)
    return max(shares, key=lambda key: shares[key])


def _is_off(stage: str, noises: Noises | Stage) -> bool:
    """True when a stage that should change nothing makes more noise of its own here than it may."""
    usual = max(_energy(noises.own.get(QUANTIZATION, EXACT_DB)), _energy(FLOAT_SUMS_DB))
    return _energy(noises.own.get(stage, EXACT_DB)) > usual or noises.typical.get(stage, EXACT_DB) < FLOAT_SUMS_DB


def _energy(db: float) -> float:
    """Noise relative to the signal."""
    return 0.0 if db >= EXACT_DB else float(10 ** (-db / 10))


def is_fault(stage: Stage | None) -> TypeGuard[Stage]:
    """True when a stage that should change nothing begins to here."""
    return stage is not None and stage.name in EXACT_STAGES and not stage.inherited and _is_off(stage.name, stage)


def source(layers: Sequence[LayerDiff]) -> LayerDiff | None:
    """The layer to look at first: where a fault arises, or else the one that makes most noise by itself.

    Of several faults the first in network order. None without measured layers.
    """
    found = [(layer, layer.stage) for layer in layers if layer.stage is not None]
    fault = next((layer for layer, stage in found if is_fault(stage)), None)
    return fault or min((layer for layer, _ in found), key=_own, default=None)


def _own(layer: LayerDiff) -> float:
    """The lowest SQNR that a stage leaves here by itself."""
    return min(layer.stage.own.values(), default=EXACT_DB) if layer.stage else EXACT_DB


def own_stage(stage: Stage) -> str:
    """The stage that makes most noise here by itself."""
    return stage.name if is_fault(stage) else min(stage.own, key=lambda name: stage.own[name], default=stage.name)


def short(stage: Stage | None) -> str:
    """A stage in a table: its name, and whether its noise came in from the layers before."""
    return "" if stage is None else f"{stage.name}, inherited" if stage.inherited else stage.name


def describe(stage: Stage) -> str:
    """One sentence: what the stage is to the layer, and the figures that say so."""
    behind = f" (behind {', '.join(stage.after)})" if stage.after else ""
    own, total = (_db(side.get(stage.name)) for side in (stage.own, stage.total))
    if not is_fault(stage):
        where = f"mostly from layers before it{behind}" if stage.inherited else "mostly of its own"
        return f"{stage.name}, {where}: {own} alone, {total} in the network"
    beside = f", quantization {_db(stage.own[QUANTIZATION])}" if QUANTIZATION in stage.own else ""
    typical = f", a typical row {_db(stage.typical[stage.name])}" if stage.name in stage.typical else ""
    fault = f"the {WRITTEN[stage.name]} begins to differ here{behind} from the graph it was written from"
    return f"{fault}: {own}{typical}{beside}"


def _db(value: float | None) -> str:
    return "not measured" if value is None else "exact" if value >= EXACT_DB else f"{value:.1f} dB"
