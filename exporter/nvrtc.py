"""CUDA C to PTX by NVRTC, through ctypes: needs neither a GPU, nor a driver, nor a host compiler.

PTX of NVRTC 12.1 (`.version 8.1`) is read by every driver from CUDA 12.1 on, and PTX for sm_80 runs on all later GPUs.
The same source and defines give the same bytes.
"""

import ctypes
import functools
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

from exporter.errors import InternalError, TargetError

DISTRIBUTION = "nvidia-cuda-nvrtc-cu12"
_COMPILATION = 6  # NVRTC_ERROR_COMPILATION: the log says what is wrong


def compile_ptx(source: str, name: str, defines: Mapping[str, int], arch: str = "sm_80") -> bytes:
    """PTX of CUDA C `source`, which includes nothing; `name` is what the compiler calls it in its messages.

    Raises TargetError when NVRTC cannot be used here or does not know `arch`, InternalError with the log when
    it refuses the source.
    """
    library = _library()
    known = _architectures(library)
    if arch not in known:
        raise TargetError(f"NVRTC compiles for {', '.join(known)}", where=arch, fix="the PTX of one runs on later GPUs")
    arguments = [f"--gpu-architecture={arch.replace('sm_', 'compute_')}", "--std=c++17", "--diag-suppress=177"]
    arguments += [f"--define-macro={key}={value}" for key, value in sorted(defines.items())]
    options = (ctypes.c_char_p * len(arguments))(*(argument.encode() for argument in arguments))
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None))
    try:
        status = library.nvrtcCompileProgram(program, len(arguments), options)
        if status == _COMPILATION:
            log = _text(library, program, "ProgramLog").decode(errors="replace").strip()
            raise InternalError(f"NVRTC refuses it with {' '.join(arguments)}: {log}", where=name)
        _check(library, status)
        return _text(library, program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _library() -> ctypes.CDLL:
    """The wheel's own library: another NVRTC on the machine would write other bytes."""
    try:
        files = importlib.metadata.distribution(DISTRIBUTION).files or []
    except importlib.metadata.PackageNotFoundError:
        raise TargetError(
            f"{DISTRIBUTION} is not installed, which compiles the GPU kernels of low-bit weights",
            fix="pip install 'qexport[trt]' or 'qexport[trt-rtx]'",
        ) from None
    found = [Path(str(file.locate())) for file in files if file.name.startswith(("libnvrtc.so", "nvrtc64_"))]
    if not found:
        raise TargetError(f"{DISTRIBUTION} holds no NVRTC library", fix=f"install {DISTRIBUTION} again")
    try:
        return ctypes.CDLL(str(found[0]))
    except OSError as error:
        raise TargetError(f"NVRTC cannot be loaded: {error}", fix=f"install {DISTRIBUTION} again") from error


def _architectures(library: ctypes.CDLL) -> list[str]:
    count = ctypes.c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(numbers))
    return [f"sm_{number}" for number in numbers]


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    """The PTX or the log of a program, without the trailing NUL."""
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw.rstrip(b"\0")


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise InternalError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
