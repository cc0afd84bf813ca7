"""The table of GPU kernels: every one compiles for every architecture, with the parameters that it says."""

import dataclasses
import functools
import re

import pytest

from exporter.gpu_kernels import GpuKernel, codebook_kernels, int3_kernels

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
LAYOUT_2X8 = {"num_codebooks": 2, "codebook_bits": 8, "in_group": 8}
FORMS = (
    *int3_kernels("float16", 4096, 64, bias=True),
    *codebook_kernels("bfloat16", 4096, bias=True, **LAYOUT_2X8),
)
STATIC_SHARED = 48 * 1024
"""What a launch gets without asking."""
OTHERS = (
    *int3_kernels("float16", 64, 4, bias=False),
    *int3_kernels("bfloat16", 4096, 128, bias=False, quant_scale=True, quant_zero=True),
    *int3_kernels("float16", 4095, 4095, bias=True),
    *codebook_kernels("float16", 4096, num_codebooks=1, codebook_bits=8, in_group=8),
    *codebook_kernels("float16", 4096, num_codebooks=1, codebook_bits=16, in_group=8, bias=True),
    *codebook_kernels("float16", 90, num_codebooks=3, codebook_bits=5, in_group=6, out_group=2, group_scales=True),
)


def name(kernel: GpuKernel) -> str:
    rows = [f"{key}={value}" for key, value in kernel.defines if key in ("ROWS", "TILE_ROWS")]
    return "-".join([kernel.entry, *rows])


@functools.cache
def compiled(kernel: GpuKernel, arch: str = "sm_80") -> str:
    return kernel.ptx(arch).decode("ascii")


@dataclasses.dataclass(frozen=True)
class Symbol:
    """A size that is not known yet, as TensorRT hands it in."""

    text: str

    def cdiv(self, divisor: int) -> "Symbol":
        return Symbol(f"cdiv({self.text}, {divisor})")


def parameters(ptx: str, entry: str) -> list[str]:
    """Types of an entry's parameters in order."""
    found = re.search(rf"\.visible \.entry {entry}\((.*?)\)", ptx, re.DOTALL)
    assert found, ptx[:500]
    return re.findall(r"\.param \.(\w+) ", found[1])


def shared_bytes(ptx: str) -> int:
    return sum(int(size) for size in re.findall(r"\.shared \.align \d+ \.b8 \S+\[(\d+)\]", ptx))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", FORMS, ids=name)
def test_a_kernel_compiles_with_the_parameters_that_the_table_says(kernel: GpuKernel, arch: str) -> None:
    ptx = compiled(kernel, arch)
    assert f".target {arch}" in ptx
    pointers, sizes, made = (len(part) for part in (kernel.inputs, kernel.sizes, kernel.outputs))
    assert parameters(ptx, kernel.entry) == ["u64"] * pointers + ["u32"] * sizes + ["u64"] * made
    assert ptx.count(".entry") == 1
    assert int(re.findall(r"\.maxntid (\d+)", ptx)[0]) == kernel.threads


@pytest.mark.parametrize("kernel", OTHERS, ids=name)
def test_other_layouts_compile(kernel: GpuKernel) -> None:
    text = compiled(kernel)
    assert f".entry {kernel.entry}(" in text
    assert shared_bytes(text) <= STATIC_SHARED


@pytest.mark.parametrize("kernel", FORMS, ids=name)
def test_the_same_kernel_is_the_same_bytes_and_sums_in_one_order(kernel: GpuKernel) -> None:
    text = compiled(kernel)
    assert kernel.ptx() == text.encode()
    assert not re.search(r"\b(atom|red)\.", text)  # sums of unordered additions would differ from run to run
    assert ".local" not in text  # register arrays stayed registers
    assert ".ftz" not in text  # codes are subnormal numbers before they are scaled
    assert 0 < shared_bytes(text) <= STATIC_SHARED


@pytest.mark.parametrize(("kernel", "instruction"), [
    (FORMS[0], "ld.global.nc.L1::no_allocate.v4.u32"),
    (FORMS[4], "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"),
    (FORMS[6], "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"),
    (FORMS[6], "ld.global.nc.L1::no_allocate.v4.u32"),
], ids=["int3 wide loads", "int3 tensor cores", "codebook tensor cores", "codebook wide loads"])  # fmt: skip
def test_the_instructions_that_speed_rests_on_are_there(kernel: GpuKernel, instruction: str) -> None:
    assert instruction in compiled(kernel)


def test_the_grid_follows_rows_that_are_known_later() -> None:
    gemv, tiled = FORMS[3], FORMS[5]
    rows = Symbol("rows")
    assert gemv.launch(rows, 4096, Symbol.cdiv).grid == (410, Symbol("cdiv(rows, 8)"), 1)
    assert tiled.launch(rows, 4096, Symbol.cdiv).grid == (52, Symbol("cdiv(rows, 64)"), 1)
    decode = FORMS[-1]
    assert decode.entry == "codebook_decode"
    assert decode.launch(rows, 100, Symbol.cdiv).grid == (7, 2, 1)


def test_kernels_say_how_many_rows_they_are_for() -> None:
    assert [kernel.most_rows for kernel in FORMS] == [1, 2, 4, 8, None, None, 8, 1, None, None, None]


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="groups of 64 do not divide 100 columns"):
        int3_kernels("float16", 100, 64, bias=False)
    with pytest.raises(ValueError, match="smaller than 4"):
        int3_kernels("float16", 100, 2, bias=False)
    with pytest.raises(ValueError, match="groups of 8 do not divide 100 columns"):
        codebook_kernels("float16", 100, **LAYOUT_2X8)
    with pytest.raises(ValueError, match="codes of 17 bits"):
        codebook_kernels("float16", 96, num_codebooks=1, codebook_bits=17, in_group=8)
