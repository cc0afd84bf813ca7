"""Finished layers on disk: a stopped run goes on to the same weights, and nothing stale or damaged is taken."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from passes import snapshot, weight_pass
from passes.base import LayerRule, Program
from passes.cache import Cache, next_key
from passes.calibration import Calibration, Stream
from passes.gptaq import GPTAQ
from passes.gptq import GPTQ
from passes.graph import copy_graph
from passes.memory import Memory
from passes.ranks import Ranks
from passes.rtn import RTN
from passes.weight_pass import WeightPass
from passes.weights import AffineWeight, CodebookWeight
from tests.exporter.compiled import program_of
from tests.passes.nets import seeded


class Net(nn.Module):
    """Three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        result: Tensor = self.net(x)
        return result


def _program(folder: Path | None, warnings: list[str] | None = None, seed: int = 0) -> Program:
    torch.manual_seed(seed)
    program = program_of(seeded(Net), {"x": torch.randn(64, 8)})
    cache = None if folder is None else Cache(folder, "1.0", (warnings if warnings is not None else []).append)
    return dataclasses.replace(program, cache=cache)


def _run(program: Program, work: WeightPass | None = None) -> dict[str, Tensor]:
    program.float_twin = copy_graph(program.graph)
    (work or GPTQ(group_size=-1)).run(program)
    return {name: value.clone() for name, value in program.graph.state_dict().items() if "codes" in name}


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _stop_after(finished: int) -> Callable[[str, int, int], None]:
    """Interrupts the run when so many layers are done."""
    layers: list[str] = []

    def stop(layer: str, done: int, total: int) -> None:
        layers.append(layer)
        if len(layers) > finished:
            raise KeyboardInterrupt

    return stop


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that were quantized, not taken from a cache."""
    names: list[str] = []
    original = WeightPass._quantized

    def quantized(self: WeightPass, matrix: Tensor, layer: weight_pass.Layer, walk: weight_pass.Walk) -> object:
        names.append(layer.name)
        return original(self, matrix, layer, walk)

    monkeypatch.setattr(WeightPass, "_quantized", quantized)
    return names


def test_a_second_run_takes_every_layer_from_the_cache(tmp_path: Path, counted: list[str]) -> None:
    folder = tmp_path / "cache"
    plain = _run(_program(None))
    first = _run(_program(folder))
    assert len(counted) == 6
    assert Cache(folder, "1.0", print).count() == 3
    second = _run(_program(folder))
    assert len(counted) == 6
    assert _same(plain, first)
    assert _same(plain, second)


@pytest.mark.parametrize("finished", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, counted: list[str], finished: int) -> None:
    expected = _run(_program(None))
    counted.clear()
    program, folder = _program(tmp_path / "cache"), tmp_path / "cache"

    program.on_step = _stop_after(finished)
    with pytest.raises(KeyboardInterrupt):
        _run(program)
    assert len(counted) == finished
    assert _same(_run(_program(folder)), expected)
    assert len(counted) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _run(_program(folder, seed=1)),
        lambda folder: _run(_program(folder), GPTQ(group_size=-1, damp=0.02)),
        lambda folder: _run(_program(folder), RTN(bits=4)),
        lambda folder: _run(dataclasses.replace(_program(folder), cache=Cache(folder, "1.1", print))),
        lambda folder: _run(dataclasses.replace(_program(folder), seed=1)),
    ],
    ids=["data", "option", "pass", "version", "seed"],
)
def test_what_differs_is_not_taken(tmp_path: Path, counted: list[str], change: object) -> None:
    folder = tmp_path / "cache"
    _run(_program(folder))
    assert callable(change)
    change(folder)
    assert len(counted) == 6


def test_other_options_of_one_layer_redo_it_and_all_behind_it(tmp_path: Path, counted: list[str]) -> None:
    folder = tmp_path / "cache"
    _run(_program(folder))
    counted.clear()

    program = dataclasses.replace(_program(folder), layer_rules=(LayerRule("net.2", options={"bits": 8}),))
    _run(program)
    assert counted == ["net.2", "net.4"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_entry_is_named_and_made_again(tmp_path: Path, counted: list[str], damage: str) -> None:
    folder, warnings = tmp_path / "cache", list[str]()
    expected = _run(_program(folder))
    counted.clear()
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"flip": bytes(content), "truncate": bytes(content[:-1]), "empty": b""}[damage])
    assert _same(_run(_program(folder, warnings)), expected)
    assert len(counted) == 3
    assert len(warnings) == 3
    assert "layer net.0 is damaged" in warnings[0]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The nodes that walks ran, in order."""
    names: list[str] = []
    original = Stream._run

    def run(self: Stream, node: fx.Node) -> None:
        names.append(node.name)
        original(self, node)

    monkeypatch.setattr(Stream, "_run", run)
    return names


def _stopped(folder: Path, finished: int, work: WeightPass | None = None, memory: Memory | None = None) -> None:
    """A run with a snapshot after every layer, stopped when so many are done."""
    with pytest.raises(KeyboardInterrupt):
        _run(dataclasses.replace(_keeping(folder, memory=memory), on_step=_stop_after(finished)), work)


def _keeping(
    folder: Path, warnings: list[str] | None = None, ranks: Ranks | None = None, memory: Memory | None = None
) -> Program:
    warn = (warnings if warnings is not None else []).append
    cache = Cache(folder, "1.0", warn, ranks, snapshot_every=0)
    return dataclasses.replace(_program(None), cache=cache, memory=memory or Memory())


