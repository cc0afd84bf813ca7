"""The output folder: written beside its place under another name, and renamed when it is whole.

    .OUT.<random>.partial   what is being written          .OUT.lock    held while a run writes
    .OUT.<random>.old       what --force replaces          .OUT.cache   finished layers, until the run ends well

Whatever ends the writing early (an error, a full disk, Ctrl-C) leaves nothing under the name the user gave, and what
stood there before stays.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

from exporter.errors import InputError
from exporter.lock import locked
from exporter.report import Json
from exporter.versions import versions

MANIFEST = "manifest.json"
NOT_HASHED = frozenset({MANIFEST, "report.json", "report.md", "report.html", "junit.xml", "timings.json"})
"""What is not the model: figures and timings differ from one processor to the next."""

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EFBIG: "the file is too big"}
FAULTS_OF_THE_DISK = frozenset({*FULL, errno.EIO, errno.EROFS, errno.ENODEV, errno.ESTALE})
CHUNK = 1 << 20


class OutputFolder:
    """A context manager that gives a temporary folder to write into, and puts it into place when the block ends well.

    Raises InputError on entry when `out` is there already (without `force`), is a file, or cannot be made; and at the
    end when the disk is full or the folder is lost. `force` replaces an output of qexport or an empty folder, nothing
    else. Missing parents are made, and removed again when nothing comes of it. What a run that was killed left behind
    is cleared away; only one run at a time may write to `out`.
    """

    def __init__(self, out: str | Path, *, force: bool = False) -> None:
        self._shown = str(out)
        self._out = Path(out).expanduser().resolve()
        self._force = force
        self._made: list[Path] = []
        self._lock = contextlib.ExitStack()
        self.folder = self._beside(f"{secrets.token_hex(4)}.partial")
        self.cache = self._beside("cache")

    def __enter__(self) -> Path:
        try:
            self._check()
            self._make()
        except BaseException:
            self._remove()
            raise
        return self.folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self._put_into_place()
            except BaseException as fault:
                self._remove()
                if isinstance(fault, OSError):
                    raise self._lost(fault) from fault
                raise
            shutil.rmtree(self.cache, ignore_errors=True)
            self._lock.close()
            return
        lost = not self.folder.exists()
        self._remove()
        if isinstance(error, Exception) and (lost or is_fault_of_disk(error) or self._is_about_folder(error)):
            raise self._lost(error) from error

    def _check(self) -> None:
        if not os.path.lexists(self._out):
            return
        if not self._out.is_dir():
            raise InputError("is a file", where=self._where, fix="give the name of a folder")
        if not self._force:
            raise InputError("exists already", where=self._where, fix="give another name, or --force to replace it")
        if any(self._out.iterdir()) and not (self._out / MANIFEST).is_file():
            raise InputError(
                "is not an output of qexport (it has no manifest.json), so --force does not replace it",
                where=self._where,
                fix="give another name",
            )

    def _make(self) -> None:
        parents = [self._out.parent, *self._out.parent.parents]
        missing = [parent for parent in parents if not os.path.lexists(parent)]
        try:
            for parent in reversed(missing):
                parent.mkdir()
                self._made.append(parent)
            self._lock.enter_context(locked(self._beside("lock"), self._where))
            self._clear()
            self.folder.mkdir()
        except OSError as error:
            raise InputError(
                f"cannot be written: {error.strerror}", where=self._where, fix="give a folder that you may write to"
            ) from error

    def _clear(self) -> None:
        """Undo what a killed run left: its unfinished folder, and the old output that it had moved aside."""
        for left in self._out.parent.glob(f".{glob.escape(self._out.name)}.*.old"):
            if os.path.lexists(self._out):
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(self._out)
        for left in self._out.parent.glob(f".{glob.escape(self._out.name)}.*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        self._check()

    def _put_into_place(self) -> None:
        if not os.path.lexists(self._out):
            self.folder.rename(self._out)
            return
        if not self._force:  # it came while we were writing
            raise InputError("exists already", where=self._where, fix="give another name, or --force to replace it")
        old = self._beside(f"{secrets.token_hex(4)}.old")
        self._out.rename(old)
        try:
            self.folder.rename(self._out)
        except BaseException:
            old.rename(self._out)
            raise
        shutil.rmtree(old, ignore_errors=True)

    def _remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):  # somebody else put something there: it stays
                parent.rmdir()

    def _beside(self, kind: str) -> Path:
        return beside(self._out, kind)

    def _is_about_folder(self, error: Exception) -> bool:
        name = error.filename if isinstance(error, OSError) else None
        return isinstance(name, str | os.PathLike) and Path(name).is_relative_to(self.folder)

    def _lost(self, error: Exception) -> InputError:
        number = _disk_errno(error)
        reason = "its folder was removed meanwhile"
        if number is not None:
            reason = FULL.get(number) or os.strerror(number)
        elif isinstance(error, OSError) and error.strerror and not isinstance(error, FileNotFoundError):
            reason = error.strerror
        return InputError(
            f"could not be written, and nothing was: {reason}",
            where=self._where,
            fix="make room, or give another --out",
        )

    @property
    def _where(self) -> str:
        return f"--out {self._shown}"


def beside(out: Path, kind: str) -> Path:
    """What a run keeps beside its output folder."""
    return out.parent / f".{out.name}.{kind}"


def is_fault_of_disk(error: BaseException) -> bool:
    """True for a full or broken disk, also where a library wrapped the system's error (safetensors, torch)."""
    return _disk_errno(error) is not None


def _disk_errno(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno in FAULTS_OF_THE_DISK:
            return error.errno
        named = (number for number in FULL if os.strerror(number) in str(error))
        if (number := next(named, None)) is not None:
            return number
        error = error.__cause__
    return None


def write_manifest(
    folder: Path,
    *,
    recipe: Mapping[str, Json],
    calibration_sha256: str | None,
    model_sha256: str | None = None,
    key: str | None = None,
) -> None:
    """Write manifest.json: hashes of what `folder` holds, versions, recipe. Same input and seed, same bytes.

    `model_sha256` is that of the MODEL that was read, where it is a file; `key` see `exporter.up_to_date`.
    """
    manifest = {
        "files": hashes(folder),
        "versions": versions(),
        "recipe": dict(recipe),
        "calibration_sha256": calibration_sha256,
        "model_sha256": model_sha256,
        "key": key,
    }
    _write_json(folder / MANIFEST, manifest)


def add_to_manifest(folder: Path, name: str) -> None:
    """Put the hash of one more file into the manifest. Raises ValueError when the manifest is damaged."""
    path = folder / MANIFEST
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise ValueError(f"{MANIFEST} is damaged")
    manifest["files"][name] = file_sha256(folder / name)
    _write_json(path, manifest)


def hashes(folder: Path) -> dict[str, str]:
    """{path inside `folder`: sha256} of model and bundle files."""
    return {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in _files(folder)
        if path.relative_to(folder).as_posix() not in NOT_HASHED
    }


def file_sizes(folder: Path) -> dict[str, int]:
    """{path inside `folder`: bytes} of model and bundle files."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in _files(folder)
        if path.relative_to(folder).as_posix() not in NOT_HASHED
    }


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> Iterable[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
