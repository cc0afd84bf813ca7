"""GPTQ on one layer, beside the authors' implementation: python -m tools.bench.gptq_layer [--reference PATH]

PATH is a checkout of https://github.com/IST-DASLab/gptq. All get the same weight and Hessian in the same process on one
thread; errors are relative layer errors tr(E H E^T) / tr(W H W^T), seconds (the processor's, on the CPU) the best of
--repeat runs, in turn. They work where --device says.

    plain     the algorithm of the reference: min-max grids, one pass over the columns
    refined   what passes.gptq does when nothing is said: grids by what errors cost, and passes.refine after it

Ratios are to the reference with the same bits, groups, symmetry and order of columns.
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
from tools.bench.problem import LayerProblem, finished, layer_problem

Quantize = Callable[[LayerProblem, GPTQ], Tensor]


def refined(problem: LayerProblem, options: GPTQ) -> Tensor:
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
    if not torch.cuda.is_available():
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


def plain(problem: LayerProblem, options: GPTQ) -> Tensor:
    """The dequantized weight by passes.gptq as it was published."""
    return refined(problem, dataclasses.replace(options, scale_search="minmax", refine=0))


def measure(problem: LayerProblem, options: GPTQ, rivals: list[Quantize], repeat: int) -> list[tuple[float, float]]:
    """(error, seconds) of each rival."""
    # Other programs on the machine change the processor's seconds little; those of a GPU are not among them.
    clock = time.process_time if problem.weight.device.type == "cpu" else time.perf_counter
    errors, seconds = [0.0] * len(rivals), [float("inf")] * len(rivals)
    for _, (index, rival) in itertools.product(range(repeat), enumerate(rivals)):
        start = clock()
        quantized = finished(rival(problem, options))
        seconds[index] = min(seconds[index], clock() - start)
        errors[index] = problem.error(quantized)
    return list(zip(errors, seconds, strict=True))


def report(
    problems: list[tuple[int, int]], options: list[GPTQ], theirs: Quantize | None, repeat: int, device: str
) -> None:
    """Print one line for each (size, seed) and set of options."""
    columns = ["size", "seed", "bits", "group", "symmetric", "act_order", "plain: error", "s", "refined: error", "s"]
    if theirs is not None:
        columns += ["reference: error", "s", "plain: error ratio", "time ratio", "refined: error ratio", "time ratio"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for size, seed in problems:
        problem = layer_problem(size, seed).to(device)
        for chosen in options:
            results = measure(problem, chosen, [plain, refined, *([theirs] if theirs else [])], repeat)
            cells: list[object] = [size, seed, chosen.bits, chosen.group_size, chosen.symmetric, chosen.act_order]
            for error, seconds in results:
                cells += [f"{error:.5f}", f"{seconds:.3f}"]
            if theirs is not None:
                for error, seconds in results[:2]:
                    cells += [f"{error / results[2][0]:.4f}", f"{seconds / results[2][1]:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="GPTQ on one layer: error and seconds")
    parser.add_argument("--sizes", default="1024", help="sizes of the square layer problems")
    parser.add_argument("--seeds", default="0", help="seeds of the problems")
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--groups", default="128,-1", help="group sizes; -1 is one per output channel")
    parser.add_argument("--natural-order", action="store_true", help="columns as they come instead of act_order")
    parser.add_argument("--reference", type=Path, help="checkout of IST-DASLab/gptq to compare with")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    problems = list(itertools.product(numbers(arguments.sizes), numbers(arguments.seeds)))
    options = [
        GPTQ(bits=bits, group_size=group_size, symmetric=symmetric, act_order=not arguments.natural_order)
        for bits, group_size, symmetric in itertools.product(
            numbers(arguments.bits), numbers(arguments.groups), (False, True)
        )
    ]
    if arguments.reference is None:
        report(problems, options, None, arguments.repeat, arguments.device)
    else:
        with reference(arguments.reference) as theirs:
            report(problems, options, theirs, arguments.repeat, arguments.device)


if __name__ == "__main__":
    main()
