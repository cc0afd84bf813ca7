"""What changed from one report to another, by output, metric and layer, and how much of it is chance.

    change    new - old
    interval  of the change over other samples of the same kind, from both reports' sums by sample; see
              `exporter.bootstrap`. SQNR and top-1 agreement have one, and layers' SQNR
    verdict   worse, better: the interval does not hold zero · noise: it does · same: no change at all
              changed: nothing says how much of it is chance

Layers are matched by name, outputs by runtime and name.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from exporter.bootstrap import Interval, agreement_change, sqnr_change
from exporter.errors import InputError
from exporter.gates import FIGURES, RUNTIMES
from exporter.report import GateResult, LayerDiff, Report, Sums

REPORT = "report.json"
LOWER_IS_BETTER = frozenset({"max_abs", "mean_abs", "kl"})
SAME_SIGNAL = 1e-3
"""Sums of one float model's outputs differ by less than this from machine to machine."""

Verdict = Literal["worse", "better", "noise", "same", "changed"]


@dataclasses.dataclass(frozen=True)
class Change:
    """A figure in both reports; `where` is runtime and output, a runtime, or a layer."""

    where: str
    figure: str
    old: float
    new: float
    interval: Interval | None
    verdict: Verdict


@dataclasses.dataclass(frozen=True)
class LayerChange:
    """A layer in both reports; `sqnr` is that of its output in the quantized network, None where not measured."""

    name: str
    sqnr: Change | None
    old: LayerDiff
    new: LayerDiff

    @property
    def stored_differently(self) -> bool:
        """True when format, bits or kernel are others."""
        return (self.old.format, self.old.kernel) != (self.new.format, self.new.kernel) or not math.isclose(
            self.old.bits_per_weight, self.new.bits_per_weight, rel_tol=1e-6
        )


@dataclasses.dataclass(frozen=True)
class ReportDiff:
    """Everything that `qexport diff` says; sizes are {file: (old, new)} in bytes, None where there is none."""

    old: str
    new: str
    remarks: tuple[str, ...]
    outputs: tuple[Change, ...]
    metrics: tuple[Change, ...]
    layers: tuple[LayerChange, ...]
    only_old: tuple[str, ...]
    only_new: tuple[str, ...]
    sizes: Mapping[str, tuple[int | None, int | None]]
    gates: tuple[GateResult, ...] = ()

    @property
    def regressions(self) -> tuple[Change, ...]:
        """Outputs' figures that are worse by more than chance."""
        return tuple(change for change in self.outputs if change.verdict == "worse")

    @property
    def layer_regressions(self) -> tuple[Change, ...]:
        """Layers whose output is worse by more than chance."""
        return tuple(layer.sqnr for layer in self.layers if layer.sqnr is not None and layer.sqnr.verdict == "worse")

    def to_json(self) -> str:
        """JSON text with the fields' names; of a layer what its report says of it, old and new."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_report(path: Path) -> Report:
    """The report at `path`, report.json or an output folder. Raises InputError when there is none."""
    file = path / REPORT if path.is_dir() else path
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        what = f"is not an output of qexport: it has no {REPORT}" if path.is_dir() else "no such file or folder"
        raise InputError(what, where=str(path), fix="give an output folder or its report.json") from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read as a report: {error}", where=str(file)) from error


def diff_reports(old: Report, new: Report, names: tuple[str, str] = ("OLD", "NEW")) -> ReportDiff:
    """What changed, no gates asked."""
    paired = _same_samples(old, new)
    before, after = ({layer.name: layer for layer in report.layers} for report in (old, new))
    files = sorted({*old.sizes.files, *new.sizes.files})
    return ReportDiff(
        *names,
        remarks=tuple(_remarks(old, new, paired)),
        outputs=tuple(_outputs(old, new, paired)),
        metrics=tuple(_metrics(old, new)),
        layers=tuple(_layer(before[name], after[name], old, new, paired) for name in after if name in before),
        only_old=tuple(name for name in before if name not in after) if after else (),
        only_new=tuple(name for name in after if name not in before) if before else (),
        sizes={name: (old.sizes.files.get(name), new.sizes.files.get(name)) for name in files},
    )


def _same_samples(old: Report, new: Report) -> bool:
    keys = ("sha256", "held_out")
    known = old.calibration.get("sha256") is not None
    return known and all(old.calibration.get(key) == new.calibration.get(key) for key in keys)


def _remarks(old: Report, new: Report, paired: bool) -> Iterable[str]:
    if not old.sample_sums.outputs or not new.sample_sums.outputs:
        side = "OLD" if not old.sample_sums.outputs else "NEW"
        yield f"{side} holds no figures by sample: numbers are compared as they are, and chance is not told apart"
    if not paired:
        yield "OLD and NEW were not validated on the same samples: part of every change is theirs"
    elif not _same_model(old, new):
        yield "the float models differ: each report compares with its own"
    for runtime in RUNTIMES:
        if (runtime in old.outputs) != (runtime in new.outputs):
            yield f"{runtime} ran in {'OLD' if runtime in old.outputs else 'NEW'} only"
    metrics = {name: "OLD" if name in old.metrics else "NEW" for name in {*old.metrics} ^ {*new.metrics}}
    yield from (f"metric {name} is in {side} only" for name, side in sorted(metrics.items()))


def _same_model(old: Report, new: Report) -> bool:
    """True unless an output's reference has another energy."""
    for runtime, outputs in old.sample_sums.outputs.items():
        for name, sums in outputs.items():
            other = new.sample_sums.outputs.get(runtime, {}).get(name)
            if other and not math.isclose(sum(sums.signal), sum(other.signal), rel_tol=SAME_SIGNAL):
                return False
    return True


