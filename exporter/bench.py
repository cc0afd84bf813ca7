"""`qexport bench OUT`: the artifact's latency and throughput beside the network in float.

Both run in one process, in turns, so that whatever else the machine does slows both; the figures are medians, and the
ratio is what to quote. An ONNX file is timed beside a file of the user's or its own graph in float
(`exporter.bench_onnx`), a TensorRT engine beside an engine of the float network (`exporter.bench_engine`). What is
timed is the network: where it runs on a GPU, its inputs and outputs are there and stay there.
"""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from exporter.backends.tensorrt.build import Flavor
from exporter.bench_engine import engine_pair, find_engine, holds_engine
from exporter.bench_onnx import onnx_pair
from exporter.errors import InputError
from exporter.render.text import ran_in
from exporter.report_files import add_latency
from runtimes.base import Array, RuntimeFault, Session

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
    """What was measured and how. `runtime` is onnxruntime or the engine's flavor, which has no `threads`."""

    timings: tuple[Timing, ...]
    runtime: Literal["onnxruntime"] | Flavor
    threads: int | None
    rounds: int


def bench(
    out: Path,
    *,
    batches: Sequence[int],
    length: int,
    threads: int,
    rounds: int,
    float_model: Path | None = None,
    trt_flavor: Literal["auto"] | Flavor = "auto",
) -> BenchResult:
    """Time OUT's artifact beside `float_model` (of the same kind and inputs), with each size of `batches`.

    OUT/model.onnx is timed, without `float_model` beside its float twin; or, where there is none or `float_model` is an
    engine, OUT's engine, with the TensorRT of `trt_flavor` (auto: the one that built it). The result goes into OUT's
    timings.json and report.html too, where OUT has a report.

    `length` is the size of free axes other than the first. A model whose first axis is fixed is timed at that size.
    Raises InputError when there is no artifact, nothing to compare it with, or one does not take inputs of that length,
    and TargetError when the engine cannot be run on this machine.
    """
    wanted = holds_engine(out) or (float_model is not None and holds_engine(float_model))
    engine = find_engine(out, trt_flavor) if wanted else None
    graph = _graph(engine.graph if engine else out / MODEL)
    pair = engine_pair(engine, graph, float_model) if engine else onnx_pair(out / MODEL, graph, float_model, threads)
    try:
        with pair as sessions:
            timings = tuple(_time(sessions, feeds, rounds) for feeds in _feeds_by_size(graph, batches, length).values())
    except RuntimeFault as fault:
        fix = fault.fix or "does the model take inputs of this size? give --batch and --length"
        raise InputError(fault.what, where=str(out), fix=fix) from fault
    if engine:
        result = BenchResult(timings, engine.flavor, None, rounds)
    else:
        result = BenchResult(timings, "onnxruntime", threads, rounds)
    add_latency(engine.file.parent if engine else out, dataclasses.asdict(result))
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
    how = f"\nmedians of {result.rounds} runs of each in turns, {ran_in(result.runtime, result.threads)}"
    return Group(table, Text(how, style="dim"))


def _time(pair: tuple[Session, Session], feeds: Mapping[str, Array], rounds: int) -> Timing:
    seconds: tuple[list[float], list[float]] = ([], [])
    with pair[0].prepared(feeds) as run_float, pair[1].prepared(feeds) as run_quantized:
        for turn in range(rounds + WARM_UP):
            for run, times in zip((run_float, run_quantized), seconds, strict=True):
                started = time.perf_counter()
                run()
                if turn >= WARM_UP:
                    times.append(time.perf_counter() - started)
    return Timing(_samples(feeds), *(statistics.median(times) for times in seconds))


def _graph(path: Path) -> ir.Model:
    """The artifact's graph in ONNX: it says what the inputs and outputs are."""
    if not path.is_file():
        raise InputError(f"has no {path.name}", where=str(path.parent), fix="give an output folder of qexport")
    try:
        return ir.load(path)
    except Exception as error:  # protobuf's and onnx-ir's errors have no common kind
        raise InputError(f"{path.name} is damaged: {type(error).__name__}", where=str(path.parent)) from error


def _feeds_by_size(model: ir.Model, batches: Sequence[int], length: int) -> dict[int, dict[str, Array]]:
    """{samples: feeds}; a model whose first axis is fixed has one size."""
    feeds = [_feeds(model, batch, length) for batch in batches]
    return {_samples(values): values for values in feeds}


def _samples(feeds: Mapping[str, Array]) -> int:
    return len(next(iter(feeds.values())))


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
