"""What `qexport diff` found, for the terminal (80 columns) and as markdown for a comment on a pull request."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from exporter.diff import Change, LayerChange, ReportDiff
from exporter.render.text import NONE, RUNTIMES, decibels, gate_state, magnitude, metric, percent, plural, shorten, size
from exporter.report import GateResult, LayerDiff

SHOWN_FIGURES = {"sqnr_db": "SQNR dB", "top1_agreement": "top-1", "max_abs": "max error"}
SHOWN_LAYERS = 10
VERDICTS = {"worse": "WORSE", "better": "better", "noise": "within noise", "same": "same", "changed": ""}
STYLES = {
    "WORSE": "bold red",
    "FAILED": "bold red",
    "better": "green",
    "passed": "green",
    "not measured": "bold yellow",
}


@dataclasses.dataclass(frozen=True)
class Section:
    """A table with a line above it, or the line alone; `text_columns` stand to the left."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: tuple[int, ...] = (0,)


def headline(diff: ReportDiff) -> str:
    """One line: what came of it."""
    failed = sum(gate.measured and not gate.passed for gate in diff.gates)
    if failed:
        return f"{failed} of {plural(len(diff.gates), 'gate')} failed"
    if any(not gate.measured for gate in diff.gates):
        return "a gate could not be measured"
    worse, layers = len(diff.regressions), len(diff.layer_regressions)
    found = f"{plural(worse, 'output figure')} and {plural(layers, 'layer')} worse beyond noise"
    return f"passed {plural(len(diff.gates), 'gate')}, {found}" if diff.gates else found


def render(diff: ReportDiff) -> RenderableType:
    """What a console prints."""
    parts: list[RenderableType] = [Text.assemble((f"{diff.old} -> {diff.new}", "bold"), f": {headline(diff)}")]
    parts += [Text(f"note: {remark}", style="yellow") for remark in diff.remarks]
    for section in sections(diff):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim", padding=(0, 1, 0, 0))
        for index, heading in enumerate(section.headings):
            justify = "left" if index in section.text_columns else "right"
            table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]  # a Literal of rich's
        for row in section.rows:
            table.add_row(*(Text(shorten(cell, 30), style=STYLES.get(cell, "")) for cell in row))
        parts += [Padding(Text(section.title), (1, 0, 0, 0)), table] if section.rows else [Text(f"\n{section.title}")]
    return Group(*parts)


