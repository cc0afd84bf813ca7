"""What this machine can do: what is installed, what runs, and what to install for the rest."""

import ctypes
import dataclasses
import importlib.util
import os
import platform
from pathlib import Path

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from exporter.backends.tensorrt.build import MODULES, available_flavor
from exporter.nvrtc import DISTRIBUTION as NVRTC
from exporter.versions import VERSION, installed

CPUINFO = Path("/proc/cpuinfo")
VNNI = ("avx512_vnni", "avx_vnni")
DISTRIBUTIONS = {"tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"), "rtx": ("tensorrt-rtx-cu12",)}
COMPUTE_CAPABILITY = (75, 76)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing looked at: `works` False comes with a `fix`, and None is neither good nor bad."""

    name: str
    found: str
    works: bool | None = None
    fix: str = ""


def examine() -> tuple[Finding, ...]:
    """Look at everything; imports onnxruntime, and TensorRT in a child process. Takes some seconds."""
    return (
        Finding("qexport", f"{VERSION} on Python {platform.python_version()}"),
        _package("torch", ("torch",), "pip install torch"),
        *_onnxruntime(),
        _processor(_cpu_flags()),
        *_gpus(),
        _tensorrt(),
        _nvrtc(),
        _package("transformers", ("transformers",), "pip install 'qexport[hf]' for Hugging Face folders"),
    )


def render(findings: tuple[Finding, ...]) -> RenderableType:
    """A table: a name, what was found, what to do."""
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    for _ in range(3):
        table.add_column()
    for finding in findings:
        mark = {True: "ok", False: "--", None: ""}[finding.works]
        lines = finding.found if not finding.fix else f"{finding.found}; {finding.fix}"
        table.add_row(Text(finding.name), Text(mark), Text(lines))
    return table


def _package(name: str, distributions: tuple[str, ...], fix: str) -> Finding:
    version = installed(*distributions)
    return Finding(name, version, True) if version else Finding(name, "not installed", False, fix)


def _onnxruntime() -> list[Finding]:
    if importlib.util.find_spec("onnxruntime") is None:
        return [Finding("onnxruntime", "not installed", False, "pip install 'qexport[cpu]' (or [gpu], never both)")]
    if installed("onnxruntime") and installed("onnxruntime-gpu"):
        fix = "pip uninstall both, then pip install 'qexport[cpu]' or 'qexport[gpu]'"
        return [Finding("onnxruntime", "onnxruntime and onnxruntime-gpu overwrite each other", False, fix)]
    try:
        import onnxruntime
    except ImportError as error:
        return [Finding("onnxruntime", f"cannot be imported: {error}", False, "install it again")]
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    return [
        Finding("onnxruntime", f"{onnxruntime.__version__}, providers {', '.join(providers)}", True),
    ]


def _cpu_flags() -> frozenset[str]:
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    found = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return frozenset(found.partition(":")[2].split())


def _processor(flags: frozenset[str]) -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    shown = f"{platform.machine()}, {cores} cores"
    if platform.machine() not in ("x86_64", "AMD64"):
        return Finding("processor", shown)
    if not flags:
        return Finding("processor", f"{shown}, features unknown")
    vnni = [name for name in VNNI if name in flags]
    if vnni:
        return Finding("processor", f"{shown}, {', '.join(vnni)}: exact and fast int8", True)
    widest = next((name for name in ("avx512bw", "avx2", "avx") if name in flags), "no AVX")
    return Finding(
        "processor",
        f"{shown}, {widest} without VNNI: sums of int8 products may saturate at 16 bits",
        False,
        "compare `onnxruntime` with `eager_quantized` in the report before you trust int8 here",
    )


def _gpus() -> list[Finding]:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [Finding("GPU", "no NVIDIA driver; models run on the CPU")]
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value:
        return [Finding("GPU", "an NVIDIA driver, but no GPU that answers", False, "see nvidia-smi")]
    return [Finding("GPU", _gpu_name(driver, index), True) for index in range(count.value)]


def _gpu_name(driver: ctypes.CDLL, index: int) -> str:
    device, name, parts = ctypes.c_int(), ctypes.create_string_buffer(128), []
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    for attribute in COMPUTE_CAPABILITY:
        value = ctypes.c_int()
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
        parts.append(str(value.value))
    return f"{name.value.decode(errors='replace')}, sm{''.join(parts)}"


def _tensorrt() -> Finding:
    flavor = available_flavor("auto")
    if flavor is not None:
        version = installed(*DISTRIBUTIONS[flavor]) or "of unknown version"
        what = "builds for this GPU" if flavor == "tensorrt" else "builds ahead of time, for any GPU"
        return Finding("TensorRT", f"{MODULES[flavor]} {version}, {what}", True)
    fix = "pip install 'qexport[trt-rtx]' to build on any machine, or 'qexport[trt]' beside a GPU"
    if importlib.util.find_spec("tensorrt") is not None:
        return Finding("TensorRT", "tensorrt is installed, but cannot build here", False, fix)
    return Finding("TensorRT", "not installed: --target trt writes the bundle only", False, fix)


def _nvrtc() -> Finding:
    wheel = installed(NVRTC)
    if wheel:
        return Finding("NVRTC", f"{NVRTC} {wheel}", True)
    fix = f"pip install {NVRTC}==12.1.105 for plugins of 3-bit and codebook weights on full TensorRT"
    return Finding("NVRTC", f"{NVRTC} is not installed", False, fix)
