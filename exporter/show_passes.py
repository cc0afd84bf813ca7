"""What `qexport passes` prints: every pass, or one with its options."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from exporter.errors import InputError
from exporter.options import nearest
from exporter.specs import PassDescription, describe
from passes import PASSES


def described(name: str | None = None) -> tuple[PassDescription, ...]:
    """Every pass, or one. Raises InputError that names the nearest when there is none of that name."""
    if name is not None and name not in PASSES:
        raise InputError(f"unknown pass {name!r}", where="passes", fix=nearest(name, PASSES))
    return tuple(describe(work) for key, work in PASSES.items() if name in (None, key))


def render_passes() -> RenderableType:
    """A line for each pass, in the order they are usually run."""
    table = _table("pass", "what it does", "paper")
    for work in PASSES.values():
        table.add_row(*map(Text, (work.name, work.summary, work.paper)))
    return Group(table, Text("\nqexport passes NAME shows a pass's options; --passes name:option=value:option=value"))


def render_pass(name: str) -> RenderableType:
    """One pass. Raises InputError that names the nearest when there is none of that name."""
    (shown,) = described(name)
    head: list[RenderableType] = [Text(f"{shown.name}: {shown.summary}", style="bold")]
    head += [Text(f"paper: {shown.paper}")] if shown.paper else []
    head += (
        [Text(f"runs after: {', '.join(shown.prerequisites)} (put in front if missing)")] if shown.prerequisites else []
    )
    options = _table("option", "default", "accepts", "meaning")
    for option in shown.options:
        options.add_row(*map(Text, (option.name, option.default, option.type, option.meaning)))
    table: list[RenderableType] = [Text(""), options] if shown.options else []
    return Group(*head, *table, Text(f"\n{shown.notes}"))


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading)
    table.columns[0].no_wrap = True
    return table
