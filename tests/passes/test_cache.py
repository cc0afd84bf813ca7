"""Finished layers on disk: a stopped run goes on to the same weights, and nothing stale or damaged is taken."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from passes import weight_pass
from passes.base import LayerRule, Program
from passes.cache import Cache, next_key
from passes.calibration import Calibration
from passes.gptq import GPTQ
from passes.graph import copy_graph
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

    def stop(layer: str, done: int, total: int) -> None:
        if done == finished:
            raise KeyboardInterrupt

    program.on_step = stop
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
