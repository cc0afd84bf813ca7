"""Outputs of every kind: inputs, constants, numbers, other outputs, and names that something else has already."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qexport
from exporter.recipe import Recipe
from passes.absorb_bias import AbsorbBias
from tests.exporter.compiled import program_of
from tests.passes.nets import seeded

pytestmark = pytest.mark.ort


class Net(nn.Module):
    """A linear layer and whatever else a forward may return."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("classes", torch.arange(3.0))
        self.scale = nn.Parameter(torch.randn(5))


class Everything(Net):
    """Outputs that no operator on the input yields."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        """[N, 6] -> many."""
        y = self.layer(x)
        return {
            "y": y,
            "same": y,
            "x_out": x,
            "classes": self.classes,
            "again": self.classes,
            "weight": self.layer.weight,
            "scale": self.scale.exp(),
            "loss": y.mean(),
            "best": y.argmax(-1),
            "positive": y > 0,
            "count": x.shape[0],
            "nothing": None,
            "number": 3,
        }


class Named(Net):
    """Outputs called like inputs, operators, weights and each other."""

    def forward(self, x: Tensor, add: Tensor) -> dict[str, Any]:
        """[N, 6], [N, 3] -> many."""
        y = torch.relu(self.layer(x)) + add
        names = ("linear", "relu", "add", "x", "layer.weight", "a_b", "fake_quantize", "val_0")
        return {**{name: y * (index + 2) for index, name in enumerate(names)}, "a": {"b": y}}


class Decision(nn.Module):
    """Outputs of which none is a floating-point number."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 6] -> [N, 3], [N]."""
        y = self.b(torch.relu(self.a(x)))
        return y > 0, y.argmax(-1)


def _samples(*shape: int) -> Tensor:
    return torch.randn(20, *shape, generator=torch.Generator().manual_seed(0))


def test_outputs_that_are_inputs_constants_or_other_outputs(tmp_path: Path) -> None:
    module, x = seeded(Everything), _samples(6)
    report = qexport.compile_model(module, {"x": x[:2]}, Recipe(passes="rtn"), calibration={"x": x}, out=tmp_path / "o")
    found = qexport.load(tmp_path / "o").run({"x": x[:4]})
    wanted = {name: value for name, value in module(x[:4]).items() if isinstance(value, Tensor)}
    assert list(found) == list(wanted)
    for name in ("x_out", "classes", "again", "scale"):  # rtol: an exponential function of onnxruntime's own
        np.testing.assert_allclose(found[name], wanted[name].detach().numpy(), rtol=1e-6, err_msg=name)
    assert all(found[name].shape == value.shape for name, value in wanted.items())
    assert report.parity["onnxruntime_unoptimized"]["y"].sqnr_db > 60


def test_names_that_something_else_has_are_numbered(tmp_path: Path) -> None:
    module, inputs = seeded(Named), {"x": _samples(6), "add": _samples(3)}
    qexport.compile_model(module, inputs, Recipe(passes="act-quant,rtn"), calibration=inputs, out=tmp_path / "o")
    found = qexport.load(tmp_path / "o").run(inputs)
    names = ["linear", "relu", "add_1", "x_1", "layer.weight", "a_b", "fake_quantize", "val_0", "a_b_1"]
    assert list(found) == names
    for name, factor in zip(names, [*range(2, 10), 1], strict=True):
        np.testing.assert_allclose(found[name], factor * found["a_b_1"], rtol=1e-6)  # one rounding of float32 each


def test_absorb_bias_with_outputs_that_are_no_floats() -> None:
    result = AbsorbBias().run(program_of(seeded(Decision), {"x": _samples(6)}))
    assert result.measured["float_shift_max_abs"] == 0
