"""Enough of TensorRT's module for NVIDIA's own Python plugin layer to run, which drives plugins as the builder does.

The layer comes from the wheel tensorrt-cu12-bindings; its compiled half needs TensorRT's libraries and is not loaded.
Expressions are computed at once, from sizes that the test gives: what the engine would compute when it runs.
"""

import enum
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "SUB": lambda a, b: a - b,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}

DimensionOperation = enum.Enum("DimensionOperation", list(OPERATIONS))
DataType = enum.Enum("DataType", ["FLOAT", "HALF", "INT8", "INT32", "BF16", "FP8", "INT4", "BOOL", "INT64"])
TensorFormat = enum.Enum("TensorFormat", ["LINEAR", "HWC"])
Request = enum.Enum("Request", ["UNKNOWN", "PREFER_JIT", "PREFER_AOT", "STRICT_JIT", "STRICT_AOT"])
FieldType = enum.Enum(
    "FieldType", ["FLOAT16", "FLOAT32", "FLOAT64", "INT8", "INT16", "INT32", "INT64", "CHAR", "UNKNOWN"]
)


class Dimension:
    """A size: a constant, or known when the engine runs."""

    def __init__(self, value: int, *, constant: bool = True) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value


class ExpressionBuilder:
    """Computes expressions."""

    def constant(self, value: int) -> Dimension:
        return Dimension(value)

    def operation(self, operation: Any, a: Dimension, b: Dimension) -> Dimension:
        value = OPERATIONS[operation.name](a.value, b.value)
        return Dimension(value, constant=a.constant and b.constant)


class Dims(tuple):  # type: ignore[type-arg]
    """Concrete dims."""

    MAX_DIMS = 8


class TensorDescription:
    """Dims, type and format of a plugin's input or output."""

    def __init__(self) -> None:
        self.dims: tuple[int, ...] = ()
        self.type: Any = None
        self.format: Any = TensorFormat.LINEAR
        self.scale = 1.0


class DynamicDescription:
    """The same with dims that may be -1."""

    def __init__(self, dims: tuple[int, ...], kind: Any) -> None:
        self.desc = TensorDescription()
        self.desc.dims, self.desc.type = dims, kind


class Expressions(list):  # type: ignore[type-arg]
    """The dims of an output."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Field:
    """An attribute."""

    def __init__(self, name: str, data: Any, kind: Any) -> None:
        self.name, self.data, self.type = name, data, kind


class Empty:
    """Base of what the layer derives its classes from."""

    def __init__(self, *_: object) -> None:
        pass


class Setter:
    """Takes a kernel's extra arguments."""

    def __init__(self) -> None:
        self.nbSymExprs = 0
        self.values: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        self.values[index] = value

    def ints(self) -> list[int]:
        assert sorted(self.values) == list(range(self.nbSymExprs))
        assert all(value.dtype == "INT32" for value in self.values.values())
        return [self.values[index].expr.value for index in range(self.nbSymExprs)]


def stand_in() -> ModuleType:
    """The module `tensorrt`."""
    module = ModuleType("tensorrt")
    names: dict[str, Any] = {
        "DataType": DataType,
        "TensorFormat": TensorFormat,
        "DimensionOperation": DimensionOperation,
        "QuickPluginCreationRequest": Request,
        "PluginFieldType": FieldType,
        "PluginArgType": SimpleNamespace(INT="INT"),
        "PluginArgDataType": SimpleNamespace(INT8="INT8", INT16="INT16", INT32="INT32"),
        "TensorRTPhase": enum.Enum("TensorRTPhase", ["BUILD", "RUNTIME"]),
        "IDimensionExpr": Dimension,
        "IExprBuilder": ExpressionBuilder,
        "Dims": Dims,
        "DimsExprs": Expressions,
        "PluginTensorDesc": TensorDescription,
        "DynamicPluginTensorDesc": DynamicDescription,
        "PluginField": Field,
        "PluginFieldCollection": list,
        "nptype": lambda kind: kind,
    }
    empty = (
        "IPluginV3 IPluginV3QuickCore IPluginV3QuickBuild IPluginV3QuickRuntime IPluginV3QuickAOTBuild ISymExpr "
        "ITensor IPluginCreatorV3Quick"
    )
    names |= {name: type(name, (Empty,), {}) for name in empty.split()}

    class Logger:
        WARNING = 2

        def log(self, severity: int, message: str) -> None:
            assert "experimental" in message

    names["Logger"] = Logger
    registered: dict[str, Any] = {}
    registry = SimpleNamespace(
        register_creator=lambda creator, namespace: registered.update({f"{namespace}::{creator.name}": creator}),
        get_creator=lambda name, version, namespace: registered[f"{namespace}::{name}"],
    )
    names["get_plugin_registry"] = lambda: registry
    for name, value in names.items():
        setattr(module, name, value)
    return module


@pytest.fixture
def plugin_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """NVIDIA's `tensorrt.plugin`, on the stand-in."""
    wheel = importlib.util.find_spec("tensorrt_bindings")
    if wheel is None or not wheel.submodule_search_locations:
        pytest.skip("tensorrt-cu12-bindings is not installed")
    folder = f"{wheel.submodule_search_locations[0]}/plugin"
    for name in [name for name in sys.modules if name == "tensorrt" or name.startswith("tensorrt.")]:
        monkeypatch.delitem(sys.modules, name)
    module = stand_in()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    spec = importlib.util.spec_from_file_location(
        "tensorrt.plugin", f"{folder}/__init__.py", submodule_search_locations=[folder]
    )
    assert spec is not None
    assert spec.loader is not None
    layer = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", layer)
    spec.loader.exec_module(layer)
    yield layer
    for name in [name for name in sys.modules if name == "tensorrt" or name.startswith("tensorrt.")]:
        sys.modules.pop(name)
