"""Models in 16 or 64 bits are compiled in float32, and say so; float64 of a float32 model stays."""

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

from exporter.compile import compile_model
from exporter.recipe import Recipe
from tests.exporter.compiled import program_of
from tests.passes.nets import seeded


class Classifier(nn.Module):
    """A convolution, a norm that casts as language models do, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 6, 6] -> [N, 4]."""
        value = torch.relu(self.norm(self.stem(x))).mean((2, 3))
        wide = value.float()
        scaled = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-3)).to(value.dtype)
        logits: Tensor = self.head(scaled + torch.zeros(8, dtype=value.dtype))
        return logits


class Autocast(nn.Module):
    """float32 weights, of which the first layer's are cast to bfloat16 at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 6] -> [N, 3]."""
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = torch.relu(self.first(x))
        logits: Tensor = self.second(value.float())
        return logits


class Doubles(nn.Module):
    """Takes and gives float64, computes in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 6] -> [N, 3]."""
        return (self.layer(x.float())).double()


@pytest.mark.ort
@pytest.mark.parametrize("passes", ["cle,gptaq", "gptq:bits=4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_model_in_another_type_is_compiled_in_float32(dtype: torch.dtype, passes: str, tmp_path: Path) -> None:
    x = torch.randn(20, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    module = seeded(Classifier).to(dtype)
    report = compile_model(
        module, {"x": x[:2].to(dtype)}, Recipe(passes=passes), calibration={"x": x}, out=tmp_path / "o"
    )
    name = str(dtype).removeprefix("torch.")
    assert f"the model computes in {name}: compiled in float32, its inputs and outputs included" in (report.warnings)
    assert next(module.parameters()).dtype == dtype  # the user's own stays what it is
    assert len(report.layers) == 2
    file = onnx.load(tmp_path / "o" / "model.onnx").graph
    types = {value.type.tensor_type.elem_type for value in [*file.input, *file.output]}
    assert types == {onnx.TensorProto.FLOAT}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_function_is_that_of_the_model_in_float32(dtype: torch.dtype) -> None:
    module = seeded(Classifier).to(dtype)
    x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    program = program_of(module, {"x": x})
    assert {value.dtype for value in program.graph.buffers()} == {torch.float32}
    wanted = module.float()(x.float())
    # The same operators on the same numbers; the batch norm's may come in another order.
    torch.testing.assert_close(program.graph(*program.calibration.batches[0].values())[0], wanted)


def test_autocast_is_computed_in_float32() -> None:
    module = seeded(Autocast)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    program = program_of(module, {"x": x})
    assert [layer.name for layer in program.layers()] == ["first", "second"]
    with torch.no_grad():
        wanted = module.second(torch.relu(module.first(x)))
    torch.testing.assert_close(program.graph(x)[0], wanted)


@pytest.mark.ort
def test_float64_of_a_float32_model_stays(tmp_path: Path) -> None:
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()
    report = compile_model(seeded(Doubles), {"x": x[:2]}, Recipe(), calibration={"x": x}, out=tmp_path / "o")
    assert not any("float64" in line for line in report.warnings)
    file = onnx.load(tmp_path / "o" / "model.onnx").graph
    assert {value.type.tensor_type.elem_type for value in [*file.input, *file.output]} == {onnx.TensorProto.DOUBLE}
