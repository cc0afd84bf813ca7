"""Values of a walk over calibration data in one file: written whole or not at all, mapped when they are read.

    sha256 of what follows | length of the head, 8 bytes | head | numbers of the tensors

The head says which values wait in front of which node; its tensors are places in the file. A tensor comes back with its
strides, and at the same address modulo ALIGNMENT: kernels may add in another order at another one.
"""

import dataclasses
import hashlib
import io
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.memory import map_file, release

ALIGNMENT = 64
DIGEST_BYTES = hashlib.sha256().digest_size
LENGTH_BYTES = 8
CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class StreamState:
    """Where a passes.calibration.Stream stands.

    last    name of the last node that ran
    values  for each batch {node: value} of what later nodes read; a value is a tensor, a number, None, or a tuple or
            list of values
    """

    last: str
    values: Sequence[Mapping[str, Any]]


def write(path: Path, states: Sequence[StreamState]) -> None:
    """Put the states at `path`. Raises OSError when the disk is full or cannot be written."""
    tensors = _Tensors()
    head = [
        (state.last, [{name: tensors.packed(value) for name, value in values.items()} for values in state.values])
        for state in states
    ]
    buffer = io.BytesIO()
    torch.save(head, buffer)
    content = buffer.getvalue()
    start = DIGEST_BYTES + LENGTH_BYTES + len(content)
    temporary = path.with_name(f"{path.name}.new")
    digest = hashlib.sha256()
    try:
        with temporary.open("wb") as file:
            file.write(bytes(DIGEST_BYTES))
            head_parts = (len(content).to_bytes(LENGTH_BYTES, "little"), content, bytes(-start % ALIGNMENT))
            for part in itertools.chain(head_parts, tensors.parts()):
                file.write(part)
                digest.update(part)
            file.seek(0)
            file.write(digest.digest())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read(path: Path) -> list[StreamState] | None:
    """The states at `path`, tensors mapped from it; None when it does not match its checksum."""
    with path.open("rb") as file:
        found = file.read(DIGEST_BYTES)
        digest = hashlib.sha256()
        while chunk := file.read(CHUNK):
            digest.update(chunk)
        if digest.digest() != found:
            return None
        file.seek(DIGEST_BYTES)
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        head = torch.load(io.BytesIO(file.read(length)), weights_only=True)
        start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
        numbers = map_file(file, path.stat().st_size)[start:]
    return [
        StreamState(last, [{name: _unpacked(value, numbers) for name, value in batch.items()} for batch in values])
        for last, values in head
    ]


@dataclasses.dataclass(frozen=True)
class _Flat:
    """The numbers a tensor reads, as they lie in memory, and their place behind the head."""

    values: Tensor
    place: int


class _Tensors:
    """Tensors on their way to a file; views of the same numbers are written once."""

    def __init__(self) -> None:
        self._flat: dict[tuple[int, int], _Flat] = {}
        self._end = 0

    def packed(self, value: Any) -> Any:
        """What the head has in the place of a value."""
        if isinstance(value, tuple | list):  # a tuple may have a type of its own, which weights_only refuses
            return tuple(map(self.packed, value)) if isinstance(value, tuple) else list(map(self.packed, value))
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        steps = zip(value.shape, value.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps) if value.numel() else 0
        flat = value.as_strided((span,), (1,), value.storage_offset())
        key = (value.data_ptr(), flat.nbytes)
        if key not in self._flat:
            place = -(-self._end // ALIGNMENT) * ALIGNMENT + value.data_ptr() % ALIGNMENT
            self._flat[key], self._end = _Flat(flat, place), place + flat.nbytes
        return {
            "place": self._flat[key].place,
            "dtype": value.dtype,
            "shape": tuple(value.shape),
            "stride": value.stride(),
        }

    def parts(self) -> Iterator[bytes | memoryview]:
        """What is written, in order, padding included."""
        end = 0
        for flat in self._flat.values():
            yield bytes(flat.place - end)
            end = flat.place + flat.values.nbytes
            if flat.values.nbytes:
                yield flat.values.cpu().view(torch.uint8).numpy().data
                release([flat.values])
        yield bytes(-end % ALIGNMENT)


def _unpacked(value: Any, numbers: Tensor) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_unpacked(part, numbers) for part in value)
    if not isinstance(value, dict):
        return value
    dtype, shape, stride = value["dtype"], value["shape"], value["stride"]
    start = value["place"] + numbers.storage_offset()
    typed = numbers[: len(numbers) // dtype.itemsize * dtype.itemsize].view(dtype)
    return typed.as_strided(shape, stride, start // dtype.itemsize)
