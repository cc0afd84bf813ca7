"""Weights mapped into memory: a tensor takes memory when it is read, and no longer than it is needed.

A safetensors file:

    8 bytes       length n of the header, little endian
    n bytes       JSON {name: {dtype, shape, data_offsets: [begin, end]}}, and strings under __metadata__
    the rest      the tensors, offsets counted from here

A torch.export archive is a zip file whose members are stored as they are, weights each in a member of its own. torch
reads them through `PT2ArchiveReader`; while `weights_in_place` lasts it is given the mapped bytes instead. Only what
the archive calls parameters: a graph may write to its buffers, and a mapped file must not be written to.
"""

import contextlib
import json
import math
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export.pt2_archive import _package as archives

from exporter.progress import steps
from passes.base import silent_step
from passes.memory import map_file, own_storage, release

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
ORDER = [
    "BOOL",
    "U8",
    "I8",
    "F8_E5M2",
    "F8_E4M3",
    "I16",
    "U16",
    "F16",
    "BF16",
    "I32",
    "U32",
    "F32",
    "F64",
    "I64",
    "U64",
]
"""Types as the format's own library orders them."""

MAX_HEADER = 100_000_000
"""What the format's own library allows."""


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """{name: tensor} of a safetensors file, mapped. Raises ValueError when it is damaged, OSError as open does."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if length > min(size - 8, MAX_HEADER):
            raise ValueError(f"its header of {length} bytes does not fit into {size} bytes")
        entries = json.loads(file.read(length))
        content = map_file(file, size)[8 + length :]
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    return {name: _tensor(content, name, entry) for name, entry in entries.items() if name != "__metadata__"}


def save_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    on_step: Callable[[str, int, int], None] = silent_step,
) -> None:
    """Write a safetensors file tensor by tensor, mapped ones given back one by one; the bytes are the library's own.

    Tensors lie by type, widest first as in ORDER, then by name. They must be on the CPU and contiguous.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (-ORDER.index(codes[tensors[name].dtype]), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        code, shape = codes[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in steps(on_step, path.name, names, len(names)):
            if tensors[name].numel():
                file.write(tensors[name].detach().view(-1).view(torch.uint8).numpy().data)
            release([tensors[name]])


def _tensor(content: Tensor, name: str, entry: object) -> Tensor:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{name}: its entry in the header is no JSON object")
    dtype = DTYPES.get(str(entry.get("dtype")))
    if dtype is None:
        raise ValueError(f"{name}: type {entry.get('dtype')!r} is not known")
    shape = _sizes(name, entry.get("shape"))
    begin, end = _sizes(name, entry.get("data_offsets"), count=2)
    if not begin <= end <= len(content) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name}: {shape} of {dtype} are not the bytes {begin} to {end} of {len(content)}")
    values = content[begin:end]
    if values.data_ptr() % dtype.itemsize:
        values = values.clone()  # torch reads only what is aligned
    return values.view(dtype).view(shape)


def _sizes(name: str, value: object, count: int | None = None) -> list[int]:
    if (
        not isinstance(value, list)
        or not all(type(number) is int and number >= 0 for number in value)
        or count not in (None, len(value))
    ):
        raise ValueError(f"{name}: its shape or place in the file is not given in whole numbers")
    return value


# ------------------------------------------------------------------------------------------- torch.export archives

WEIGHTS = "data/weights/"
WEIGHTS_CONFIG = f"{WEIGHTS}model_weights_config.json"


@contextlib.contextmanager
def weights_in_place(path: Path) -> Iterator[None]:
    """Have `torch.export.load` map the parameters of the archive at `path` instead of reading them."""
    package: Any = archives
    reader: Any = package.PT2ArchiveReader

    class Mapping(reader):  # type: ignore[misc]  # a class that is looked up at run time
        def __init__(self, file: Any) -> None:
            super().__init__(file)
            self.archive_file: Any = _Records(self.archive_file, path)

    package.PT2ArchiveReader = Mapping
    try:
        yield
    finally:
        package.PT2ArchiveReader = reader


class _Records:
    """torch's reader of an archive, but for the records of parameters, which are mapped."""

    def __init__(self, reader: Any, path: Path) -> None:
        self._reader = reader
        self._parameters: set[str] = set()
        with zipfile.ZipFile(path) as archive:
            stored = all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        if stored and WEIGHTS_CONFIG in reader.get_all_records():
            entries = json.loads(reader.get_record(WEIGHTS_CONFIG))["config"].values()
            others = {entry["path_name"] for entry in entries if not entry["is_param"] or entry["use_pickle"]}
            self._parameters = {
                f"{WEIGHTS}{entry['path_name']}" for entry in entries if entry["path_name"] not in others
            }
        with path.open("rb") as file:
            self._content = map_file(file, path.stat().st_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def get_storage_from_record(self, name: str, count: int, dtype: torch.dtype) -> Tensor:
        """The record's values [count], as torch's own reader returns them."""
        start = self._reader.get_record_offset(name)
        values = self._content[start : start + count * dtype.itemsize]
        if name not in self._parameters or not count or values.data_ptr() % dtype.itemsize:
            found: Tensor = self._reader.get_storage_from_record(name, count, dtype)
            return found
        return own_storage(values).view(dtype)
