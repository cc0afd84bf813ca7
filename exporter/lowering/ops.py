"""The operators of a lowered graph: what a backend turns into its own nodes, still runnable in eager torch.

A lowered graph says which layers meet integers and how, in one operator a layer, so that a dialect never has to match
patterns. Each operator here has an eager meaning, an ONNX schema in domain `qexport` and an entry in TRANSLATIONS;
none of them is left in a finished file. How a layer's weight is quantized is not in the operator: `weight` is the float
value that the program's own nodes make of the codes, and the dialect finds the QuantWeight by the layer's name.

    linear        y = x' W^T + b; token_bits > 0: x' is x quantized row by row, else x' = x
    conv_weight   the weight of a convolution on quantized activations, in the layer's shape
    matrix        the matrix [out, in] of a layer that multiplies in float
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
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, token_bits: int, integer: bool, name: str) -> Tensor:
    """x [..., K], weight [N, K], bias [N] -> [..., N].

    `integer`: the input is quantized (before, or here by token_bits), so that an integer kernel may run.
    """
    if token_bits:
        x = ops.fake_quantize_dynamic(x, token_bits, -1)
    return torch.nn.functional.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, token_bits: int, integer: bool, name: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("qexport::conv_weight", mutates_args=())
def conv_weight(weight: Tensor, name: str) -> Tensor:
    """The weight itself (a copy: an operator may not return its input)."""
    return weight.clone()


@conv_weight.register_fake
def _(weight: Tensor, name: str) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("qexport::matrix", mutates_args=())
def matrix(weight: Tensor, name: str) -> Tensor:
    """The matrix [out, in] itself."""
    return weight.clone()


@matrix.register_fake
def _(weight: Tensor, name: str) -> Tensor:
    return torch.empty_like(weight)


@torch.library.custom_op("qexport::embedding", mutates_args=())
def embedding(weight: Tensor, indices: Tensor, name: str) -> Tensor:
    """Rows of weight [rows, dim] at indices [...] -> [..., dim]."""
    return torch.nn.functional.embedding(indices, weight)


@embedding.register_fake
def _(weight: Tensor, indices: Tensor, name: str) -> Tensor:
    return weight.new_empty((*indices.shape, weight.shape[1]))


@torch.library.custom_op("qexport::mark", mutates_args=())
def mark(x: Tensor, name: str) -> Tensor:
    """x itself."""
    return x.clone()


@mark.register_fake
def _(x: Tensor, name: str) -> Tensor:
    return torch.empty_like(x)


LINEAR = torch.ops.qexport.linear.default
CONV_WEIGHT = torch.ops.qexport.conv_weight.default
MATRIX = torch.ops.qexport.matrix.default
EMBEDDING = torch.ops.qexport.embedding.default
MARK = torch.ops.qexport.mark.default

# ---- ONNX schemas --------------------------------------------------------------------------------------------------

DOMAIN = "qexport"
_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_TYPES = [
    ("T", _FLOATS, "values"),
    ("C", ["tensor(int8)", "tensor(uint8)", "tensor(int32)", "tensor(float8e4m3fn)"], "codes"),
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
_DEQUANTIZE = _schema("Dequantize", "codes:C scale:T zero_point:T?", {"bits": _INT, "group_size": _INT, "axis": _INT})
_DEQUANTIZE_CODEBOOK = _schema(
    "DequantizeCodebook",
    "codes:C codebooks:T scales:T",
    {"scale_bits": _INT, "codebook_value_bits": _INT, "codebook_value_groups": _INT},
)
_LINEAR = _schema("Linear", "x:T weight:T bias:T?", {"token_bits": _INT, "integer": _INT, "name": _STRING})
_CONV_WEIGHT = _schema("ConvWeight", "weight:T", {"name": _STRING})
_MATRIX = _schema("Matrix", "weight:T", {"name": _STRING})
_EMBEDDING = _schema("Embedding", "weight:T indices:I", {"name": _STRING})
_MARK = _schema("Mark", "x:T", {"name": _STRING})


# ---- translation: torch.onnx reads the parameters' names and annotations -------------------------------------------
# (mypy: onnxscript's operators are untyped callables)


def _fake_quantize(x, scale, zero_point, quant_min: int, quant_max: int):  # type: ignore[no-untyped-def]
    return _FAKE_QUANTIZE(x, scale, zero_point, quant_min=quant_min, quant_max=quant_max)


def _fake_quantize_dynamic(x, bits: int, group_size: int):  # type: ignore[no-untyped-def]
    return _DYNAMIC(x, bits=bits, group_size=group_size)


def _dequantize(codes, scale, zero_point, bits: int, group_size: int, axis: int = 1):  # type: ignore[no-untyped-def]
    return _DEQUANTIZE(codes, scale, zero_point, bits=bits, group_size=group_size, axis=axis)


def _dequantize_codebook(  # type: ignore[no-untyped-def]
    codes, codebooks, scales, scale_bits: int, codebook_value_bits: int, codebook_value_groups: int = 0
):
    tables = {"codebook_value_bits": codebook_value_bits, "codebook_value_groups": codebook_value_groups}
    return _DEQUANTIZE_CODEBOOK(codes, codebooks, scales, scale_bits=scale_bits, **tables)


def _linear(x, weight, bias, token_bits: int, integer: bool, name: str):  # type: ignore[no-untyped-def]
    return _LINEAR(x, weight, bias, token_bits=token_bits, integer=int(integer), name=name)


def _conv_weight(weight, name: str):  # type: ignore[no-untyped-def]
    return _CONV_WEIGHT(weight, name=name)


def _matrix(weight, name: str):  # type: ignore[no-untyped-def]
    return _MATRIX(weight, name=name)


def _embedding(weight, indices, name: str):  # type: ignore[no-untyped-def]
    return _EMBEDDING(weight, indices, name=name)


def _mark(x, name: str):  # type: ignore[no-untyped-def]
    return _MARK(x, name=name)


TRANSLATIONS: dict[Callable[..., object], Callable[..., object]] = {
    ops.FAKE_QUANTIZE: _fake_quantize,
    ops.FAKE_QUANTIZE_DYNAMIC: _fake_quantize_dynamic,
    ops.DEQUANTIZE: _dequantize,
    ops.DEQUANTIZE_CODEBOOK: _dequantize_codebook,
    LINEAR: _linear,
    CONV_WEIGHT: _conv_weight,
    MATRIX: _matrix,
    EMBEDDING: _embedding,
    MARK: _mark,
}
