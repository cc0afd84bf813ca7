"""What `--json` prints: for scripts, one value on stdout."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from exporter.inspect_out import OutputState
from exporter.report import Report


class Compiled(Protocol):
    """What a compilation came to."""

    @property
    def report(self) -> Report: ...
    @property
    def out(self) -> Path: ...
    @property
    def exit_code(self) -> int: ...
    @property
    def messages(self) -> tuple[str, ...]: ...
    @property
    def reused(self) -> bool: ...


def as_text(value: object) -> str:
    """A dataclass, a tuple of them or plain data as JSON text."""
    return json.dumps(value, default=_plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def compiled_json(results: Sequence[Compiled]) -> str:
    """{models: [{out, exit_code, reused, messages, report}]}, `report` as in report.json."""
    models = [
        {
            "out": result.out,
            "exit_code": result.exit_code,
            "reused": result.reused,
            "messages": result.messages,
            "report": json.loads(result.report.to_json()),
        }
        for result in results
    ]
    return as_text({"models": models})


def inspected_json(state: OutputState) -> str:
    """{files: {name: ok, changed or missing}, key, report}."""
    return as_text({"files": state.files, "key": state.key, "report": json.loads(state.report.to_json())})


def _plain(value: object) -> object:
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    raise TypeError(f"no JSON for a {type(value).__name__}")
