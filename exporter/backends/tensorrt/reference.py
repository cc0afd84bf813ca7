"""What the plugins compute, as ONNX functions of their names: any ONNX runtime can run the file without TensorRT.

Everything is in float32 from the inputs to the sums, as in the kernels; the result has the type of the activations.
TensorRT would expand a function instead of looking for a plugin, so the bundle is built from a copy without them.
"""

import onnx
import onnx.parser
import onnx_ir as ir

from exporter.lowering.ops import DOMAIN
from exporter.lowering.to_onnx import OPSET

HEAD = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}, "{DOMAIN}" : 1]>'
ATTRIBUTES = "<kernels, plugin_namespace, plugin_version, aot>"

PRODUCT = """
    transposed = Transpose <perm = [1, 0]> (weight)
    floats = Cast <to = 1> (x)
    product = MatMul (floats, transposed)
    bias_floats = Cast <to = 1> (bias)
    sums = Add (product, bias_floats)
    y = CastLike (sums, x)
"""

BODIES = {
    # Ten 3-bit codes in an int32, as exporter.formats.int3_hqq packs them; scale and zero [out, groups] are floats.
    "int3_weight (packed, scale, zero) => (weight)": """
    powers = Constant <value_ints = [134217728, 16777216, 2097152, 262144, 32768, 4096, 512, 64, 8, 1]> ()
    slab_shape = Constant <value_ints = [10, 1, 1]> ()
    slabs = Reshape (powers, slab_shape)
    words = Cast <to = 7> (packed)
    first = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    eight = Constant <value_int = 8> ()
    one_slab = Unsqueeze (words, first)
    moved = Div (one_slab, slabs)
    fields = Mod (moved, eight)
    columns = Shape <start = 1> (packed)
    tall = Concat <axis = 0> (last, columns)
    stacked = Reshape (fields, tall)
    out = Shape <end = 1> (scale)
    codes = Slice (stacked, first, out, first)
    values = Cast <to = 1> (codes)
    grid = Shape (scale)
    grouped_shape = Concat <axis = 0> (grid, last)
    grouped = Reshape (values, grouped_shape)
    zeros = Unsqueeze (zero, last)
    centered = Sub (grouped, zeros)
    scales = Unsqueeze (scale, last)
    scaled = Mul (centered, scales)
    shape = Concat <axis = 0> (out, columns)
    weight = Reshape (scaled, shape)
""",
    f"int3_linear {ATTRIBUTES} (x, packed, scale, zero, bias) => (y)": f"""
    scale_floats = Cast <to = 1> (scale)
    zero_floats = Cast <to = 1> (zero)
    weight = {DOMAIN}.int3_weight (packed, scale_floats, zero_floats)
    {PRODUCT}
""",
    # Bytes with a scale and a zero for every 128 consecutive ones.
    "meta_values (codes, meta_scale, meta_zero) => (values)": """
    signed = Cast <to = 7> (codes)
    byte = Constant <value_int = 256> ()
    unsigned = Mod (signed, byte)
    bytes = Cast <to = 1> (unsigned)
    last = Constant <value_ints = [-1]> ()
    count = Size (codes)
    none = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    group = Constant <value_int = 128> ()
    positions = Range (none, count, one)
    groups = Div (positions, group)
    scales = Gather (meta_scale, groups)
    zeros = Gather (meta_zero, groups)
    row = Reshape (bytes, last)
    centered = Sub (row, zeros)
    scaled = Mul (centered, scales)
    shape = Shape (codes)
    values = Reshape (scaled, shape)
""",
    f"int3_linear_meta {ATTRIBUTES} (x, packed, scale, scale_meta_scale, scale_meta_zero, zero, zero_meta_scale, "
    "zero_meta_zero, bias) => (y)": f"""
    scale_floats = {DOMAIN}.meta_values (scale, scale_meta_scale, scale_meta_zero)
    zero_floats = {DOMAIN}.meta_values (zero, zero_meta_scale, zero_meta_zero)
    weight = {DOMAIN}.int3_weight (packed, scale_floats, zero_floats)
    {PRODUCT}
""",
    # Codes [out / og, in / ig, M] of a byte, or [.., 2 M] of two, the low one first; codebooks [M, entries, og, ig].
    "codebook_weight (codes, codebooks, scales) => (weight)": """
    signed = Cast <to = 7> (codes)
    byte = Constant <value_int = 256> ()
    unsigned = Mod (signed, byte)
    count = Shape <end = 1> (codebooks)
    places = Shape <end = 2> (codes)
    last = Constant <value_ints = [-1]> ()
    parts_shape = Concat <axis = 0> (places, count, last)
    parts = Reshape (unsigned, parts_shape)
    none = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    width = Shape <start = 3> (parts)
    width_of = Squeeze (width)
    digits = Range (none, width_of, one)
    factors = Pow (byte, digits)
    weighed = Mul (parts, factors)
    code = ReduceSum <keepdims = 0> (weighed, last)
    count_of = Squeeze (count)
    order = Range (none, count_of, one)
    entries = Shape <start = 1, end = 2> (codebooks)
    starts = Mul (order, entries)
    index = Add (code, starts)
    block = Shape <start = 2> (codebooks)
    table_shape = Concat <axis = 0> (last, block)
    floats = Cast <to = 1> (codebooks)
    table = Reshape (floats, table_shape)
    picked = Gather (table, index)
    third = Constant <value_ints = [2]> ()
    sums = ReduceSum <keepdims = 0> (picked, third)
    scale_floats = Cast <to = 1> (scales)
    behind = Constant <value_ints = [2, 3]> ()
    scale_blocks = Unsqueeze (scale_floats, behind)
    scaled = Mul (sums, scale_blocks)
    turned = Transpose <perm = [0, 2, 1, 3]> (scaled)
    shape = Mul (places, block)
    weight = Reshape (turned, shape)
""",
    f"codebook_linear {ATTRIBUTES} (x, codes, codebooks, scales, bias) => (y)": f"""
    weight = {DOMAIN}.codebook_weight (codes, codebooks, scales)
    {PRODUCT}
""",
    f"codebook_decode {ATTRIBUTES} (codes, codebooks, scales) => (rounded)": f"""
    weight = {DOMAIN}.codebook_weight (codes, codebooks, scales)
    rounded = CastLike (weight, scales)
""",
}


def add_functions(model: ir.Model, plugin: str) -> None:
    """Give the model the function of a plugin and those it calls."""
    for head, body in BODIES.items():
        name = head.split()[0]
        if name in (plugin, *CALLED[plugin]):
            identifier = (DOMAIN, name, "")
            if identifier not in model.functions:
                model.functions[identifier] = ir.serde.deserialize_function(
                    onnx.parser.parse_function(f"{HEAD}\n{head} {{{body}}}")
                )
    model.opset_imports[DOMAIN] = 1


CALLED = {
    "int3_linear": ("int3_weight",),
    "int3_linear_meta": ("int3_weight", "meta_values"),
    "codebook_linear": ("codebook_weight",),
    "codebook_decode": ("codebook_weight",),
}
