"""The straight line: load, prepare, capture, passes, lower, build, validate, report. One call a stage."""

import contextlib
import dataclasses
import platform
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn

from exporter.backends import backend_for
from exporter.backends.base import Backend, LoweringError
from exporter.backends.tensorrt.bundle import EngineResult
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.budget import fit_budget, shortfall
from exporter.capture import capture
from exporter.checkpoint import save_checkpoint
from exporter.device import device_for
from exporter.engine import build_engine, engine_facts
from exporter.errors import InputError, InternalError, TargetError
from exporter.foreign.adopt import adopt
from exporter.gates import GATE_FAILED, evaluate, exit_code, parse_gate
from exporter.judge import judge_all
from exporter.load import Loaded, load_model
from exporter.lowering.lowered import Lowered
from exporter.output import OutputFolder, beside, file_sha256, file_sizes, write_manifest
from exporter.pinned import write_chosen
from exporter.prepare import Prepared, prepare
from exporter.progress import Progress, Silent
from exporter.recipe import Recipe
from exporter.recipe_values import InputSpec
from exporter.report import Budget, Json, PassRecordView, Report, Sizes, SkipView
from exporter.report_files import write_reports
from exporter.sensitivity import measure_sensitivity
from exporter.torchrun import joined
from exporter.up_to_date import compile_key, up_to_date
from exporter.versions import versions
from passes import PASSES
from passes.base import PassError, PassRecord, Pipeline, Program, TargetRules
from passes.cache import Cache
from passes.memory import Memory
from passes.ranks import Ranks
from passes.threads import single_thread
from runtimes.base import RuntimeFault

INCOMPLETE = 4


@dataclasses.dataclass(frozen=True)
class CompileResult:
    """What one compilation came to; `messages` are lines for stderr, `reused` says that nothing was done again."""

    report: Report
    out: Path
    exit_code: int
    messages: tuple[str, ...]
    reused: bool = False


def worst_code(codes: Iterable[int]) -> int:
    """The exit code of several compilations: a failed gate wins over a target that could not be completed."""
    found = set(codes)
    return next((code for code in (GATE_FAILED, INCOMPLETE) if code in found), 0)


def compile_path(model: Path, recipe: Recipe, *, progress: Progress) -> CompileResult:
    """Compile the model in a file or folder. Raises QExportError.

    Under torchrun only the first rank returns: the others end with SystemExit when there is no more to share.
    With `recipe.reuse` an output folder that is up to date stays as it is, and one that is not is replaced.
    """
    if recipe.reuse:
        report = up_to_date(recipe.out, compile_key(model, recipe), recipe)
        if report is not None:
            return CompileResult(report, recipe.out, exit_code(report.gates), tuple(_failed_gates(report)), reused=True)
        recipe = dataclasses.replace(recipe, force=True)
    with joined(device_for(recipe.device)) as ranks, output_of(recipe, ranks) as output, faults():
        shown = Silent() if ranks.rank else progress
        shown.stage("load")
        loaded = load_model(model, factory=recipe.factory, trust=recipe.trust_model)
        return _compile(loaded, recipe, output, shown, None, ranks)


def compile_model(
    model: nn.Module | torch.export.ExportedProgram,
    example_inputs: Mapping[str, Tensor] | tuple[Tensor, ...],
    recipe: Recipe | None = None,
    *,
    calibration: object = None,
    out: str | Path | None = None,
) -> Report:
    """Compile a model in memory; `calibration` is {input: [n, ...]}, batches of that, or a function that gives either.

    `example_inputs` say the inputs' shapes and, for a mapping, their names; they calibrate where nothing else is given.
    A module is captured in eval mode, and has the modes it came with when this returns. Raises QExportError.
    """
    recipe = recipe or Recipe()
    if out is not None:
        recipe = dataclasses.replace(recipe, out=Path(out))
    if isinstance(model, nn.Module):
        loaded = Loaded("module", Path(type(model).__name__), module=model)
    else:
        loaded = Loaded("exported", Path("program"), program=model)
    values = dict(example_inputs) if isinstance(example_inputs, Mapping) else dict(enumerate(example_inputs))
    specs = tuple(
        InputSpec(name if isinstance(name, str) else None, tuple(value.shape), str(value.dtype).removeprefix("torch."))
        for name, value in values.items()
    )
    if loaded.module is not None and not recipe.inputs:
        recipe = dataclasses.replace(recipe, inputs=specs)
    alone = Ranks(device=device_for(recipe.device))
    with output_of(recipe, alone) as output, faults(), _in_eval_mode(loaded.module):
        given = calibration if calibration is not None or recipe.calib is not None else [example_inputs]
        return _compile(loaded, recipe, output, Silent(), given, alone).report


