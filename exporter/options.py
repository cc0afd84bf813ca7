"""Values of options, from the text of a flag or from TOML, checked against the type of the field they are for.

Fields are int, float, bool, str, Literal or Path, a tuple of any length of one of those, or one of those or None.
"""

import difflib
import math
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def convert(value: object, hint: Any) -> Any:
    """`value` as the type `hint`; text is read. Raises ValueError that says what is accepted."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else convert(value, next(a for a in typing.get_args(hint) if a is not type(None)))
    if origin is Literal:
        accepted = typing.get_args(hint)
        if value not in accepted:
            raise ValueError(f"{shown(value)} is not one of {', '.join(accepted)}")
        return value
    if origin is tuple:
        item = typing.get_args(hint)[0]
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list | tuple):
            raise ValueError(f"{shown(value)} is not a list")
        return tuple(convert(entry, item) for entry in entries)
    return _scalar(value, hint)


def describe_type(hint: Any) -> str:
    """A type as a user reads it: int, float, true|false, a|b|c, text."""
    if typing.get_origin(hint) is Literal:
        return "|".join(typing.get_args(hint))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return describe_type(next(a for a in typing.get_args(hint) if a is not type(None)))
    return {bool: "true|false", str: "text"}.get(hint, getattr(hint, "__name__", str(hint)))


def describe_value(value: object) -> str:
    """A value as it is written in an option."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def nearest(name: str, known: Iterable[str]) -> str:
    """What to do about an unknown name: the nearest known ones, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(names)}"


def shown(value: object) -> str:
    """A value quoted in a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _scalar(value: object, hint: Any) -> Any:
    if hint is bool:
        found = BOOLEANS.get(value.lower()) if isinstance(value, str) else value
        if isinstance(found, bool):
            return found
        raise ValueError(f"{shown(value)} is neither true nor false")
    if hint is str and isinstance(value, str):
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint in (int, float) and not isinstance(value, bool) and isinstance(value, str | int | float):
        try:
            number = hint(value) if hint is float or not isinstance(value, float) else None
        except ValueError:
            number = None
        if number is not None and math.isfinite(number):
            return number
    accepted = {int: "a whole number", float: "a number", str: "text", Path: "a path"}.get(hint, str(hint))
    raise ValueError(f"{shown(value)} is not {accepted}")
