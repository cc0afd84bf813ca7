"""Codebooks and scales rounded to 16 bits, so that a file holds them in half the room and loses nothing.

float16 has 11 bits for numbers from 2^-14 to 65504, so a weight moves by at most 2^-11 of itself; 2 bits a weight leave
a tenth. Where values reach beyond that range, and where they have 16 bits of another kind, they stay as they are.
"""

import torch
from torch import Tensor

HALF = torch.finfo(torch.float16)
WIDE = (torch.float32, torch.float64)


def half_scales(scales: Tensor) -> Tensor:
    """Scales from 0 up, each rounded to float16 and back; unchanged if one is too large or small."""
    counted = scales[scales > 0]
    fits = not len(counted) or bool(counted.min() >= HALF.tiny and counted.max() <= HALF.max)
    return scales.half().to(scales.dtype) if fits and scales.dtype in WIDE else scales


def half_codebooks(codebooks: Tensor) -> Tensor:
    """Codebooks rounded to float16 and back; unchanged if the largest value is too large or small."""
    top = float(codebooks.abs().max())
    # Values add up, so it is the largest that the others' errors, 2^-25 at least, are measured by.
    fits = top == 0 or 2**11 * HALF.tiny <= top <= HALF.max
    return codebooks.half().to(codebooks.dtype) if fits and codebooks.dtype in WIDE else codebooks
