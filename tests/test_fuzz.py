"""A short run of tools/fuzz.py: no input ends in a fault, and faults are told when they happen."""

from pathlib import Path

import pytest

from tools import fuzz


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return fuzz.good_files()


def test_two_hundred_mutated_inputs_end_as_they_should(files: dict[str, bytes], tmp_path: Path) -> None:
    outcomes = {number: fuzz.examine(number, 20, files, tmp_path) for number in range(1, 201) if number % fuzz.EVERY}
    assert {number: outcome for number, outcome in outcomes.items() if outcome.is_fault} == {}
    assert {outcome.ended for outcome in outcomes.values()} == {"read", "refused"}
    assert {outcome.kind for outcome in outcomes.values()} == set(files)


def test_the_whole_command(files: dict[str, bytes], tmp_path: Path) -> None:
    outcomes = [fuzz.examine(number, 1, files, tmp_path) for number in (0, fuzz.EVERY, 2 * fuzz.EVERY)]
    assert [outcome for outcome in outcomes if outcome.is_fault] == []


def test_good_files_are_good(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "mutated", lambda content, choose: content)
    ended = {(found := fuzz.examine(number, 0, files, tmp_path)).kind: found.ended for number in range(1, 100)}
    text, module = ended.pop("calib.jsonl"), ended.pop("model.module")
    assert (text, module) == ("refused", "refused")  # text needs a tokenizer, a module --trust-model
    assert set(ended.values()) == {"read"}


@pytest.mark.parametrize("fault", ["exception", "file", "lines"])
def test_faults_are_told(files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    def read(kind: str, path: Path) -> tuple[str, str]:
        if fault == "exception":
            raise IndexError("here")
        if fault == "file":
            (path.parent / "left").touch()
        else:
            raise fuzz.QExportError("")
        return "read", ""

    monkeypatch.setattr(fuzz, "_by_function", read)
    outcome = fuzz.examine(1, 0, files, tmp_path)
    assert outcome.is_fault
    assert outcome.ended == {"exception": "IndexError", "file": "file left behind", "lines": "several lines"}[fault]
    assert list(tmp_path.iterdir()) == []
