"""Everything that can run here, against the float model: outputs, layers, stages, causes, metrics."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from exporter.backends.tensorrt.bundle import EngineResult
from exporter.backends.tensorrt.cast import TYPES, cast, typed
from exporter.backends.tensorrt.widen import in_float32
from exporter.blocks import NodeByNode
from exporter.causes import explain, worth_a_look
from exporter.engine import engine_session
from exporter.evidence import gather
from exporter.histograms import layer_histograms
from exporter.kernels import kernel_of_layers, optimized_kernels
from exporter.leftovers import left_in_float
from exporter.lowering.lowered import Dtype, Lowered
from exporter.progress import steps
from exporter.recipe import Recipe
from exporter.report import AllSums, Report, Sums
from exporter.stage_noise import measure_stages
from exporter.stages import with_stages
from exporter.validate import (
    OutputFigures,
    compare_layers,
    compare_outputs,
    eager_session,
    evaluate_metrics,
    layer_batches,
    layer_bytes,
)
from passes.base import Program
from runtimes.base import OnDemand, Session
from runtimes.ort import OnnxRuntime

COPIES = 5
"""Of a model's file that are held while onnxruntime optimizes it, and while the stages of its layers are told apart."""

NETWORKS = 10
"""Whose layers' outputs are held at once while the stages are told apart."""


def judge_all(
    program: Program, recipe: Recipe, lowered: Mapping[str, Lowered], engine: EngineResult | None, folder: Path
) -> Report:
    """Outputs, layers and metrics of everything that can run here, against the float model."""
    program.memory.settle()
    rounded = lowered.get("trt")
    if rounded is None or rounded.graph is rounded.simulated:
        return _judge(program, recipe, lowered, engine, folder)
    # The file is held to its graph without the rounding to 16 bits that `simulated` has.
    with in_float32(rounded) as trt:
        report = _judge(program, recipe, {**lowered, "trt": trt}, engine, folder)
    parity = dict(report.parity)
    if recipe.dtype != "bfloat16":  # for which onnxruntime has few kernels
        one, other = eager_session(program, rounded.simulated), OnDemand(OnnxRuntime(optimize=False), rounded.artifact)
        parity["tensorrt_16_bit"] = compare_outputs(one, other, program.calibration.holdout)
    alone: dict[str, OutputFigures] = {}
    if recipe.dtype != "float32":
        alone[recipe.dtype] = cast_alone(program, recipe.dtype)
    return dataclasses.replace(report, parity=parity, cast=alone)


def cast_alone(program: Program, dtype: Dtype) -> OutputFigures:
    """The float model in a 16-bit type, in eager torch, against float32."""
    float_model = program.float_twin or program.graph
    halved = cast(typed(float_model, program.calibration.batches), TYPES[dtype])
    reference = eager_session(program, program.reference)
    return compare_outputs(reference, eager_session(program, halved), program.calibration.holdout)


def _judge(
    program: Program, recipe: Recipe, lowered: Mapping[str, Lowered], engine: EngineResult | None, folder: Path
) -> Report:
    main = lowered.get("onnx") or next(iter(lowered.values()))
    reference = eager_session(program, program.reference)
    sessions: dict[str, Session] = {"eager_quantized": eager_session(program, main.simulated)}
    parity: dict[str, tuple[Session, Session]] = {}
    kernels: Mapping[str, str | None] = engine.kernels if engine else {}
    folded = engine.folded if engine else ()
    warnings = list(left_in_float(program))
    runtime = OnnxRuntime(provider=recipe.provider, threads=recipe.threads)
    roomy = fits(program, folder, warnings)
    if "onnx" in lowered:
        plain = eager_session(program, main.graph)
        parity["onnxruntime_unoptimized"] = (plain, NodeByNode(main.artifact))
    if "onnx" in lowered and roomy:
        artifact = main.artifact
        sessions["onnxruntime"] = OnDemand(runtime, artifact)
        parity["onnxruntime"] = (sessions["eager_quantized"], sessions["onnxruntime"])
        kernels = kernel_of_layers(
            artifact.model, optimized_kernels(artifact, runtime), {layer.name: layer.codes for layer in main.layers}
        )
        folded = tuple(name for name, kernel in kernels.items() if kernel is None)
    if "trt" in lowered:
        trt = lowered["trt"]
        plain = eager_session(program, trt.graph)
        parity["tensorrt_dialect"] = (plain, NodeByNode(trt.artifact))
        session = engine_session(trt, engine, folder, warnings)
        if session is not None:
            sessions["tensorrt"] = session
            parity["tensorrt"] = (sessions["eager_quantized"], session)
    batches = program.calibration.holdout
    sums: dict[str, dict[str, Sums]] = {name: {} for name in sessions}
    outputs: dict[str, OutputFigures] = {
        name: compare_outputs(reference, session, steps(program.on_step, name, batches, len(batches)), sums[name])
        for name, session in sessions.items()
    }
    layer_sums: dict[str, Sums] = {}
    layers = compare_layers(program, main, kernels, layer_sums)
    program.memory.settle()
    if roomy:
        noises = measure_stages(program, lowered, runtime)
        layers = with_stages(layers, noises)
    layers = explain(layers, gather(program), folded)
    return Report(
        model={},
        recipe={},
        environment={},
        calibration={},
        warnings=tuple(warnings),
        layers=layers,
        outputs=outputs,
        histograms=layer_histograms(program, main, worth_a_look(layers)),
        parity={
            name: compare_outputs(one, other, steps(program.on_step, f"parity, {name}", batches, len(batches)))
            for name, (one, other) in parity.items()
        },
        metrics=evaluate_metrics(recipe.eval, {"reference": reference, **sessions}),
        sample_sums=AllSums(sums, layer_sums),
    )


def fits(program: Program, folder: Path, warnings: list[str]) -> bool:
    """True when there is room for several copies of the model's file, and of its layers' outputs, at once."""
    limit = program.memory.limit
    if not limit:
        return True
    needed = COPIES * max(path.stat().st_size for path in folder.rglob("*.onnx*"))
    if needed <= limit:
        batch = layer_batches(program)[0]
        needed += NETWORKS * layer_bytes(program) * len(next(iter(batch.values())))
    if needed <= limit:
        return True
    warnings.append(
        f"run node by node only: onnxruntime as shipped, its kernels and the stages of layers were not measured, "
        f"as they take about {needed / 1e9:.1f} GB, more than --memory allows"
    )
    return False
