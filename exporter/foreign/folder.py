"""The tensors of a quantized Hugging Face folder: codes as they are, and the float model they stand for.

The architecture is built with float layers. Theirs is the value that the codes mean, so that the model is captured,
and judged, like any other; `exporter.foreign.adopt` then puts the codes in the program in its place.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from exporter.errors import InputError
from exporter.foreign import LAYOUTS
from exporter.foreign.base import ForeignWeight, Layout, Settings

INDEX = "model.safetensors.index.json"
AUTO_GPTQ = "quantize_config.json"
"""Where AutoGPTQ put its configuration before transformers read it from config.json."""

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A folder's content: `tensors` for the float architecture, `weights` {layer's path in the model: its codes}."""

    tensors: dict[str, Tensor]
    weights: dict[str, ForeignWeight]


def settings_of(path: Path, config: Mapping[str, Any]) -> Settings | None:
    """The quantization's own configuration, or None when the folder holds a float model.

    Raises InputError when the tool that made it is not known here.
    """
    found, where = config.get("quantization_config"), path / "config.json"
    beside = path / AUTO_GPTQ
    if not found and beside.is_file():
        where = beside
        try:
            found = {"quant_method": "gptq", **json.loads(beside.read_text(encoding="utf-8"))}
        except (ValueError, TypeError, OSError) as error:
            raise InputError("is not a JSON object", where=str(beside)) from error
    if not found:
        return None
    method = found.get("quant_method", "unnamed") if isinstance(found, Mapping) else "unnamed"
    if method not in LAYOUTS:
        raise InputError(
            f"a checkpoint quantized by {method} cannot be read; known are {', '.join(LAYOUTS)}",
            where=str(where),
            fix="give the float model",
        )
    try:
        LAYOUTS[method].check(found)
    except ValueError as error:
        raise InputError(f"{method}: {error}", where=str(where), fix="write it in one of these forms") from error
    settings: Settings = found
    return settings


def read_quantized(path: Path, settings: Settings, tensors: Mapping[str, Tensor], skeleton: nn.Module) -> Quantized:
    """Take the quantized layers out of `tensors`, those of the folder; `skeleton` is the model, with no values.

    Raises InputError, naming file and layer, when a layer's tensors do not fit it or one another.
    """
    layout = LAYOUTS[settings["quant_method"]]
    floats = dict(tensors)
    weights: dict[str, ForeignWeight] = {}
    for name in _quantized_names(layout, tensors, skeleton):
        try:
            place, module = _module(skeleton, name)
            parts = {part: floats.pop(f"{name}.{part}") for part in layout.parts if f"{name}.{part}" in floats}
            weights[place] = layout.read(parts, settings, _matrix_shape(module))
            floats[f"{name}.weight"] = _own_shape(module, weights[place].dequantize())
            _drop_bias(floats, name, module)
        except ValueError as error:
            raise InputError(
                f"layer {name}: {error}", where=_file_of(path, f"{name}.{layout.marker}"), fix="write the model again"
            ) from error
    if not weights:
        what = f"its configuration says {layout.method}, but no layer has {layout.marker}"
        raise InputError(
            what, where=str(path), fix="take quantization_config out of config.json if it is a float model"
        )
    return Quantized(floats, weights)


def _quantized_names(layout: Layout, names: Iterable[str], skeleton: nn.Module) -> list[str]:
    """Layers that have the marker, and linear ones that have any other of the layout's tensors: theirs is lost."""
    found: dict[str, None] = {}
    for name in names:
        owner, _, part = name.rpartition(".")
        if part == layout.marker or (part in layout.parts and _is_linear(skeleton, owner)):
            found[owner] = None
    return list(found)


def _is_linear(skeleton: nn.Module, name: str) -> bool:
    try:
        _matrix_shape(_module(skeleton, name)[1])
    except ValueError:
        return False
    return True


def _module(skeleton: nn.Module, name: str) -> tuple[str, nn.Module]:
    """(path, module) of a layer; a checkpoint may leave out, or add, the name of the model inside."""
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    for place in (name, f"{prefix}{name}", name.removeprefix(prefix)):
        try:
            return place, skeleton.get_submodule(place)
        except AttributeError:
            continue
    raise ValueError(f"{type(skeleton).__name__} has no such layer")


def _matrix_shape(module: nn.Module) -> Shape:
    """(out, in) of a linear layer or convolution."""
    if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
        rows, *rest = module.weight.shape
        return rows, module.weight[0].numel() if rest else 1
    if _is_conv1d(module):
        inputs, outputs = module.get_parameter("weight").shape
        return outputs, inputs
    raise ValueError(f"it is a {type(module).__name__}, not a linear layer")


def _own_shape(module: nn.Module, matrix: Tensor) -> Tensor:
    """The layer's weight whose matrix this is."""
    weight = module.get_parameter("weight")
    return matrix.T.contiguous() if _is_conv1d(module) else matrix.view(weight.shape)


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is [in, out]."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _drop_bias(tensors: dict[str, Tensor], name: str, module: nn.Module) -> None:
    """Some tools write a bias of zeros for a layer that has none."""
    bias = tensors.get(f"{name}.bias")
    if bias is None or module._parameters.get("bias") is not None:
        return
    if bool(bias.any()):
        raise ValueError("it has a bias, the model's layer has none")
    del tensors[f"{name}.bias"]


def _file_of(path: Path, tensor: str) -> str:
    """The file in which a tensor lies, or should."""
    index = path / INDEX
    if index.is_file():
        place = json.loads(index.read_text(encoding="utf-8"))["weight_map"].get(tensor)
        return str(path / place) if place else str(index)
    files = sorted(path.glob("*.safetensors"))
    return str(files[0] if len(files) == 1 else path / "model.safetensors")
