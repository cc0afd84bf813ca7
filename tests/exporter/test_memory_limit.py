"""--memory: the same files, and a report that says what there was no room to measure."""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qexport
from exporter import checkpoint, judge
from exporter.lowering import to_onnx
from exporter.output import MANIFEST
from exporter.recipe import Recipe
from exporter.recipe_values import parse_size
from exporter.validate import layer_batches, layer_bytes
from passes.memory import Memory, is_mapped
from passes.rtn import RTN
from passes.weight_nodes import read_weight
from tests.exporter.compiled import compiled, program_of, quantized
from tests.passes.nets import seeded


def test_a_limit_changes_no_file_and_says_what_was_not_measured(tmp_path: Path) -> None:
    model = seeded(lambda: nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256)))
    torch.manual_seed(0)
    data = torch.randn(40, 256)
    reports = {
        memory: qexport.compile_model(
            model,
            {"input": data[:2]},
            Recipe(passes="gptq:bits=4:group_size=64", memory=parse_size(memory)),
            calibration={"input": data},
            out=tmp_path / memory,
        )
        for memory in ("0", "1kB")
    }
    hashes = [json.loads((tmp_path / memory / MANIFEST).read_text(encoding="utf-8"))["files"] for memory in reports]
    assert hashes[0] == hashes[1]
    free, limited = reports["0"], reports["1kB"]
    assert free.outputs["eager_quantized"] == limited.outputs["eager_quantized"]
    assert "onnxruntime" in free.outputs
    assert "onnxruntime" not in limited.outputs
    assert free.parity["onnxruntime_unoptimized"] == limited.parity["onnxruntime_unoptimized"]
    assert any("more than --memory allows" in line for line in limited.warnings)
    assert not any("--memory" in line for line in free.warnings)


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))


def test_codes_are_given_back_once_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(seeded(_net), {"input": torch.randn(4, 256)})
    program.memory = Memory(1)
    quantized(program, RTN(bits=4))
    codes = {read_weight(program.graph, layer).codes.data_ptr() for layer in program.layers()}
    assert all(is_mapped(read_weight(program.graph, layer).codes) for layer in program.layers())
    released: set[int] = set()

    def release(tensors: Iterable[Tensor]) -> None:
        released.update(tensor.data_ptr() for tensor in tensors)

    for writer in (to_onnx, checkpoint):
        monkeypatch.setattr(writer, "release", release)
    compiled(program, tmp_path)
    assert codes <= released
    released.clear()
    checkpoint.save_checkpoint(program, tmp_path)
    assert codes <= released


def test_what_is_run_needs_room_for_copies_of_the_file_and_for_the_layers_values(tmp_path: Path) -> None:
    result = compiled(quantized(program_of(seeded(_net), {"input": torch.randn(20, 256)}), RTN(bits=4)), tmp_path)
    assert layer_bytes(result.program) == 4 * (512 + 256)
    copies = judge.COPIES * result.lowered.artifact.model.stat().st_size
    values = judge.NETWORKS * 4 * (512 + 256) * len(layer_batches(result.program)[0]["input"])
    for limit, roomy in ((0, True), (copies - 1, False), (copies + values - 1, False), (copies + values, True)):
        warnings: list[str] = []
        program = dataclasses.replace(result.program, memory=Memory(limit))
        assert judge.fits(program, tmp_path, warnings) == roomy, limit
        assert bool(warnings) != roomy


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("512MB", 512 * 10**6), ("1.5e9", 15 * 10**8), ("7k", 7000), (12, 12)]
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "4GiB", "1e99", True, None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(qexport.QExportError, match=r"--memory: .* is no number of bytes"):
        parse_size(text)
