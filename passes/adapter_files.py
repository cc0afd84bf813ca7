"""Adapters in safetensors files, under PEFT's names or plain ones.

    [base_model.model.]<layer>.lora_A[.default].weight            [rank, in]
    [base_model.model.]<layer>.lora_B[.default].weight            [out, rank]
    [base_model.model.]<layer>.lora_magnitude_vector[...]         [out]; without it only the low-rank part is added

adapter_config.json beside them says lora_alpha and use_rslora (alpha / sqrt(rank) in the place of alpha / rank).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from passes.base import PassError
from passes.dora import Adapter

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?")


def load_adapters(path: Path, alpha: float, bases: Mapping[str, Tensor]) -> dict[str, Adapter]:
    """{layer: adapter} of a file, or of a folder as PEFT writes it; `bases` {layer: its matrix [out, in]}.

    `alpha` holds where no adapter_config.json does; 0 is the rank. Raises PassError, naming file and layer, for tensors
    of another name, for layers that are not in `bases`, and for shapes that do not fit.
    """
    file = path / FILE if path.is_dir() else path
    config = _config(file.parent / CONFIG)
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _tensors(file).items():
        match = NAME.fullmatch(name)
        if match is None:
            raise PassError(
                f"{file}: {name} is no tensor of a LoRA or DoRA adapter", fix="give adapters of linear layers"
            )
        if match[1] not in bases:
            raise PassError(f"{file} has an adapter for it, but the program no such linear layer", node=match[1])
        found.setdefault(match[1], {})[match[2]] = tensor.float()
    return {layer: _adapter(file, layer, parts, bases[layer], alpha, config) for layer, parts in found.items()}


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError as error:
        raise PassError(
            f"{file}: no such file", fix="give adapters=PATH of a safetensors file or PEFT folder"
        ) from error
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise PassError(f"{file}: truncated or damaged safetensors file", fix="write it again") from error


def _config(file: Path) -> Mapping[str, object]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PassError(f"{file}: is not JSON", fix="write it again") from error
    if not isinstance(config, Mapping) or config.get("alpha_pattern") or config.get("fan_in_fan_out"):
        raise PassError(f"{file}: alpha_pattern and fan_in_fan_out are not read", fix="merge these adapters with PEFT")
    return config


def _adapter(
    file: Path, layer: str, parts: Mapping[str, Tensor], base: Tensor, alpha: float, config: Mapping[str, object]
) -> Adapter:
    for part in ("lora_A", "lora_B"):
        if part not in parts:
            raise PassError(f"{file} has no {part} for it", node=layer, fix="write it again")
    lora_a, lora_b = parts["lora_A"], parts["lora_B"]
    outputs, inputs = base.shape
    rank = len(lora_a)
    magnitude = parts.get("lora_magnitude_vector", base.new_ones(outputs)).flatten()
    shapes = {"lora_A": (lora_a, (rank, inputs)), "lora_B": (lora_b, (outputs, rank))}
    for part, (tensor, shape) in (shapes | {"lora_magnitude_vector": (magnitude, (outputs,))}).items():
        if tuple(tensor.shape) != shape:
            raise PassError(f"{part} in {file} has shape {list(tensor.shape)}, not {list(shape)}", node=layer)
        if not bool(torch.isfinite(tensor).all()):
            raise PassError(f"{part} in {file} holds NaN or infinite values", node=layer)
    scale = config.get("lora_alpha", alpha or rank)
    if not isinstance(scale, int | float) or isinstance(scale, bool):
        raise PassError(f"{file.parent / CONFIG}: lora_alpha is {scale!r}, not a number", fix="write it again")
    adapter = Adapter(lora_a, lora_b, magnitude, scale * rank**0.5 if config.get("use_rslora") else float(scale))
    if "lora_magnitude_vector" in parts:
        return adapter
    return Adapter(lora_a, lora_b, adapter.norms(base), adapter.alpha)
