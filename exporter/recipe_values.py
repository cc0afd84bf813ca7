"""The small languages of flags: shapes of inputs, axes that stay free, TensorRT's optimization profiles.

--input [NAME=]SHAPE[:dtype]        x=8x3x32x32, 8x128:int64 (x or a comma between the sizes)
--dynamic NAME:AXIS[=label]         x:0=batch
--memory SIZE                       4GB
--trt-profile NAME=MIN/OPT/MAX      x=1x3x32x32/8x3x32x32/32x3x32x32
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from exporter.errors import InputError
from exporter.options import shown

DType = Literal["float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool"]
DTYPES: tuple[str, ...] = DType.__args__  # type: ignore[attr-defined]  # a Literal's own list

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Shape = tuple[int, ...]
Dynamic = Mapping[str, Mapping[int, str]]
"""{input: {axis: label}}; axes with one label are equal."""
Profiles = Mapping[str, tuple[Shape, Shape, Shape]]
"""{input: (smallest, most usual, largest shape)}"""


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """An input's shape and type; `name` None stands for the input at this place."""

    name: str | None
    shape: Shape
    dtype: str = "float32"

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        return f"{name}{shape_text(self.shape)}{'' if self.dtype == 'float32' else f':{self.dtype}'}"


def parse_input(text: object) -> InputSpec:
    """Read `[NAME=]SHAPE[:dtype]`. Raises InputError."""
    match = re.fullmatch(r"(?:([^=:]+)=)?([^=:]*)(?::(.*))?", text.strip()) if isinstance(text, str) else None
    if match is None:
        raise InputError(f"{shown(text)} is not [NAME=]SHAPE[:dtype]", where="--input", fix="write x=8x3x32x32")
    name, shape, dtype = match.groups()
    dtype = dtype or "float32"
    if dtype not in DTYPES:
        raise InputError(f"unknown type {dtype!r}", where="--input", fix=f"known are {', '.join(DTYPES)}")
    return InputSpec(name, parse_shape(shape, "--input"), dtype)


def parse_size(value: object) -> int:
    """Read a number of bytes: `4GB`, `512MB`, `1.5e9`, or the number itself; 0 is no limit. Raises InputError."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kMGT]?)B?\s*", value) if isinstance(value, str) else None
    try:
        size = float(match[1]) * UNITS[match[2]] if match else float(value) if type(value) is int else -1.0
    except ValueError:
        size = -1.0
    if not 0 <= size < 1e18:
        raise InputError(f"{shown(value)} is no number of bytes", where="--memory", fix="write 4GB or 512MB")
    return int(size)


def parse_shape(value: object, flag: str) -> Shape:
    """Read `8x3x32x32`, `8,3,32,32`, or a list of sizes. Raises InputError naming `flag`."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+(\s*[x,]\s*\d+)*\s*", value):
        sizes = [int(size) for size in re.split("[x,]", value)]
    elif isinstance(value, list | tuple) and value and all(type(size) is int for size in value):
        sizes = list(value)
    else:
        raise InputError(f"{shown(value)} is not a shape", where=flag, fix="write sizes as in 8x3x32x32")
    if min(sizes) < 1:
        raise InputError(f"a size of {shape_text(sizes)} is less than 1", where=flag)
    return tuple(sizes)


def shape_text(shape: Sequence[int]) -> str:
    """A shape as a flag has it."""
    return "x".join(map(str, shape))


def parse_dynamic(value: Mapping[str, Any] | Sequence[object]) -> dict[str, dict[int, str]]:
    """Read entries `NAME:AXIS[=label]`, or {name: {axis: label}}. An axis 0 without a label is called batch."""
    axes: dict[str, dict[int, str]] = {}
    if isinstance(value, Mapping):
        entries = [f"{name}:{axis}={label}" for name, labels in value.items() for axis, label in _items(name, labels)]
    else:
        entries = list(value)  # type: ignore[arg-type]  # each is checked below
    for entry in entries:
        match = re.fullmatch(r"\s*([^:=]+):(\d+)(?:=(\w+))?\s*", entry) if isinstance(entry, str) else None
        if match is None:
            raise InputError(f"{shown(entry)} is not NAME:AXIS[=label]", where="--dynamic", fix="write x:0=batch")
        name, axis, label = match[1].strip(), int(match[2]), match[3]
        if axis in axes.setdefault(name, {}):
            raise InputError(f"axis {axis} of {name} is given twice", where="--dynamic")
        axes[name][axis] = label or ("batch" if axis == 0 else f"{re.sub(r'[^0-9A-Za-z_]', '_', name)}_{axis}")
    return axes


def parse_profile(value: Mapping[str, Any] | Sequence[object]) -> dict[str, tuple[Shape, Shape, Shape]]:
    """Read entries `NAME=MIN/OPT/MAX`, or {name: [min, opt, max]}. Raises InputError unless min <= opt <= max."""
    flag = "--trt-profile"
    profiles: dict[str, tuple[Shape, Shape, Shape]] = {}
    pairs: list[tuple[object, object]]
    if isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        texts = [entry.partition("=") if isinstance(entry, str) else (entry, "", "") for entry in value]
        pairs = [(name, shapes.split("/")) for name, _, shapes in texts]
    for name, shapes in pairs:
        if not isinstance(name, str) or not name or not isinstance(shapes, list | tuple) or len(shapes) != 3:
            fix = "write x=1x3x32x32/8x3x32x32/32x3x32x32"
            raise InputError(f"{shown(name)} has no three shapes, the smallest, usual and largest", where=flag, fix=fix)
        low, usual, high = (parse_shape(shape, flag) for shape in shapes)
        fits = len(low) == len(usual) == len(high)
        if not fits or not all(a <= b <= c for a, b, c in zip(low, usual, high, strict=True)):
            raise InputError(f"the shapes of {name} do not grow from the smallest to the largest", where=flag)
        if name in profiles:
            raise InputError(f"{name} is given twice", where=flag)
        profiles[name] = (low, usual, high)
    return profiles


def _items(name: str, labels: object) -> list[tuple[object, object]]:
    if not isinstance(labels, Mapping):
        raise InputError(f"{shown(labels)} of {name} is not {{axis: label}}", where="--dynamic")
    return list(labels.items())
