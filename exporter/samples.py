"""Samples to calibrate and validate with: where they come from, whether they fit the model, and who sees which.

Every fifth sample is held out for validation; passes see the rest. Without data of the user's, a model's example inputs
or random numbers stand in, and a warning says so.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exporter.errors import InputError
from exporter.leak import leak_warning
from exporter.load import resolve_callable
from exporter.recipe_values import InputSpec
from exporter.sample_files import FLAG, read_file
from exporter.sample_inputs import Wanted, fit
from exporter.sample_text import tokenize
from passes.calibration import Calibration, cut

HELD_OUT = 5
"""One sample of so many is held out."""

BATCH = 32

NO_DATA = (
    "no calibration data: activation ranges come from {source}, and every figure below is about those; "
    "give real data with --calib"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Arrays {input: [n, ...]}, axis 0 = samples; `sha256` is that of their names, types, shapes and bytes."""

    values: Mapping[str, Tensor]
    source: str
    sha256: str
    warnings: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many."""
        return len(next(iter(self.values.values())))


def load_samples(spec: str, wanted: Sequence[Wanted] | None, count: int, *, tokenizer: Path | None = None) -> Samples:
    """At most `count` samples of `spec`, a file or `pkg.mod:function`, that fit `wanted` (None: take them as they are).

    `tokenizer` is the Hugging Face folder that reads text. Raises InputError, one line for the first fault found.
    """
    module, colon, _ = spec.rpartition(":")
    if colon and not Path(spec).exists() and all(part.isidentifier() for part in module.split(".")):
        function = resolve_callable(spec, FLAG)
        try:
            value = function()
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{spec} failed: {reason}", where=FLAG) from error
        return gather(value, wanted, count, source=spec)
    path = Path(spec)
    content = read_file(path, count)
    if isinstance(content, list):
        if tokenizer is None:
            raise InputError(
                "text is for a Hugging Face folder, whose tokenizer reads it",
                where=f"{FLAG} {spec}",
                fix="give arrays: .safetensors, .npz, .npy or .pt",
            )
        lengths = {want.name: want.shape[1] if want.shape and len(want.shape) > 1 else None for want in wanted or ()}
        content = tokenize(content, tokenizer, lengths, count)
    return gather(content, wanted, count, source=path.name)


def gather(value: object, wanted: Sequence[Wanted] | None, count: int, *, source: str) -> Samples:
    """Samples from what a user's function or loader gives: {name: array}, one array, or batches of either.

    A batch that is a tuple or list gives its entries to the inputs in order; what is left over (labels) is not used.
    Infinite iterables are fine: reading stops after `count` samples.
    """
    names = [want.name for want in wanted] if wanted is not None else None
    arrays = _arrays(value, names, count, f"{FLAG} {source}")
    values = fit(arrays, wanted, source)
    values = {name: value[:count].contiguous() for name, value in values.items()}
    return Samples(values, source, fingerprint(values))


def synthetic(inputs: Sequence[InputSpec], count: int, seed: int, bounds: Mapping[str, int] | None = None) -> Samples:
    """`count` random samples: normal numbers, integers below `bounds` (see `index_bounds`; 2 elsewhere), masks of ones.

    Axis 0 of every input is the samples'. Raises InputError for an input without a name.
    """
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for spec in inputs:
        if spec.name is None:
            raise InputError("an input without a name", where="--input", fix="write NAME=SHAPE")
        shape, dtype = (count, *spec.shape[1:]), getattr(torch, spec.dtype)
        if dtype.is_floating_point:
            values[spec.name] = torch.randn(shape, generator=generator).to(dtype)
        elif dtype == torch.bool or "mask" in spec.name:
            values[spec.name] = torch.ones(shape, dtype=dtype)
        else:
            bound = min((bounds or {}).get(spec.name, 2), torch.iinfo(dtype).max)
            values[spec.name] = torch.randint(bound, shape, generator=generator).to(dtype)
    warning = NO_DATA.format(source="random numbers")
    return Samples(values, "synthetic", fingerprint(values), (warning,))


def from_example(inputs: Mapping[str, Tensor], source: str = "example inputs") -> tuple[Calibration, tuple[str, ...]]:
    """One batch, used for calibration and validation alike, and the warning about it."""
    batch = dict(inputs)
    return Calibration((batch,), (batch,), source), (NO_DATA.format(source=source),)


def split(samples: Samples, *, batch: int = BATCH, fixed: bool = False) -> tuple[Calibration, tuple[str, ...]]:
    """Every fifth sample held out, the rest calibrates; fewer than five serve as both, with a warning.

    `fixed`: the model takes batches of `batch` samples and no others, so that whole batches are held out, and a
    remainder is dropped. Raises InputError when there is not one whole batch.
    """
    warnings = list(samples.warnings)
    unit = batch if fixed else 1
    units = samples.count // unit
    if not units:
        raise InputError(
            f"{_plural(samples.count, 'sample')} of {samples.source}, but the model takes batches of {batch}",
            where=FLAG,
            fix="give more samples, or export the model with a dynamic batch",
        )
    held_out = torch.arange(units) % HELD_OUT == HELD_OUT - 1
    seen = ~held_out
    if units < HELD_OUT:
        what = _plural(units * unit, "sample")
        warnings.append(f"only {what} to calibrate with: validation uses the same, so its figures flatter")
        held_out = seen = torch.ones(units, dtype=torch.bool)
    rows = torch.arange(units * unit).view(units, unit)
    calibration, validation = (
        tuple(cut({name: value[rows[chosen].flatten()] for name, value in samples.values.items()}, batch))
        for chosen in (seen, held_out)
    )
    cut_up = Calibration(calibration, validation, samples.source)
    leak = leak_warning(cut_up) if units >= HELD_OUT else None
    return cut_up, (*warnings, leak) if leak else tuple(warnings)


def fixed_batch(wanted: Iterable[Wanted]) -> int | None:
    """The size that axis 0 of the inputs must have; None where it is free. Raises InputError when inputs disagree."""
    sizes = {want.name: want.shape[0] for want in wanted if want.shape}
    fixed = {name: size for name, size in sizes.items() if size is not None}
    if not fixed:
        return None
    if len(set(fixed.values())) > 1 or len(fixed) < len(sizes):
        listed = ", ".join(f"{name} {size or 'free'}" for name, size in sizes.items())
        raise InputError(
            f"the first axes of the inputs differ ({listed}), so that none counts samples",
            where=FLAG,
            fix="leave --calib out: the example inputs are used",
        )
    return next(iter(fixed.values()))


def fingerprint(values: Mapping[str, Tensor]) -> str:
    """The sha256 of names, types, shapes and bytes, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(values):
        value = values[name].contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)};".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


