"""`--budget`: bits for each layer by measured sensitivity, within what a user allows for size and accuracy.

Noise of single layers (see `exporter.budget_options`) is taken to add up. From everything in float, the step (layer,
option) that adds the least noise for each byte it saves comes next, until nothing is left to save: a path on which the
size falls and the noise grows (the greedy knapsack; Dantzig 1957, doi 10.1287/opre.5.2.266). Of it is taken

    with a bound on the size        the first point within it: the most accurate assignment of that size
    with bounds on accuracy alone   the last point within them, found by bisection on calibration samples with all
                                    layers' quantized weights put together

A point is proved by quantizing the network under its rules, and asking the bounds of its file and outputs on the
held-out samples; where it fails, points beside it are tried, ATTEMPTS in all.
"""

import dataclasses
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.budget_options import (
    FLOAT,
    Option,
    Options,
    Progress,
    Quantize,
    calibration_batches,
    float_bytes,
    measure_options,
    with_rules,
)
from exporter.budget_terms import FLAG, parse_budget
from exporter.errors import InputError
from exporter.gates import SIZE, Gate, evaluate, margin
from exporter.output import file_sizes
from exporter.recipe import Recipe
from exporter.report import Budget, BudgetLayer, GateResult, Report, Sizes
from exporter.sensitivity import Variant
from exporter.validate import compare_outputs, eager_session, evaluate_metrics
from passes.base import Program
from passes.calibration import Batch
from passes.graph import find_layers
from runtimes.base import Session
from runtimes.ort import OnnxRuntime

ATTEMPTS = 4
BACK = 20
"""Where the accuracy of a point fails its proof, the next is one in so many of the path's steps before it."""

Assignment = Mapping[str, str]
"""{layer: name of the option}"""


def fit_budget(recipe: Recipe, quantize: Quantize, progress: Progress) -> tuple[Recipe, Budget]:
    """The recipe with a rule for every layer and the terms among its gates, and what was measured and chosen.

    `quantize` gives the program that a recipe makes. Raises InputError when there is nothing to choose.
    """
    assert recipe.budget is not None
    terms = parse_budget(recipe.budget)
    if "onnx" not in recipe.target:
        raise InputError("weighs the bytes of model.onnx", where=FLAG, fix="add --target onnx")
    options = measure_options(recipe, quantize, progress)
    path = greedy_path(options.layers)
    sizes = [gate for gate in terms if gate.figure == SIZE]
    point = _first_within(sizes, options, path) if sizes else _last_accurate(terms, options, path, recipe)
    tried: dict[int, tuple[GateResult, ...]] = {}
    while point not in tried and len(tried) < ATTEMPTS:
        progress("proving the budget", len(tried), ATTEMPTS)
        tried[point] = prove(quantize(with_rules(recipe, options.rules(path[point]))), terms, recipe)
        point = _neighbour(point, tried[point], terms, options, path)
    best = min(tried, key=lambda index: _missed(tried[index], terms))
    gates = tuple(dict.fromkeys((*recipe.gates, *(gate.expr for gate in terms))))
    met = all(result.passed or not result.measured for result in tried[best])
    chosen = tuple(_row(name, path[best][name], choices) for name, choices in options.layers.items())
    pinned = dataclasses.replace(with_rules(recipe, options.rules(path[best])), gates=gates)
    return pinned, Budget(recipe.budget, met, chosen)


def shortfall(budget: Budget | None) -> list[str]:
    """The line for a budget that nothing meets."""
    if budget is None or budget.met:
        return []
    return [f"no bits for the layers meet --budget {budget.terms}: these come nearest"]


def greedy_path(layers: Mapping[str, Mapping[str, Option]]) -> list[dict[str, str]]:
    """Assignments from all in float to the smallest, each one step from the one before."""
    assignment = dict.fromkeys(layers, FLOAT)
    path = [dict(assignment)]
    while True:
        best: tuple[float, str, str] | None = None
        for name, options in layers.items():
            now = options[assignment[name]]
            for option in options.values():
                if option.size < now.size:
                    price = (option.noise - now.noise) / (now.size - option.size)
                    if best is None or price < best[0]:  # of equals the first in the graph's order
                        best = price, name, option.name
        if best is None:
            return path
        assignment[best[1]] = best[2]
        path.append(dict(assignment))


