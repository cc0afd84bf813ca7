"""Codebooks beside 3-bit grids by the width of a layer: python -m tools.bench.lowbit_layer [--rows GLOB]

The layer problem of tools.bench.problem, square. Relative layer error tr(E H E^T) / tr(W H W^T), CPU seconds on one
thread, and bits a weight from the bytes that the checkpoint stores: a codebook costs the same in every layer, so narrow
ones pay more for it a weight.

--weights student  those of the problem: tails of Student's t with 4 degrees of freedom, columns four times as large
          normal, uniform   independent, with the problem's inputs
"""

import argparse
import dataclasses
import fnmatch
import time
from collections.abc import Callable

import torch
from torch import Tensor

from exporter.formats import pack_smallest
from passes import aq, aq_fit, gptq, hqq
from passes.weights import QuantWeight
from tools.bench.problem import LayerProblem, layer_problem


def _aq(problem: LayerProblem, num_codebooks: int) -> QuantWeight:
    """Codebooks of least layer error."""
    return aq_fit.quantize_weight(problem.weight, problem.hessian, aq.AQ(num_codebooks=num_codebooks, strengthen=1.0))


RIVALS: dict[str, Callable[[LayerProblem], QuantWeight]] = {
    "hqq 3b g64": lambda problem: hqq.quantize_weight(problem.weight, hqq.HQQ(bits=3, group_size=64)),
    "hqq 3b g64, hessian": lambda problem: hqq.quantize_weight(
        problem.weight, hqq.HQQ(bits=3, group_size=64), problem.hessian
    ),
    "gptq 2b g64": lambda problem: gptq.quantize_weight(
        problem.weight, problem.hessian, gptq.GPTQ(bits=2, group_size=64)
    ),
    "gptq 3b g64": lambda problem: gptq.quantize_weight(
        problem.weight, problem.hessian, gptq.GPTQ(bits=3, group_size=64)
    ),
    "gptq 3b g128": lambda problem: gptq.quantize_weight(
        problem.weight, problem.hessian, gptq.GPTQ(bits=3, group_size=128)
    ),
    "aq 1x8 g8": lambda problem: _aq(problem, 1),
    "aq 2x8 g8": lambda problem: _aq(problem, 2),
    "aq 3x8 g8": lambda problem: _aq(problem, 3),
}


WEIGHTS: dict[str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    "normal": lambda shape, generator: 0.02 * torch.randn(shape, generator=generator),
    "uniform": lambda shape, generator: 0.02 * 12**0.5 * (torch.rand(shape, generator=generator) - 0.5),
}
"""Other weights of the problem's standard deviation."""


def problem_with(size: int, seed: int, weights: str) -> LayerProblem:
    """The layer problem, with other weights if these are not its own."""
    problem = layer_problem(size, seed)
    if weights not in WEIGHTS:
        return problem
    generator = torch.Generator().manual_seed(seed)
    return dataclasses.replace(problem, weight=WEIGHTS[weights](problem.weight.shape, generator))


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description="low-bit formats on one layer: error, bits, seconds")
    parser.add_argument("--sizes", default="256,512,1024", help="sizes of the square layer problems")
    parser.add_argument("--rows", default="*", help="names of the rows to run, a glob")
    parser.add_argument("--weights", choices=["student", *WEIGHTS], default="student")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| size | weights | bits a weight | error | s |\n|---|---|---|---|---|")
    for size in map(int, arguments.sizes.split(",")):
        problem = problem_with(size, arguments.seed, arguments.weights)
        for name in fnmatch.filter(RIVALS, arguments.rows):
            start = time.process_time()
            weight = RIVALS[name](problem)
            seconds = time.process_time() - start
            bits = pack_smallest(weight)[1].bits_per_weight
            error = problem.error(weight.dequantize())
            print(f"| {size} | {name} | {bits:.2f} | {error:.5f} | {seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
