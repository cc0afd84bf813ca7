"""In what form a quantized layer goes into the file, and why.

    kernel    integer        int8 codes of one grid a channel, on quantized activations
              blocks         codes in blocks of inputs, as MatMulNBits reads them
              rounded        the weight rounded again, to 8 bits: in blocks of inputs, or, of a convolution, by channels
              rows           of an embedding: picked packed, then decoded
              float          the weight becomes float when the file is loaded
    storage   direct         constants are what the kernel reads
              decoded        constants are packed; standard operators decode them, once, when the file is loaded
              function       the same as a local function of domain `qexport`, down to float

`--weights-as` chooses: *fast* the fastest kernel and constants as it reads them; *auto* the fastest kernel, its
constants decoded at load wherever that makes the file smaller; *compact* the function. Rounding again costs little
beside what a narrow weight's own codes cost (8 bits in blocks of 128 are 44 dB, in a table 39); weights of 8 bits are
not rounded twice.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import fx

from exporter.backends.onnx_qdq.decode import ROUNDED_BITS, ROUNDED_BLOCK
from exporter.backends.onnx_qdq.tables import joined, rounded
from exporter.lowering.fuse import has_whole_zeros, is_narrow, on_channel_grid, put_behind
from exporter.lowering.lowered import WeightsAs
from exporter.lowering.ops import CONV_WEIGHT, EMBEDDING, LINEAR, MATRIX
from passes.graph import add_tensor, call_before, tidy
from passes.ops import DEQUANTIZE_CODEBOOK, FAKE_QUANTIZE_DYNAMIC
from passes.weights import AffineWeight, CodebookWeight, QuantWeight

Kernel = Literal["integer", "blocks", "rounded", "rows", "float"]
Storage = Literal["direct", "decoded", "function"]

BLOCKS = (256, 128, 64, 32, 16)
DEFAULT_BLOCK = 32
"""The block onnxruntime chooses for a weight-only layer with one scale per channel."""

ROUNDED = "so it is rounded again, to 8 bits"
FOLDED = "onnxruntime folds it to float when it loads the file"


@dataclasses.dataclass(frozen=True)
class Form:
    """See the module's docstring."""

    kernel: Kernel
    storage: Storage
    why: str


def kernel_block(columns: int, group_size: int) -> int | None:
    """The block MatMulNBits uses for groups of `group_size` inputs of `columns`; None when it has none for them."""
    if group_size <= 0 or group_size >= columns:
        return DEFAULT_BLOCK
    return next((block for block in BLOCKS if group_size % block == 0), None)


def input_block(weight: QuantWeight, form: Form) -> int | None:
    """The block in which the layer's kernel rounds its own input to 8 bits; None when it does not."""
    if form.kernel == "rounded":
        return ROUNDED_BLOCK
    if form.kernel != "blocks" or not isinstance(weight, AffineWeight):
        return None
    return kernel_block(weight.shape[1], weight.group_size)


def choose_forms(
    graph: fx.GraphModule, weights: Mapping[str, QuantWeight], wanted: Mapping[str, WeightsAs]
) -> dict[str, Form]:
    """{layer: its form} for the layers of a lowered graph; `wanted` is what --weights-as is for each."""
    forms = {}
    for node in graph.graph.nodes:
        if node.target in (LINEAR, CONV_WEIGHT, MATRIX, EMBEDDING):
            name = str(node.args[-1])
            forms[name] = _choose(node, weights[name], wanted[name])
    return forms


def _choose(node: fx.Node, weight: QuantWeight, wanted: WeightsAs) -> Form:
    if node.target is LINEAR:
        return _integer(weight, wanted) if node.args[4] else _linear(weight, wanted)
    if node.target is CONV_WEIGHT:
        if on_channel_grid(weight):
            return _integer(weight, wanted)
        return Form("rounded", "decoded", f"{_off_grid(weight)}, {ROUNDED}, one scale a channel")
    if node.target is EMBEDDING:
        reason = _rows_refusal(weight)
        return Form("float", "decoded", f"{reason}: {FOLDED}") if reason else Form("rows", "direct", "rows stay packed")
    storage: Storage = "function" if wanted == "compact" else "decoded"
    return Form("float", storage, f"no kernel takes a float input and packed weights here: {FOLDED}")


