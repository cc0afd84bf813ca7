"""Safetensors files mapped into memory: a tensor takes memory when it is read, and no longer than it is needed.

8 bytes       length n of the header, little endian
n bytes       JSON {name: {dtype, shape, data_offsets: [begin, end]}}, and strings under __metadata__
the rest      the tensors, offsets counted from here
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from passes.memory import map_file

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
