"""HQQ's layout, packed here and by HQQ's own package; and what does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from exporter.errors import InputError
from exporter.foreign import hqq as layout
from exporter.load import load_model
from passes.weights import AffineWeight
from tests.exporter.foreign.checkpoints import batch, change, folder, hqq, hqq_settings, llama, opt

pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

FC1 = "model.decoder.layers.0.fc1"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("as_float", [False, True])
def test_codes_are_taken_over_exactly(bits: int, axis: int, as_float: bool, tmp_path: Path) -> None:
    written = folder(tmp_path, llama(), hqq_settings(bits, 16, axis), hqq(bits, 16, axis, as_float=as_float))
    loaded = load_model(tmp_path)
    assert loaded.weights.keys() == written.layers.keys()
    for name, packed in written.layers.items():
        weight = loaded.weights[name].weight
        assert isinstance(weight, AffineWeight)
        assert (weight.bits, weight.axis, weight.group_size) == (bits, axis, 16)
        assert weight.dequantize().equal(packed.matrix)
    assert loaded.module is not None
    assert loaded.module(**batch()).logits.equal(written.logits(batch()))


@pytest.mark.parametrize(("axis", "size", "run"), [(1, 64, -1), (1, 48, 16), (0, 16, 16), (0, 32, 16)])
def test_groups_that_do_not_divide_a_row_or_a_column(axis: int, size: int, run: int) -> None:
    """HQQ groups the flattened matrix; the scales are repeated for runs that divide both."""
    packed = hqq(4, size, axis)((48, 32), np.random.default_rng(0))
    found = layout.read(packed.parts, hqq_settings(4), (48, 32))
    assert isinstance(found.weight, AffineWeight)
    assert found.weight.group_size == run
    assert found.dequantize().equal(packed.matrix)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_against_the_package_of_hqq(bits: int, axis: int) -> None:
    package = pytest.importorskip("hqq.core.quantize")
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=False)
    settings = package.BaseQuantizeConfig(nbits=bits, group_size=64, axis=axis)
    theirs = package.HQQLinear(linear, settings, compute_dtype=torch.float32, device="cpu", del_orig=False)
    found = layout.read(theirs.state_dict(), {}, (64, 128))
    assert found.dequantize().equal(theirs.dequantize())


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [
        ("W_q", torch.zeros(12, 16, dtype=torch.int32), "W_q has shape [12, 16], not [13, 16]"),
        ("W_q", torch.zeros(13, 16, dtype=torch.uint8), "W_q is uint8, not int32"),
        ("W_q", torch.zeros(13, 17, dtype=torch.float16), "W_q has rows of 34 bytes"),
        ("W_q", None, "W_q is missing"),
        ("scale", torch.ones(127, 1), "scale has shape [127, 1], not [128, 1]"),
        ("zero", torch.full((128, 1), torch.nan), "zero holds NaN or infinite values"),
        ("zero", None, "zero is missing"),
        ("nbits", torch.tensor(7, dtype=torch.int32), "nbits is 7 and axis 1"),
        ("nbits", torch.tensor(1.58), "nbits is 1.58, not a whole number"),
        ("nbits", torch.tensor(2, dtype=torch.int32), "code 7 is out of range for 2 bits"),
        ("axis", torch.tensor(2, dtype=torch.int32), "nbits is 3 and axis 2"),
        ("group_size", torch.tensor(15, dtype=torch.int32), "groups of 15 do not divide its 2048 weights"),
        ("group_size", torch.tensor([1, 2], dtype=torch.int32), "group_size has shape [2], it is no number"),
        ("shape", torch.tensor([32, 64]), "its shape is [32, 64], the model's layer is [64, 32]"),
        ("packing", torch.tensor([ord("x")], dtype=torch.uint8), "packing is 'x'; read are 8bit_u8"),
    ],
)
def test_a_layer_that_does_not_fit(part: str, value: Tensor | None, what: str, tmp_path: Path) -> None:
    folder(tmp_path, opt(), hqq_settings(3), hqq(3))
    change(tmp_path, **{f"{FC1}.{part}".replace(".", "__"): value})
    with pytest.raises(InputError) as refused:
        load_model(tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{tmp_path / 'model.safetensors'}: layer {FC1}: {what}")
    assert "\n" not in line
