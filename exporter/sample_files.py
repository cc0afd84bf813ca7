"""Reading calibration files without running code of theirs: what a file is, is read from its bytes.

safetensors   eight bytes of length, then a JSON header; only the samples asked for are read
.npz          a zip of .npy members       .npy   its magic; neither may hold Python objects
.pt           a zip with data.pkl, or torch's older pickle; the safe unpickler: tensors only
.txt, .jsonl  anything else that is UTF-8; lines of JSON objects are read by their "text"
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.torch_files import check_torch_file

FLAG = "--calib"
MAX_EXPANDED, MAX_RATIO = 1 << 30, 100
"""A .npz may expand to this many bytes, or to this many times its own: masks compress well, bombs better."""

HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}

KINDS = "give .safetensors, .npz, .npy or a .pt of tensors (keys = input names, axis 0 = samples)"

Arrays = Mapping[str, Tensor] | Tensor


def read_file(path: Path, count: int) -> Arrays | list[str]:
    """The first `count` samples of each array of the file, one array without a name, or pieces of text.

    Raises InputError when the file is missing, empty, damaged, or holds anything but plain arrays.
    """
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
        raise InputError(reason, where=_where(path), fix="give a file, or pkg.mod:function") from error
    if not head:
        raise InputError("the file is empty", where=_where(path), fix=KINDS)
    try:
        return _read(path, head, count)
    except InputError:
        raise
    except Exception as error:  # readers meet damage with whatever comes first: IndexError, zlib.error, struct.error
        reason = " ".join(f"{error or type(error).__name__}".split())[:200]
        raise InputError(f"damaged: {reason}", where=_where(path), fix=KINDS) from error


def _read(path: Path, head: bytes, count: int) -> Arrays | list[str]:
    if head.startswith(b"\x93NUMPY"):
        return torch.from_numpy(_array(path, np.load(path, mmap_mode="r", allow_pickle=False)[:count]))
    if head.startswith(b"PK"):
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            is_npz = bool(members) and all(name.endswith(".npy") for name in members)
            if is_npz:
                _check_sizes(archive, path.stat().st_size)
        if is_npz:
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(_array(path, arrays[name][:count])) for name in arrays.files}
    if head.startswith(b"PK") or re.match(rb"\x80[\x02-\x05]", head):
        return _read_torch(path, count)
    if head[8:9] == b"{":
        return _read_safetensors(path, count)
    return _read_text(path)


def _check_sizes(archive: zipfile.ZipFile, stored: int) -> None:
    """Raise ValueError when members are more than their header says, or less, before numpy makes room for either."""
    members = archive.infolist()
    expanded = sum(member.file_size for member in members)
    if expanded > max(MAX_EXPANDED, MAX_RATIO * stored):
        raise ValueError(f"{stored} bytes that expand to {expanded}")
    for member in members:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version not in HEADER_READERS:
                raise ValueError(f"{member.filename} is of version {version} of the format")
            shape, _, dtype = HEADER_READERS[version](file)
            size = member.file_size - file.tell()
        if math.prod(shape) * dtype.itemsize != size and not dtype.hasobject:  # whose pickles np.load refuses
            raise ValueError(f"{member.filename}: {list(shape)} of {dtype} are not its {size} bytes")


def _array(path: Path, array: Any) -> Any:
    """A copy in memory, in this machine's byte order, of a type that torch has."""
    if not isinstance(array, np.ndarray):
        raise InputError("a member is no array", where=_where(path), fix=KINDS)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise InputError(f"holds an array of type {array.dtype}", where=_where(path), fix=KINDS)
    return np.array(array, dtype=array.dtype.newbyteorder("="), order="C")


def _read_torch(path: Path, count: int) -> Arrays:
    check_torch_file(path)
    try:
        with path.open("rb") as file:  # given a name, torch goes by its ending
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            "holds more than tensors, which is not unpickled", where=_where(path), fix="save a dict of tensors"
        ) from error
    if isinstance(content, Tensor):
        return content[:count]
    if isinstance(content, Mapping) and content:
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, Tensor):
                what = f"{name!r} is a {type(value).__name__}, not a tensor"
                raise InputError(what, where=_where(path), fix="save a dict of tensors")
        return {name: value[:count] if value.ndim else value for name, value in content.items()}
    raise InputError(f"holds a {type(content).__name__}", where=_where(path), fix="save a dict of tensors")


def _read_safetensors(path: Path, count: int) -> Arrays:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a dict
            return {name: part[:count] if part.get_shape() else file.get_tensor(name) for name, part in slices.items()}
    except SafetensorError as error:
        raise InputError(f"a truncated or damaged safetensors file: {error}", where=_where(path)) from error


def _read_text(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError("neither arrays nor text in UTF-8", where=_where(path), fix=KINDS) from error
    if "\0" in text:
        raise InputError("neither arrays nor text", where=_where(path), fix=KINDS)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or not lines[0].lstrip().startswith("{"):
        return [text]
    pieces = []
    for number, line in enumerate(lines, start=1):
        try:
            piece = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            piece = None
        if not isinstance(piece, str):
            raise InputError(
                f'line {number} is not a JSON object with a "text"',
                where=_where(path),
                fix='write {"text": "..."} a line',
            )
        pieces.append(piece)
    return pieces


def _where(path: Path) -> str:
    return f"{FLAG} {path}"
