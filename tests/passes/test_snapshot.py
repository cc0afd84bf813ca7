"""Snapshots of a walk: every value comes back as it was, damage is noticed, nothing half written is left."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from passes import snapshot
from passes.memory import is_mapped
from passes.snapshot import ALIGNMENT, StreamState


def _states() -> list[StreamState]:
    torch.manual_seed(0)
    wide = torch.randn(6, 8)
    values: dict[str, Any] = {
        "plain": wide,
        "transposed": wide.t(),
        "cut": wide[1:3, 2:5],
        "expanded": torch.randn(1, 4).expand(3, 4),
        "half": torch.randn(5).half(),
        "mask": torch.tensor([True, False, True]),
        "tokens": torch.arange(7),
        "empty": torch.empty(0, 3),
        "number": 3,
        "nothing": None,
        "several": (torch.randn(2), [torch.randn(3), 4]),
        "typed": torch.max(wide, 1),
    }
    return [StreamState("node", [values, {"other": torch.randn(2, 2)}]), StreamState("", [{}, {}])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        same_place = one.data_ptr() % ALIGNMENT == other.data_ptr() % ALIGNMENT or not one.numel()
        return one.equal(other) and one.dtype == other.dtype and one.stride() == other.stride() and same_place
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def test_values_come_back_with_their_strides_and_alignment(tmp_path: Path) -> None:
    states = _states()
    snapshot.write(tmp_path / "walk", states)
    found = snapshot.read(tmp_path / "walk")
    assert found is not None
    assert [state.last for state in found] == ["node", ""]
    for state, expected in zip(found, states, strict=True):
        for values, originals in zip(state.values, expected.values, strict=True):
            assert values.keys() == originals.keys()
            assert all(_same(originals[name], value) for name, value in values.items())
    assert is_mapped(found[0].values[0]["plain"])
    assert [path.name for path in tmp_path.iterdir()] == ["walk"]


def test_one_that_was_read_is_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    snapshot.write(tmp_path / "walk", _states())
    found = snapshot.read(tmp_path / "walk")
    assert found is not None
    snapshot.write(tmp_path / "again", found)
    again = snapshot.read(tmp_path / "again")
    assert again is not None
    assert all(_same(value, again[0].values[0][name]) for name, value in found[0].values[0].items())
    # What is kept are the values, not the file that they were mapped from.
    assert (tmp_path / "again").stat().st_size <= (tmp_path / "walk").stat().st_size


def test_views_of_the_same_numbers_are_kept_once(tmp_path: Path) -> None:
    wide = torch.randn(64, 64)
    snapshot.write(tmp_path / "one", [StreamState("node", [{"a": wide}])])
    snapshot.write(tmp_path / "both", [StreamState("node", [{"a": wide, "b": wide.view(-1)}])])
    assert (tmp_path / "both").stat().st_size < (tmp_path / "one").stat().st_size + wide.nbytes


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damage_is_noticed(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "walk"
    snapshot.write(path, _states())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes({"flip": bytes(content), "truncate": bytes(content[:-1]), "empty": b""}[damage])
    assert snapshot.read(path) is None


def test_what_could_not_be_written_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "walk"
    snapshot.write(path, _states())
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        snapshot.write(path, [])
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["walk"]
