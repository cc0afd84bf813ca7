"""--device: what it names, and one clear line where it is not there."""

from pathlib import Path

import pytest
import torch
from torch import nn

import qexport
from exporter.cli import USAGE, run
from exporter.device import device_for
from exporter.errors import InputError
from exporter.recipe import Recipe
from tests.passes.nets import seeded


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two GPUs, as far as torch tells; the indices that were made current."""
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return current


def _rank(monkeypatch: pytest.MonkeyPatch, rank: int, processes: int) -> None:
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))


def test_one_process_takes_the_one_it_is_given(gpus: list[int]) -> None:
    assert device_for("cpu") == torch.device("cpu")
    assert torch.backends.cudnn.allow_tf32
    assert device_for("cuda") == torch.device("cuda", 0)
    assert device_for("cuda:1") == torch.device("cuda", 1)
    assert gpus == [0, 1]
    assert not torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_takes_the_one_at_its_place(gpus: list[int], monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    _rank(monkeypatch, rank, 2)
    assert device_for("cuda:1, cuda:0") == torch.device("cuda", 1 - rank)
    assert device_for("cpu") == torch.device("cpu")


@pytest.mark.usefixtures("gpus")
def test_each_process_needs_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InputError,
        match=r"--device cuda:0,cuda:1: 2 devices for 1 processes .*; name 1, or start torchrun",
    ):
        device_for("cuda:0,cuda:1")
    _rank(monkeypatch, 1, 2)
    with pytest.raises(InputError, match=r"--device cuda: 1 devices for 2 processes"):
        device_for("cuda")


@pytest.mark.usefixtures("gpus")
def test_one_that_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"there is no cuda:2; torch sees cuda:0 to cuda:1"):
        device_for("cuda:2")


@pytest.mark.parametrize("text", ["gpu", "", "cuda:", "cuda:x", "cuda:0,", "cpu,cuda:0", "cuda,cuda:0"])
def test_what_names_no_devices_is_refused_with_the_recipe(text: str) -> None:
    with pytest.raises(InputError, match="--device"):
        Recipe(device=text)


def test_without_a_gpu_the_command_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run([str(tmp_path), "--device", "cuda", "--out", str(tmp_path / "out")]) == USAGE
    err = capsys.readouterr().err
    assert err.startswith("error: --device cuda: torch sees no CUDA device; install ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("passes", ["rtn:bits=4:group_size=32", "gptq:bits=4:group_size=32", "gptaq", "hqq", "aq"])
def test_a_gpu_comes_to_the_loss_of_the_cpu(passes: str, tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 64)))
    torch.manual_seed(0)
    data = torch.randn(200, 128)
    losses = {}
    for device in ("cpu", "cuda"):
        report = qexport.compile_model(
            model,
            {"input": data[:2]},
            Recipe(passes=passes, device=device),
            calibration={"input": data},
            out=tmp_path / device,
        )
        losses[device] = next(iter(report.outputs["eager_quantized"].values()))["sqnr_db"]
    # Sums in another order move single codes by one level, of 16384 and more: far less than half a decibel in all.
    assert losses["cuda"] == pytest.approx(losses["cpu"], abs=0.5)
