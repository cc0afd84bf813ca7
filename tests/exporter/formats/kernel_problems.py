"""Layers for the GPU kernels, with the exact result and how far from it a kernel may land.

All inputs are numbers of the activations' type, so that the reference, in float64, is free of their rounding. A kernel
adds at most three times:

    output rounding   u |y|, u = 2^-11 for float16 (11 bits), 2^-8 for bfloat16 (8 bits), 2^-25 under float16's normals
    float32 sums      (n + 16) v |x| |terms|, v = 2^-24, n additions in any order (Higham, Accuracy and Stability of
                      Numerical Algorithms, ch. 4), 16 for decoding; |terms| adds up the sizes of what is subtracted
    weight rounding   u |x| |w|, where weights are rounded to the activations' type before they are multiplied

Tensor cores cut sums off where the CPU rounds: on a GPU, v = 2^-23.
"""

import dataclasses
from collections.abc import Mapping

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from exporter.gpu_kernels import Dtype, GpuKernel

Array = NDArray[np.generic]
Floats = NDArray[np.float64]
TYPES: dict[Dtype, np.dtype] = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
UNIT: dict[Dtype, float] = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclasses.dataclass(frozen=True)
class Problem:
    """Inputs by name and what they stand for; `terms` [out, columns] is |w| with the signs of its parts dropped."""

    dtype: Dtype
    arrays: Mapping[str, Array]
    sizes: Mapping[str, int]
    weight: Floats
    terms: Floats
    bias: Floats

    @property
    def y(self) -> Floats:
        return self._x @ self.weight.T + self.bias

    @property
    def _x(self) -> Floats:
        return self.arrays["x"].astype(np.float64)

    def bound(self, kernel: GpuKernel, *, sum_unit: float = 2.0**-24) -> Floats:
        """Largest error of each element of what `kernel` makes, y or the weight."""
        unit, sums = UNIT[self.dtype], (self.sizes["columns"] + 16) * sum_unit
        if kernel.outputs == ("weight",):
            return unit * np.abs(self.weight) + 16 * sum_unit * self.terms + 2.0**-25
        magnitude = np.abs(self._x) @ self.terms.T + np.abs(self.bias)
        error = unit * np.abs(self.y) + sums * magnitude + 2.0**-25
        return error + unit * magnitude if self._rounds_weights(kernel) else error

    def _rounds_weights(self, kernel: GpuKernel) -> bool:
        defines = dict(kernel.defines)
        entrywise = kernel.entry == "codebook_gemv" and not defines["GROUP_SCALES"] and defines["IN_GROUP"] % 4 == 0
        return kernel.entry not in ("int3_gemv", "codebook_lookup") and not entrywise

    def output(self, kernel: GpuKernel) -> Array:
        """Where the kernel writes, full of NaN: an element that is left out is seen."""
        shape = (self.sizes["rows"] if kernel.outputs == ("y",) else self.sizes["out"], self.width(kernel))
        return np.full(shape, np.nan, TYPES[self.dtype])

    def width(self, kernel: GpuKernel) -> int:
        return self.sizes["out" if kernel.outputs == ("y",) else "columns"]

    def check(self, kernel: GpuKernel, made: Array, *, sum_unit: float = 2.0**-24) -> None:
        """Fails with the worst element where it is further off than the bound."""
        exact = self.y if kernel.outputs == ("y",) else self.weight
        excess = np.abs(made.astype(np.float64) - exact) / self.bound(kernel, sum_unit=sum_unit)
        worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        assert excess[worst] <= 1, f"{kernel.entry} {worst}: {made[worst]} for {exact[worst]}, {excess[worst]} bounds"


