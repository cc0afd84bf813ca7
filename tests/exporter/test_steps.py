"""A run of a model that takes minutes says how far it is in each of its stages."""

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporter.compile import compile_path
from exporter.lowering import to_onnx
from exporter.progress import Silent, steps
from exporter.recipe import Recipe
from tests.passes.nets import seeded

Step = tuple[int, int]


class Recording(Silent):
    """Keeps {(stage, text): its steps (done, total)}."""

    def __init__(self) -> None:
        self.steps: dict[tuple[str, str], list[Step]] = {}
        self._stage = ""

    def stage(self, name: str) -> None:
        self._stage = name

    def step(self, text: str, done: int, total: int) -> None:
        self.steps.setdefault((self._stage, text), []).append((done, total))


def mean(predict: Any) -> Mapping[str, float]:
    """For --eval."""
    return {"mean": float(predict({"input": torch.ones(2, 32)})["output"].mean())}


def test_steps_are_told_in_front_of_the_first_unit_and_after_each():
    seen: list[tuple[str, int, int]] = []
    for unit in steps(lambda *step: seen.append(step), "letters", "bc", 3, start=1):
        seen.append((unit, 0, 0))
    assert seen == [("letters", 1, 3), ("b", 0, 0), ("letters", 2, 3), ("c", 0, 0), ("letters", 3, 3)]


@pytest.mark.ort
def test_every_stage_after_the_passes_counts_up_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(to_onnx, "EXTERNAL_DATA_ABOVE", 1000)
    model = seeded(lambda: nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)))
    batch = torch.export.Dim("batch")
    example: tuple[Tensor, ...] = (torch.randn(40, 32, generator=torch.Generator().manual_seed(0)),)
    torch.export.save(torch.export.export(model, example, dynamic_shapes=({0: batch},)), path := tmp_path / "net.pt2")
    recipe = Recipe(
        passes="rtn", target=("onnx", "trt"), sensitivity=True, eval=f"{__name__}:mean", out=tmp_path / "out", threads=1
    )
    recording = Recording()
    compile_path(path, recipe, progress=recording)

    found = {key: told for key, told in recording.steps.items() if key[0] not in ("rtn", "capture")}
    lowering = [(f"lower to {target}", text) for target in ("onnx", "trt") for text in ("nodes", "model.onnx.data")]
    checkpoint = [("save the checkpoint", text) for text in ("packing", "model.safetensors")]
    validation = [
        "eager_quantized",
        "onnxruntime",
        "layers",
        "weights",
        "stages",
        "causes",
        "causes in weights",
        "histograms",
        "parity, onnxruntime_unoptimized",
        "parity, onnxruntime",
        "parity, tensorrt_dialect",
    ]
    ranking = [("sensitivity", "layers"), ("sensitivity", "metrics")]
    assert {*lowering, *checkpoint, *(("validate", text) for text in validation), *ranking} <= set(found)
    for key, told in found.items():
        assert told[0][0] == 0 < told[0][1], key
        assert told[-1][0] == told[-1][1], key
        for (before, total), (after, _) in itertools.pairwise(told):
            assert before <= after or (before == total and after == 0), key  # a second round begins where one ended
