"""torchrun: several ranks write the bytes of one process, and end together when one of them fails."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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
    return subprocess.run(
        _command(ranks, *arguments), cwd=here, env=_environment(), capture_output=True, text=True, check=False
    )


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


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


def _ip(*arguments: str) -> bool:
    return subprocess.run(["ip", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two network namespaces joined by a cable: as good as two machines to whoever lives in them."""
    names = [f"qexport{os.getpid()}{letter}" for letter in "ab"]
    made = shutil.which("ip") is not None and _ip("netns", "add", names[0]) and _ip("netns", "add", names[1])
    try:
        if not made:
            pytest.skip("network namespaces need root and the ip command")
        assert _ip("link", "add", "cable0", "netns", names[0], "type", "veth", "peer", "cable1", "netns", names[1])
        for index, name in enumerate(names):
            assert _ip("-n", name, "addr", "add", f"10.77.0.{index + 1}/24", "dev", f"cable{index}")
            assert _ip("-n", name, "link", "set", f"cable{index}", "up")
            assert _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            _ip("netns", "delete", name)


def test_two_machines_write_the_bytes_of_one(here: Path, machines: list[str], tmp_path: Path) -> None:
    done = _run(here, 1, "--passes", "gptq", "--out", str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    children = []
    for rank, name in enumerate(machines):
        launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank), "--nproc-per-node", "1"]
        launcher += ["--master-addr", "10.77.0.1", "--master-port", "29511"]
        command = [sys.executable, *launcher, *_command(1, "--passes", "gptq", "--out", str(tmp_path / "two"))[1:]]
        environment = _environment() | {"GLOO_SOCKET_IFNAME": f"cable{rank}"}
        children.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command], cwd=here, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    for child in children:
        _, err = child.communicate(timeout=250)
        assert child.returncode == 0, err
    assert _files(tmp_path / "one") == _files(tmp_path / "two")


def test_a_rank_that_is_killed_ends_the_run(here: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        _command(2, "--passes", "gptq", "--out", str(tmp_path / "out")),
        cwd=here,
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        cache = tmp_path / ".out.cache"
        while not any(cache.glob("[!.]*")):
            assert launcher.poll() is None
            time.sleep(0.01)
        found = subprocess.run(["pgrep", "-P", str(launcher.pid)], capture_output=True, text=True, check=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        killed = time.monotonic()
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode != 0
    assert "rank" in err
    # torchrun gives the others 30 seconds to end by themselves; they do not need them.
    assert time.monotonic() - killed < 30
    assert not (tmp_path / "out").exists()
    done = _run(here, 1, "--passes", "gptq", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert not cache.exists()
