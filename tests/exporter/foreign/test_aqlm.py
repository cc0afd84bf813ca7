"""AQLM's layout, packed here and run by AQLM's own package; and what does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.foreign import aqlm as layout
from exporter.load import load_model
from passes.weights import CodebookWeight
from tests.exporter.foreign.checkpoints import aqlm, aqlm_settings, batch, change, configure, folder, llama, opt

pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

FC1 = "model.decoder.layers.0.fc1"


@pytest.mark.parametrize(
    ("books", "bits", "height", "width"), [(2, 8, 1, 8), (1, 12, 2, 4), (1, 4, 1, 8), (3, 5, 4, 2)]
)
def test_codes_are_taken_over_exactly(books: int, bits: int, height: int, width: int, tmp_path: Path) -> None:
    sizes = (books, bits, height, width)
    written = folder(tmp_path, llama(), aqlm_settings(*sizes), aqlm(*sizes))
    loaded = load_model(tmp_path)
    assert loaded.weights.keys() == written.layers.keys()
    for name, packed in written.layers.items():
        weight = loaded.weights[name].weight
        assert isinstance(weight, CodebookWeight)
        assert (weight.codes.long() == packed.parts["codes"].long() % 2**bits).all()
        assert weight.codebooks.equal(packed.parts["codebooks"].float())
        # The sum over codebooks may be taken in another order: one rounding of it, two of the product.
        assert torch.allclose(weight.dequantize(), packed.matrix, rtol=0, atol=4 * 2.0**-24 * books)
    assert loaded.module is not None
    logits = written.logits(batch())
    # Weights a few float32 steps apart, seven layers.
    with torch.no_grad():
        found = loaded.module(**batch()).logits
    assert float((found - logits).abs().max()) <= 1e-5 * float(logits.abs().max())


def test_against_the_package_of_aqlm() -> None:
    package = pytest.importorskip("aqlm")
    packed = aqlm(2, 8)((32, 64), np.random.default_rng(0))
    module = package.QuantizedLinear(64, 32, 8, 1, 2, 8, bias=False, dtype=torch.float32)
    module.load_state_dict({name: value if name == "codes" else value.float() for name, value in packed.parts.items()})
    weight = layout.read(packed.parts, aqlm_settings(2, 8), (32, 64)).dequantize()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))  # past 6 rows the package's CPU kernel is wrong
    with torch.no_grad():
        expected = module(x)
    # Sums of 64 products in another order.
    assert torch.allclose(x @ weight.T, expected, rtol=0, atol=64 * 2.0**-23 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [
        ("codes", torch.zeros(64, 4, 1, dtype=torch.int8), "codes has shape [64, 4, 1], not [64, 4, 2]"),
        ("codes", torch.zeros(4, 64, 2, dtype=torch.int8), "codes has shape [4, 64, 2], not [64, 4, 2]"),
        ("codes", torch.full((64, 4, 2), 300, dtype=torch.int16), "codes from 300 to 300 are out of range for 8 bits"),
        ("codes", torch.full((64, 4, 2), -200, dtype=torch.int16), "codes from -200 to -200 are out of range"),
        ("codes", torch.zeros(64, 4, 2), "codes is float32, not int8 or int16 or int32 or int64"),
        ("codes", None, "codes is missing"),
        ("codebooks", torch.zeros(2, 128, 1, 8), "codebooks has shape [2, 128, 1, 8], not [2, 256, 1, 8]"),
        ("codebooks", torch.full((2, 256, 1, 8), torch.inf), "codebooks holds NaN or infinite values"),
        ("scales", torch.ones(64, 3, 1, 1), "scales has 3 for each row of blocks, not 1 or 4"),
        ("scales", torch.ones(63, 1, 1, 1), "scales has shape [63, 1, 1, 1]"),
    ],
)
def test_a_layer_that_does_not_fit(part: str, value: Tensor | None, what: str, tmp_path: Path) -> None:
    folder(tmp_path, opt(), aqlm_settings(2, 8), aqlm(2, 8))
    change(tmp_path, **{f"{FC1}.{part}".replace(".", "__"): value})
    with pytest.raises(InputError) as refused:
        load_model(tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{tmp_path / 'model.safetensors'}: layer {FC1}: {what}")
    assert "\n" not in line


def test_scales_of_every_group() -> None:
    packed = aqlm(1, 4)((8, 32), np.random.default_rng(0))
    scales = torch.rand(8, 4, 1, 1)
    found = layout.read({**packed.parts, "scales": scales}, aqlm_settings(1, 4), (8, 32)).dequantize()
    ratio = (scales[:, :, 0, 0] / packed.parts["scales"][:, 0, 0].float()).repeat_interleave(8, dim=1)
    assert torch.allclose(found, packed.matrix * ratio, rtol=1e-6)


@pytest.mark.parametrize(
    ("change_", "what"),
    [
        ({"num_codebooks": None}, "num_codebooks is None, not a whole number from 1"),
        ({"nbits_per_codebook": 17}, "nbits_per_codebook is 17, more than 16"),
        ({"in_group_size": 5}, "blocks of 1 x 5 do not divide"),
    ],
)
def test_a_configuration_that_is_not_read(change_: dict[str, object], what: str, tmp_path: Path) -> None:
    folder(tmp_path, opt(), aqlm_settings(2, 8), aqlm(2, 8))
    configure(tmp_path, quantization_config=aqlm_settings(2, 8) | change_)
    with pytest.raises(InputError) as refused:
        load_model(tmp_path)
    assert what in str(refused.value)
