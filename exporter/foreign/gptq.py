"""GPTQ as AutoGPTQ and GPTQModel store it (formats `gptq` and `gptq_v2`): 2, 3, 4 or 8 bits in words of 32.

    qweight [in * bits / 32, out] int32   column o is a bit string, lowest bit of the first word first: the code of
                                          input i takes bits [i * bits, (i + 1) * bits), over a word's end at 3 bits
    qzeros  [groups, out * bits / 32]     zero points, packed likewise along a row; `gptq` stores z - 1 modulo 2^bits
    scales  [groups, out]                 W[o, i] = (q[o, i] - z[g, o]) scales[g, o],   g = g_idx[i]
    g_idx   [in] int32, may be left out   i // group_size; any other order after act_order

A z of 0 wraps to 2^bits - 1 in `gptq`, so it is read back modulo 2^bits; no quantizer makes a z of 2^bits.

Where all zero points are 2^(bits - 1) the codes are symmetric ones with that taken off. Where g_idx is not a run of
equal groups, columns are put in the order of their groups, and the layer's input with them.
"""

import math

import torch
from torch import Tensor

from exporter.foreign.base import ForeignWeight, Layout, Settings, Tensors, finite, take
from passes.weights import AffineWeight

WORD = 32
WIDTHS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


def check(settings: Settings) -> None:
    """The variants that are packed as the module says."""
    form = _format(settings)
    if form not in FORMATS:
        raise ValueError(f"checkpoint_format is {form!r}; read are {' and '.join(FORMATS)}")
    if settings.get("is_marlin_format"):
        raise ValueError("its weights are in Marlin's order; read are gptq and gptq_v2")
    if settings.get("bits") not in WIDTHS:
        raise ValueError(f"bits is {settings.get('bits')!r}, not 2, 3, 4 or 8")


def read(tensors: Tensors, settings: Settings, shape: tuple[int, int]) -> ForeignWeight:
    """The codes of one layer [out, in]."""
    outputs, inputs = shape
    packed = take(tensors, "qweight", (-1, outputs), torch.int32)
    bits = _bits(packed, settings, inputs)
    codes = unpack(packed, bits).T  # [out, in]
    scale = finite("scales", take(tensors, "scales", (-1, outputs))).T.contiguous()
    groups = scale.shape[1]
    if outputs * bits % WORD:
        raise ValueError(f"{outputs} zero points of {bits} bits do not fill words of {WORD} bits")
    zeros = unpack(take(tensors, "qzeros", (groups, outputs * bits // WORD), torch.int32).T, bits)  # [out, groups]
    if _format(settings) == "gptq":
        zeros = (zeros + 1) & (2**bits - 1)
    index = _group_index(tensors, settings, inputs, groups)
    return _arrange(codes, scale, zeros, bits, index)


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 [k, n] -> uint8 [32 k / bits, n]: the values in the bit string that each column is."""
    stream = words.to(torch.int64) & (2**WORD - 1)
    first = torch.arange(len(words) * WORD // bits) * bits
    at, shift = first // WORD, (first % WORD)[:, None]
    values = stream[at] >> shift
    if WORD % bits:
        following = torch.nn.functional.pad(stream, (0, 0, 0, 1))[at + 1]
        values |= following << (WORD - shift)
    codes: Tensor = values & (2**bits - 1)
    return codes.to(torch.uint8)


def _format(settings: Settings) -> object:
    return settings.get("checkpoint_format") or settings.get("format") or "gptq"


def _bits(packed: Tensor, settings: Settings, inputs: int) -> int:
    """The width, from the shape: GPTQModel's `dynamic` may give a layer one of its own."""
    found = [bits for bits in WIDTHS if len(packed) * WORD == inputs * bits]
    if found and (settings.get("dynamic") or found[0] == settings["bits"]):
        return found[0]
    raise ValueError(f"qweight has {len(packed)} rows; {inputs} codes of {settings['bits']} bits do not take that many")


def _group_index(tensors: Tensors, settings: Settings, inputs: int, groups: int) -> Tensor:
    """The group of every input, int64 [in]."""
    if "g_idx" in tensors and tensors["g_idx"].numel():
        index = take(tensors, "g_idx", (inputs,), torch.int32, torch.int64).long()
        least, most = (int(value) for value in index.aminmax())
        if least < 0 or most >= groups:
            raise ValueError(f"g_idx has groups from {least} to {most}, scales has groups 0 to {groups - 1}")
        return index
    size = -(-inputs // groups) if settings.get("dynamic") else int(settings.get("group_size", -1))
    size = inputs if size <= 0 else size
    if -(-inputs // size) != groups:
        raise ValueError(f"scales has {groups} groups; {inputs} inputs in groups of {size} make {-(-inputs // size)}")
    return torch.arange(inputs) // size


def _arrange(codes: Tensor, scale: Tensor, zeros: Tensor, bits: int, index: Tensor) -> ForeignWeight:
    """Groups as runs of one length (the last may be shorter): columns in the groups' order, long groups cut."""
    order = None if bool((index.diff() >= 0).all()) else index.argsort(stable=True)
    present, counts = index.unique(return_counts=True)
    size = int(counts[0])
    if bool((counts[:-1] != size).any()) or counts[-1] > size:
        size = math.gcd(*counts.tolist())
        present = present.repeat_interleave(counts // size)
    scale, zeros = scale[:, present], zeros[:, present]
    codes = codes if order is None else codes[:, order]
    middle = 2 ** (bits - 1)
    if bool((zeros == middle).all()):
        signed = (codes.to(torch.int16) - middle).to(torch.int8)
        return ForeignWeight(AffineWeight(signed.contiguous(), scale, None, bits, _size(size, codes)), order)
    weight = AffineWeight(codes.contiguous(), scale, zeros.float(), bits, _size(size, codes))
    return ForeignWeight(weight, order)


def _size(size: int, codes: Tensor) -> int:
    return -1 if size == codes.shape[1] else size


LAYOUT = Layout("gptq", "qweight", frozenset({"qweight", "qzeros", "scales", "g_idx"}), check, read)