@dataclasses.dataclass(frozen=True)
class Output:
    """Where a run writes: its unfinished output folder, and the finished layers beside it (None: they are not kept)."""

    folder: Path
    cache: Path | None


@contextlib.contextmanager
def output_of(recipe: Recipe, ranks: Ranks) -> Iterator[Output]:
    """The first rank's output folder; the others write nothing but scratch files and snapshots of their walk."""
    if not ranks.is_first:
        with tempfile.TemporaryDirectory() as scratch:
            yield Output(Path(scratch), beside(recipe.out.expanduser().resolve(), "cache") if recipe.resume else None)
    else:
        output = OutputFolder(recipe.out, force=recipe.force)
        with output as folder:
            yield Output(folder, output.cache if recipe.resume else None)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module | None) -> Iterator[None]:
    """Every module of the model in eval mode, afterwards in its own again."""
    modes = [(module, module.training) for module in model.modules()] if model is not None else []
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """Faults of passes, backends and runtimes as errors of ours: the one place where they are wrapped."""
    try:
        yield
    except PassError as error:
        raise InputError(error.what, where=error.node or "--passes", fix=error.fix) from error
    except LoweringError as error:
        raise InputError(str(error), where="--target") from error
    except RuntimeFault as error:
        if error.fix:
            raise TargetError(error.what, fix=error.fix) from error
        raise InternalError(error.what) from error


class _Clock:
    """Seconds by stage, and the stages as the user sees them."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", time.perf_counter()

    def stage(self, name: str) -> None:
        self.stop()
        self._stage = name
        self.progress.stage(name)

    def stop(self) -> None:
        now = time.perf_counter()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._since, self._stage = now, ""


def _compile(
    loaded: Loaded, recipe: Recipe, output: Output, progress: Progress, given: object, ranks: Ranks
) -> CompileResult:
    clock, folder, key = _Clock(progress), output.folder, compile_key(loaded.path, recipe)
    recipe = recipe.for_model(quantized=bool(loaded.weights))
    with single_thread():  # a convolution, too, differs in its last bits between one thread and two
        clock.stage("capture")
        backends = [
            backend_for(
                target, recipe.trt_arch, recipe.weights_as, recipe.trt_flavor, recipe.dtype, recipe.trt_profiles
            )
            for target in recipe.target
        ]
        prepared = prepare(loaded, recipe, given)
        pipeline = Pipeline(recipe.parsed_passes, PASSES)
        damaged: list[str] = []

        def quantize(recipe: Recipe) -> tuple[Program, list[PassRecord]]:
            program = capture(
                prepared.program,
                prepared.calibration,
                rules_for(backends),
                dynamic=prepared.dynamic,
                layer_rules=recipe.layer_rules,
                seed=recipe.seed,
            )
            program.on_step, program.on_part = progress.step, progress.part
            program.memory = Memory(recipe.memory, folder)
            program.ranks = ranks
            if output.cache is not None:
                program.cache = Cache(output.cache, str(versions()), damaged.append, ranks)
            adopt(program, loaded.weights, loaded.path)
            return program, pipeline.run(program, before=lambda step: clock.stage(step.work.name))

        budget: Budget | None = None
        if recipe.budget is not None:
            recipe, budget = fit_budget(recipe, lambda tried: quantize(tried)[0], progress.step)
        program, records = quantize(recipe)
        if not ranks.is_first:
            if program.cache is not None:
                program.cache.drop_walks()
            print(*(f"warning: rank {ranks.rank}: {line}\n" for line in damaged), sep="", end="", file=sys.stderr)
            raise SystemExit  # what is left is the first rank's

        lowered: dict[str, Lowered] = {}
        for backend in backends:
            clock.stage(f"lower to {backend.name}")
            lowered[backend.name] = backend.lower(program, _folder_of(backend, folder))
        clock.stage("save the checkpoint")
        save_checkpoint(program, folder)

        engine: EngineResult | None = None
        incomplete: list[str] = []
        if "trt" in lowered:
            clock.stage("build the TensorRT engine")
            engine, incomplete = build_engine(recipe, folder)

        clock.stage("validate")
        report = judge_all(program, recipe, lowered, engine, folder)
        if recipe.sensitivity:
            clock.stage("sensitivity")
            report = dataclasses.replace(report, sensitivity=measure_sensitivity(program, recipe.eval))
        clock.stop()
    report = dataclasses.replace(
        report,
        model={"name": loaded.path.name, "kind": loaded.kind, "inputs": list(program.calibration.batches[0])},
        recipe=recipe.to_json(),
        environment={**versions(), "machine": platform.machine()},
        engine=engine_facts(engine),
        calibration={
            "source": prepared.calibration.source,
            "samples": _count(prepared.calibration.batches),
            "held_out": _count(prepared.calibration.holdout),
            "sha256": prepared.sha256,
        },
        warnings=(*prepared.warnings, *shared_rules(backends), *report.warnings, *incomplete),
        passes=tuple(_record(record) for record in records),
        sizes=Sizes(float_bytes(program.reference), file_sizes(folder)),
    )
    gates = evaluate([parse_gate(gate) for gate in recipe.gates], report)
    report = dataclasses.replace(report, budget=budget, gates=gates)
    write_chosen(folder, recipe)
    write(folder, report, clock.seconds, prepared, recipe, loaded, key)
    code = exit_code(report.gates)
    warnings = (*prepared.warnings, *damaged, *incomplete, *shortfall(budget))
    messages = [*(f"warning: {line}" for line in warnings), *_failed_gates(report)]
    return CompileResult(report, recipe.out, code or (INCOMPLETE if incomplete else 0), tuple(messages))


def rules_for(backends: list[Backend]) -> TargetRules:
    """The strictest of the targets' rules: one program serves them all."""
    rules = backends[0].rules
    for backend in backends[1:]:
        rules = rules.strictest(backend.rules)
    return rules


