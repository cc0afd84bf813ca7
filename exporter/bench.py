"""`qexport bench OUT`: the artifact's latency and throughput beside the network in float.

Both run in onnxruntime in one process, in turns, so that whatever else the machine does slows both; the figures are
medians, and the ratio is what to quote. The float network is a file of the user's, or the artifact's own graph with
float weights and without rounding: what passes added to it (caps per channel of `cle`) is in both.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from exporter.errors import InputError
from exporter.float_twin import make_float
from exporter.lowering.to_onnx import save
from exporter.render.text import plural
from exporter.report_files import add_latency
from runtimes.base import Array, Artifact, RuntimeFault, Session
from runtimes.ort import OnnxRuntime

MODEL = "model.onnx"
WARM_UP = 3


@dataclasses.dataclass(frozen=True)
class Timing:
    """Medians in seconds of one run with `batch` samples."""

    batch: int
    float_s: float
    quantized_s: float

    @property
    def ratio(self) -> float:
        """How many times faster the quantized network is."""
        return self.float_s / self.quantized_s


@dataclasses.dataclass(frozen=True)
class BenchResult:
    """What was measured and how."""

    timings: tuple[Timing, ...]
    threads: int
    rounds: int


def bench(
    out: Path, *, batches: Sequence[int], length: int, threads: int, rounds: int, float_model: Path | None = None
) -> BenchResult:
    """Time OUT/model.onnx beside `float_model` (ONNX, same inputs) or its float twin, with each size of `batches`.

    The result goes into OUT's timings.json and report.html too, where OUT has a report.

    `length` is the size of free axes other than the first. A model whose first axis is fixed is timed at that size.
    Raises InputError when there is no model, or one does not take inputs of that length.
    """
    path = out / MODEL
    if not path.is_file():
        raise InputError(f"has no {MODEL}", where=str(out), fix="give a folder made with --target onnx")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx-ir's errors have no common kind
        raise InputError(f"{MODEL} is damaged: {type(error).__name__}", where=str(out)) from error
    inputs = tuple(str(value.name) for value in model.graph.inputs)
    outputs = tuple(str(value.name) for value in model.graph.outputs)
    feeds = {batch: _feeds(model, batch, length) for batch in batches}
    sizes = {len(next(iter(values.values()))): values for values in feeds.values()}
    runtime = OnnxRuntime(threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        twin = float_model
        if twin is None:
            twin = Path(folder) / MODEL
            if not make_float(model):
                raise InputError("computes in float: nothing to compare", where=str(path), fix="give --float")
            save(model, twin)
        try:
            pair = [runtime.load(Artifact("onnxruntime", file, inputs, outputs)) for file in (twin, path)]
            timings = tuple(_time(pair, batch, values, rounds) for batch, values in sizes.items())
        except RuntimeFault as fault:
            fix = fault.fix or "does the model take inputs of this size? give --batch and --length"
            raise InputError(fault.what, where=str(out), fix=fix) from fault
    result = BenchResult(timings, threads, rounds)
    add_latency(out, dataclasses.asdict(result))
    return result


def render(result: BenchResult) -> RenderableType:
    """A line for each number of samples."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in ("samples", "float ms", "quantized ms", "float /s", "quantized /s", "times as fast"):
        table.add_column(heading, justify="right")
    for timing in result.timings:
        table.add_row(
            str(timing.batch),
            f"{1000 * timing.float_s:.3f}",
            f"{1000 * timing.quantized_s:.3f}",
            f"{timing.batch / timing.float_s:.1f}",
            f"{timing.batch / timing.quantized_s:.1f}",
            f"{timing.ratio:.2f}",
        )
    threads = plural(result.threads, "thread") if result.threads else "onnxruntime's own number of threads"
    how = f"\nmedians of {result.rounds} runs of each in turns, {threads}"
    return Group(table, Text(how, style="dim"))


def _time(pair: Sequence[Session], batch: int, feeds: Mapping[str, Array], rounds: int) -> Timing:
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + WARM_UP):
        for session, times in zip(pair, seconds, strict=True):
            started = time.perf_counter()
            session.run(feeds)
            if turn >= WARM_UP:
                times.append(time.perf_counter() - started)
    return Timing(batch, *(statistics.median(times) for times in seconds))


def _feeds(model: ir.Model, batch: int, length: int) -> dict[str, Array]:
    """Normal numbers; ones where integers are taken, which are valid indices and masks."""
    generator = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        assert value.shape is not None
        assert value.dtype is not None
        free = (batch, *[length] * len(value.shape))
        shape = [size if isinstance(size, int) else free[axis] for axis, size in enumerate(value.shape)]
        dtype = value.dtype.numpy()
        is_float = np.issubdtype(dtype, np.floating)
        feeds[str(value.name)] = (generator.standard_normal(shape) if is_float else np.ones(shape)).astype(dtype)
    return feeds
