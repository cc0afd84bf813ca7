"""Results of weight algorithms, which compute wherever their weight is, back on the CPU, where a program keeps them."""

import dataclasses
from typing import TypeVar

from torch import Tensor

from passes.weights import AffineWeight, CodebookWeight

Weight = TypeVar("Weight", AffineWeight, CodebookWeight)


def to_cpu(weight: Weight) -> Weight:
    """The same weight with its tensors, and those of weights inside it, on the CPU."""
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    return dataclasses.replace(weight, **{name: _moved(value) for name, value in fields.items()})


def _moved(value: object) -> object:
    if isinstance(value, AffineWeight):
        return to_cpu(value)
    return value.cpu() if isinstance(value, Tensor) else value
