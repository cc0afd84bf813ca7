"""Rows: a layer's output is its rows times its matrix, whatever the kernel; moments are sums over all batches."""

import pytest
import torch
from torch import Tensor, nn

import passes.layer_inputs
from passes.base import PassError
from passes.graph import weight_of
from passes.layer_inputs import hessian_of, layer_rows
from tests.passes.nets import FLOAT32_EPS, program_of, seeded

CASES = {
    "linear": (lambda: nn.Linear(6, 4, bias=False), (2, 6)),
    "linear, rank 4": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 5, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, stride=3, padding=2, bias=False), (2, 3, 11)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (2, 3, 7, 6)),
    "dilated": (lambda: nn.Conv2d(3, 5, 3, dilation=(2, 1), padding=2, bias=False), (2, 3, 8, 8)),
    "same, even kernel": (lambda: nn.Conv2d(3, 5, (4, 3), padding="same", bias=False), (2, 3, 7, 6)),
    "valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid", bias=False), (2, 3, 7, 6)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1, bias=False), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2, bias=False), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, padding=1, bias=False), (2, 2, 4, 3, 5)),
    "transposed": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, bias=False),
        (2, 4, 5, 4),
    ),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 5, 5)),
    "transposed, dilated": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, dilation=2, bias=False), (2, 4, 5)),
    "transposed, cropped": (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, padding=2, bias=False), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_output_is_rows_times_matrix(case: str) -> None:
    build, shape = CASES[case]
    module = seeded(build)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    program = program_of(module, {"input": x})
    (layer,) = program.layers()
    matrix = layer.to_matrix(weight_of(program.graph, layer))  # [out, in]
    (rows,) = layer_rows(layer, x)  # [groups, n, in]
    product = rows @ matrix.unflatten(0, (layer.groups, -1)).mT  # [groups, n, out / groups]
    actual = product.movedim(0, 1).flatten(1)  # [n, out]
    with torch.no_grad():
        expected = module(x)
    expected = expected.flatten(0, -2) if layer.kind == "linear" else expected.movedim(1, -1).flatten(0, -2)
    # Both are float32 sums of matrix.shape[1] products, each order of summation off by eps for every term.
    scale = float((rows.abs() @ matrix.abs().unflatten(0, (layer.groups, -1)).mT).max())
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 2 * matrix.shape[1] * FLOAT32_EPS * scale


@pytest.mark.parametrize("case", ["linear, rank 4", "grouped", "transposed, grouped"])
def test_moments_are_those_of_all_rows(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, shape = CASES[case]
    program = program_of(seeded(build), {"input": torch.zeros(shape)})
    (layer,) = program.layers()
    batches = [batch["input"] for batch in program.calibration.batches]
    rows = torch.cat([part for batch in batches for part in layer_rows(layer, batch)], dim=1).double()
    expected = rows.mT @ rows / rows.shape[1]
    # One float32 product a batch: a relative error of eps for each of its rows.
    tolerance = rows.shape[1] * FLOAT32_EPS * float(expected.abs().max())
    assert float((hessian_of(layer, batches) - expected).abs().max()) <= tolerance
    monkeypatch.setattr(passes.layer_inputs, "ROWS_AT_ONCE", 1)  # one sample at a time
    assert len(list(layer_rows(layer, batches[0]))) == (1 if layer.kind == "linear" else len(batches[0]))
    assert float((hessian_of(layer, batches) - expected).abs().max()) <= tolerance


def test_moments_do_not_depend_on_threads() -> None:
    program = program_of(nn.Linear(96, 4), {"input": torch.zeros(200, 96)})
    (layer,) = program.layers()
    batches = [batch["input"] for batch in program.calibration.batches]
    before = torch.get_num_threads()
    moments: list[Tensor] = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            moments.append(hessian_of(layer, batches))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*moments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_name_the_layer(value: float) -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 4)), {"input": torch.zeros(2, 3)})
    (layer,) = program.layers()
    with pytest.raises(PassError, match=r"^0: its inputs are not finite") as caught:
        hessian_of(layer, [torch.tensor([[1.0, value, 2.0]])])
    assert caught.value.node == "0"


def test_no_data() -> None:
    program = program_of(nn.Sequential(nn.Linear(3, 4)), {"input": torch.zeros(2, 3)})
    with pytest.raises(PassError, match="no calibration data"):
        hessian_of(program.layers()[0], [])
