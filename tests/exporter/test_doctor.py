"""What doctor says about machines that are not this one."""

import importlib.machinery
from collections.abc import Callable

import pytest
from rich.console import Console

from exporter import doctor
from exporter.cli import run
from exporter.doctor import Finding, examine, render


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """{name: finding} on a machine that has what is named and nothing else."""

    def look(installed: dict[str, str], *, flavor: str | None = None, flags: str = "", arch: str = "x86_64") -> dict:
        def version(*distributions: str) -> str | None:
            return next((installed[name] for name in distributions if name in installed), None)

        def spec(name: str) -> importlib.machinery.ModuleSpec | None:
            return importlib.machinery.ModuleSpec(name, None) if name in installed else None

        monkeypatch.setattr(doctor, "installed", version)
        monkeypatch.setattr(doctor.importlib.util, "find_spec", spec)
        monkeypatch.setattr(doctor, "available_flavor", lambda flavor_asked: flavor)
        monkeypatch.setattr(doctor, "_cpu_flags", lambda: frozenset(flags.split()))
        monkeypatch.setattr(doctor.platform, "machine", lambda: arch)
        return {finding.name: finding for finding in examine()}

    return look


def test_a_bare_machine_is_told_what_to_install(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine({})
    assert {name for name, finding in found.items() if finding.works is False} == {
        "torch",
        "onnxruntime",
        "TensorRT",
        "NVRTC",
        "transformers",
    }
    assert "pip install 'qexport[cpu]'" in found["onnxruntime"].fix
    assert "qexport[trt-rtx]" in found["TensorRT"].fix
    assert all(finding.fix for finding in found.values() if finding.works is False)


def test_two_onnxruntimes_overwrite_each_other(machine: Callable[..., dict[str, Finding]]) -> None:
    found = machine({"onnxruntime": "1.30", "onnxruntime-gpu": "1.30"})["onnxruntime"]
    assert found.works is False
    assert "pip uninstall both" in found.fix


@pytest.mark.parametrize(
    ("flags", "arch", "works"),
    [
        ("avx avx2 avx512bw avx512_vnni", "x86_64", True),
        ("avx avx2 avx_vnni", "x86_64", True),
        ("avx avx2", "x86_64", False),
        ("", "x86_64", None),
        ("asimddp", "aarch64", None),
    ],
)
def test_int8_sums_saturate_without_vnni(
    machine: Callable[..., dict[str, Finding]], flags: str, arch: str, works: bool | None
) -> None:
    found = machine({}, flags=flags, arch=arch)["processor"]
    assert found.works is works
    assert ("saturate" in found.found) is (works is False)


def test_the_flavor_of_tensorrt_is_named(machine: Callable[..., dict[str, Finding]]) -> None:
    assert "any GPU" in machine({"tensorrt-rtx-cu12": "1.7"}, flavor="rtx")["TensorRT"].found
    assert "this GPU" in machine({"tensorrt": "10.9"}, flavor="tensorrt")["TensorRT"].found
    assert "cannot build here" in machine({"tensorrt": "10.9"})["TensorRT"].found


def test_this_machine_is_examined(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("qexport", "torch", "onnxruntime", "processor", "GPU", "TensorRT", "NVRTC"))


def test_a_finding_is_shown_with_its_fix() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(render((Finding("NVRTC", "not [installed]", False, "install it"),)))
    assert captured.get().split() == ["NVRTC", "--", "not", "[installed];", "install", "it"]
