"""--memory: the same files, and a report that says what there was no room to measure."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import qexport
from exporter.output import MANIFEST
from exporter.recipe import Recipe
from exporter.recipe_values import parse_size
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


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("512MB", 512 * 10**6), ("1.5e9", 15 * 10**8), ("7k", 7000), (12, 12)]
)
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "4GiB", "1e99", True, None])
def test_what_is_no_size(text: object) -> None:
    with pytest.raises(qexport.QExportError, match=r"--memory: .* is no number of bytes"):
        parse_size(text)
