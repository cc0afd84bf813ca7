"""Rows of codes of any width up to 16 bits as bytes without a gap between them, the first code in the lowest bits.

Bit n of code k of a row is bit k bits + n of the row's bytes (bit 0 being the lowest of byte 0); a row ends on a byte,
what is left of it is zero. Eight codes, a run, fill `bits` bytes whatever the width. Both directions take some
thousand runs at a time, so that what they make on the way stays in the cache, and each step is one operation on all of
them. Widths that divide 8 take a shorter way: all codes of a byte, one in each byte of a little-endian integer, are
folded onto its lowest byte, halves first:

    w |= w >> (8 - bits),  w |= w >> 2 (8 - bits),  ...
"""

import torch
from torch import Tensor
from torch.nn import functional as F

WORDS = {1: torch.int64, 2: torch.int32, 4: torch.int16}
"""An integer that has one byte for each code of a byte, by width of the code."""

RUNS_AT_ONCE = 1 << 16


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """The lowest `bits` bits of integers [rows, columns] -> uint8 [rows, ceil(columns * bits / 8)]."""
    if bits <= 8:
        codes = codes.view(torch.uint8) if codes.itemsize == 1 else codes.to(torch.uint8)
    if bits == 8:
        return codes
    rows, columns = codes.shape
    runs = F.pad(codes, (0, -columns % 8)).reshape(-1, 8)
    packed = torch.empty(len(runs), bits, dtype=torch.uint8, device=codes.device)
    for source, target in zip(runs.split(RUNS_AT_ONCE), packed.split(RUNS_AT_ONCE), strict=True):
        (_fold if bits in WORDS else _merge)(source, target, bits)
    return packed.view(rows, -1)[:, : packed_width(columns, bits)].contiguous()


def unpack_bits(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Bytes [rows, ceil(columns * bits / 8)] -> codes [rows, columns]: uint8 up to 8 bits, int32 above."""
    if bits == 8:
        return packed
    rows = len(packed)
    runs = F.pad(packed, (0, -packed.shape[1] % bits)).reshape(-1, bits)
    dtype = torch.uint8 if bits <= 8 else torch.int32
    codes = torch.empty(len(runs), 8, dtype=dtype, device=packed.device)
    for source, target in zip(runs.split(RUNS_AT_ONCE), codes.split(RUNS_AT_ONCE), strict=True):
        (_unfold if bits in WORDS else _separate)(source, target, bits)
    return codes.view(rows, -1)[:, :columns].contiguous()


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` codes."""
    return -(-columns * bits // 8)


def _fold(runs: Tensor, packed: Tensor, bits: int) -> None:
    """Runs uint8 [n, 8] -> packed [n, bits], for widths that divide 8."""
    words = (runs & (2**bits - 1)).view(WORDS[bits])
    for shift in _shifts(bits):
        words |= words >> shift
    packed.copy_(words)  # keeps the lowest byte


def _unfold(packed: Tensor, runs: Tensor, bits: int) -> None:
    """Packed [n, bits] -> runs uint8 [n, 8], for widths that divide 8."""
    words = packed.to(WORDS[bits])
    for shift in reversed(_shifts(bits)):
        words |= words << shift
    torch.bitwise_and(words.view(torch.uint8), 2**bits - 1, out=runs)


def _shifts(bits: int) -> list[int]:
    return [(8 - bits) * count for count in (1, 2, 4) if count < 8 // bits]


def _merge(runs: Tensor, packed: Tensor, bits: int) -> None:
    """Runs [n, 8] -> packed [n, bits]: each byte from the codes that reach into it."""
    codes = (runs.to(torch.int32) & (2**bits - 1)).t().contiguous()
    for byte in range(bits):
        first, last = 8 * byte // bits, (8 * byte + 7) // bits
        value = _shifted(codes[first], first * bits - 8 * byte)
        for code in range(first + 1, last + 1):
            value = value | _shifted(codes[code], code * bits - 8 * byte)
        packed[:, byte] = value & 255


def _separate(packed: Tensor, runs: Tensor, bits: int) -> None:
    """Packed [n, bits] -> runs [n, 8]: each code from the bytes that it reaches into."""
    stored = packed.t().to(torch.int32, memory_format=torch.contiguous_format)
    for code in range(8):
        first, last = code * bits // 8, (code * bits + bits - 1) // 8
        value = _shifted(stored[first], 8 * first - code * bits)
        for byte in range(first + 1, last + 1):
            value = value | _shifted(stored[byte], 8 * byte - code * bits)
        runs[:, code] = value & (2**bits - 1)


def _shifted(values: Tensor, left: int) -> Tensor:
    return values << left if left >= 0 else values >> -left
