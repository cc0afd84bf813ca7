"""compile_model leaves the caller's module as it was."""

import contextlib
from pathlib import Path

import pytest
import torch
from torch import nn

import qexport
from exporter.errors import InputError
from exporter.recipe import Recipe


def _partly_frozen() -> nn.Module:
    """A network in training of which one part is not, with a batch norm that data would move."""
    module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4)).train()
    module[1].eval()
    return module


@pytest.mark.parametrize("passes", ["rtn", "rtn:bits=5"])
def test_modes_and_statistics_stay_whether_or_not_it_succeeds(tmp_path: Path, passes: str) -> None:
    module = _partly_frozen()
    modes = [part.training for part in module.modules()]
    values = {name: value.clone() for name, value in module.state_dict().items()}
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    refused = pytest.raises(InputError, match="bits=5") if "bits=5" in passes else contextlib.nullcontext()
    with refused:
        qexport.compile_model(module, {"input": x}, Recipe(passes=passes), out=tmp_path / "out")
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, values[name]) for name, value in module.state_dict().items())
