"""What --json prints: dataclasses inside of each other, paths, the verdicts of several compilations."""

import dataclasses
import json
from pathlib import Path

import pytest

from exporter.compile import CompileResult, worst_code
from exporter.inspect_out import OutputState
from exporter.render.json_text import as_text, compiled_json, inspected_json
from tests.exporter.render.reports import SMALL


@dataclasses.dataclass(frozen=True)
class Part:
    size: int


@dataclasses.dataclass(frozen=True)
class Whole:
    path: Path
    parts: tuple[Part, ...]


def test_dataclasses_and_paths():
    whole = Whole(Path("a/b"), (Part(1), Part(2)))
    assert json.loads(as_text(whole)) == {"path": "a/b", "parts": [{"size": 1}, {"size": 2}]}
    assert as_text(whole).endswith("}\n")


def test_what_is_no_json_is_a_fault():
    with pytest.raises(TypeError, match="no JSON for a object"):
        as_text(object())
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_text(float("nan"))


def test_compilations_and_folders_hold_their_report():
    result = CompileResult(SMALL, Path("out"), 3, ("gate failed",), reused=True)
    (entry,) = json.loads(compiled_json([result]))["models"]
    assert entry.pop("report") == json.loads(SMALL.to_json())
    assert entry == {"out": "out", "exit_code": 3, "reused": True, "messages": ["gate failed"]}
    found = json.loads(inspected_json(OutputState(SMALL, {"model.onnx": "ok"}, "abc")))
    assert (found["files"], found["key"]) == ({"model.onnx": "ok"}, "abc")
    assert found["report"]["schema_version"] == 1


def test_a_failed_gate_wins_over_what_is_incomplete():
    assert [worst_code(codes) for codes in ((), (0, 0), (0, 4), (4, 3, 0))] == [0, 0, 4, 3]
