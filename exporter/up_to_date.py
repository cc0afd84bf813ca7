"""Whether an output folder is what a command would write again: the same model, recipe, versions and data.

The manifest holds a key, sha256 over the bytes of all that decides the result:

    the model           of a folder every file by its name
    files that it names --calib; of pkg.mod:function (--calib, --factory, --eval) the source file of the module
    the recipe          gates included, so that the report's verdicts are those asked for
    versions            of Python, qexport, torch, onnx, onnxruntime, and TensorRT where it is a target

A function may read more than its module's source says: after such a change give --force. Without a key (a model made
in memory, a module without a source file) nothing is reused.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

from exporter.inspect_out import whole_output
from exporter.load import import_from_here
from exporter.output import MANIFEST, file_sha256
from exporter.recipe import Recipe
from exporter.report import Report
from exporter.versions import installed, versions

ENGINE = "model.engine"
TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu12")


def compile_key(model: Path, recipe: Recipe) -> str | None:
    """The key of compiling `model`; None when it cannot be known."""
    parts = [json.dumps([recipe.to_json(), versions()], sort_keys=True)]
    if "trt" in recipe.target:
        parts.append(f"tensorrt {[installed(name) for name in TENSORRT]}")
    sources = [_path_of(spec) for spec in (recipe.calib, recipe.factory, recipe.eval) if spec is not None]
    for path in (model, *sources):
        digest = _digest(path) if path is not None else None
        if digest is None:
            return None
        parts.append(digest)
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def up_to_date(out: Path, key: str | None, recipe: Recipe) -> Report | None:
    """The report in `out` when it was made under this key and its files are whole and complete, else None."""
    if key is None or not (out / MANIFEST).is_file():
        return None
    state = whole_output(out)
    if state is None or state.key != key or ("trt" in recipe.target and ENGINE not in state.files):
        return None
    return state.report


def _path_of(spec: str) -> Path | None:
    """A file, or the source of the module of pkg.mod:function."""
    module, colon, _ = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return Path(spec)
    import_from_here()
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return Path(found.origin) if found is not None and found.origin is not None else None


def _digest(path: Path) -> str | None:
    """Of a file its sha256, of a folder that of its files' names and hashes; None of what is not there."""
    try:
        if path.is_file():
            return file_sha256(path)
        files = sorted(file for file in path.rglob("*") if file.is_file())
        listed = [f"{file.relative_to(path).as_posix()} {file_sha256(file)}" for file in files]
    except OSError:
        return None
    return hashlib.sha256("\n".join(listed).encode()).hexdigest() if listed else None
