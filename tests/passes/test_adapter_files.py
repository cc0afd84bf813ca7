"""Adapters of PEFT's files, and of plain ones; and what does not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from passes.adapter_files import load_adapters
from passes.base import PassError

BASES = {"model.fc1": torch.ones(6, 4), "model.fc2": torch.ones(4, 6)}
PEFT = "base_model.model."


def parts(layer: str = "model.fc1", prefix: str = PEFT, default: str = "", vector: str = "") -> dict[str, Tensor]:
    outputs, inputs = BASES[layer].shape
    return {
        f"{prefix}{layer}.lora_A{default}.weight": torch.full((2, inputs), 0.5),
        f"{prefix}{layer}.lora_B{default}.weight": torch.full((outputs, 2), 0.25),
        f"{prefix}{layer}.lora_magnitude_vector{vector}": torch.arange(1.0, outputs + 1),
    }


@pytest.mark.parametrize("prefix", [PEFT, ""])
@pytest.mark.parametrize(("default", "vector"), [("", ""), ("", ".weight"), (".default", ".default.weight")])
def test_every_spelling(prefix: str, default: str, vector: str, tmp_path: Path) -> None:
    save_file(parts("model.fc1", prefix, default, vector) | parts("model.fc2", prefix), tmp_path / "a.safetensors")
    found = load_adapters(tmp_path / "a.safetensors", 0.0, BASES)
    assert found.keys() == BASES.keys()
    adapter = found["model.fc1"]
    assert (adapter.lora_a.shape, adapter.lora_b.shape, adapter.scaling) == ((2, 4), (6, 2), 1.0)
    assert adapter.magnitude.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("config", "scaling"), [({"lora_alpha": 8}, 4.0), ({"lora_alpha": 8, "use_rslora": True}, 8 / 2**0.5), ({}, 1.5)]
)
def test_a_folder_of_peft(config: dict[str, object], scaling: float, tmp_path: Path) -> None:
    save_file(parts(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert load_adapters(tmp_path, 3.0, BASES)["model.fc1"].scaling == pytest.approx(scaling)


def test_an_adapter_without_magnitudes_only_adds(tmp_path: Path) -> None:
    tensors = {name: value for name, value in parts().items() if "magnitude" not in name}
    save_file(tensors, tmp_path / "a.safetensors")
    base = BASES["model.fc1"]
    adapter = load_adapters(tmp_path / "a.safetensors", 0.0, BASES)["model.fc1"]
    expected = base + torch.full((6, 2), 0.25) @ torch.full((2, 4), 0.5)
    assert torch.allclose(adapter.weight(base), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({f"{PEFT}model.fc1.lora_A.weight": None}, "model.fc1: .* has no lora_A"),
        ({f"{PEFT}model.fc1.lora_A.weight": torch.ones(2, 5)}, r"model.fc1: lora_A in .* \[2, 5\], not \[2, 4\]"),
        ({f"{PEFT}model.fc1.lora_B.weight": torch.ones(6, 3)}, r"model.fc1: lora_B in .* \[6, 3\], not \[6, 2\]"),
        ({f"{PEFT}model.fc1.lora_magnitude_vector": torch.ones(5)}, "model.fc1: lora_magnitude_vector in"),
        ({f"{PEFT}model.fc1.lora_B.weight": torch.full((6, 2), torch.nan)}, "model.fc1: lora_B in .* NaN"),
        ({f"{PEFT}model.fc9.lora_A.weight": torch.ones(2, 4)}, "model.fc9: .* no such linear layer"),
        ({f"{PEFT}model.fc1.weight": torch.ones(2, 4)}, "model.fc1.weight is no tensor of a LoRA or DoRA adapter"),
    ],
)
def test_tensors_that_do_not_fit(change: dict[str, Tensor | None], what: str, tmp_path: Path) -> None:
    tensors = {name: value for name, value in (parts() | change).items() if value is not None}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(PassError, match=what):
        load_adapters(tmp_path / "a.safetensors", 0.0, BASES)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PassError, match=r"adapter_model.safetensors: no such file"):
        load_adapters(tmp_path, 0.0, BASES)
    path = tmp_path / "adapter_model.safetensors"
    save_file(parts(), path)
    for text, what in (
        ("{", "is not JSON"),
        ('{"alpha_pattern": {"x": 1}}', "alpha_pattern"),
        ('{"lora_alpha": "8"}', "8"),
    ):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(PassError, match=what):
            load_adapters(tmp_path, 0.0, BASES)
    path.write_bytes(path.read_bytes()[:-8])
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(PassError, match="truncated or damaged"):
        load_adapters(tmp_path, 0.0, BASES)