def _integer(weight: QuantWeight, wanted: WeightsAs) -> Form:
    if is_narrow(weight) and wanted != "fast":
        return Form("integer", "decoded", "stored in 4 bits; the integer kernel takes 8")
    return Form("integer", "direct", "stored as the integer kernel reads it")


def _linear(weight: QuantWeight, wanted: WeightsAs) -> Form:
    reason = blocks_refusal(weight)
    if not reason and not _gains(weight):
        return Form("blocks", "direct", "stored as the kernel reads it")
    if wanted == "compact":
        return Form("float", "function", f"asked for compact: {FOLDED}")
    if reason and not is_narrow(weight):
        return Form("float", "decoded", f"{reason}, and 8 bits are not rounded twice: {FOLDED}")
    storage: Storage = "direct" if wanted == "fast" else "decoded"
    if reason:
        return Form("rounded", storage, f"{reason}, {ROUNDED} in blocks of {ROUNDED_BLOCK}")
    exact = "" if has_whole_zeros(_affine(weight)) else "; what zero points are off a code is added group by group"
    how = "stored as the kernel reads it" if wanted == "fast" else "packed; becomes what the kernel reads at load"
    return Form("blocks", storage, f"{how}{exact}")


def blocks_refusal(weight: QuantWeight) -> str:
    """Why MatMulNBits cannot read the weight; empty when it can."""
    if isinstance(weight, CodebookWeight):
        return "no kernel multiplies codebook entries"
    if weight.axis != 1:
        return "no kernel has groups along the outputs"
    columns, size = weight.shape[1], weight.group_size
    if kernel_block(columns, size) is None:
        return f"no kernel has groups of {size}"
    if 0 < size < columns and columns % size and not has_whole_zeros(weight):
        return f"groups of {size} do not divide {columns} inputs"
    return ""


def _gains(weight: QuantWeight) -> bool:
    """True when the kernel's own form of the weight takes more room than the packed one."""
    affine = _affine(weight)
    return affine.bits not in (4, 8) or affine.scale_codes is not None or not has_whole_zeros(affine)


def _off_grid(weight: QuantWeight) -> str:
    if isinstance(weight, CodebookWeight):
        return "no kernel multiplies codebook entries"
    return "an integer convolution has one grid a channel"


def _rows_refusal(weight: QuantWeight) -> str:
    """Why rows of the table cannot be decoded one by one; empty when they can."""
    if isinstance(weight, CodebookWeight):
        return "a codebook entry spans several rows" if weight.codebooks.shape[2] > 1 else ""
    return "" if weight.axis == 1 else "groups along the rows"


def _affine(weight: QuantWeight) -> AffineWeight:
    assert isinstance(weight, AffineWeight)
    return weight


def round_again(graph: fx.GraphModule, weights: Mapping[str, QuantWeight], forms: Mapping[str, Form]) -> None:
    """Round the weights of rounded forms in the lowered graph, in place: what the file then says."""
    for node in list(graph.graph.nodes):
        name = str(node.args[-1]) if node.target in (LINEAR, CONV_WEIGHT) else ""
        if not name or forms[name].kernel != "rounded":
            continue
        weight = weights[name]
        if node.target is CONV_WEIGHT:  # a view of the matrix [out, in]
            put_behind(graph, node.args[0].args[0], FAKE_QUANTIZE_DYNAMIC, ROUNDED_BITS, -1)
        elif joined(weight):
            table = rounded(weight)
            codes = add_tensor(graph, f"{name}.table_codes", table.codes, node)
            values = add_tensor(graph, f"{name}.table", table.codebooks.to(weight.codebooks.dtype), node)
            scales = node.args[1].args[2]
            node.update_arg(1, call_before(graph, node, DEQUANTIZE_CODEBOOK, (codes, values, scales, 0, 0)))
        else:
            put_behind(graph, node.args[1], FAKE_QUANTIZE_DYNAMIC, ROUNDED_BITS, ROUNDED_BLOCK)
    tidy(graph)
