"""Results of weight algorithms, which compute wherever their weight is, back on the CPU, where a program keeps them."""

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

from passes.weights import AffineWeight, QuantWeight

Weight = TypeVar("Weight", bound=QuantWeight)


def to_cpu(weight: Weight) -> Weight:
    """The same weight with its tensors, and those of weights inside it, on the CPU."""
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    moved: dict[str, Any] = {name: _moved(value) for name, value in fields.items()}
    return dataclasses.replace(weight, **moved)


def _moved(value: object) -> object:
    if isinstance(value, AffineWeight):
        return to_cpu(value)
    return value.cpu() if isinstance(value, Tensor) else value