def shared_rules(backends: list[Backend]) -> list[str]:
    """The remark that one program for several targets has none of their liberties."""
    names = " and ".join(backend.name for backend in backends)
    return [f"one program for {names}, made under the strictest of their rules"] if len(backends) > 1 else []


def _folder_of(backend: Backend, folder: Path) -> Path:
    """ONNX lies at the top; a bundle in a folder of its own."""
    if not isinstance(backend, TensorRTBackend):
        return folder
    (folder / "trt").mkdir()
    return folder / "trt"


def write(
    folder: Path,
    report: Report,
    seconds: Mapping[str, float],
    prepared: Prepared,
    recipe: Recipe,
    loaded: Loaded,
    key: str | None,
) -> None:
    """The reports, the timings and the manifest."""
    write_reports(folder, report, seconds)
    sha256 = file_sha256(loaded.path) if loaded.path.is_file() else None
    write_manifest(folder, recipe=recipe.to_json(), calibration_sha256=prepared.sha256, model_sha256=sha256, key=key)


def float_bytes(graph: fx.GraphModule) -> int:
    """Bytes of the floating-point tensors a graph holds, shared ones once."""
    return sum(value.nbytes for value in graph.buffers() if value.dtype.is_floating_point)


def _count(batches: tuple[Mapping[str, Tensor], ...]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in batches)


def _record(record: PassRecord) -> PassRecordView:
    result = record.result
    return PassRecordView(
        name=record.name,
        options={name: cast(Json, value) for name, value in record.options.items()},
        inserted=record.inserted,
        changed=result.changed,
        skipped=tuple(SkipView(skip.node, skip.why) for skip in result.skipped),
        measured=result.measured,
    )


def _failed_gates(report: Report) -> list[str]:
    return [
        f"gate failed: {gate.expr} (is {gate.value:.6g} in {gate.where})"
        if gate.value is not None
        else f"gate not measured: {gate.expr}"
        for gate in report.gates
        if not gate.passed
    ]
