"""Which folders are quantized, where their tensors lie, and which layer a name stands for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.errors import InputError
from exporter.foreign.folder import settings_of
from exporter.load import load_model
from tests.exporter.foreign.checkpoints import (
    aqlm,
    aqlm_settings,
    batch,
    change,
    configure,
    folder,
    gptq,
    gptq_settings,
    hqq,
    hqq_settings,
    llama,
    opt,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

UP = "model.layers.0.mlp.up_proj"


def error_of(path: Path) -> str:
    with pytest.raises(InputError) as refused:
        load_model(path)
    assert refused.value.exit_code == 2
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_float_folder_has_no_settings(tmp_path: Path) -> None:
    assert settings_of(tmp_path, {"architectures": ["OPTForCausalLM"]}) is None
    assert settings_of(tmp_path, {"quantization_config": None}) is None


@pytest.mark.parametrize("found", [{"quant_method": "awq"}, {"load_in_8bit": True}, "yes"])
def test_a_tool_that_is_not_known(found: object, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read; known are gptq, aqlm, hqq"):
        settings_of(tmp_path, {"quantization_config": found})


def test_the_configuration_file_of_autogptq(tmp_path: Path) -> None:
    written = folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    configure(tmp_path, quantization_config=None)
    (tmp_path / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 16, "desc_act": False}))
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-16g.safetensors")
    loaded = load_model(tmp_path)
    assert loaded.module is not None
    assert loaded.module(**batch()).logits.equal(written.logits(batch()))
    (tmp_path / "quantize_config.json").write_text("[")
    assert "quantize_config.json: is not a JSON object" in error_of(tmp_path)


def test_several_files(tmp_path: Path) -> None:
    written = folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(state)
    places = {name: f"model-0000{1 + (index > 20)}-of-00002.safetensors" for index, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: state[name] for name in names if places[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    loaded = load_model(tmp_path)
    assert loaded.module is not None
    assert loaded.module(**batch()).logits.equal(written.logits(batch()))
    file = tmp_path / places[f"{UP}.qweight"]
    tensors = load_file(file)
    tensors[f"{UP}.qweight"] = tensors[f"{UP}.qweight"][:-1].contiguous()
    save_file(tensors, file)
    assert error_of(tmp_path).startswith(f"{file}: layer {UP}: qweight has 3 rows")


def test_half_precision_runs_in_float32(tmp_path: Path) -> None:
    written = folder(tmp_path, opt(), gptq_settings(4), gptq(4), half=True)
    loaded = load_model(tmp_path)
    assert loaded.module is not None
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    assert loaded.module(**batch()).logits.equal(written.logits(batch()))


def test_names_without_the_name_of_the_model_inside(tmp_path: Path) -> None:
    written = folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    state = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in state.items()}, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path)
    assert loaded.weights.keys() == written.layers.keys()
    assert loaded.module is not None
    assert loaded.module(**batch()).logits.equal(written.logits(batch()))


@pytest.mark.parametrize("settings", [gptq_settings(4), aqlm_settings(2, 8), hqq_settings(4)])
def test_a_float_folder_that_says_it_is_quantized(settings: dict[str, object], tmp_path: Path) -> None:
    opt().save_pretrained(tmp_path)
    configure(tmp_path, quantization_config=settings)
    assert "but no layer has" in error_of(tmp_path)


@pytest.mark.parametrize(
    ("settings", "pack", "marker"),
    [
        (gptq_settings(4), gptq(4), "qweight"),
        (aqlm_settings(2, 8), aqlm(2, 8), "codes"),
        (hqq_settings(4), hqq(4), "W_q"),
    ],
)
def test_a_layer_whose_codes_are_lost(settings: dict[str, object], pack: object, marker: str, tmp_path: Path) -> None:
    folder(tmp_path, llama(), settings, pack)  # type: ignore[arg-type]  # parametrize loses the type
    change(tmp_path, **{f"{UP}.{marker}".replace(".", "__"): None})
    assert f"layer {UP}: {marker} is missing" in error_of(tmp_path)


def test_layers_that_the_model_has_not(tmp_path: Path) -> None:
    folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    change(tmp_path, model__layers__7__mlp__up_proj__qweight=torch.zeros(4, 64, dtype=torch.int32))
    assert "layer model.layers.7.mlp.up_proj: LlamaForCausalLM has no such layer" in error_of(tmp_path)


def test_codes_of_something_that_is_no_linear_layer(tmp_path: Path) -> None:
    folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    change(tmp_path, model__embed_tokens__qweight=torch.zeros(4, 64, dtype=torch.int32))
    assert "layer model.embed_tokens: it is a Embedding, not a linear layer" in error_of(tmp_path)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_bias_that_the_model_has_not(value: float, tmp_path: Path) -> None:
    """Old tools wrote biases of zeros; others would be lost."""
    written = folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    change(tmp_path, **{f"{UP}.bias".replace(".", "__"): torch.full((64,), value)})
    if value:
        assert f"layer {UP}: it has a bias, the model's layer has none" in error_of(tmp_path)
    else:
        module = load_model(tmp_path).module
        assert module is not None
        assert module(**batch()).logits.equal(written.logits(batch()))


def test_a_truncated_file(tmp_path: Path) -> None:
    folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: truncated or damaged" in error_of(tmp_path)


def test_a_scale_so_large_that_a_weight_overflows(tmp_path: Path) -> None:
    folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    change(tmp_path, **{f"{UP}.scales".replace(".", "__"): torch.full((2, 64), 3e38)})
    assert f"{UP}.weight holds" in error_of(tmp_path)
