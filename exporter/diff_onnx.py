"""Another tool's ONNX file of the same model, as a report that ours can be compared with.

The file runs in onnxruntime on the samples that the new report was validated on, and its outputs are compared with the
model in float, as ours were. Both come from what compile was given: the model and the calibration data; their hash and
the float outputs' sums by sample show whether they are the same again.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from exporter.backends import backend_for
from exporter.capture import capture
from exporter.compile import faults
from exporter.diff import SAME_SIGNAL
from exporter.errors import InputError
from exporter.load import load_model
from exporter.metrics import Figures
from exporter.prepare import prepare
from exporter.recipe import Recipe
from exporter.report import AllSums, Report, Sizes, Sums
from exporter.validate import compare_outputs, eager_session, evaluate_metrics
from passes.base import Program
from passes.calibration import Batch, cut
from runtimes.base import Array, Artifact, RuntimeFault, Session
from runtimes.ort import OnnxRuntime

RUNTIME = "onnxruntime"


@dataclasses.dataclass(frozen=True)
class Source:
    """What compile was given, to be given again: names of files and functions as on its command line."""

    model: Path | None = None
    calib: str | None = None
    factory: str | None = None
    eval: str | None = None
    trust_model: bool = False


def report_of_onnx(path: Path, new: Report, source: Source) -> Report:
    """Run the ONNX file at `path` on the samples of `new`. Raises InputError, naming inputs that do not fit."""
    file = _read(path)
    if source.model is None:
        raise InputError(
            "is an ONNX file: to compare it, the model in float and the samples are needed again",
            where=str(path),
            fix="give --model, --calib and --factory as compile was given them",
        )
    with faults():
        program, sha256 = _program(source, new)
        batches = _fitting(file, program.calibration.holdout, path)
        inputs, outputs = _names(file)
        session = _load(Artifact(RUNTIME, path, inputs, outputs))
        renamed = _Renamed(session, program.output_names, path)
        reference = eager_session(program, program.reference)
        sums: dict[str, Sums] = {}
        try:
            figures = compare_outputs(reference, renamed, batches, sums)
        except RuntimeFault as fault:
            raise InputError(fault.what, where=str(path)) from fault
        except ValueError as error:
            raise InputError(f"its outputs do not fit the model's: {error}", where=str(path)) from error
        _check_model(sums, new, source.model)
        metrics = evaluate_metrics(source.eval, {"reference": reference, RUNTIME: renamed})
    found = _report(path, file, new, {RUNTIME: figures}, {RUNTIME: sums}, metrics, sha256, renamed.remarks)
    return Report.from_json(found.to_json())  # rounded as NEW's numbers are


def _report(
    path: Path,
    file: onnx.ModelProto,
    new: Report,
    outputs: Mapping[str, Mapping[str, Figures]],
    sums: Mapping[str, Mapping[str, Sums]],
    metrics: Mapping[str, Mapping[str, float | None]],
    sha256: str | None,
    remarks: Sequence[str],
) -> Report:
    return Report(
        model={"name": path.name, "kind": "onnx"},
        recipe={},
        environment={},
        calibration={**new.calibration, "sha256": sha256},
        warnings=tuple(remarks),
        outputs=outputs,
        metrics=metrics,
        sizes=Sizes(new.sizes.float_parameters, {"model.onnx": _bytes_of(file, path)}),
        sample_sums=AllSums(sums, {}),
    )


def _read(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except Exception as error:  # protobuf's own kind derives from Exception only
        raise InputError(
            "is neither a report, an output folder nor an ONNX file", where=str(path), fix="give one of these"
        ) from error
    if not model.graph.output:
        raise InputError("is an ONNX file without outputs", where=str(path))
    return model


def _load(artifact: Artifact) -> Session:
    try:
        return OnnxRuntime().load(artifact)
    except RuntimeFault as fault:
        if fault.fix:  # onnxruntime itself is what is missing
            raise
        raise InputError(fault.what, where=str(artifact.model)) from fault


def _program(source: Source, new: Report) -> tuple[Program, str | None]:
    """The model in float with the samples of `new`, and these samples' hash."""
    assert source.model is not None
    kept = {"input": "inputs", "dynamic": "dynamic", "calib-samples": "calib_samples", "seed": "seed"}
    values: dict[str, Any] = {field: new.recipe[key] for key, field in kept.items() if key in new.recipe}
    recipe = Recipe(**values, calib=source.calib, factory=source.factory, trust_model=source.trust_model)
    prepared = prepare(load_model(source.model, factory=recipe.factory, trust=recipe.trust_model), recipe)
    if prepared.sha256 != new.calibration.get("sha256"):
        raise InputError(
            f"these are not the samples that NEW was validated on ({new.calibration.get('source')})",
            where="--calib",
            fix="give --calib as compile was given it",
        )
    rules = backend_for("onnx", ()).rules
    program = capture(prepared.program, prepared.calibration, rules, dynamic=prepared.dynamic, seed=recipe.seed)
    return program, prepared.sha256


