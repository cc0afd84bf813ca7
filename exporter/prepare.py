"""From a loaded model and the user's data to an exported program and calibration batches.

Where an archive says what its inputs are, the data must fit it. A module says only what its inputs are called; their
shapes come from --input or from the data, and axis 0 of every input stays free unless the model fixes it.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from exporter.capture import Dynamic, export_module, flatten
from exporter.errors import InputError
from exporter.float32 import other_types
from exporter.load import Loaded
from exporter.recipe import Recipe
from exporter.recipe_values import InputSpec
from exporter.sample_inputs import Wanted, example_of, index_bounds, wanted_of
from exporter.samples import Samples, fixed_batch, from_example, gather, load_samples, split, synthetic
from passes.calibration import Calibration

SYNTHETIC_SAMPLES = 32
SYNTHETIC_LENGTH = 16
"""Length of a free axis other than the batch, where nothing says how long it is."""

IMAGE_SIZE = 224
"""Of a Hugging Face model whose configuration does not say: what most were trained with."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What `capture` takes. `dynamic` None: the free axes and their names come from the program itself."""

    program: torch.export.ExportedProgram
    calibration: Calibration
    dynamic: Dynamic | None
    sha256: str | None
    warnings: tuple[str, ...]


def prepare(loaded: Loaded, recipe: Recipe, given: object = None) -> Prepared:
    """Export what needs exporting and cut the samples. `given` is calibration data from Python, instead of --calib."""
    if loaded.program is not None:
        prepared = _prepare_program(loaded.program, recipe, given)
    else:
        assert loaded.module is not None
        folder = loaded.path if loaded.kind == "huggingface" else None
        prepared = _prepare_module(loaded.module, recipe, given, folder)
    if types := other_types(prepared.program):
        note = f"the model computes in {' and '.join(types)}: compiled in float32, its inputs and outputs included"
        return dataclasses.replace(prepared, warnings=(*prepared.warnings, note))
    return prepared


def _prepare_program(program: torch.export.ExportedProgram, recipe: Recipe, given: object) -> Prepared:
    if recipe.dynamic:
        raise InputError("an archive has its free axes already", where="--dynamic", fix="set them when exporting it")
    wanted = wanted_of(program)
    samples = _samples(recipe, given, wanted, None)
    example = example_of(program)
    if samples is None and example:
        calibration, warnings = from_example(example, "the archive's example inputs")
        return Prepared(program, calibration, None, None, warnings)
    fixed = fixed_batch(wanted)
    if samples is None:
        bounds = index_bounds(flatten(program)[0])
        samples = synthetic([_spec(want) for want in wanted], fixed or SYNTHETIC_SAMPLES, recipe.seed, bounds)
    calibration, warnings = _split(samples, fixed)
    return Prepared(program, calibration, None, samples.sha256, warnings)


def _prepare_module(module: nn.Module, recipe: Recipe, given: object, folder: Path | None) -> Prepared:
    """`folder` is the Hugging Face folder the module comes from, if any."""
    specs = input_specs(module, recipe.inputs)
    if folder is not None and not specs and recipe.calib is None and given is None:
        specs = huggingface_inputs(module)
    wanted = [Wanted(spec.name or "", (None, *spec.shape[1:]), getattr(torch, spec.dtype)) for spec in specs] or None
    samples = _samples(recipe, given, wanted, folder)
    if samples is None and not specs:
        raise InputError(
            "nothing says what the model's inputs are",
            where="MODEL",
            fix="give --calib with data, or --input NAME=SHAPE",
        )
    if samples is None:
        samples = synthetic(specs, SYNTHETIC_SAMPLES, recipe.seed, _vocabulary(module))
    check_names(module, samples.values)
    batch = {name: value[:2] for name, value in samples.values.items()}
    if samples.count == 1:
        batch = {name: value.repeat_interleave(2, 0) for name, value in batch.items()}
    if recipe.dynamic:
        _check_dynamic(recipe.dynamic, batch)
        program = export_module(module, batch, recipe.dynamic)
        calibration, warnings = _split(samples, fixed_batch(wanted_of(program)))
        return Prepared(program, calibration, recipe.dynamic, samples.sha256, warnings)
    return _export_by_default(module, samples, batch, specs)