def _walks(folder: Path) -> list[str]:
    return sorted(path.name[: len(".walk-0-of-1")] for path in folder.glob(".walk*"))


@pytest.mark.parametrize("work", [GPTQ(group_size=-1), GPTAQ(act_bits=0)], ids=["gptq", "gptaq"])
@pytest.mark.parametrize("limit", [0, 1], ids=["in memory", "spilled"])
def test_a_run_that_goes_on_walks_from_where_it_stood(
    tmp_path: Path, ran: list[str], work: WeightPass, limit: int
) -> None:
    memory = Memory(limit, tmp_path)
    expected = _run(_program(None), work)
    whole = len(ran)
    _stopped(tmp_path / "cache", 2, work, memory)
    before, last = ran[whole:], ran[-1]
    assert _walks(tmp_path / "cache") == [".walk-0-of-1"]
    ran.clear()
    assert _same(_run(_keeping(tmp_path / "cache", memory=memory), work), expected)
    # Both runs together walk every node once: none in front of the second layer is run again.
    assert len(before) + len(ran) == whole
    assert last not in ran
    assert _walks(tmp_path / "cache") == [".walk-0-of-1"]


def test_what_is_left_counts_weights_that_are_not_kept_yet(tmp_path: Path) -> None:
    sizes = [8 * 16, 16 * 16, 16 * 4]
    steps: list[tuple[int, int]] = []
    program = _program(tmp_path)
    program.on_step = lambda layer, done, total: steps.append((done, total))
    _run(program)
    assert steps == [(0, sum(sizes)), (sizes[0], sum(sizes)), (sizes[0] + sizes[1], sum(sizes))]
    steps.clear()
    program = _program(tmp_path)
    program.on_step = lambda layer, done, total: steps.append((done, total))
    _run(program)
    assert steps == [(0, sum(sizes)), (0, sizes[1] + sizes[2]), (0, sizes[2])]


def test_a_damaged_snapshot_is_named_and_the_network_run_again(tmp_path: Path, ran: list[str]) -> None:
    expected, folder, warnings = _run(_program(None)), tmp_path / "cache", list[str]()
    _stopped(folder, 2)
    path = next(folder.glob(".walk*"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    ran.clear()
    program = _keeping(folder, warnings)
    first = next(iter(program.graph.graph.nodes)).name
    assert _same(_run(program), expected)
    assert first in ran
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert "the kept activations are damaged" in warnings[0]


def test_a_snapshot_of_other_batches_is_not_taken(tmp_path: Path, ran: list[str]) -> None:
    expected, folder = _run(_program(None)), tmp_path / "cache"
    _stopped(folder, 2)
    path = next(folder.glob(".walk*"))
    path.rename(path.with_name(path.name.replace("-0-of-1-", "-0-of-2-")))  # of the first of two ranks
    ran.clear()
    program = _keeping(folder)
    first = next(iter(program.graph.graph.nodes)).name
    assert _same(_run(program), expected)
    assert first in ran
    assert _walks(folder) == [".walk-0-of-1"]  # the new one replaced it


def test_a_disk_without_room_for_a_snapshot_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(snapshot, "write", full)
    warnings = list[str]()
    expected = _run(_program(None))
    assert _same(_run(_keeping(tmp_path / "cache", warnings)), expected)
    assert len(warnings) == 1
    assert "activations are not kept: No space left on device" in warnings[0]


def test_snapshots_are_not_taken_more_often_than_asked(tmp_path: Path) -> None:
    _run(_program(tmp_path / "cache"))
    assert _walks(tmp_path / "cache") == []  # it took less than half a minute


def test_snapshots_are_dropped_when_a_rank_is_done(tmp_path: Path) -> None:
    program = _keeping(tmp_path / "cache")
    _run(program)
    assert program.cache is not None
    program.cache.drop_walks()
    assert _walks(tmp_path / "cache") == []
    assert program.cache.count() == 3


def test_every_kind_of_weight_comes_back(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", "1.0", print)
    meta = AffineWeight(torch.ones(1, 4, dtype=torch.uint8), torch.ones(1, 1), None, 8, -1)
    affine = AffineWeight(
        torch.ones(2, 4, dtype=torch.uint8), torch.ones(2, 2), torch.ones(2, 2), 3, 2, scale_codes=meta, zero_codes=meta
    )
    codebook = CodebookWeight(torch.ones(2, 1, 1, dtype=torch.uint8), torch.randn(1, 2, 1, 4), torch.ones(2, 1), 3, 4)
    for weight in (affine, codebook):
        key = next_key("", "layer", weight)
        cache.put(key, weight)
        found = cache.get(key, "layer")
        assert type(found) is type(weight)
        assert repr(found) == repr(weight)
        assert found.dequantize().equal(weight.dequantize())


def test_a_calibration_of_the_same_numbers_has_the_same_key(tmp_path: Path, counted: list[str]) -> None:
    folder = tmp_path / "cache"
    program = _program(folder)
    _run(program)
    again = _program(folder)
    batches = tuple({name: value.clone() for name, value in batch.items()} for batch in again.calibration.batches)
    again = dataclasses.replace(again, calibration=Calibration(batches, again.calibration.holdout, "elsewhere"))
    counted.clear()
    _run(again)
    assert counted == []
