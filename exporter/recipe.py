"""What to do with a model: one frozen value, from the flags of the command line, TOML, or Python.

TOML stands in a file of its own (--recipe) or in `[tool.qexport]` of the current directory's pyproject.toml, its keys
are the flags' names, and the flags win. What only TOML can say are rules for the layers that a glob matches, and which
models to compile (`exporter.jobs`):

    passes = "cle,gptaq:bits=4"          # or ["cle", {name = "gptaq", bits = 4}]
    target = ["onnx", "trt"]
    gate = ["sqnr_db>=20"]
    [[layers]]
    match = "*.fc2"
    bits = 8
"""

import dataclasses
import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from exporter.budget_terms import parse_budget
from exporter.device import device_names
from exporter.errors import InputError
from exporter.gates import parse_gate
from exporter.lowering.lowered import Dtype, WeightsAs
from exporter.options import convert, nearest, shown
from exporter.recipe_values import (
    Dynamic,
    InputSpec,
    Profiles,
    parse_dynamic,
    parse_input,
    parse_profile,
    parse_size,
    shape_text,
)
from exporter.report import Json
from exporter.specs import NO_PASSES, join_specs, option_types, parse_passes
from passes.base import LayerRule, Pass

Target = Literal["onnx", "trt"]
Flavor = Literal["auto", "tensorrt", "rtx"]
Provider = Literal["cpu", "cuda", "tensorrt"]

DEFAULT_PASSES = "cle,gptaq"
DEFAULT_SAMPLES = 512
FLAGS = {"inputs": "input", "gates": "gate", "trt_profiles": "trt-profile"}
"""Flags that are not called as their field is."""

NOT_IN_TOML = frozenset({"trust_model"})
"""A file that lies in the current directory must not decide that a model's code is run."""