def prove(program: Program, terms: Sequence[Gate], recipe: Recipe) -> tuple[GateResult, ...]:
    """The verdict on the terms from the program's file and outputs, on held-out samples."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lowered = OnnxBackend(recipe.weights_as).lower(program, folder)
        runtime = OnnxRuntime(provider=recipe.provider, threads=recipe.threads)
        sessions = {
            "eager_quantized": eager_session(program, lowered.simulated),
            "onnxruntime": runtime.load(lowered.artifact),
        }
        report = _measured(program, sessions, program.calibration.holdout, recipe)
        return evaluate(terms, dataclasses.replace(report, sizes=Sizes(float_bytes(program), file_sizes(folder))))


def _measured(program: Program, sessions: Mapping[str, Session], batches: Sequence[Batch], recipe: Recipe) -> Report:
    reference = eager_session(program, program.reference)
    return Report(
        model={},
        recipe={},
        environment={},
        calibration={},
        outputs={name: compare_outputs(reference, session, batches) for name, session in sessions.items()},
        metrics=evaluate_metrics(recipe.eval, {"reference": reference, **sessions}),
    )


def _first_within(sizes: Sequence[Gate], options: Options, path: Sequence[Assignment]) -> int:
    """The first point whose predicted size is within the bounds, else the last."""
    bound = min(gate.bound for gate in sizes)
    return next((index for index, point in enumerate(path) if options.ratio(point) <= bound), len(path) - 1)


def _last_accurate(terms: Sequence[Gate], options: Options, path: Sequence[Assignment], recipe: Recipe) -> int:
    """The last point within the bounds on accuracy, noise growing along the path; the first where none is."""
    program = options.program
    twin = program.float_twin or program.graph
    nodes = {layer.name: layer.node for layer in find_layers(twin)}
    batches = calibration_batches(program)

    def is_accurate(point: Assignment) -> bool:
        computes = {nodes[name]: choices[point[name]].compute for name, choices in options.layers.items()}
        replaced = {node: compute for node, compute in computes.items() if compute is not None}
        together = Variant(program, twin, replaced)
        report = _measured(program, {"eager_quantized": together, "onnxruntime": together}, batches, recipe)
        return all(result.passed or not result.measured for result in evaluate(terms, report))

    low, high = 0, len(path) - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_accurate(path[middle]) else (low, middle - 1)
    return low


def _neighbour(
    point: int, results: Sequence[GateResult], terms: Sequence[Gate], options: Options, path: Sequence[Assignment]
) -> int:
    """Where to try next: a smaller one where the size fails, a more accurate one where only accuracy is asked for."""
    failed = [
        (gate, result) for gate, result in zip(terms, results, strict=True) if result.measured and not result.passed
    ]
    oversize = [
        result.value / gate.bound for gate, result in failed if gate.figure == SIZE and result.value is not None
    ]
    if oversize:
        wanted = options.ratio(path[point]) / max(oversize)
        return next((index for index in range(point, len(path)) if options.ratio(path[index]) <= wanted), len(path) - 1)
    if failed and all(gate.figure != SIZE for gate in terms):
        return max(0, point - max(1, math.ceil(len(path) / BACK)))
    return point


def _missed(results: Sequence[GateResult], terms: Sequence[Gate]) -> float:
    """How far outside its bounds a point is, each as a share of the bound; the first of equals is kept."""
    return sum(
        max(0.0, -margin(gate.relation, gate.bound, result.value)) / max(abs(gate.bound), 1e-12)
        for gate, result in zip(terms, results, strict=True)
        if result.value is not None
    )


def _row(name: str, chosen: str, options: Mapping[str, Option]) -> BudgetLayer:
    alone = {option.name: -10 * math.log10(option.noise) for option in options.values() if option.noise > 0}
    return BudgetLayer(name, chosen, {option.name: round(option.stored) for option in options.values()}, alone)
