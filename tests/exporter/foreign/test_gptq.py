"""GPTQ's layout: every width, both conventions for zero points, groups in any order; and what does not fit."""

from pathlib import Path

import numpy as np
import pytest
import torch

from exporter.errors import InputError
from exporter.foreign import gptq as layout
from exporter.load import load_model
from passes.weights import AffineWeight
from tests.exporter.foreign.checkpoints import (
    Pack,
    batch,
    bit_string,
    change,
    configure,
    folder,
    gpt2,
    gptq,
    gptq_settings,
    llama,
    opt,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

K_PROJ = "model.decoder.layers.0.self_attn.k_proj"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_taken_over_exactly(bits: int, v2: bool, symmetric: bool, tmp_path: Path) -> None:
    form = {"checkpoint_format": "gptq_v2"} if v2 else {}
    written = folder(tmp_path, opt(), gptq_settings(bits, **form), gptq(bits, symmetric=symmetric, v2=v2))
    loaded = load_model(tmp_path)
    assert loaded.weights.keys() == written.layers.keys()
    for name, packed in written.layers.items():
        weight = loaded.weights[name].weight
        assert isinstance(weight, AffineWeight)
        assert weight.dequantize().equal(packed.matrix)
        assert (weight.bits, weight.group_size, weight.zero_point is None) == (bits, 16, symmetric)
    assert loaded.module is not None
    assert loaded.module(**batch()).logits.equal(written.logits(batch()))


@pytest.mark.parametrize("pack", [gptq(3), gptq(4, -1), gptq(4, order="plain"), gptq(2, order="act"), gptq(8, 24)])
def test_groups_in_any_order(pack: Pack, tmp_path: Path) -> None:
    parts = pack((32, 64), np.random.default_rng(1))
    bits = parts.parts["qweight"].shape[0] * 32 // 64
    size = -1 if len(parts.parts["scales"]) == 1 else 24 if bits == 8 else 16
    found = layout.read(parts.parts, gptq_settings(bits, size), (32, 64))
    assert found.dequantize().equal(parts.matrix)
    assert (found.columns is not None) == (bits == 2)  # the shuffled one


def test_groups_of_unequal_length_are_cut() -> None:
    """24, 8 and 32 inputs of three groups, shuffled: runs of 8 hold all of them."""
    generator = np.random.default_rng(2)
    index = generator.permutation(np.repeat([2, 0, 1], [24, 8, 32]))
    codes, zeros = generator.integers(0, 16, (8, 64)), generator.integers(0, 16, (8, 3))
    scales = generator.uniform(0.01, 0.03, (8, 3)).astype(np.float16)
    parts = {
        "qweight": torch.tensor(np.stack([bit_string(row, 4) for row in codes], axis=1)),
        "qzeros": torch.tensor(np.stack([bit_string((column - 1) % 16, 4) for column in zeros.T])),
        "scales": torch.tensor(scales.T.copy()),
        "g_idx": torch.tensor(index.astype(np.int32)),
    }
    found = layout.read(parts, gptq_settings(4), (8, 64))
    assert isinstance(found.weight, AffineWeight)
    assert found.weight.group_size == 8
    expected = (codes - zeros[:, index]) * scales[:, index].astype(np.float32)
    assert found.dequantize().equal(torch.tensor(expected, dtype=torch.float32))


def test_a_zero_point_of_zero_wraps_and_comes_back(tmp_path: Path) -> None:
    written = folder(tmp_path, opt(), gptq_settings(4), gptq(4, zero=0))
    weight = load_model(tmp_path).weights[K_PROJ].weight
    assert isinstance(weight, AffineWeight)
    assert weight.zero_point is not None
    assert not weight.zero_point.any()
    assert weight.dequantize().equal(written.layers[K_PROJ].matrix)


@pytest.mark.parametrize("order", ["plain", "act"])
def test_the_linear_layers_of_gpt2(order: str, tmp_path: Path) -> None:
    written = folder(tmp_path, gpt2(), gptq_settings(4), gptq(4, order=order))
    loaded = load_model(tmp_path)
    assert loaded.module is not None
    assert loaded.module(**batch()).logits.equal(written.logits(batch()))


def test_widths_of_single_layers(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` gives layers options of their own: widths and groups follow from the shapes."""
    packed = folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    other = gptq(8, 32)((64, 32), np.random.default_rng(3))
    name = "model.layers.0.mlp.up_proj"
    change(tmp_path, **{f"{name}.{part}".replace(".", "__"): value for part, value in other.parts.items()})
    configure(tmp_path, quantization_config=gptq_settings(4, dynamic={"+:.*up_proj": {"bits": 8, "group_size": 32}}))
    weights = load_model(tmp_path).weights
    assert weights[name].dequantize().equal(other.matrix)
    down = "model.layers.0.mlp.down_proj"
    assert weights[down].dequantize().equal(packed.layers[down].matrix)


def zeros_of(shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("part", "value", "what"),
    [
        ("qweight", zeros_of((3, 32)), "qweight has 3 rows; 32 codes of 4 bits do not take that many"),
        ("qweight", zeros_of((4, 31)), "qweight has shape [4, 31], not [any, 32]"),
        ("qweight", zeros_of((4, 32), torch.int64), "qweight is int64, not int32"),
        ("qweight", None, "qweight is missing"),
        ("qzeros", zeros_of((1, 4)), "qzeros has shape [1, 4], not [2, 4]"),
        ("qzeros", None, "qzeros is missing"),
        ("scales", zeros_of((3, 32), torch.float16), "scales has 3 groups; 32 inputs in groups of 16 make 2"),
        ("scales", torch.full((2, 32), torch.nan), "scales holds NaN or infinite values"),
        ("scales", zeros_of((2, 32)), "scales is int32, not floating point"),
        ("g_idx", torch.full((32,), 2, dtype=torch.int32), "g_idx has groups from 2 to 2, scales has groups 0 to 1"),
        ("g_idx", torch.full((32,), -1, dtype=torch.int32), "g_idx has groups from -1 to -1"),
        ("g_idx", zeros_of((31,)), "g_idx has shape [31], not [32]"),
        ("bias", None, "weights are missing: model.decoder.layers.0.self_attn.k_proj.bias"),
    ],
)
def test_a_layer_that_does_not_fit(part: str, value: torch.Tensor | None, what: str, tmp_path: Path) -> None:
    folder(tmp_path, opt(), gptq_settings(4), gptq(4))
    if part == "scales" and value is not None and len(value) == 3:
        change(tmp_path, **{f"{K_PROJ}.qzeros".replace(".", "__"): zeros_of((3, 4))})
    change(tmp_path, **{f"{K_PROJ}.{part}".replace(".", "__"): value})
    with pytest.raises(InputError) as refused:
        load_model(tmp_path)
    line = str(refused.value)
    assert what in line
    assert "\n" not in line
    assert part == "bias" or line.startswith(f"{tmp_path / 'model.safetensors'}: layer {K_PROJ}: ")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        (gptq_settings(4, checkpoint_format="marlin"), "checkpoint_format is 'marlin'; read are gptq and gptq_v2"),
        (gptq_settings(4, format="gptq_p"), "checkpoint_format is 'gptq_p'"),
        (gptq_settings(4, is_marlin_format=True), "Marlin's order"),
        (gptq_settings(5), "bits is 5, not 2, 3, 4 or 8"),
        (gptq_settings(3), "32 codes of 3 bits"),
        (gptq_settings(4, 32), "32 inputs in groups of 32 make 1"),
    ],
)
def test_a_configuration_that_is_not_read(settings: dict[str, object], what: str, tmp_path: Path) -> None:
    folder(tmp_path, opt(), gptq_settings(4), gptq(4))
    configure(tmp_path, quantization_config=settings)
    with pytest.raises(InputError) as refused:
        load_model(tmp_path)
    assert what in str(refused.value)