def pack_codes(codes: NDArray[np.uint8]) -> NDArray[np.int32]:
    """[out, columns] -> [ceil(out / 10), columns]: code [k step + r, i] at bit 27 - 3k of word [r, i]."""
    out, columns = codes.shape
    step = -(-out // 10)
    padded = np.zeros((10 * step, columns), np.int64)
    padded[:out] = codes
    fields = padded.reshape(10, step, columns) << (27 - 3 * np.arange(10)).reshape(10, 1, 1)
    return fields.sum(axis=0).astype(np.int32)


def int3_problem(
    dtype: Dtype,
    rows: int,
    out: int,
    columns: int,
    group: int,
    *,
    bias: bool,
    quant_scale: bool = False,
    quant_zero: bool = False,
) -> Problem:
    """Random 3-bit weights with fractional zeros, as HQQ makes them."""
    random = np.random.default_rng([rows, out, columns, group])
    groups = columns // group
    codes = random.integers(0, 8, (out, columns), dtype=np.uint8)
    arrays: dict[str, Array] = {"x": random.standard_normal((rows, columns)).astype(TYPES[dtype])}
    arrays["packed"] = pack_codes(codes)
    values = {"scale": random.uniform(0.01, 0.03, (out, groups)), "zero": random.uniform(2.0, 5.0, (out, groups))}
    exact: dict[str, Floats] = {}
    for name, quantized in (("scale", quant_scale), ("zero", quant_zero)):
        arrays[name] = values[name].astype(TYPES[dtype])
        exact[name] = arrays[name].astype(np.float64)
        if quantized:
            meta = _meta(name, values[name])
            arrays.update(meta)
            scale, zero = (
                np.repeat(meta[f"{name}_meta_{part}"].astype(np.float64), 128)[: out * groups].reshape(out, groups)
                for part in ("scale", "zero")
            )
            exact[name] = (meta[name].astype(np.float64) - zero) * scale
    arrays["bias"] = random.standard_normal(out).astype(TYPES[dtype])
    scale, zero = (np.repeat(exact[name], group, axis=1) for name in ("scale", "zero"))
    return Problem(
        dtype,
        arrays,
        {"rows": rows, "out": out, "columns": columns},
        weight=(codes - zero) * scale,
        terms=(codes + np.abs(zero)) * np.abs(scale),
        bias=bias * arrays["bias"].astype(np.float64),
    )


def _meta(name: str, values: Floats) -> dict[str, Array]:
    flat = values.ravel()
    blocks = [flat[i : i + 128] for i in range(0, flat.size, 128)]
    scale = np.array([np.ptp(block) / 255 for block in blocks]).astype(np.float32)
    zero = np.array([-block.min() / (np.ptp(block) / 255) for block in blocks]).astype(np.float32)
    codes = np.concatenate([np.clip(np.round(b / s + z), 0, 255) for b, s, z in zip(blocks, scale, zero, strict=True)])
    return {
        name: codes.astype(np.uint8).reshape(values.shape),
        f"{name}_meta_scale": scale,
        f"{name}_meta_zero": zero,
    }


def codebook_problem(
    dtype: Dtype,
    rows: int,
    out: int,
    columns: int,
    *,
    num_codebooks: int,
    codebook_bits: int,
    in_group: int,
    out_group: int = 1,
    group_scales: bool = False,
    bias: bool = False,
) -> Problem:
    """Random codes over random codebooks; without group scales there is one a group of outputs."""
    random = np.random.default_rng([rows, out, columns, num_codebooks, codebook_bits])
    kind, code = TYPES[dtype], np.uint8 if codebook_bits <= 8 else np.uint16
    shape = (out // out_group, columns // in_group)
    codes = random.integers(0, 2**codebook_bits, (*shape, num_codebooks), dtype=code)
    books = random.standard_normal((num_codebooks, 2**codebook_bits, out_group, in_group)).astype(kind)
    scales = random.uniform(0.01, 0.03, shape if group_scales else (shape[0], 1)).astype(kind)
    entries = [books[m].astype(np.float64)[codes[:, :, m]] for m in range(num_codebooks)]
    scale = scales.astype(np.float64)[:, :, None, None]

    def matrix(summed: Floats) -> Floats:
        return (scale * summed).transpose(0, 2, 1, 3).reshape(out, columns)

    x = random.standard_normal((rows, columns)).astype(kind)
    biases = random.standard_normal(out).astype(kind)
    return Problem(
        dtype,
        {"x": x, "codes": codes, "codebooks": books, "scales": scales, "bias": biases},
        {"rows": rows, "out": out, "columns": columns},
        weight=matrix(np.sum(entries, axis=0)),
        terms=matrix(np.sum(np.abs(entries), axis=0)),
        bias=bias * biases.astype(np.float64),
    )
