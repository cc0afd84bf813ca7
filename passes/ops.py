"""The custom operators a quantized graph is written in. They run in eager torch and say what an artifact must compute.

    fake_quantize          x' = (clamp(round(x / s) + z, lo, hi) - z) s                one s, z for the tensor
    fake_quantize_dynamic  the same with z = 0 and s = max|x| / hi taken from each row, or block of a row, as it comes
    dequantize             W[o, i] = (codes[o, i] - z[o, g]) s[o, g],   g = i // group_size

round is to nearest, ties to even, and the division is a division (not a multiplication by 1 / s): this is what ONNX's
QuantizeLinear does, so eager torch and onnxruntime cross the same rounding boundaries.
"""

import torch
from torch import Tensor

TINY_SCALE = 1e-30
"""Floor of a dynamic scale: a row of zeros stays zeros instead of dividing by zero."""


@torch.library.custom_op("qexport::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """Quantize and dequantize `x` [...] by one `scale` [] and `zero_point` [] (int32)."""
    codes = torch.round(x / scale).add_(zero_point).clamp_(quant_min, quant_max)
    return codes.sub_(zero_point).mul_(scale)


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
def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    """Float weight [out, in] of `codes` [out, in], `scale` and `zero_point` [out or 1, groups].

    group_size k > 0: groups of k inputs (the last may be shorter); -1: one group per output; 0: one for the tensor.
    `bits` says how wide the codes are; it does not change the value.
    """
    columns = codes.shape[1]
    if group_size <= 0 or group_size >= columns:
        centred = codes.to(scale.dtype) if zero_point is None else codes.to(scale.dtype) - zero_point
        return centred * scale
    index = torch.arange(columns, device=codes.device) // group_size
    weight = codes.to(scale.dtype)
    if zero_point is not None:
        weight -= zero_point[:, index]
    return weight.mul_(scale[:, index])


@dequantize.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, group_size: int) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


FAKE_QUANTIZE = torch.ops.qexport.fake_quantize.default
FAKE_QUANTIZE_DYNAMIC = torch.ops.qexport.fake_quantize_dynamic.default
DEQUANTIZE = torch.ops.qexport.dequantize.default