Arrays = dict[str, Tensor]


def _arrays(value: object, names: Sequence[str] | None, count: int, where: str) -> Arrays:
    """{input: array} from one batch, or from batches put behind each other until there are `count` samples."""
    if isinstance(value, Mapping | Tensor | np.ndarray):
        return _batch(value, names, where)
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        what = f"gives a {type(value).__name__}"
        raise InputError(what, where=where, fix="give {name: array}, an array, or batches of either")
    batches: list[Arrays] = []
    total = 0
    for entry in value:
        batches.append(_batch(entry, names, where))
        if batches[-1].keys() != batches[0].keys():
            raise InputError(f"batch {len(batches) - 1} has other inputs than batch 0", where=where)
        first = next(iter(batches[-1].values()), None)
        total += len(first) if first is not None and first.ndim else 0
        if total >= count:
            break
    if not batches:
        raise InputError("gives no batches", where=where, fix="give at least one sample")
    return {name: _joined(name, [batch[name] for batch in batches], where) for name in batches[0]}


def _batch(value: object, names: Sequence[str] | None, where: str) -> Arrays:
    if isinstance(value, Mapping):
        return {str(name): _tensor(str(name), array, where) for name, array in value.items()}
    entries = list(value) if isinstance(value, tuple | list) else [value]
    if names is None:
        what = "gives an array without a name, and nothing says what the model's inputs are called"
        raise InputError(what, where=where, fix="give {name: array}, or --input NAME=SHAPE")
    if len(entries) < len(names) or (not isinstance(value, tuple | list) and len(names) > 1):
        what = f"gives {_plural(len(entries), 'array')} for the inputs {', '.join(names)}"
        raise InputError(what, where=where, fix="give {name: array}")
    return {name: _tensor(name, entry, where) for name, entry in zip(names, entries, strict=False)}


def _tensor(name: str, array: object, where: str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().cpu()
    if isinstance(array, np.ndarray | np.generic) and array.dtype.kind in "fiub" and array.dtype.itemsize <= 8:
        return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))
    kind = f"an array of type {array.dtype}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
    raise InputError(f"{name} is {kind}, not an array of numbers", where=where)


def _joined(name: str, parts: Sequence[Tensor], where: str) -> Tensor:
    shapes = {tuple(part.shape[1:]): index for index, part in reversed(list(enumerate(parts)))}
    if any(not part.ndim for part in parts):
        raise InputError(f"{name} is a single number: axis 0 must count samples", where=where)
    if len(shapes) > 1:
        listed = " and ".join(str(list(parts[index].shape)) for index in sorted(shapes.values())[:2])
        raise InputError(f"the batches of {name} have different shapes: {listed}", where=where, fix="pad them alike")
    return torch.cat(list(parts))


def _plural(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