NOT_IN_REPORT = frozenset({"out", "force", "quiet", "trust_model", "memory", "resume", "reuse", "threads"})
"""What says nothing about the result."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides a compilation but the model; a field is called as its flag is, or nearly.

    Lists and the text of flags are accepted for every field (`target=["onnx"]`, `inputs="x=1x3x32x32"`,
    `dynamic="x:0=batch"`). Raises InputError for a value of the wrong type, an unknown target, pass or option, and a
    gate that does not parse. Without `passes` it is DEFAULT_PASSES, or none for a model quantized already.
    """

    passes: str | None = None
    target: tuple[Target, ...] = ("onnx",)
    weights_as: WeightsAs = "auto"
    trt_flavor: Flavor = "auto"
    trt_arch: tuple[str, ...] = ()
    trt_profiles: Profiles = dataclasses.field(default_factory=dict)
    dtype: Dtype = "float32"
    calib: str | None = None
    calib_samples: int = DEFAULT_SAMPLES
    inputs: tuple[InputSpec, ...] = ()
    dynamic: Dynamic = dataclasses.field(default_factory=dict)
    eval: str | None = None
    gates: tuple[str, ...] = ()
    sensitivity: bool = False
    budget: str | None = None
    skip: tuple[str, ...] = ()
    layers: tuple[LayerRule, ...] = ()
    out: Path = Path("out")
    force: bool = False
    provider: Provider = "cpu"
    device: str = "cpu"
    seed: int = 0
    threads: int = 0
    memory: int = 0
    resume: bool = True
    reuse: bool = False
    factory: str | None = None
    trust_model: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(Recipe)
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _read(field.name, getattr(self, field.name), hints[field.name]))
        object.__setattr__(self, "target", tuple(dict.fromkeys(self.target)))
        for name, least in (("calib_samples", 1), ("seed", 0), ("threads", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{getattr(self, name)} is less than {least}", where=flag_of(name))
        device_names(self.device)
        if not self.target:
            raise InputError("no target", where="--target", fix="give onnx or trt")
        if self.dtype != "float32" and "onnx" in self.target:
            raise InputError(f"target onnx has no {self.dtype}", where="--dtype", fix="give --target trt alone")
        object.__setattr__(self, "layers", _checked_layers(self.layers, self.parsed_passes))
        for gate in self.gates:
            parse_gate(gate)
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def parsed_passes(self) -> tuple[Pass, ...]:
        """The passes, in order, without their prerequisites."""
        return parse_passes(self.passes or DEFAULT_PASSES)

    def for_model(self, *, quantized: bool) -> "Recipe":
        """This recipe with the passes written out that the model gets: `quantized` if its weights are codes already."""
        if self.passes is not None:
            return self
        return dataclasses.replace(self, passes=NO_PASSES if quantized else DEFAULT_PASSES)

    @property
    def layer_rules(self) -> tuple[LayerRule, ...]:
        """What holds for single layers: --skip, then [[layers]]."""
        return (*(LayerRule(match=glob, skip=True) for glob in self.skip), *self.layers)

    def to_json(self) -> dict[str, Json]:
        """What decides the result, by the flags' names and as their texts; of files the name without the folder."""
        return {
            FLAGS.get(field.name, field.name.replace("_", "-")): _written(field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in NOT_IN_REPORT
        }


def read_recipe(flags: Mapping[str, Any], file: Path | None = None, folder: Path | None = None) -> Recipe:
    """The recipe of `flags` {field: value}, over TOML: `file`, or else the pyproject.toml in `folder` (default: here).

    A flag that is None, () or an unset switch was not given. Raises InputError naming the flag, or the file and key.
    """
    return recipe_of(flags, *read_table(file, folder))


def recipe_of(flags: Mapping[str, Any], path: Path, table: Mapping[str, Any]) -> Recipe:
    """The recipe of `flags` over the `table` that stands in `path`."""
    given = {name: value for name, value in flags.items() if not _is_unset(name, value)}
    return Recipe(**_values(path, table) | given)


def read_table(file: Path | None, folder: Path | None = None) -> tuple[Path, Mapping[str, Any]]:
    """The TOML file and our table in it; an empty one where there is no file, and none was asked for."""
    path = file or (folder or Path.cwd()) / "pyproject.toml"
    if file is None and not path.is_file():
        return path, {}
    try:
        table: Any = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"cannot be read as TOML: {reason}", where=str(path)) from error
    if file is None:
        tool = table.get("tool", {})
        table = tool.get("qexport", {}) if isinstance(tool, Mapping) else {}
        if not isinstance(table, Mapping):
            raise InputError("[tool.qexport] is not a table", where=str(path))
    return path, table


def _is_unset(name: str, value: Any) -> bool:
    return value is None or value == () or (value is False and name != "resume")  # which is on unless switched off


def flag_of(field: str) -> str:
    """The flag of a field of Recipe."""
    return f"--{FLAGS.get(field, field).replace('_', '-')}"


def _values(path: Path, table: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        flag_of(field.name).removeprefix("--").replace("-", "_"): field.name for field in dataclasses.fields(Recipe)
    }
    values = {}
    for key, value in table.items():
        name = names.get(key.replace("-", "_"))
        if name in NOT_IN_TOML:
            raise InputError(f"{key} is not taken from a file", where=str(path), fix=f"give {flag_of(name)}")
        if name is None:
            known = [key.replace("_", "-") for key, field in names.items() if field not in NOT_IN_TOML]
            raise InputError(f"unknown key {key!r}", where=str(path), fix=nearest(key, known))
        values[name] = value
    try:
        Recipe(**values)
    except InputError as error:  # the same faults as of flags, but they stand in the file
        raise InputError(error.what, where=f"{path}: {error.where.removeprefix('--')}", fix=error.fix) from error
    return values


def _read(name: str, value: Any, hint: Any) -> Any:
    if name == "passes" and isinstance(value, list | tuple):
        return join_specs(value)
    if name == "layers":
        return tuple(_layer_rule(entry) for entry in _entries(name, value))
    if name == "inputs":
        specs = tuple(entry if isinstance(entry, InputSpec) else parse_input(entry) for entry in _entries(name, value))
        return _without_repeats(specs)
    if name == "dynamic":
        return parse_dynamic(value if isinstance(value, Mapping) else _entries(name, value))
    if name == "trt_profiles":
        return parse_profile(value if isinstance(value, Mapping) else _entries(name, value))
    if name == "memory":
        return parse_size(value)
    if name == "trt_arch" and isinstance(value, str):
        value = [arch.strip() for arch in value.split(",")]
    try:
        return convert(value, hint)
    except ValueError as error:
        raise InputError(str(error), where=flag_of(name)) from error


def _entries(name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, str | InputSpec):
        return [value]
    raise InputError(f"{shown(value)} is not a list", where=flag_of(name))


def _without_repeats(specs: tuple[InputSpec, ...]) -> tuple[InputSpec, ...]:
    names = [spec.name for spec in specs if spec.name is not None]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{name} is given twice", where="--input")
    return specs


def _layer_rule(entry: Any) -> LayerRule:
    if isinstance(entry, LayerRule):
        return entry
    options = dict(entry) if isinstance(entry, Mapping) else {}
    match, skip = options.pop("match", None), options.pop("skip", False)
    if not isinstance(match, str) or not isinstance(skip, bool):
        raise InputError(
            f"{shown(entry)} is not a rule for layers",
            where="[[layers]]",
            fix='write match = "*.fc2" and bits = 8 under [[layers]]',
        )
    return LayerRule(match, skip, options)


def _checked_layers(rules: Sequence[LayerRule], passes: Sequence[Pass]) -> tuple[LayerRule, ...]:
    """The rules with their options as the passes' own types."""
    known: dict[str, Any] = {"weights_as": WeightsAs}
    for work in passes:
        known |= option_types(type(work))
    checked = []
    for rule in rules:
        options = {}
        for key, value in rule.options.items():
            if key not in known:
                raise InputError(
                    f"no pass of the recipe has an option {key!r} (in the rule for {rule.match!r})",
                    where="[[layers]]",
                    fix=nearest(key, known),
                )
            try:
                options[key] = convert(value, known[key])
            except ValueError as error:
                raise InputError(f"{key} of {rule.match!r}: {error}", where="[[layers]]") from error
        checked.append(dataclasses.replace(rule, options=options))
    return tuple(checked)


def _written(name: str, value: Any) -> Json:
    if name == "calib" and value is not None and ":" not in value:
        return Path(value).name
    if name == "layers":
        return [{"match": rule.match, **({"skip": True} if rule.skip else {}), **rule.options} for rule in value]
    if name == "dynamic":
        return [f"{name}:{axis}={label}" for name, axes in value.items() for axis, label in axes.items()]
    if name == "trt_profiles":
        return [f"{name}={'/'.join(map(shape_text, shapes))}" for name, shapes in value.items()]
    if isinstance(value, tuple):
        return [str(entry) for entry in value]
    return typing.cast(Json, value)
