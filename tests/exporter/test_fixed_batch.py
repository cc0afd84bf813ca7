"""Models exported for a fixed number of samples, which their reshapes hold: every pass runs them as they are."""

from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from exporter.compile import compile_path
from exporter.progress import Silent
from exporter.recipe import Recipe
from tests.exporter.compiled import labels
from tests.passes.nets import seeded

pytestmark = pytest.mark.ort


class Mixer(nn.Module):
    """A convolution, then attention, whose views torch.export writes with the number of samples in them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
        self.mix = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 6] -> [N, 4]."""
        value = self.mix(self.stem(x).transpose(1, 2))
        logits: Tensor = self.head(value.reshape(x.shape[0], -1, 16)[:, 0])
        return logits


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize(
    "passes",
    [
        "cle,absorb-bias,smooth,gptaq,bias-correct",
        "act-quant:method=output,aq:codebook_bits=4",
        "hqq:bits=3,qdora:rank=2:steps=2",
    ],
)
def test_the_number_of_samples_stays(tmp_path: Path, samples: int, passes: str) -> None:
    generator = torch.Generator().manual_seed(0)
    network = seeded(Mixer).eval()
    exported = torch.export.export(network, (), {"x": torch.randn(samples, 3, 6, generator=generator)})
    torch.export.save(exported, tmp_path / "model.pt2")
    save_file({"x": torch.randn(40, 3, 6, generator=generator)}, tmp_path / "data.safetensors")
    recipe = Recipe(passes=passes, calib=str(tmp_path / "data.safetensors"), out=tmp_path / "out", sensitivity=True)
    report = compile_path(tmp_path / "model.pt2", recipe, progress=Silent()).report
    sizes = labels(onnx.load(tmp_path / "out" / "model.onnx"))
    assert sizes == {"x": (samples, 3, 6), "output": (samples, 4)}
    assert all(layer.output_sqnr_db.own is not None for layer in report.layers)