def markdown(diff: ReportDiff) -> str:
    """The same as markdown."""
    lines = [f"## qexport diff {_cell(diff.old)} → {_cell(diff.new)}: {headline(diff)}"]
    lines += [f"> **Note:** {_cell(remark)}" for remark in diff.remarks]
    for section in sections(diff):
        lines.append(f"**{_cell(section.title)}**")
        if section.rows:
            rule = ["---" if index in section.text_columns else "---:" for index in range(len(section.headings))]
            rows = [[f"**{cell}**" if cell in ("WORSE", "FAILED") else cell for cell in row] for row in section.rows]
            lines.append("\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (section.headings, rule, *rows)))
    return "\n\n".join(lines) + "\n"


def sections(diff: ReportDiff) -> list[Section]:
    """Gates, outputs, metrics, layers, sizes; what is empty is left out."""
    figures = [change for change in diff.outputs if change.figure in SHOWN_FIGURES]
    several = len({change.where.partition(" ")[2] for change in figures}) > 1
    found = [
        Section("gates", ("gate", "measured", "verdict", "at"), tuple(map(_gate, diff.gates)), (0, 2, 3)),
        Section(
            "outputs against float",
            ("output", "figure", "old", "new", "change", "99 % interval", "verdict"),
            tuple(_figure(change, several) for change in figures),
            (0, 1, 6),
        ),
        Section(
            "metrics",
            ("metric", "at", "old", "new", "change"),
            tuple(_metric(change) for change in diff.metrics),
            (0, 1),
        ),
        *_layers(diff),
        Section("bytes", ("file", "old", "new", "change"), tuple(_sizes(diff))),
    ]
    return [section for section in found if section.rows or section.headings == ()]


def _gate(gate: GateResult) -> tuple[str, ...]:
    return gate.expr, metric(gate.value), gate_state(gate), gate.where


def _figure(change: Change, several: bool) -> tuple[str, ...]:
    """`several` outputs are told apart by name."""
    runtime, _, output = change.where.partition(" ")
    name = RUNTIMES.get(runtime, runtime)
    write = {"sqnr_db": decibels, "top1_agreement": percent}.get(change.figure, magnitude)
    values = write(change.old), write(change.new)
    where = f"{name}: {output}" if several else name
    return where, SHOWN_FIGURES[change.figure], *values, *_difference(change), VERDICTS[change.verdict]


def _difference(change: Change) -> tuple[str, str]:
    """The change and its interval; shares in points of percent."""
    factor = 100.0 if change.figure == "top1_agreement" else 1.0
    form: Callable[[float], str] = (
        (lambda value: f"{factor * value:+.3g}")
        if change.figure == "max_abs"
        else (lambda value: f"{factor * value:+.2f}")
    )
    interval = change.interval
    return form(change.new - change.old), f"{form(interval.low)} to {form(interval.high)}" if interval else NONE


def _metric(change: Change) -> tuple[str, ...]:
    return change.figure, change.where, metric(change.old), metric(change.new), f"{change.new - change.old:+.4g}"


def _layers(diff: ReportDiff) -> Iterable[Section]:
    judged = [layer.sqnr for layer in diff.layers if layer.sqnr is not None]
    if judged:
        counts = {name: sum(change.verdict == name for change in judged) for name in VERDICTS}
        listed = [f"{number} {VERDICTS[name].lower() or 'changed'}" for name, number in counts.items() if number]
        moved = [
            layer for layer in diff.layers if layer.sqnr is not None and layer.sqnr.verdict not in ("same", "noise")
        ]
        ranked = sorted(moved, key=lambda layer: _gain(layer))
        ends = ranked if len(ranked) <= SHOWN_LAYERS else [*ranked[: SHOWN_LAYERS - 3], *ranked[-3:]]
        more = f", the {SHOWN_LAYERS - 3} worst and 3 best" if len(ranked) > SHOWN_LAYERS else ""
        headings = ("layer", "old dB", "new dB", "change", "99 % interval", "verdict")
        yield Section(f"layers: {', '.join(listed)}{more}", headings if ends else (), tuple(map(_layer, ends)), (0, 5))
    stored = [layer for layer in diff.layers if layer.stored_differently]
    if stored:
        shown = stored[:SHOWN_LAYERS]
        title = f"{plural(len(stored), 'layer')} stored or run differently"
        title += f", the first {SHOWN_LAYERS}" if len(stored) > SHOWN_LAYERS else ""
        rows = tuple((layer.name, _storage(layer.old), _storage(layer.new)) for layer in shown)
        yield Section(title, ("layer", "old", "new"), rows, (0, 1, 2))
    for side, names in (("OLD", diff.only_old), ("NEW", diff.only_new)):
        if names:
            more = f" and {len(names) - SHOWN_LAYERS} more" if len(names) > SHOWN_LAYERS else ""
            yield Section(f"layers in {side} only: {', '.join(names[:SHOWN_LAYERS])}{more}", (), ())


def _gain(layer: LayerChange) -> float:
    assert layer.sqnr is not None
    return layer.sqnr.new - layer.sqnr.old


def _layer(layer: LayerChange) -> tuple[str, ...]:
    assert layer.sqnr is not None
    change = layer.sqnr
    values = decibels(change.old), decibels(change.new)
    return layer.name, *values, *_difference(change), VERDICTS[change.verdict]


def _storage(layer: LayerDiff) -> str:
    return f"{layer.bits_per_weight:.2f} bits, {layer.kernel or layer.format}"


def _sizes(diff: ReportDiff) -> Iterable[tuple[str, ...]]:
    for name, (old, new) in diff.sizes.items():
        change = f"{100 * (new / old - 1):+.1f} %" if old and new else NONE
        yield name, *(NONE if value is None else size(value) for value in (old, new)), change


def _cell(value: Sequence[str] | str) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")
