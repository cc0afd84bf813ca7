"""Codebook GPU kernels, run on the CPU from their own source."""

import dataclasses

import pytest

from exporter.gpu_kernels import Dtype, GpuKernel, codebook_kernels
from tests.exporter.formats.cuda_host import build, needs_compiler, run
from tests.exporter.formats.kernel_problems import Problem, codebook_problem

pytestmark = needs_compiler


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to compile the kernels and the shapes (rows, out, columns) to run them on."""

    dtype: Dtype
    num_codebooks: int
    codebook_bits: int
    in_group: int
    tile_rows: int
    shapes: tuple[tuple[int, int, int], ...]
    out_group: int = 1
    group_scales: bool = False
    bias: bool = False

    def layout(self) -> dict[str, int]:
        names = ("num_codebooks", "codebook_bits", "in_group", "out_group", "group_scales")
        return {name: getattr(self, name) for name in names}

    def kernels(self, columns: int) -> tuple[GpuKernel, ...]:
        found = codebook_kernels(self.dtype, columns, bias=self.bias, **self.layout())
        return tuple(
            kernel for kernel in found if dict(kernel.defines).get("TILE_ROWS", self.tile_rows) == self.tile_rows
        )

    def problem(self, rows: int, out: int, columns: int) -> Problem:
        return codebook_problem(self.dtype, rows, out, columns, bias=self.bias, **self.layout())


CASES = {
    "1x8": Case("float16", 1, 8, 8, 32, ((1, 41, 640), (9, 70, 128))),
    "1x8, codes one by one": Case("bfloat16", 1, 8, 8, 64, ((2, 17, 200),), bias=True),
    "2x8": Case("float16", 2, 8, 8, 32, ((1, 70, 576), (8, 16, 64), (33, 13, 64)), bias=True),
    "2x8, bfloat16": Case("bfloat16", 2, 8, 8, 64, ((3, 33, 320), (17, 66, 72), (128, 9, 64))),
    "1x16": Case("float16", 1, 16, 8, 32, ((1, 35, 320), (5, 65, 72)), bias=True),
    "4x8, groups of 4": Case("float16", 4, 8, 4, 32, ((4, 30, 96), (6, 16, 20))),
    "1x6, groups of 16, scaled": Case("bfloat16", 1, 6, 16, 64, ((7, 20, 176),), group_scales=True, bias=True),
    "2x7, groups of 16": Case("float16", 2, 7, 16, 64, ((1, 18, 1040), (8, 40, 48))),
    "3x5, groups of 2 by 6, scaled": Case("float16", 3, 5, 6, 32, ((3, 34, 90),), 2, group_scales=True),
    "2x8, groups of 4 by 1": Case("float16", 2, 8, 1, 32, ((2, 20, 67),), 4, bias=True),
    "8x4, groups of 2 by 8": Case("bfloat16", 8, 4, 8, 32, ((8, 22, 104),), 2),
    "1x12, groups of 8": Case("float16", 1, 12, 8, 64, ((4, 19, 136),)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kernel_multiplies_by_the_entries_that_the_codes_name(case: Case) -> None:
    for shape in case.shapes:
        problem, kernels = case.problem(*shape), case.kernels(shape[2])
        library = build(kernels)
        for kernel in kernels:
            made = run(library, kernel, problem.arrays, problem.sizes, problem.output(kernel))
            problem.check(kernel, made)
