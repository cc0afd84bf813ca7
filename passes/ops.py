"""The custom operators a quantized graph is written in. They run in eager torch and say what an artifact must compute.

    fake_quantize          x' = (clamp(round(x / s) + z, lo, hi) - z) s                one s, z for the tensor
    fake_quantize_dynamic  the same with z = 0 and s = max|x| / hi taken from each row, or block of a row, as it comes
    dequantize             W[o, i] = (codes[o, i] - z[o, g]) s[o, g],   g = i // group_size, or along the outputs
    dequantize_codebook    blocks of W as sums of codebook entries, times a scale

round is to nearest, ties to even, and the division is a division (not a multiplication by 1 / s): this is what ONNX's
QuantizeLinear does, so eager torch and onnxruntime cross the same rounding boundaries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448
"""The largest number of the 8-bit floats; fake_quantize with codes from -448 to 448 rounds to these."""

TINY_SCALE = 1e-30
"""Floor of a dynamic scale: a row of zeros stays zeros instead of dividing by zero."""


@torch.library.custom_op("qexport::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and dequantize `x` [...] by one `scale` [] and `zero_point` [] (int32).

    Computed in float32 whatever the type of `x`, which the result has too: so do the runtimes. Codes from -E4M3_MAX to
    E4M3_MAX are 8-bit floats, and have no zero point.
    """
    if quant_max == E4M3_MAX:
        codes = (x.float() / scale.float()).clamp_(quant_min, quant_max).to(E4M3)
        return (codes.float() * scale.float()).to(x.dtype)
    codes = torch.round(x.float() / scale.float()).add_(zero_point).clamp_(quant_min, quant_max)
    return codes.sub_(zero_point).mul_(scale.float()).to(x.dtype)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qexport::fake_quantize_dynamic", mutates_args=())
def fake_quantize_dynamic(x: Tensor, bits: int, group_size: int) -> Tensor:
    """Symmetric quantize and dequantize of `x` [..., k]: one scale a row (group_size -1) or a block of group_size."""
    top = 2 ** (bits - 1) - 1
    k = x.shape[-1]
    if group_size < 0 or group_size >= k:
        rows = x
    else:
        rows = torch.nn.functional.pad(x, (0, -k % group_size)).unflatten(-1, (-1, group_size))
    scale = (rows.abs().amax(-1, keepdim=True) / top).clamp_min(TINY_SCALE)
    rounded: Tensor = torch.round(rows / scale) * scale
    return rounded if rows is x else rounded.flatten(-2)[..., :k].contiguous()


@fake_quantize_dynamic.register_fake
def _(x: Tensor, bits: int, group_size: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qexport::dequantize", mutates_args=())
def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, axis: int = 1
) -> Tensor:
    """Float weight [out, in] of `codes` [out, in], `scale` and `zero_point` [out or 1, groups].

    group_size k > 0: groups of k inputs (the last may be shorter); -1: one group per output; 0: one for the tensor.
    axis 0: groups of group_size outputs; `scale` and `zero_point` are [out / group_size, in].
    `bits` says how wide the codes are; it does not change the value.
    """
    weight = codes.to(scale.dtype)
    if axis == 0:
        slabs: Tensor = weight.unflatten(0, (-1, scale.shape[0]))  # row h of every slab belongs to group h
        slabs = (slabs if zero_point is None else slabs - zero_point) * scale
        return slabs.flatten(0, 1)
    columns = codes.shape[1]
    if group_size <= 0 or group_size >= columns:
        return (weight if zero_point is None else weight - zero_point) * scale
    index = torch.arange(columns, device=codes.device) // group_size
    if zero_point is not None:
        weight -= zero_point[:, index]
    return weight.mul_(scale[:, index])


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int, axis: int = 1) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


@torch.library.custom_op("qexport::dequantize_codebook", mutates_args=())
def dequantize_codebook(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    scale_bits: int,
    codebook_value_bits: int,
    codebook_value_groups: int = 0,
) -> Tensor:
    """Float weight [out, in]: block (a, b) is scales[a // h, b // k] sum_m codebooks[m, codes[a, b, m]].

    `codes` [out / og, in / ig, M], `codebooks` [M, entries, og, ig], `scales` [out / og / h, in / ig / k].
    The other arguments say how these can be stored; they do not change the value.
    """
    blocks = codebooks[0][codes[..., 0].long()]  # [out / og, in / ig, og, ig]
    for index in range(1, len(codebooks)):
        blocks += codebooks[index][codes[..., index].long()]
    blocks *= spread_scales(scales, codes.shape)[:, :, None, None]
    return blocks.transpose(1, 2).reshape(codes.shape[0] * codebooks.shape[2], codes.shape[1] * codebooks.shape[3])


@dequantize_codebook.register_fake
def _(
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    scale_bits: int,
    codebook_value_bits: int,
    codebook_value_groups: int = 0,
) -> Tensor:
    return codebooks.new_empty(codes.shape[0] * codebooks.shape[2], codes.shape[1] * codebooks.shape[3])


def spread_scales(scales: Tensor, blocks: Sequence[int]) -> Tensor:
    """Scales that several of the blocks [rows, columns, ...] share, one for each: [rows, 1 or columns]."""
    spread = scales if len(scales) == blocks[0] else scales.repeat_interleave(blocks[0] // len(scales), 0)
    columns = scales.shape[1]
    return spread if columns in (1, blocks[1]) else spread.repeat_interleave(blocks[1] // columns, 1)


FAKE_QUANTIZE = torch.ops.qexport.fake_quantize.default
FAKE_QUANTIZE_DYNAMIC = torch.ops.qexport.fake_quantize_dynamic.default
DEQUANTIZE = torch.ops.qexport.dequantize.default
DEQUANTIZE_CODEBOOK = torch.ops.qexport.dequantize_codebook.default
