"""What one command compiles: MODEL, or the models that a recipe names.

    model = "model.pt2"          one model, beside the recipe's other keys

    passes = "cle,gptaq"         or several: what stands above holds for all of them
    [[models]]
    model = "encoder.pt2"
    out = "out/encoder"
    [[models]]
    model = "decoder.pt2"
    out = "out/decoder"
    passes = "gptq:bits=4"

Paths are relative to the folder the command runs in, as those of flags are.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporter.errors import InputError
from exporter.options import shown
from exporter.recipe import Recipe, read_table, recipe_of


@dataclasses.dataclass(frozen=True)
class Job:
    """A model and what to do with it."""

    model: Path
    recipe: Recipe


def read_jobs(
    model: Path | None, flags: Mapping[str, Any], file: Path | None = None, folder: Path | None = None
) -> tuple[Job, ...]:
    """The compilations that a command line asks for: `model` as the recipe says, or else the models of the recipe.

    Raises InputError when there is no model, two are to be written to one folder, or a key is wrong.
    """
    path, table = read_table(file, folder)
    common = {key: value for key, value in table.items() if key not in ("model", "models")}
    if model is not None:
        return (Job(model, recipe_of(flags, path, common)),)
    entries = [{**common, **entry} for entry in _entries(path, table)]
    jobs = tuple(_job(flags, path, entry) for entry in entries)
    for index, job in enumerate(jobs):
        if job.recipe.out in [other.recipe.out for other in jobs[:index]]:
            what = f"two models are written to {job.recipe.out}"
            raise InputError(what, where=str(path), fix="give each of [[models]] its own out, and no --out")
    return jobs


def names_a_model(folder: Path | None = None) -> bool:
    """True when the pyproject.toml of the folder (default: here) says what to compile."""
    _, table = read_table(None, folder)
    return "model" in table or "models" in table


def _entries(path: Path, table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "model" in table and "models" in table:
        raise InputError("has both model and [[models]]", where=str(path), fix="write every model under [[models]]")
    if "model" in table:
        return [{"model": table["model"]}]
    models = table.get("models", [])
    if not isinstance(models, list) or not all(isinstance(entry, Mapping) for entry in models):
        raise InputError("models is not a list of tables", where=str(path), fix="write [[models]] above each")
    if not models:
        raise InputError("no MODEL", where="qexport", fix='give one, or write model = "model.pt2" into the recipe')
    return models


def _job(flags: Mapping[str, Any], path: Path, entry: Mapping[str, Any]) -> Job:
    rest = dict(entry)
    model = rest.pop("model", None)
    if not isinstance(model, str) or not model:
        raise InputError(f"model: {shown(model)} is not a path", where=str(path), fix='write model = "model.pt2"')
    return Job(Path(model), recipe_of(flags, path, rest))