def _outputs(old: Report, new: Report, paired: bool) -> Iterable[Change]:
    for runtime in RUNTIMES:
        for output, after in new.outputs.get(runtime, {}).items():
            before = old.outputs.get(runtime, {}).get(output)
            if before is None:
                continue
            sums = [report.sample_sums.outputs.get(runtime, {}).get(output) for report in (old, new)]
            for figure in FIGURES:
                value, now = getattr(before, figure), getattr(after, figure)
                if value is not None and now is not None:
                    interval = _interval(figure, sums[0], sums[1], paired)
                    yield _change(f"{runtime} {output}", figure, value, now, interval)


def _metrics(old: Report, new: Report) -> Iterable[Change]:
    for name, values in new.metrics.items():
        for runtime in ("reference", *RUNTIMES):
            before, after = old.metrics.get(name, {}).get(runtime), values.get(runtime)
            if before is not None and after is not None:
                yield _change(runtime, name, before, after, None)


def _layer(before: LayerDiff, after: LayerDiff, old: Report, new: Report, paired: bool) -> LayerChange:
    value, now = before.output_sqnr_db.accumulated, after.output_sqnr_db.accumulated
    if value is None or now is None:
        return LayerChange(before.name, None, before, after)
    sums = [report.sample_sums.layers.get(before.name) for report in (old, new)]
    interval = _interval("sqnr_db", sums[0], sums[1], paired)
    return LayerChange(before.name, _change(before.name, "output_sqnr_db", value, now, interval), before, after)


def _interval(figure: str, old: Sums | None, new: Sums | None, paired: bool) -> Interval | None:
    change = {"sqnr_db": sqnr_change, "top1_agreement": agreement_change}.get(figure)
    return None if change is None or old is None or new is None else change(old, new, paired=paired)


def _change(where: str, figure: str, old: float, new: float, interval: Interval | None) -> Change:
    verdict: Verdict = "changed"
    if new == old:
        verdict = "same"
    elif interval is not None:
        grew = (interval.low > 0) != (figure in LOWER_IS_BETTER)
        verdict = "noise" if interval.holds_zero else "better" if grew else "worse"
    return Change(where, figure, old, new, interval, verdict)
