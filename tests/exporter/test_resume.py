"""Runs that are killed: whatever the moment, the next run goes on to the bytes of one that was not."""

import dataclasses
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporter.compile import compile_path
from exporter.errors import InputError
from exporter.inspect_out import inspect_out
from exporter.lock import locked
from exporter.output import MANIFEST, OutputFolder
from exporter.progress import Silent
from exporter.recipe import Recipe
from passes.cache import Cache
from passes.gptq import GPTQ
from passes.graph import copy_graph
from passes.weights import AffineWeight
from tests.exporter.compiled import program_of
from tests.passes.nets import seeded

LAYERS = 12
KILLS = 50


class Deep(nn.Module):
    """A row of linear layers."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(LAYERS):
            layers += [nn.Linear(32, 32), nn.ReLU()]
        self.net = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        result: Tensor = self.net(x)
        return result


def _killed(work: Callable[[], object], after_s: float) -> bool:
    """Run `work` in a process of its own and kill it after so many seconds; False when it was done before."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            work()
        finally:
            os._exit(0)
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    """A forked process cannot use its parent's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_killed_at_fifty_random_points_the_weights_are_those_of_a_whole_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    captured = program_of(seeded(Deep), {"x": torch.randn(256, 32)})
    warnings: list[str] = []

    def run(folder: Path) -> dict[str, Tensor]:
        cache = Cache(folder, "1.0", warnings.append, snapshot_every=0)
        program = dataclasses.replace(captured, graph=copy_graph(captured.graph), cache=cache)
        GPTQ(group_size=-1).run(program)
        return program.graph.state_dict()

    started = time.monotonic()
    expected = run(tmp_path / "whole")
    longest_s = time.monotonic() - started
    choose = random.Random(0)
    folder, kills = tmp_path / "cache", 0
    while kills < KILLS:
        killed = _killed(lambda: run(folder), choose.uniform(0, longest_s))
        kills += killed
        longest_s *= 1.05 if killed else 0.95  # a busy machine's pace changes: about half of the runs are to be killed
        if Cache(folder, "1.0", print).count() == LAYERS:
            for path in folder.iterdir():
                path.unlink()
    found = run(folder)
    assert warnings == []
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported network."""
    path = tmp_path_factory.mktemp("model") / "deep.pt2"
    batch = torch.export.Dim("batch")
    exported = torch.export.export(seeded(Deep).eval(), (torch.randn(16, 32),), dynamic_shapes=({0: batch},))
    torch.export.save(exported, path)
    return path


def _compile(model: Path, out: Path) -> None:
    compile_path(model, Recipe(passes="gptq:group_size=-1", out=out, quiet=True), progress=Silent())


def _hashes(out: Path) -> dict[str, str]:
    files: dict[str, str] = json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]
    return files


def test_a_killed_command_goes_on_to_the_same_files(model: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    _compile(model, tmp_path / "whole")
    whole_s = time.monotonic() - started
    choose = random.Random(1)
    for _ in range(5):
        _killed(lambda: _compile(model, tmp_path / "out"), choose.uniform(0.2, 0.9) * whole_s)
        if (tmp_path / "out").exists():
            break
    else:
        _compile(model, tmp_path / "out")
    assert _hashes(tmp_path / "out") == _hashes(tmp_path / "whole")
    # Neither the folder a killed run was writing to, nor its lock, nor the finished layers are left.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_second_run_to_the_same_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out) as folder:
        (folder / "file").touch()
        with pytest.raises(InputError, match=r"--out .*out: another run is writing to it"), OutputFolder(out):
            pass
    assert (out / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"

    def hold() -> None:
        with locked(path, "out"):
            (tmp_path / "held").touch()
            time.sleep(600)

    child = os.fork()
    if child == 0:
        hold()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(InputError, match="another run"), locked(path, "out"):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(path, "out"):
        assert path.exists()
    assert not path.exists()


def test_what_force_had_moved_aside_comes_back(tmp_path: Path) -> None:
    old, partial = tmp_path / ".out.0123abcd.old", tmp_path / ".out.0123abcd.partial"
    for folder in (old, partial):
        folder.mkdir()
        (folder / MANIFEST).write_text(folder.name, encoding="utf-8")
    with pytest.raises(InputError, match="exists already"), OutputFolder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / MANIFEST).read_text(encoding="utf-8") == old.name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_inspect_says_how_far_a_stopped_run_got(tmp_path: Path) -> None:
    cache = Cache(tmp_path / ".out.cache", "1.0", print)
    for name in ("a", "b"):
        cache.put(name, AffineWeight(torch.zeros(1, 4, dtype=torch.int8), torch.ones(1, 1), None, 8, -1))
    with pytest.raises(InputError, match=r"out: not finished: a run was stopped when 2 of its layers were quantized"):
        inspect_out(tmp_path / "out")
