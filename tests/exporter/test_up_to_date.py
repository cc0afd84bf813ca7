"""What makes an output folder one that need not be made again."""

import dataclasses
import os
from pathlib import Path

import pytest

from exporter.recipe import Recipe
from exporter.up_to_date import compile_key


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").write_bytes(b"weights")
    (tmp_path / "data.npz").write_bytes(b"samples")
    (tmp_path / "up_to_date_net.py").write_text("def make(): ...\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


RECIPE = Recipe(calib="data.npz", factory="up_to_date_net:make")


def key(**fields: object) -> str | None:
    return compile_key(Path("model"), dataclasses.replace(RECIPE, **fields))


def test_what_does_not_touch_the_result_leaves_the_key(here: Path) -> None:
    first = key()
    assert first is not None
    assert len(first) == 64
    os.utime("model", (0, 0))
    assert key(out=Path("elsewhere"), force=True, quiet=True, threads=2, resume=False, reuse=True) == first


@pytest.mark.parametrize("name", ["model", "data.npz", "up_to_date_net.py"])
def test_every_file_is_in_the_key(here: Path, name: str) -> None:
    first = key()
    (here / name).write_bytes(b"others")
    assert key() != first


@pytest.mark.parametrize("fields", [{"seed": 1}, {"passes": "gptq"}, {"gates": ("sqnr_db>=1",)}, {"target": ("trt",)}])
def test_the_recipe_is_in_the_key(here: Path, fields: dict[str, object]) -> None:
    assert key(**fields) != key()


def test_versions_are_in_the_key(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = key()
    monkeypatch.setattr("exporter.up_to_date.versions", lambda: {"torch": "0"})
    assert key() != first


def test_of_a_folder_every_file_counts(here: Path) -> None:
    (here / "folder" / "inner").mkdir(parents=True)
    assert compile_key(Path("folder"), Recipe()) is None  # nothing in it
    (here / "folder" / "inner" / "a").write_bytes(b"1")
    first = compile_key(Path("folder"), Recipe())
    (here / "folder" / "b").write_bytes(b"2")
    assert None not in (first, compile_key(Path("folder"), Recipe()))
    assert compile_key(Path("folder"), Recipe()) != first


def test_what_cannot_be_read_has_no_key(here: Path) -> None:
    assert compile_key(Path("nothing"), Recipe()) is None
    assert key(calib="nothing.npz") is None
    assert key(eval="no_such_module_at_all:function") is None