def _export_by_default(
    module: nn.Module, samples: Samples, batch: Mapping[str, Tensor], specs: Sequence[InputSpec]
) -> Prepared:
    """Axis 0 of every input free, and axis 1 of a language model's; fixed shapes where the model allows neither."""
    free: Dynamic = {name: {0: "batch"} for name in batch}
    text = {name: {0: "batch", 1: "sequence"} for name, value in batch.items() if _is_text(name, value)}
    attempts: list[Dynamic] = [{**free, **text}, free] if text else [free]
    for dynamic in attempts:
        try:
            program = export_module(module, batch, dynamic)
        except InputError:
            continue
        calibration, warnings = _split(samples, None)
        return Prepared(program, calibration, dynamic, samples.sha256, warnings)
    size = specs[0].shape[0] if specs else 1
    fixed = {name: value[:size] for name, value in samples.values.items()}
    program = export_module(module, fixed, {})
    calibration, warnings = _split(samples, size)
    note = f"the model does not export with a free batch: the artifact takes batches of {size}"
    return Prepared(program, calibration, {}, samples.sha256, (*warnings, note))


def _is_text(name: str, value: Tensor) -> bool:
    return value.ndim == 2 and not value.dtype.is_floating_point and name.endswith(("ids", "mask", "tokens"))


def _samples(recipe: Recipe, given: object, wanted: Sequence[Wanted] | None, tokenizer: Path | None) -> Samples | None:
    if given is not None:
        value = given() if callable(given) else given
        return gather(value, wanted, recipe.calib_samples, source="calibration")
    if recipe.calib is None:
        return None
    return load_samples(recipe.calib, wanted, recipe.calib_samples, tokenizer=tokenizer)


def _split(samples: Samples, fixed: int | None) -> tuple[Calibration, tuple[str, ...]]:
    return split(samples) if fixed is None else split(samples, batch=fixed, fixed=True)


def _spec(want: Wanted) -> InputSpec:
    """An input of an archive as random numbers would fill it."""
    shape = want.shape or ()
    sizes = tuple(
        size if size is not None else SYNTHETIC_SAMPLES if axis == 0 else SYNTHETIC_LENGTH
        for axis, size in enumerate(shape)
    )
    return InputSpec(want.name, sizes, str(want.dtype).removeprefix("torch."))


def input_specs(module: nn.Module, given: Sequence[InputSpec]) -> list[InputSpec]:
    """The user's --input with the names of the module's parameters where they were left out."""
    names = parameter_names(module)
    specs = []
    for place, spec in enumerate(given):
        if spec.name is None and place >= len(names):
            what = f"{type(module).__name__} takes {len(names)} inputs"
            raise InputError(what, where="--input", fix="write NAME=SHAPE")
        specs.append(spec if spec.name is not None else dataclasses.replace(spec, name=names[place]))
    return specs


def huggingface_inputs(module: nn.Module) -> list[InputSpec]:
    """The inputs of a Hugging Face model as its configuration tells them; empty for a kind that is not known here."""
    config, name = module.config, str(module.main_input_name)
    if name == "input_ids":
        length = min(SYNTHETIC_LENGTH, getattr(config, "max_position_embeddings", SYNTHETIC_LENGTH))
        shape = (SYNTHETIC_SAMPLES, length)
        return [InputSpec("input_ids", shape, "int64"), InputSpec("attention_mask", shape, "int64")]
    if name == "pixel_values":
        size = getattr(config, "image_size", IMAGE_SIZE)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        return [InputSpec(name, (SYNTHETIC_SAMPLES, getattr(config, "num_channels", 3), height, width))]
    return []


def _vocabulary(module: nn.Module) -> dict[str, int]:
    """{input_ids: size of the vocabulary} of a Hugging Face model, {} of others."""
    size = getattr(getattr(module, "config", None), "vocab_size", None)
    return {"input_ids": size} if isinstance(size, int) else {}


def parameter_names(module: nn.Module) -> list[str]:
    """The names of what `forward` takes."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, value in inspect.signature(module.forward).parameters.items() if value.kind in kinds]


def check_names(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Raise InputError unless `forward` can be called with these inputs by name."""
    parameters = inspect.signature(module.forward).parameters
    if any(value.kind is inspect.Parameter.VAR_KEYWORD for value in parameters.values()):
        return
    names = parameter_names(module)
    unknown = [name for name in values if name not in names]
    missing = [name for name in names if parameters[name].default is inspect.Parameter.empty and name not in values]
    if unknown or missing:
        what = f"no input called {unknown[0]}" if unknown else f"no data for input {missing[0]}"
        raise InputError(f"{type(module).__name__} has {what}" if unknown else what, where="--calib", fix=_takes(names))


def _takes(names: Sequence[str]) -> str:
    return f"the model takes {', '.join(names)}"


def _check_dynamic(dynamic: Dynamic, batch: Mapping[str, Tensor]) -> None:
    for name, axes in dynamic.items():
        if name not in batch:
            raise InputError(f"no input called {name}", where="--dynamic", fix=_takes(list(batch)))
        for axis in axes:
            if axis >= batch[name].ndim:
                raise InputError(f"{name} has {batch[name].ndim} axes, so no axis {axis}", where="--dynamic")
