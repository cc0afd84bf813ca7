"""Rows of codes of any width up to 16 bits as bytes without a gap between them, the first code in the lowest bits.

Bit n of code k of a row is bit k bits + n of the row's bytes (bit 0 being the lowest of byte 0); a row ends on a byte,
what is left of it is zero. Eight codes fill `bits` bytes whatever the width, so both directions work on all runs of
eight at once. Widths that divide 8 take a shorter way: the codes of a byte, read as one little-endian integer, are
folded onto its lowest byte.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""An integer that has one byte for each code of a byte, by width of the code."""


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """The lowest `bits` bits of integers [rows, columns] -> uint8 [rows, ceil(columns * bits / 8)]."""
    columns = codes.shape[1]
    if bits in (*WORDS, 8):
        return _fold(codes.view(torch.uint8) if codes.itemsize == 1 else codes.to(torch.uint8), bits)
    runs = F.pad(codes.to(torch.int32) & (2**bits - 1), (0, -columns % 8)).unflatten(1, (-1, 8))
    packed = torch.empty(*runs.shape[:2], bits, dtype=torch.uint8, device=codes.device)
    for byte in range(bits):
        first, last = 8 * byte // bits, (8 * byte + 7) // bits
        value = _shifted(runs[..., first], first * bits - 8 * byte)
        for code in range(first + 1, last + 1):
            value |= _shifted(runs[..., code], code * bits - 8 * byte)
        packed[..., byte] = value & 255
    return packed.flatten(1)[:, : packed_width(columns, bits)].contiguous()


def unpack_bits(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Bytes [rows, ceil(columns * bits / 8)] -> codes [rows, columns]: uint8 up to 8 bits, int32 above."""
    if bits in (*WORDS, 8):
        return _unfold(packed, columns, bits)
    runs = F.pad(packed.to(torch.int32), (0, -packed.shape[1] % bits)).unflatten(1, (-1, bits))
    codes = torch.empty(*runs.shape[:2], 8, dtype=torch.uint8 if bits <= 8 else torch.int32, device=packed.device)
    for code in range(8):
        first, last = code * bits // 8, (code * bits + bits - 1) // 8
        value = _shifted(runs[..., first], 8 * first - code * bits)
        for byte in range(first + 1, last + 1):
            value |= _shifted(runs[..., byte], 8 * byte - code * bits)
        codes[..., code] = value & (2**bits - 1)
    return codes.flatten(1)[:, :columns].contiguous()


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` codes."""
    return -(-columns * bits // 8)


def _shifted(values: Tensor, left: int) -> Tensor:
    return values << left if left >= 0 else values >> -left


def _fold(codes: Tensor, bits: int) -> Tensor:
    """pack_bits of bytes, for widths that divide 8."""
    if bits == 8:
        return codes
    count = 8 // bits
    words = F.pad(codes & (2**bits - 1), (0, -codes.shape[1] % count)).contiguous().view(WORDS[bits])
    folded = words.clone()
    for code in range(1, count):
        folded |= words >> (code * (8 - bits))
    return folded.to(torch.uint8)


def _unfold(packed: Tensor, columns: int, bits: int) -> Tensor:
    """unpack_bits for widths that divide 8."""
    if bits == 8:
        return packed
    count = 8 // bits
    words = packed.to(WORDS[bits])
    spread = words.clone()
    for code in range(1, count):
        spread |= words << (code * (8 - bits))
    codes = spread.view(torch.uint8)
    codes &= 2**bits - 1
    return codes if codes.shape[1] == columns else codes[:, :columns].contiguous()
