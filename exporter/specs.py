"""Pass specs: `cle,gptq:bits=3:group_size=64:act_order=true`. The fields of a pass are its options.

Commas stand between passes, colons inside one; `none` is no pass at all. A recipe may also give a list, whose entries
are specs or tables:
["cle", {name = "gptq", bits = 3}].
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from exporter.errors import InputError
from exporter.options import convert, describe_type, describe_value, nearest, shown
from passes import PASSES
from passes.base import Pass, PassError, order

FLAG = "--passes"

NO_PASSES = "none"
"""The spec of no pass at all: the model is lowered as it is."""


@dataclasses.dataclass(frozen=True)
class OptionDescription:
    """An option of a pass: its name, type and default as a user writes them, and what its class's docstring says."""

    name: str
    type: str
    default: str
    meaning: str


@dataclasses.dataclass(frozen=True)
class PassDescription:
    """A pass for people; `notes` is its docstring without the lines about single options."""

    name: str
    summary: str
    paper: str
    prerequisites: tuple[str, ...]
    options: tuple[OptionDescription, ...]
    notes: str


def parse_passes(text: str) -> tuple[Pass, ...]:
    """The passes of a spec, in order. Raises InputError for an unknown pass or option, or a value of the wrong type."""
    specs = [spec.strip() for spec in text.split(",")]
    if specs == [NO_PASSES]:
        return ()
    if not all(specs):
        raise InputError(
            f"{shown(text)} names no pass" if not any(specs) else f"{shown(text)} has an empty entry",
            where=FLAG,
            fix="write for example cle,gptq:bits=4",
        )
    passes = tuple(_parse_pass(spec) for spec in specs)
    try:
        order(passes, PASSES)
    except PassError as error:
        raise InputError(error.what, where=FLAG, fix=error.fix) from error
    return passes


def join_specs(entries: Sequence[str | Mapping[str, object]]) -> str:
    """The spec that a list of specs and tables stands for. Raises InputError for an entry that is neither."""
    specs = []
    for entry in entries:
        if isinstance(entry, Mapping):
            options = dict(entry)
            name = options.pop("name", None)
            if not isinstance(name, str):
                raise InputError(f"{shown(entry)} has no name", where=FLAG, fix='write {name = "gptq", bits = 3}')
            specs.append(":".join([name, *(f"{key}={describe_value(value)}" for key, value in options.items())]))
        elif isinstance(entry, str):
            specs.append(entry)
        else:
            raise InputError(f"{shown(entry)} is not a pass", where=FLAG, fix='write "gptq:bits=3"')
    return ",".join(specs)


def describe(work: type[Pass]) -> PassDescription:
    """What `qexport passes NAME` shows."""
    hints = option_types(work)
    meanings: dict[str, str] = {}
    for ancestor in reversed(work.__mro__):
        meanings |= _read_docstring(ancestor, hints)[1]
    options = tuple(
        OptionDescription(
            field.name, describe_type(hints[field.name]), describe_value(field.default), meanings.get(field.name, "")
        )
        for field in _fields(work)
    )
    notes = _read_docstring(work, hints)[0]
    return PassDescription(work.name, work.summary, work.paper, work.prerequisites, options, notes)


def option_types(work: type[Pass]) -> dict[str, Any]:
    """{option: type} of a pass."""
    hints = typing.get_type_hints(work)
    return {field.name: hints[field.name] for field in _fields(work)}


def _read_docstring(owner: type, options: Collection[str]) -> tuple[str, dict[str, str]]:
    """The docstring without its lines `option   what it means` (and their indented rest), and those by option."""
    notes: list[str] = []
    meanings: dict[str, str] = {}
    current = ""
    for line in inspect.cleandoc(owner.__doc__ or "").splitlines():
        match = re.match(r"(\w+(?:, \w+)*) {2,}(\S.*)", line)
        names = [name for name in match[1].split(", ") if name in options] if match else []
        if match and names:
            current = names[0]
            meanings |= dict.fromkeys(names, match[2])
        elif current and line.startswith("  "):
            meanings[current] += f" {line.strip()}"
        else:
            current = ""
            notes.append(line)
    return "\n".join(notes).strip(), meanings


def _parse_pass(spec: str) -> Pass:
    name, *pairs = [part.strip() for part in spec.split(":")]
    if name not in PASSES:
        raise InputError(f"unknown pass {name!r}", where=FLAG, fix=nearest(name, PASSES))
    work = PASSES[name]
    hints = option_types(work)
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not key:
            raise InputError(f"{name}: {pair!r} is not of the form option=value", where=FLAG)
        if key not in hints:
            raise InputError(f"{name} has no option {key!r}", where=FLAG, fix=nearest(key, hints))
        if key in options:
            raise InputError(f"{name}: {key} is given twice", where=FLAG)
        try:
            options[key] = convert(value, hints[key])
        except ValueError as error:
            raise InputError(f"{name}:{key}: {error}", where=FLAG) from error
    try:
        return work(**options)
    except PassError as error:
        raise InputError(error.what, where=FLAG, fix=error.fix) from error


def _fields(work: type[Pass]) -> "tuple[dataclasses.Field[Any], ...]":
    return dataclasses.fields(work)  # type: ignore[arg-type]  # passes are dataclasses
