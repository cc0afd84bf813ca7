"""A TensorRT engine beside an engine of the float network, on the GPU.

An engine cannot be turned back into float, so the float one is made beforehand and given:

    qexport MODEL --passes fold-bn --target trt --out FLOAT
    qexport bench OUT --float FLOAT
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from exporter.backends.tensorrt.build import MODULES, Flavor, available_flavor
from exporter.backends.tensorrt.bundle import DESCRIPTION
from exporter.backends.tensorrt.bundle import MODEL as GRAPH
from exporter.build_bundle import BUNDLE, ENGINE, BundlePlace, locate
from exporter.errors import InputError, TargetError
from exporter.inspect_out import REPORT
from exporter.report import Report
from runtimes.base import Artifact, RuntimeFault, Session
from runtimes.trt import TensorRT

MODEL = "model.onnx"
FLOAT = "make one with `qexport MODEL --passes fold-bn --target trt --out FLOAT` and give --float FLOAT"


@dataclasses.dataclass(frozen=True)
class Engine:
    """An engine, the ONNX graph it was built of, and its flavor."""

    file: Path
    graph: Path
    flavor: Flavor


def holds_engine(path: Path) -> bool:
    """True for an engine file, a bundle, and an output folder of the TensorRT target alone."""
    if path.suffix == ".engine" or (path / DESCRIPTION).is_file():
        return True
    return not (path / MODEL).is_file() and any((path / name).exists() for name in (ENGINE, BUNDLE))


def find_engine(out: Path, flavor: Literal["auto"] | Flavor) -> Engine:
    """The engine of an output folder or a bundle; the flavor `auto` is the one that built it.

    Raises InputError when there is none, and TargetError when nothing says its flavor and no TensorRT works here.
    """
    place = locate(out)
    if place is None:
        what = f"holds no TensorRT engine with its bundle ({BUNDLE}/{DESCRIPTION})"
        raise InputError(what, where=str(out), fix="give the output folder of --target trt")
    file = _built(place, out)
    return Engine(file, place.folder / GRAPH, _flavor_of(file) if flavor == "auto" else flavor)


@contextlib.contextmanager
def engine_pair(engine: Engine, graph: ir.Model, float_model: Path | None) -> Iterator[tuple[Session, Session]]:
    """(float, quantized); `float_model` is an engine file, or an output folder or bundle that has one.

    Raises InputError when it is missing or not an engine of the same inputs and outputs, and TargetError when the
    quantized engine cannot be loaded: without the library or its GPU.
    """
    if float_model is None:
        raise InputError("an engine is timed beside a float engine", where=str(engine.file), fix=FLOAT)
    in_float = _float_engine(float_model)
    inputs = tuple(str(value.name) for value in graph.graph.inputs)
    outputs = tuple(str(value.name) for value in graph.graph.outputs)
    runtime = TensorRT(flavor=engine.flavor)
    try:
        quantized = runtime.load(Artifact("tensorrt", engine.file, inputs, outputs))
    except RuntimeFault as fault:
        raise TargetError(fault.what, where=str(engine.file), fix=fault.fix) from fault
    try:
        beside = runtime.load(Artifact("tensorrt", in_float, inputs, outputs))
    except RuntimeFault as fault:  # the machine can run engines: it is this file
        raise InputError(fault.what, where=f"--float {in_float}", fix=FLOAT) from fault
    yield beside, quantized


def _float_engine(given: Path) -> Path:
    if given.is_file() and given.suffix != ".onnx":
        return given
    place = locate(given)
    if place is None:
        what = "is no engine" if given.exists() else "no such file or folder"
        raise InputError(what, where=f"--float {given}", fix=FLOAT)
    return _built(place, given)


def _built(place: BundlePlace, given: Path) -> Path:
    if not place.engine.is_file():
        fix = f"build it on the machine that has the GPU: qexport build {given}"
        raise InputError(f"has no {ENGINE} yet", where=str(given), fix=fix)
    return place.engine


def _flavor_of(engine: Path) -> Flavor:
    """The flavor in the report beside it; of an engine without one that which `qexport build` takes here."""
    report = engine.with_name(REPORT)
    if report.is_file():
        try:
            stated = Report.from_json(report.read_text(encoding="utf-8")).engine.get("flavor")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"its report cannot be read: {error}", where=str(engine.parent)) from error
        for flavor in MODULES:
            if stated == flavor:
                return flavor
    found = available_flavor("auto")
    if found is None:
        raise TargetError("no TensorRT works on this machine", where=str(engine), fix="see `qexport doctor`")
    return found
