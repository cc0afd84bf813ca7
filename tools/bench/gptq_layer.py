"""GPTQ on one layer, beside the authors' implementation: python -m tools.bench.gptq_layer [--reference PATH]

PATH is a checkout of https://github.com/IST-DASLab/gptq. Both get the same weight and Hessian in the same process on
one thread; errors are relative layer errors tr(E H E^T) / tr(W H W^T), seconds the best of --repeat runs, in turn.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import itertools
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from passes.gptq import GPTQ, quantize_weight
from tools.bench.problem import LayerProblem, layer_problem

Quantize = Callable[[LayerProblem, GPTQ], Tensor]


def ours(problem: LayerProblem, options: GPTQ) -> Tensor:
    """The dequantized weight by passes.gptq."""
    return quantize_weight(problem.weight, problem.hessian, options).dequantize()


@contextlib.contextmanager
def reference(checkout: Path) -> Iterator[Quantize]:
    """The authors' code as a function; what it imports by bare name is visible inside the block only."""
    placeholder: Any = types.ModuleType("transformers")  # it only asks whether the layer is one of its Conv1D
    placeholder.Conv1D = type("Conv1D", (nn.Module,), {})
    before = dict(sys.modules)
    sys.modules["transformers"] = placeholder
    sys.path.insert(0, str(checkout))
    synchronize = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None  # it waits for a GPU whether or not there is one
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            gptq, quant = importlib.import_module("gptq"), importlib.import_module("quant")
        yield lambda problem, options: _by_reference(gptq, quant, problem, options)
    finally:
        torch.cuda.synchronize = synchronize
        sys.path.remove(str(checkout))
        for name in ("gptq", "quant", "transformers"):
            sys.modules.pop(name, None)
            if name in before:
                sys.modules[name] = before[name]


def _by_reference(gptq: Any, quant: Any, problem: LayerProblem, options: GPTQ) -> Tensor:
    outputs, inputs = problem.weight.shape
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight.data = problem.weight.clone()
    solver = gptq.GPTQ(layer)
    solver.quantizer = quant.Quantizer()
    solver.quantizer.configure(options.bits, perchannel=True, sym=options.symmetric, mse=False)
    solver.H = problem.hessian.clone()
    with contextlib.redirect_stdout(io.StringIO()):
        solver.fasterquant(
            blocksize=options.block_size,
            percdamp=options.damp,
            groupsize=options.group_size,
            actorder=options.act_order,
            static_groups=options.act_order and options.group_size > 0,
        )
    return layer.weight.data


def measure(problem: LayerProblem, options: GPTQ, rivals: list[Quantize], repeat: int) -> list[tuple[float, float]]:
    """(error, seconds) of each rival."""
    errors, seconds = [0.0] * len(rivals), [float("inf")] * len(rivals)
    for _, (index, rival) in itertools.product(range(repeat), enumerate(rivals)):
        start = time.perf_counter()
        quantized = rival(problem, options)
        seconds[index] = min(seconds[index], time.perf_counter() - start)
        errors[index] = problem.error(quantized)
    return list(zip(errors, seconds, strict=True))


def report(sizes: list[int], options: list[GPTQ], rivals: list[Quantize], repeat: int) -> None:
    """Print one line for each size and set of options."""
    columns = ["size", "bits", "group", "act_order", "symmetric", "error", "seconds"]
    if len(rivals) > 1:
        columns += ["ref. error", "ref. seconds", "error ratio", "time ratio"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for size in sizes:
        problem = layer_problem(size)
        for chosen in options:
            results = measure(problem, chosen, rivals, repeat)
            (error, seconds), *others = results
            cells: list[object] = [size, chosen.bits, chosen.group_size, chosen.act_order, chosen.symmetric]
            cells += [f"{error:.5f}", f"{seconds:.3f}"]
            for other_error, other_seconds in others:
                cells += [f"{other_error:.5f}", f"{other_seconds:.3f}"]
                cells += [f"{error / other_error:.4f}", f"{seconds / other_seconds:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="GPTQ on one layer: error and seconds")
    parser.add_argument("--sizes", default="512,1024", help="sizes of the square layer problems")
    parser.add_argument("--reference", type=Path, help="checkout of IST-DASLab/gptq to compare with")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    base = GPTQ(damp=0.01)
    options = [
        dataclasses.replace(base, bits=bits, group_size=group_size, act_order=act_order, symmetric=symmetric)
        for bits, group_size, act_order, symmetric in itertools.product((4, 3), (-1, 128), (False, True), (False, True))
    ]
    if arguments.reference is None:
        report(sizes, options, [ours], arguments.repeat)
    else:
        with reference(arguments.reference) as theirs:
            report(sizes, options, [ours, theirs], arguments.repeat)


if __name__ == "__main__":
    main()
