"""Additive quantization of one layer, beside the authors': python -m tools.bench.aq_layer [--reference PATH]

PATH is a checkout of https://github.com/Vahe1994/AQLM. Both get the same weight and Hessian in the same process on one
thread. Errors are relative layer errors tr(E H E^T) / tr(W H W^T), seconds those of the process's CPU. The reference
runs k-means, then a beam search over all codes with --reference-beam; the table gives its error after it. --many takes
the layer problem's inputs with many shared factors.

Figures of another machine are only comparable by ratio; `yardstick` is what a 1024 x 1024 matrix product takes.
Peak is the process's largest memory so far: run one size at a time to read it. --outputs N makes the problems N x size,
for how time and memory grow with the rows. With --device both work there; the process's CPU waits for it.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import resource
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.aq import AQ
from passes.aq_fit import quantize_weight
from tools.bench.problem import FEW, MANY, LayerProblem, finished, layer_problem

Quantize = Callable[[LayerProblem, AQ], Tensor]


def ours(problem: LayerProblem, options: AQ) -> Tensor:
    """The dequantized weight by passes.aq_fit."""
    return quantize_weight(problem.weight, problem.hessian, options).dequantize()


@contextlib.contextmanager
def reference(checkout: Path, beam_size: int) -> Iterator[Quantize]:
    """The authors' code as a function; its package `src` is visible inside the block only."""
    before = dict(sys.modules)
    sys.path.insert(0, str(checkout))
    try:
        module = importlib.import_module("src.aq")
        yield lambda problem, options: _by_reference(module, problem, options, beam_size)
    finally:
        sys.path.remove(str(checkout))
        for name in set(sys.modules) - set(before):
            if name == "src" or name.startswith("src."):
                del sys.modules[name]


def _by_reference(module: types.ModuleType, problem: LayerProblem, options: AQ, beam_size: int) -> Tensor:
    torch.manual_seed(options.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight: Any = module.QuantizedWeight(
            reference_weight=problem.weight,
            in_group_size=options.in_group_size,
            out_group_size=options.out_group_size,
            num_codebooks=options.num_codebooks,
            nbits_per_codebook=options.codebook_bits,
        )
        weight.beam_search_update_codes_(
            XTX=problem.hessian, reference_weight=problem.weight, beam_size=beam_size, verbose=False
        )
        result: Tensor = weight().detach()
    return result


def measure(problem: LayerProblem, options: AQ, quantize: Quantize) -> tuple[float, float]:
    """(error, CPU seconds)."""
    start = time.process_time()
    quantized = finished(quantize(problem, options))
    seconds = time.process_time() - start
    return problem.error(quantized), seconds


def yardstick() -> float:
    """CPU seconds of a 1024 x 1024 matrix product, the best of ten."""
    matrix, best = torch.randn(1024, 1024), float("inf")
    for _ in range(10):
        start = time.process_time()
        torch.mm(matrix, matrix)
        best = min(best, time.process_time() - start)
    return best


def with_outputs(problem: LayerProblem, outputs: int) -> LayerProblem:
    """The problem with this many rows, each of those beyond its own a mixture of two of them."""
    weight, size = problem.weight, len(problem.weight)
    mixed = [(weight + weight.roll(shift, 0)) / 2**0.5 for shift in range(1, -(-outputs // size))]
    return dataclasses.replace(problem, weight=torch.cat([weight, *mixed])[:outputs])


def report(problems: Iterable[LayerProblem], options: list[AQ], theirs: Quantize | None) -> None:
    """Print one line for each problem and set of options."""
    columns = ["size", "codebooks", "bits a weight", "error", "s", "yardstick ms", "peak MB"]
    if theirs is not None:
        columns += ["reference: error", "s", "error ratio", "time ratio"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for problem in problems:
        for chosen in options:
            error, seconds = measure(problem, chosen, ours)
            bits = chosen.bits_per_parameter(*problem.weight.shape)
            shape = f"{chosen.num_codebooks}x{chosen.codebook_bits} g{chosen.in_group_size}"
            size = " x ".join(map(str, problem.weight.shape))
            cells: list[object] = [size, shape, f"{bits:.3f}", f"{error:.5f}", f"{seconds:.2f}"]
            cells += [f"{yardstick() * 1e3:.0f}", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024]
            if theirs is not None:
                their_error, their_seconds = measure(problem, chosen, theirs)
                cells += [f"{their_error:.5f}", f"{their_seconds:.2f}"]
                cells += [f"{error / their_error:.3f}", f"{seconds / their_seconds:.3f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="additive quantization of one layer: error and seconds")
    parser.add_argument("--sizes", default="512,1024", help="sizes of the square layer problems")
    parser.add_argument("--outputs", type=int, default=0, help="rows of the problems; 0: as many as columns")
    parser.add_argument("--seeds", default="0", help="seeds of the problems")
    parser.add_argument("--many", action="store_true", help="inputs with many shared factors, not few")
    parser.add_argument("--codebooks", default="2,1", help="numbers of codebooks")
    parser.add_argument("--codebook-bits", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="inputs of a block")
    parser.add_argument("--beam", default="8", help="beam sizes")
    parser.add_argument("--rounds", type=int, default=AQ.rounds)
    parser.add_argument("--reference", type=Path, help="checkout of Vahe1994/AQLM to compare with")
    parser.add_argument("--reference-beam", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    options = [
        AQ(
            num_codebooks=count,
            codebook_bits=arguments.codebook_bits,
            in_group_size=arguments.group,
            beam_size=beam,
            rounds=arguments.rounds,
            strengthen=1.0,  # least layer error
        )
        for count in numbers(arguments.codebooks)
        for beam in numbers(arguments.beam)
    ]
    mixture = MANY if arguments.many else FEW
    problems = (
        with_outputs(layer_problem(size, seed, mixture), arguments.outputs or size).to(arguments.device)
        for size, seed in itertools.product(numbers(arguments.sizes), numbers(arguments.seeds))
    )
    if arguments.reference is None:
        report(problems, options, None)
    else:
        with reference(arguments.reference, arguments.reference_beam) as theirs:
            report(problems, options, theirs)


if __name__ == "__main__":
    main()
