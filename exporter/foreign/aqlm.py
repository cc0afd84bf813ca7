"""AQLM (arXiv 2401.06118) as its inference package stores it.

    codes      [out / og, in / ig, M]         int8 up to 8 bits, int16 up to 16, ...: the entry's number modulo 2^bits
    codebooks  [M, 2^bits, og, ig]
    scales     [out / og, 1 or in / ig, 1, 1]

Block (a, b) of W is scales[a, b] sum_m codebooks[m, codes[a, b, m]]. Codes are kept, as unsigned numbers.
"""

import torch

from exporter.foreign.base import ForeignWeight, Layout, Settings, Tensors, finite, take
from passes.weights import CodebookWeight

OPTIONS = ("num_codebooks", "nbits_per_codebook", "out_group_size", "in_group_size")
INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)
MOST_BITS = 16


def check(settings: Settings) -> None:
    """The configuration says the shapes."""
    for option in OPTIONS:
        value = settings.get(option)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{option} is {value!r}, not a whole number from 1")
    if settings["nbits_per_codebook"] > MOST_BITS:
        raise ValueError(f"nbits_per_codebook is {settings['nbits_per_codebook']}, more than {MOST_BITS}")


def read(tensors: Tensors, settings: Settings, shape: tuple[int, int]) -> ForeignWeight:
    """The codes of one layer [out, in]."""
    books, bits, height, width = (settings[option] for option in OPTIONS)
    outputs, inputs = shape
    if outputs % height or inputs % width:
        raise ValueError(f"blocks of {height} x {width} do not divide its {outputs} x {inputs} weights")
    blocks = (outputs // height, inputs // width)
    stored = take(tensors, "codes", (*blocks, books), *INTEGERS).to(torch.int32)
    least, most = (int(value) for value in stored.aminmax())
    if least < -(2 ** (bits - 1)) or most >= 2**bits:
        raise ValueError(f"codes from {least} to {most} are out of range for {bits} bits")
    codes = (stored % 2**bits).to(torch.uint8 if bits <= 8 else torch.int32)
    codebooks = finite("codebooks", take(tensors, "codebooks", (books, 2**bits, height, width)))
    scales = finite("scales", take(tensors, "scales", (blocks[0], -1, 1, 1)))[:, :, 0, 0]
    if scales.shape[1] not in (1, blocks[1]):
        raise ValueError(f"scales has {scales.shape[1]} for each row of blocks, not 1 or {blocks[1]}")
    return ForeignWeight(CodebookWeight(codes, codebooks.contiguous(), scales.contiguous()))


LAYOUT = Layout("aqlm", "codes", frozenset({"codes", "codebooks", "scales"}), check, read)