def _check_model(sums: Mapping[str, Sums], new: Report, model: Path) -> None:
    for outputs in new.sample_sums.outputs.values():
        for name, ours in outputs.items():
            other = sums.get(name)
            if other is None or not math.isclose(sum(ours.signal), sum(other.signal), rel_tol=SAME_SIGNAL):
                what = f"its output {name} is not that of the model NEW was made of"
                raise InputError(what, where=f"--model {model}", fix="give the model that compile was given")


def _names(file: onnx.ModelProto) -> tuple[tuple[str, ...], tuple[str, ...]]:
    weights = {tensor.name for tensor in file.graph.initializer}
    inputs = tuple(value.name for value in file.graph.input if value.name not in weights)
    return inputs, tuple(value.name for value in file.graph.output)


def _fitting(file: onnx.ModelProto, batches: Sequence[Batch], path: Path) -> list[Batch]:
    """The samples in batches of the size the file takes. Raises InputError naming the first input that does not fit."""
    names, _ = _names(file)
    given = {name: value.numpy() for name, value in batches[0].items()}
    if set(names) != set(given):
        what = f"takes {', '.join(names)}, but the model takes {', '.join(given)}"
        raise InputError(what, where=str(path), fix="export it with the same names of inputs")
    sizes = set()
    for value in file.graph.input:
        if value.name not in given:
            continue
        array, tensor = given[value.name], value.type.tensor_type
        shape = [axis.dim_value if axis.HasField("dim_value") else None for axis in tensor.shape.dim]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        fits = len(shape) == array.ndim and all(
            size in (None, there) for size, there in zip(shape[1:], array.shape[1:], strict=True)
        )
        if not fits or dtype != array.dtype:
            wanted = f"{dtype} {['any' if size is None else size for size in shape]}".replace("'", "")
            what = f"input {value.name} is {wanted}, but the samples are {array.dtype} {list(array.shape)}"
            raise InputError(what, where=str(path), fix="export it for the model's own inputs")
        sizes |= {shape[0]} if shape else set()
    fixed = next((size for size in sizes if size), None)
    if fixed is None:
        return list(batches)
    whole: list[Batch] = [small for batch in batches for small in cut(batch, fixed)]
    if any(len(next(iter(batch.values()))) != fixed for batch in whole):
        count = sum(len(next(iter(batch.values()))) for batch in batches)
        what = f"takes batches of {fixed}, which {count} held-out samples do not make up"
        raise InputError(what, where=str(path), fix="export it with a free batch")
    return whole


class _Renamed(Session):
    """A session whose outputs go by the model's names: by name where these are the same, else in order."""

    def __init__(self, session: Session, outputs: Sequence[str], path: Path) -> None:
        self._session = session
        self.inputs, self.outputs = session.inputs, tuple(outputs)
        theirs, self.remarks = session.outputs, []
        if set(outputs) <= set(theirs):
            self._source = {name: name for name in outputs}
            return
        if len(theirs) != len(outputs):
            what = f"has the outputs {', '.join(theirs)}, but the model has {', '.join(outputs)}"
            raise InputError(what, where=str(path), fix="export it with the same outputs")
        self._source = dict(zip(outputs, theirs, strict=True))
        pairs = ", ".join(f"{theirs} is {ours}" for ours, theirs in self._source.items())
        self.remarks.append(f"outputs of {path.name} are taken in order: {pairs}")

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by the model's names."""
        values = self._session.run(feeds)
        return {name: values[source] for name, source in self._source.items()}


def _bytes_of(file: onnx.ModelProto, path: Path) -> int:
    """The file and what it keeps beside it."""
    beside = {
        entry.value for tensor in file.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    return path.stat().st_size + sum((path.parent / str(name)).stat().st_size for name in beside)
