"""The operators of a lowered graph: what a backend turns into its own nodes, still runnable in eager torch.

A lowered graph says which layers meet integers and how, in one operator a layer, so that a dialect never has to match
patterns. Each operator here has an eager meaning, an ONNX schema in domain `qexport` and an entry in TRANSLATIONS;
none of them is left in a finished file.

    linear        y = x' W^T + b, W by passes.ops.dequantize; token_bits > 0: x' is x quantized row by row, else x' = x
    conv_weight   W = (codes - z) s, one s for each channel of `axis` (or one in all), codes in the weight's own shape
    embedding     rows of a quantized table
    mark          names the value of a layer, so that it can be found again in the file
"""

from collections.abc import Callable, Mapping

import onnx
import onnxscript
import torch
from torch import Tensor

from passes import ops

# ---- eager meaning -------------------------------------------------------------------------------------------------


@torch.library.custom_op("qexport::linear", mutates_args=())
def linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    token_bits: int,
    integer: bool,
    name: str,
) -> Tensor:
    """x [..., K], codes [N, K], scale and zero_point [N or 1, groups], bias [N] -> [..., N].

    `integer`: the input is quantized (before, or here by token_bits), so that an integer kernel may run.
    """
    if token_bits:
        x = ops.fake_quantize_dynamic(x, token_bits, -1)
    return torch.nn.functional.linear(x, ops.dequantize(codes, scale, zero_point, bits, group_size), bias)


@linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    token_bits: int,
    integer: bool,
    name: str,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


@torch.library.custom_op("qexport::conv_weight", mutates_args=())
def conv_weight(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int, name: str) -> Tensor:
    """codes in the weight's shape, scale and zero_point [channels] along `axis`, or [1] -> float weight."""
    shape = [1] * codes.dim()
    shape[axis] = scale.numel()
    centred = codes.to(scale.dtype) if zero_point is None else codes.to(scale.dtype) - zero_point.view(shape)
    return centred * scale.view(shape)


@conv_weight.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, axis: int, name: str) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


@torch.library.custom_op("qexport::embedding", mutates_args=())
def embedding(codes: Tensor, scale: Tensor, zero_point: Tensor | None, indices: Tensor, bits: int, name: str) -> Tensor:
    """codes [rows, dim], scale and zero_point [rows or 1, 1], indices [...] -> [..., dim]."""
    rows = codes[indices].to(scale.dtype)
    picked = indices if scale.shape[0] > 1 else torch.zeros_like(indices)
    return (rows if zero_point is None else rows - zero_point[picked]) * scale[picked]


@embedding.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, indices: Tensor, bits: int, name: str) -> Tensor:
    return torch.empty((*indices.shape, codes.shape[1]), dtype=scale.dtype, device=codes.device)


