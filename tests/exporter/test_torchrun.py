"""torchrun: several ranks write the bytes of one process, and end together when one of them fails."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from exporter.output import MANIFEST
from tests.passes.nets import seeded

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 1280
"""Outputs of a layer: more than one unit of work."""

FACTORY = f"""
import torch
from torch import nn

def net():
    layers = [nn.Linear(64, {WIDTH}), nn.ReLU(), nn.Linear({WIDTH}, {WIDTH}), nn.ReLU(), nn.Linear({WIDTH}, 8)]
    return nn.Sequential(*layers)
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, its data and what makes the module."""
    folder = tmp_path_factory.mktemp("torchrun")
    layers = [nn.Linear(64, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 8)]
    model = seeded(lambda: nn.Sequential(*layers))
    save_file(model.state_dict(), folder / "model.safetensors")
    save_file({"input": torch.randn(200, 64)}, folder / "data.safetensors")
    (folder / "made.py").write_text(FACTORY, encoding="utf-8")
    return folder


def _command(ranks: int, *arguments: str) -> list[str]:
    command = ["-m", "exporter.cli", "model.safetensors", "--factory", "made:net", "--calib", "data.safetensors"]
    command += ["--quiet", *arguments]
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launcher, *command]
    return [sys.executable, *command]


def _run(here: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        _command(ranks, *arguments), cwd=here, env=environment, capture_output=True, text=True, check=False
    )


def _files(out: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
    return files


def test_two_ranks_write_the_bytes_of_one(here: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        done = _run(here, ranks, "--passes", "gptaq", "--out", str(tmp_path / str(ranks)))
        assert done.returncode == 0, done.stderr
    assert _files(tmp_path / "1") == _files(tmp_path / "2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


def test_a_rank_that_fails_stops_the_others_with_its_reason(here: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "taken").touch()
    started = time.monotonic()
    done = _run(here, 2, "--passes", "gptq", "--out", str(tmp_path / "out"))
    assert done.returncode != 0
    # Only the first rank writes, so only it can find the folder taken; torchrun would wait for the other for good.
    assert "exists already" in done.stderr
    assert time.monotonic() - started < 120
