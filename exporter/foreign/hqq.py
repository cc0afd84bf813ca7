"""HQQ as its linear layer's state_dict stores it: codes, meta data as tensors beside them (text as its characters).

    W_q               the grouped codes q [R, C], packed along their rows; or the same bytes under a floating-point type
    scale, zero       [R, 1] (axis 1: q = W.reshape(-1, group)) or [1, C] (axis 0: q = W.reshape(group, -1))
    nbits, group_size, axis, shape, packing, view_as_float, ...

    W = ((q - zero) scale).reshape(shape)

Row k * step + r of q lies at word [r, c], step = R / (values in a word); for 3 bits R is padded up:

    8bit_u8   one a byte           4bit_u8   bits 4, 0           2bit_u8   bits 6, 4, 2, 0        1bit_u8   bits 7 ... 0
    3bit_32   ten in 32 bits: bits 27, 24, ..., 0

Groups run over the flattened matrix. Where a group is longer than a row, or a row is no multiple of it, its scale is
repeated for every run of the greatest length that divides both.
"""

import math

import torch
from torch import Tensor

from exporter.foreign.base import ForeignWeight, Layout, Settings, Tensors, finite, take
from passes.weights import AffineWeight

PACKINGS: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
    "8bit_u8": (torch.uint8, (0,)),
    "4bit_u8": (torch.uint8, (4, 0)),
    "2bit_u8": (torch.uint8, (6, 4, 2, 0)),
    "1bit_u8": (torch.uint8, tuple(range(7, -1, -1))),
    "3bit_32": (torch.int32, tuple(range(27, -1, -3))),
}
"""{packing: (type of a word, lowest bit of each value in it)}."""

PACKING_OF = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}


def check(settings: Settings) -> None:
    """Nothing: every layer says how it is stored."""


def read(tensors: Tensors, settings: Settings, shape: tuple[int, int]) -> ForeignWeight:
    """The codes of one layer [out, in]."""
    outputs, inputs = shape
    stored = take(tensors, "shape", (2,), torch.int32, torch.int64).tolist()
    if stored != [outputs, inputs]:
        raise ValueError(f"its shape is {stored}, the model's layer is {[outputs, inputs]}")
    bits, axis, size = (_number(tensors, part) for part in ("nbits", "axis", "group_size"))
    if bits not in PACKING_OF or axis not in (0, 1):
        raise ValueError(f"nbits is {bits} and axis {axis}; read are {sorted(PACKING_OF)} bits along axis 0 or 1")
    if size < 1 or outputs * inputs % size:
        raise ValueError(f"groups of {size} do not divide its {outputs * inputs} weights")
    others = outputs * inputs // size
    rows, columns = (others, size) if axis == 1 else (size, others)
    codes = _unpack(tensors, _packing(tensors, bits), rows, columns).view(outputs, inputs)
    most = int(codes.max())
    if most >= 2**bits:
        raise ValueError(f"code {most} is out of range for {bits} bits")
    meta = (rows, 1) if axis == 1 else (1, columns)
    scale, zero = (finite(part, take(tensors, part, meta)).flatten() for part in ("scale", "zero"))
    if axis == 1:
        run = math.gcd(size, inputs)
        scale, zero = (values.repeat_interleave(size // run).view(outputs, -1) for values in (scale, zero))
        run = -1 if run == inputs else run
    else:
        run = math.gcd(size, outputs)
        scale, zero = (values.repeat(size // run).view(-1, inputs) for values in (scale, zero))
    return ForeignWeight(AffineWeight(codes, scale.contiguous(), zero.contiguous(), bits, run, axis=axis))


def _unpack(tensors: Tensors, packing: str, rows: int, columns: int) -> Tensor:
    """The grouped codes, uint8 [rows, columns]."""
    dtype, shifts = PACKINGS[packing]
    step = -(-rows // len(shifts))
    if packing != "3bit_32" and rows % len(shifts):
        raise ValueError(f"{rows} rows of codes do not fill {packing}, {len(shifts)} in a word")
    if "W_q" not in tensors:
        raise ValueError("W_q is missing")
    words = tensors["W_q"].contiguous()
    if words.is_floating_point():  # view_as_float: the same bytes
        if words.shape[-1] * words.element_size() % dtype.itemsize:
            raise ValueError(f"W_q has rows of {words.shape[-1] * words.element_size()} bytes, which are no {dtype}")
        words = words.view(dtype)
    words = take({"W_q": words}, "W_q", (step, columns), dtype)
    width = 32 if dtype == torch.int32 else 8
    mask = 2 ** (width // len(shifts)) - 1
    return torch.cat([(words >> shift & mask).to(torch.uint8) for shift in shifts])[:rows].contiguous()


def _packing(tensors: Tensors, bits: int) -> str:
    """How the codes are packed: as the layer says, else as its width is."""
    if "packing" not in tensors:
        return PACKING_OF[bits]
    text = "".join(chr(number) for number in take(tensors, "packing", (-1,), torch.uint8).tolist())
    if text not in PACKINGS:
        raise ValueError(f"packing is {text!r}; read are {', '.join(PACKINGS)}")
    return text


def _number(tensors: Tensors, part: str) -> int:
    """A whole number that is stored as a tensor."""
    if part not in tensors:
        raise ValueError(f"{part} is missing")
    if tensors[part].numel() != 1:
        raise ValueError(f"{part} has shape {list(tensors[part].shape)}, it is no number")
    value = float(tensors[part])
    if not value.is_integer():
        raise ValueError(f"{part} is {value:g}, not a whole number")
    return int(value)


META = """W_q scale zero nbits group_size axis shape packing unpack_view_dtype view_as_float compute_dtype channel_wise
optimize round_zero quant_scale quant_zero offload_meta encoded_state_dict stores_quant_config"""

LAYOUT = Layout("hqq", "W_q", frozenset(META.split()), check, read)