@torch.library.custom_op("qexport::mark", mutates_args=())
def mark(x: Tensor, name: str) -> Tensor:
    """x itself (a copy: an operator may not return its input)."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


LINEAR = torch.ops.qexport.linear.default
CONV_WEIGHT = torch.ops.qexport.conv_weight.default
EMBEDDING = torch.ops.qexport.embedding.default
MARK = torch.ops.qexport.mark.default

# ---- ONNX schemas --------------------------------------------------------------------------------------------------

DOMAIN = "qexport"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = [
    ("T", _FLOATS, "values"),
    ("C", ["tensor(int8)", "tensor(uint8)"], "codes"),
    ("Z", [*_FLOATS, "tensor(int32)"], "zero points"),
    ("I", ["tensor(int64)", "tensor(int32)"], "indices"),
]


def _schema(name: str, inputs: str, attributes: Mapping[str, onnx.defs.OpSchema.AttrType]) -> onnxscript.values.Op:
    """An operator of ours. `inputs` is `x:T codes:C? ...`: name, type, and ? when it may be left out."""
    kind = onnx.defs.OpSchema
    formal = []
    for item in inputs.split():
        label, letter = item.rstrip("?").split(":")
        option = kind.FormalParameterOption.Optional if item.endswith("?") else kind.FormalParameterOption.Single
        formal.append(kind.FormalParameter(label, letter, param_option=option))
    letters = {item.rstrip("?").split(":")[1] for item in inputs.split()} | {"T"}
    schema = kind(
        name,
        DOMAIN,
        1,
        inputs=formal,
        outputs=[kind.FormalParameter("y", "T")],
        type_constraints=[entry for entry in _TYPES if entry[0] in letters],
        attributes=[kind.Attribute(label, value, required=True) for label, value in attributes.items()],
    )
    return onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, 1), name, schema)


_INT, _STRING = onnx.defs.OpSchema.AttrType.INT, onnx.defs.OpSchema.AttrType.STRING

_FAKE_QUANTIZE = _schema("FakeQuantize", "x:T scale:T zero_point:Z", {"quant_min": _INT, "quant_max": _INT})
_DYNAMIC = _schema("FakeQuantizeDynamic", "x:T", {"bits": _INT, "group_size": _INT})
_DEQUANTIZE = _schema("Dequantize", "codes:C scale:T zero_point:Z?", {"bits": _INT, "group_size": _INT})
_LINEAR = _schema(
    "Linear",
    "x:T codes:C scale:T zero_point:Z? bias:T?",
    {"bits": _INT, "group_size": _INT, "token_bits": _INT, "integer": _INT, "name": _STRING},
)
_CONV_WEIGHT = _schema("ConvWeight", "codes:C scale:T zero_point:Z?", {"bits": _INT, "axis": _INT, "name": _STRING})
_EMBEDDING = _schema("Embedding", "codes:C scale:T zero_point:Z? indices:I", {"bits": _INT, "name": _STRING})
_MARK = _schema("Mark", "x:T", {"name": _STRING})


# ---- translation: torch.onnx reads the parameters' names and annotations -------------------------------------------
# (mypy: onnxscript's operators are untyped callables)


def _fake_quantize(x, scale, zero_point, quant_min: int, quant_max: int):  # type: ignore[no-untyped-def]
    return _FAKE_QUANTIZE(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max)


def _fake_quantize_dynamic(x, bits: int, group_size: int):  # type: ignore[no-untyped-def]
    return _DYNAMIC(x, bits=bits, group_size=group_size)


def _dequantize(codes, scale, zero_point, bits: int, group_size: int):  # type: ignore[no-untyped-def]
    return _DEQUANTIZE(codes, scale, zero_point, bits=bits, group_size=group_size)


def _linear(  # type: ignore[no-untyped-def]
    x, codes, scale, zero_point, bias, bits: int, group_size: int, token_bits: int, integer: bool, name: str
):
    options = {"bits": bits, "group_size": group_size, "token_bits": token_bits, "integer": int(integer), "name": name}
    return _LINEAR(x, codes, scale, zero_point, bias, **options)


def _conv_weight(codes, scale, zero_point, bits: int, axis: int, name: str):  # type: ignore[no-untyped-def]
    return _CONV_WEIGHT(codes, scale, zero_point, bits=bits, axis=axis, name=name)


def _embedding(codes, scale, zero_point, indices, bits: int, name: str):  # type: ignore[no-untyped-def]
    return _EMBEDDING(codes, scale, zero_point, indices, bits=bits, name=name)


def _mark(x, name: str):  # type: ignore[no-untyped-def]
    return _MARK(x, name=name)


TRANSLATIONS: dict[Callable[..., object], Callable[..., object]] = {
    ops.FAKE_QUANTIZE: _fake_quantize,
    ops.FAKE_QUANTIZE_DYNAMIC: _fake_quantize_dynamic,
    ops.DEQUANTIZE: _dequantize,
    LINEAR: _linear,
    CONV_WEIGHT: _conv_weight,
    EMBEDDING: _embedding,
    MARK: _mark,
}
