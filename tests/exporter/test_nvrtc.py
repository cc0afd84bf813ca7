"""CUDA C to PTX without a GPU, and what is said when it cannot be done."""

import importlib.metadata

import pytest

from exporter import nvrtc
from exporter.errors import InternalError, TargetError
from exporter.nvrtc import compile_ptx

SOURCE = 'extern "C" __global__ void scale(const float *x, int n, float *y) { if (n) *y = *x * FACTOR; }'


def test_ptx_is_text_of_the_architecture_that_was_asked_for() -> None:
    ptx = compile_ptx(SOURCE, "scale.cu", {"FACTOR": 3}, "sm_86").decode("ascii")
    assert ".target sm_86" in ptx
    assert ".version 8.1" in ptx  # what drivers from CUDA 12.1 on read
    assert ".entry scale(" in ptx
    assert "\0" not in ptx


def test_defines_reach_the_source() -> None:
    three, four = (compile_ptx(SOURCE, "scale.cu", {"FACTOR": factor}) for factor in (3, 4))
    assert three != four


def test_a_refused_source_comes_with_the_compilers_words() -> None:
    with pytest.raises(InternalError, match=r'broken\.cu.*--define-macro=FACTOR=2.*identifier "nothing" is undefined'):
        compile_ptx("__global__ void f(float *y) { *y = nothing; }", "broken.cu", {"FACTOR": 2})


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(TargetError, match=r"sm_123: NVRTC compiles for .*sm_80.*sm_90; the PTX of one runs on later"):
        compile_ptx(SOURCE, "scale.cu", {"FACTOR": 3}, "sm_123")


def test_without_the_wheel_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    nvrtc._library.cache_clear()
    with pytest.raises(TargetError, match=r"nvidia-cuda-nvrtc-cu12 is not installed.*qexport\[trt\]") as caught:
        compile_ptx(SOURCE, "scale.cu", {"FACTOR": 3})
    assert caught.value.exit_code == 4
