"""One run at a time for an output folder: a lock that goes when its process does, however that ends."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from exporter.errors import InputError


@contextlib.contextmanager
def locked(path: Path, where: str) -> Iterator[None]:
    """Hold the lock file `path`. Raises InputError about `where` when another process does."""
    descriptor = _acquire(path, where)
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, where: str) -> int:
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            raise InputError(
                "another run is writing to it", where=where, fix="wait for that run, or give another --out"
            ) from error
        if _is_at(descriptor, path):
            return descriptor
        os.close(descriptor)  # its last holder removed it between our two calls


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
