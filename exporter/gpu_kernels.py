"""The GPU kernels of low-bit weights: which there are for a layer, how each is compiled, launched and called.

A kernel's parameters are the pointers of its inputs, then int32 sizes, then the pointer of its output, in the order of
`inputs`, `sizes`, `outputs`. Every kernel is right for any number of rows; they differ in which they are fast for:

    int3_gemv, ROWS 1, 2, 4, 8       up to that many rows: fp32 units, each packed word read once for all of them
    int3_tiled, TILE_ROWS 32, 64     more rows: weights decoded into shared memory, tensor cores
    codebook_gemv                    up to 8 rows: tensor cores, weights decoded into registers
    codebook_lookup                  1 row, few entries against the outputs: partial dot products from a table
    codebook_tiled, TILE_ROWS 32, 64 more rows, as int3_tiled
    codebook_decode                  the weight itself, in front of a convolution

Nothing here needs a GPU. The sources lie beside their formats, `exporter/formats/*.cu`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeVar

from exporter.nvrtc import compile_ptx

Dtype = Literal["float16", "bfloat16"]
Size = TypeVar("Size")
"""An int, or a size that is known only when the engine runs: TensorRT's symbolic expressions."""

SOURCES = Path(__file__).parent / "formats"
SHARED_SOURCES = ("device.cu", "mma_tile.cu")
GEMV_ROWS = (1, 2, 4, 8)
TILE_ROWS = (32, 64)
SMALLEST_GROUP = 4
LARGEST_TABLE = 8192
"""Partial dot products of one group of inputs that fit beside each other in 48 KB of shared memory, in float32."""


@dataclasses.dataclass(frozen=True)
class KernelLaunch:
    """The grid, whose sides are ints or symbolic sizes, threads of a block, bytes of dynamic shared memory."""

    grid: tuple[object, object, object]
    block: int
    shared_mem: int = 0


@dataclasses.dataclass(frozen=True)
class GpuKernel:
    """One kernel with everything fixed at compile time; layers with the same `defines` share its PTX.

    `block_outputs` by `block_rows` of the output is what a block makes; for codebook_decode, which has no rows,
    outputs by columns of the weight. `most_rows` is what it was made for: None has no end.
    """

    entry: str
    source: str
    columns: int
    defines: tuple[tuple[str, int], ...]
    inputs: tuple[str, ...]
    sizes: tuple[str, ...]
    outputs: tuple[str, ...]
    block_outputs: int
    block_rows: int
    threads: int
    most_rows: int | None = None

    def launch(self, rows: Size, out: int, cdiv: Callable[[Size, int], object]) -> KernelLaunch:
        """How to start it; `cdiv(rows, n)` is rows divided by n and rounded up, for whatever `rows` is."""
        decodes = "x" not in self.inputs
        second = ceil_div(self.columns, self.block_rows) if decodes else cdiv(rows, self.block_rows)
        return KernelLaunch((ceil_div(out, self.block_outputs), second, 1), self.threads)

    def code(self) -> str:
        """The whole CUDA C source; what it needs at compile time is in `defines` and the entry's name in capitals."""
        parts = [(name, (SOURCES / name).read_text(encoding="utf-8")) for name in (*SHARED_SOURCES, self.source)]
        return "".join(f'#line 1 "{name}"\n{text}' for name, text in parts)

    def ptx(self, arch: str = "sm_80") -> bytes:
        """PTX for `arch` and later. Raises TargetError when NVRTC is not installed."""
        return compile_ptx(self.code(), self.source, {**dict(self.defines), self.entry.upper(): 1}, arch)


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def int3_kernels(
    dtype: Dtype, columns: int, group: int, *, bias: bool, quant_scale: bool = False, quant_zero: bool = False
) -> tuple[GpuKernel, ...]:
    """Kernels for a linear layer of 3-bit weights [out, columns] with a scale and a zero per `group` inputs.

    `quant_scale` and `quant_zero`: these are bytes with float32 meta values. Raises ValueError for groups that do not
    divide the columns or have fewer than 4 of them.
    """
    if columns % group or group < SMALLEST_GROUP:
        raise ValueError(f"groups of {group} do not divide {columns} columns, or are smaller than {SMALLEST_GROUP}")
    common = {
        "BF16": int(dtype == "bfloat16"),
        "GROUP": group,
        "BIAS": int(bias),
        "META_SCALE": int(quant_scale),
        "META_ZERO": int(quant_zero),
    }
    inputs = ("x", "packed", *_meta("scale", quant_scale), *_meta("zero", quant_zero), *_bias(bias))
    vector = 1 if columns % 4 or group % 4 else 4

    def kernel(entry: str, outputs: int, rows: int, threads: int, **defines: int) -> GpuKernel:
        return GpuKernel(
            entry,
            "int3_hqq.cu",
            columns,
            tuple(sorted({**common, **defines}.items())),
            inputs=inputs,
            sizes=("rows", "out", "columns"),
            outputs=("y",),
            block_outputs=outputs,
            block_rows=rows,
            threads=threads,
            most_rows=rows if entry == "int3_gemv" else None,
        )

    return (
        *(kernel("int3_gemv", 10, rows, 256, ROWS=rows, VECTOR=vector) for rows in GEMV_ROWS),
        *(kernel("int3_tiled", 80, rows, 4 * rows, TILE_ROWS=rows) for rows in TILE_ROWS),
    )


