"""Runs a GPU kernel's source on the CPU: g++ compiles it with cuda_host.h in the place of device.cu."""

import ctypes
import functools
import mmap
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from exporter.gpu_kernels import SOURCES, GpuKernel, ceil_div

Array = NDArray[np.generic]
HEADER = Path(__file__).with_name("cuda_host.h")
FLAGS = ("-std=c++20", "-O1", "-shared", "-fPIC", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the kernels for the CPU")


def build(kernels: Sequence[GpuKernel]) -> ctypes.CDLL:
    """A library with all of `kernels`, which are of one source and agree in what they define."""
    defines: dict[str, int] = {}
    for kernel in kernels:
        assert all(defines.get(name, value) == value for name, value in kernel.defines)
        defines.update(kernel.defines)
    return _compiled(kernels[0].source, tuple(kernel.entry for kernel in kernels), tuple(sorted(defines.items())))


@functools.cache
def _compiled(source_name: str, entries: tuple[str, ...], defines: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    lines = [
        *(f"#define {name} {value}" for name, value in defines),
        *(f"#define {entry.upper()}" for entry in entries),
    ]
    lines += [f'#include "{path}"' for path in (HEADER, SOURCES / "mma_tile.cu", SOURCES / source_name)]
    lines += [f"HOST_ENTRY({entry})" for entry in entries]
    folder = Path(tempfile.mkdtemp())
    try:
        source, library = folder / "kernels.cpp", folder / "kernels.so"
        source.write_text("\n".join(lines) + "\n", encoding="utf-8")
        done = subprocess.run(["g++", *FLAGS, str(source), "-o", str(library)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        return ctypes.CDLL(str(library))
    finally:
        shutil.rmtree(folder)


def fenced(array: Array) -> Array:
    """A copy that ends where its page does (within 16 bytes), between pages that nobody may touch."""
    page = mmap.PAGESIZE
    pages = -(-array.nbytes // page)
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (start, start + (pages + 1) * page):
        assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(fence), page, 0) == 0
    offset = (pages + 1) * page - -(-array.nbytes // 16) * 16
    copy = np.frombuffer(memory, np.uint8, array.nbytes, offset).view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(
    library: ctypes.CDLL, kernel: GpuKernel, arrays: Mapping[str, Array], sizes: Mapping[str, int], output: Array
) -> Array:
    """Launches a kernel of the library as the driver would, and returns what it wrote into a copy of `output`.

    Fails when it touches other memory, or writes something else where the threads of a block go backwards.
    """
    inputs = [fenced(arrays[name]) for name in kernel.inputs]
    made, again = fenced(output), fenced(output)
    launch = kernel.launch(sizes["rows"], sizes["out"], ceil_div)
    for target, backwards in ((made, 0), (again, 1)):
        values: list[ctypes.c_void_p | ctypes.c_int] = [ctypes.c_void_p(array.ctypes.data) for array in inputs]
        values += [ctypes.c_int(sizes[name]) for name in kernel.sizes]
        values.append(ctypes.c_void_p(target.ctypes.data))
        arguments = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        stayed_inside = getattr(library, f"{kernel.entry}_on_host")(
            arguments, *launch.grid[:2], launch.block, backwards
        )
        assert stayed_inside, f"{kernel.entry} reads or writes outside of its arrays"
    assert made.tobytes() == again.tobytes(), f"{kernel.entry} lacks a barrier"
    return made
