"""HQQ on one layer, beside the hqq package: python -m tools.bench.hqq_layer [--reference]

With --reference the installed hqq package quantizes the same weight in the same process, with its defaults for a CPU;
both run on one thread. Errors are relative layer errors tr(E H E^T) / tr(W H W^T), seconds are CPU seconds, the best of
--repeat runs, in turn.

    plain     float scales and zero points, as the package has them, rounded to 16 bits
    stored    what passes.hqq does when nothing is said: scales and zero points in 8 bits
    finer     half the group, scales and zero points in 7 bits: at most the bits of the package's, which are of 16
    hessian   the levels of `stored`, codes by GPTQ on the Hessian, which the others do not look at

Bits per weight are counted from the bytes of the checkpoint's format. Ratios are to the package.
"""

import argparse
import dataclasses
import importlib
import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from exporter.formats import pack_smallest
from passes.hqq import HQQ, quantize_weight
from passes.weights import AffineWeight
from tools.bench.problem import LayerProblem, layer_problem

Quantize = Callable[[LayerProblem, HQQ], AffineWeight | Tensor]


def plain(problem: LayerProblem, options: HQQ) -> AffineWeight:
    """Float scales and zero points."""
    return quantize_weight(problem.weight, dataclasses.replace(options, quant_zero=False, quant_scale=False))


def stored(problem: LayerProblem, options: HQQ) -> AffineWeight:
    """The defaults."""
    return quantize_weight(problem.weight, options)


def finer(problem: LayerProblem, options: HQQ) -> AffineWeight:
    """Smaller groups."""
    return quantize_weight(problem.weight, half_groups(options))


def half_groups(options: HQQ) -> HQQ:
    """No more bits than the package takes with `options`."""
    return dataclasses.replace(options, group_size=options.group_size // 2, meta_bits=7)


def hessian(problem: LayerProblem, options: HQQ) -> AffineWeight:
    """Codes by GPTQ."""
    return quantize_weight(problem.weight, options, problem.hessian)


def reference(problem: LayerProblem, options: HQQ) -> Tensor:
    """The hqq package."""
    return package_weight(problem.weight, options)


def package_weight(weight: Tensor, options: HQQ) -> Tensor:
    """The weight as the hqq package quantizes it, dequantized."""
    quantizer = importlib.import_module("hqq.core.quantize").Quantizer
    packed, meta = quantizer.quantize(
        weight,
        nbits=options.bits,
        group_size=options.group_size,
        axis=options.axis,
        compute_dtype=torch.float32,
        device="cpu",
    )
    dequantized: Tensor = quantizer.dequantize(packed, meta)
    return dequantized


def measure(problem: LayerProblem, options: HQQ, rivals: list[Quantize], repeat: int) -> list[tuple[float, float, str]]:
    """(error, seconds, bits per weight) of each rival."""
    errors, seconds, sizes = [0.0] * len(rivals), [float("inf")] * len(rivals), [""] * len(rivals)
    for _, (index, rival) in itertools.product(range(repeat), enumerate(rivals)):
        start = time.process_time()
        found = rival(problem, options)
        seconds[index] = min(seconds[index], time.process_time() - start)
        if isinstance(found, AffineWeight):
            sizes[index] = f"{pack_smallest(found)[1].bits_per_weight:.3f}"
            found = found.dequantize()
        errors[index] = problem.error(found)
    return list(zip(errors, seconds, sizes, strict=True))


def report(problems: list[tuple[int, int]], options: list[HQQ], with_reference: bool, repeat: int) -> None:
    """Print one line for each (size, seed) and set of options."""
    rivals: list[Quantize] = [plain, stored, finer, hessian]
    columns = ["size", "seed", "bits", "axis"]
    for rival in rivals:
        columns += [f"{rival.__name__}: error", "s", "bits per weight"]
    if with_reference:
        rivals.append(reference)
        columns += ["reference: error", "s"]
        for rival in rivals[:3]:
            columns += [f"{rival.__name__}: error ratio", "time ratio"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for size, seed in problems:
        problem = layer_problem(size, seed)
        for chosen in options:
            results = measure(problem, chosen, rivals, repeat)
            cells: list[object] = [size, seed, chosen.bits, chosen.axis]
            for error, seconds, bits in results[:4]:
                cells += [f"{error:.5f}", f"{seconds:.3f}", bits]
            if with_reference:
                base_error, base_seconds, _ = results[4]
                cells += [f"{base_error:.5f}", f"{base_seconds:.3f}"]
                for error, seconds, _ in results[:3]:
                    cells += [f"{error / base_error:.3f}", f"{seconds / base_seconds:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="HQQ on one layer: error, seconds, size")
    parser.add_argument("--sizes", default="512,1024", help="sizes of the square layer problems")
    parser.add_argument("--seeds", default="0", help="seeds of the problems")
    parser.add_argument("--bits", default="2,3,4")
    parser.add_argument("--axes", default="1,0")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--reference", action="store_true", help="compare with the installed hqq package")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    problems = list(itertools.product(numbers(arguments.sizes), numbers(arguments.seeds)))
    options = [
        HQQ(bits=bits, group_size=arguments.group_size, axis=axis)
        for bits, axis in itertools.product(numbers(arguments.bits), numbers(arguments.axes))
    ]
    report(problems, options, arguments.reference, arguments.repeat)


if __name__ == "__main__":
    main()