def codebook_kernels(
    dtype: Dtype,
    columns: int,
    *,
    num_codebooks: int,
    codebook_bits: int,
    in_group: int,
    out_group: int = 1,
    group_scales: bool = False,
    bias: bool = False,
) -> tuple[GpuKernel, ...]:
    """Kernels for weights [out, columns] of codebook entries; the last one decodes, the others multiply.

    `group_scales`: a scale per group of inputs, not one per output. Raises ValueError for groups that do not divide the
    columns and for codes that do not fit into 16 bits.
    """
    if columns % in_group:
        raise ValueError(f"groups of {in_group} do not divide {columns} columns")
    if not 1 <= codebook_bits <= 16:
        raise ValueError(f"codes of {codebook_bits} bits, not of 1 to 16")
    common = {
        "BF16": int(dtype == "bfloat16"),
        "NUM_CODEBOOKS": num_codebooks,
        "BITS": codebook_bits,
        "IN_GROUP": in_group,
        "OUT_GROUP": out_group,
        "GROUP_SCALES": int(group_scales),
        "ALIGNED_CODES": int(columns // in_group * num_codebooks * (1 if codebook_bits <= 8 else 2) % 16 == 0),
        "BIAS": int(bias),
    }
    weight = ("codes", "codebooks", "scales")

    def kernel(
        entry: str, outputs: int, rows: int, threads: int, most_rows: int | None = None, **defines: int
    ) -> GpuKernel:
        decodes = entry == "codebook_decode"
        return GpuKernel(
            entry,
            "aq_codebook.cu",
            columns,
            tuple(sorted({**common, **defines}.items())),
            inputs=weight if decodes else ("x", *weight, *_bias(bias)),
            sizes=("out", "columns") if decodes else ("rows", "out", "columns"),
            outputs=("weight",) if decodes else ("y",),
            block_outputs=outputs,
            block_rows=rows,
            threads=threads,
            most_rows=most_rows,
        )

    run = 4 if in_group % 8 else 8
    kernels = [kernel("codebook_gemv", 16, 8, 256, most_rows=8)]
    if codebook_bits <= 8 and num_codebooks * 2**codebook_bits * out_group <= LARGEST_TABLE:
        kernels.append(kernel("codebook_lookup", 1024 * out_group, 1, 256, most_rows=1))
    kernels += [kernel("codebook_tiled", 64, rows, 4 * rows, TILE_ROWS=rows) for rows in TILE_ROWS]
    return (*kernels, kernel("codebook_decode", 16, 256 * run, 256))


def _meta(name: str, quantized: bool) -> tuple[str, ...]:
    return (name, f"{name}_meta_scale", f"{name}_meta_zero") if quantized else (name,)


def _bias(exists: bool) -> tuple[str, ...]:
    return ("bias",) if exists else ()
