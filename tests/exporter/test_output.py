"""The output folder is whole or not there, and what stood there before stays until the new one is whole."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from exporter.errors import InputError
from exporter.output import MANIFEST, OutputFolder, file_sizes, hashes, write_manifest
from exporter.versions import VERSION, versions

ROOT = Path(__file__).resolve().parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def finished(out: Path) -> Path:
    """An output of qexport, as an earlier run left it."""
    with OutputFolder(out) as folder:
        (folder / "model.onnx").write_text("old")
        write_manifest(folder, recipe={}, calibration_sha256=None)
    return out


def test_the_folder_appears_whole_with_its_parents(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with OutputFolder(out) as folder:
        (folder / "model.onnx").write_text("x")
        assert not out.exists()
    assert names(out) == ["model.onnx"]
    assert names(out.parent) == ["out"]


def test_others_may_read_what_the_users_umask_lets_them(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out"):
        pass
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode


def write_then_raise(out: Path, error: BaseException | type[BaseException]) -> None:
    with OutputFolder(out) as folder:
        (folder / "model.onnx").write_text("x")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_the_writing_early_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        write_then_raise(tmp_path / "a" / "out", error)
    assert names(tmp_path) == []


def test_a_folder_that_is_there_is_kept_without_force(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    with pytest.raises(InputError, match=r"--out .*out: exists already; .*--force"), OutputFolder(out):
        pass
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="exists already"), OutputFolder(tmp_path / "empty"):
        pass
    assert names(tmp_path) == ["empty", "out"]


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    for force in (False, True):
        with pytest.raises(InputError, match="is a file"), OutputFolder(tmp_path / "out", force=force):
            pass
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_force_replaces_an_output_and_nothing_else(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    with OutputFolder(out, force=True) as folder:
        (folder / "new").write_text("new")
        assert (out / "model.onnx").read_text(encoding="utf-8") == "old"
    assert names(out) == ["new"]
    (out / "holiday.jpg").write_text("")
    with pytest.raises(InputError, match="not an output of qexport"), OutputFolder(out, force=True):
        pass
    assert names(out) == ["holiday.jpg", "new"]
    assert names(tmp_path) == ["out"]


def test_a_failure_under_force_keeps_the_old_folder(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    with pytest.raises(RuntimeError), OutputFolder(out, force=True):
        raise RuntimeError
    assert (out / "model.onnx").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["out"]


def test_the_old_folder_comes_back_when_the_swap_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = finished(tmp_path / "out")
    rename = Path.rename

    def fails_for_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_for_the_new)
    with pytest.raises(InputError, match="Input/output error"), OutputFolder(out, force=True):
        pass
    assert (out / "model.onnx").read_text(encoding="utf-8") == "old"
    assert names(tmp_path) == ["out"]


def test_a_folder_that_may_not_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mkdir = Path.mkdir

    def denied(self: Path, *arguments: object) -> None:  # root, as whom tests may run, is denied nothing
        if self.name.endswith(".partial"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        mkdir(self)

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(InputError, match="cannot be written: Permission denied"), OutputFolder(tmp_path / "a" / "out"):
        pass
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written: Not a directory"), OutputFolder(tmp_path / "file" / "out"):
        pass
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_on_one_line(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(InputError, match="the disk is full") as caught:
        write_then_raise(tmp_path / "out", error)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


def test_a_write_that_really_fails_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk; it needs a process of its own."""
    script = (
        "import sys; from exporter.output import OutputFolder\n"
        "with OutputFolder(sys.argv[1]) as folder:\n"
        "    (folder / 'model.onnx').write_bytes(bytes(1 << 20))\n"
    )

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit)
    assert "InputError" in done.stderr
    assert "the file is too big" in done.stderr
    assert names(tmp_path) == []


def lose(out: Path, *, then_write: bool) -> None:
    with OutputFolder(out) as folder:
        folder.rmdir()
        if then_write:
            (folder / "model.onnx").write_text("x")


@pytest.mark.parametrize("then_write", [True, False])
def test_a_folder_lost_while_it_is_written_is_bad_input(tmp_path: Path, then_write: bool) -> None:
    with pytest.raises(InputError, match="its folder was removed"):
        lose(tmp_path / "out", then_write=then_write)
    assert names(tmp_path) == []


def test_an_error_of_the_system_about_something_else_stays_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), OutputFolder(tmp_path / "out"):
        (tmp_path / "calibration.npz").read_bytes()


def test_the_manifest_is_the_same_for_the_same_result(tmp_path: Path) -> None:
    texts = []
    for name in ("a", "b"):
        with OutputFolder(tmp_path / name) as folder:
            (folder / "trt").mkdir()
            (folder / "trt" / "model.onnx").write_bytes(b"model")
            (folder / "report.json").write_text(f"takes {name} seconds")
            write_manifest(folder, recipe={"seed": 0}, calibration_sha256="ab")
        texts.append((tmp_path / name / MANIFEST).read_text(encoding="utf-8"))
    assert texts[0] == texts[1]
    manifest = json.loads(texts[0])
    digest = "9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4"  # of the bytes "model"
    assert manifest["files"] == {"trt/model.onnx": digest}
    assert manifest["versions"] == versions()
    assert str(tmp_path) not in texts[0]


def test_sizes_and_hashes_are_of_the_same_files(tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    assert file_sizes(out) == {"model.onnx": 3}
    assert hashes(out).keys() == file_sizes(out).keys()


def test_the_version_is_that_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == VERSION
