"""HQQ on one layer, beside the hqq package: python -m tools.bench.hqq_layer [--reference] [--exhaustive]

With --reference the installed hqq package quantizes the same weight in the same process, with its defaults for a CPU;
both run on one thread. Errors are relative layer errors tr(E H E^T) / tr(W H W^T), seconds are CPU seconds, the best of
--repeat runs, in turn.

    plain     float scales and zero points, as the package has them, rounded to 16 bits
    stored    what passes.hqq does when nothing is said: scales and zero points in 8 bits
    finer     half the group, scales and zero points in 7 bits: at most the bits of the package's, which are of 16
    hessian   the levels of `stored`, codes by GPTQ on the Hessian, which the others do not look at

Bits per weight are counted from the bytes of the checkpoint's format. Ratios are to the package; weight: of |E|^2.
--exhaustive shows the least |E|^2 that float levels of the same groups can leave: the best of 1,600 pairs of scale and
zero point for every group, each after a step of least squares, and eight steps from it.
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


def exhaustive(problem: LayerProblem, options: HQQ) -> Tensor:
    """The weight on the best levels that a search over scales and zero points finds, in float."""
    weight, top = problem.weight, 2**options.bits - 1
    grouped = (
        weight.reshape(-1, options.group_size) if options.axis == 1 else weight.reshape(options.group_size, -1).t()
    )
    found = torch.cat([_search(values, top) for values in grouped.split(2048)])
    return (found if options.axis == 1 else found.t()).reshape(weight.shape)


def _search(groups: Tensor, top: int) -> Tensor:
    """Groups [groups, n] on their best levels; scales from 0.6 (8 bits: 0.95) to 1.02 of the range's."""
    low, high = groups.aminmax(dim=1, keepdim=True)
    values = (groups - low) / (high - low) * top
    best, least = torch.zeros_like(values), torch.full_like(low, torch.inf)
    best_scale, best_base = torch.ones_like(low), torch.zeros_like(low)

    def step(scale: Tensor, base: Tensor) -> None:
        """Least squares for the codes of these levels."""
        nonlocal best, least, best_scale, best_base
        codes = ((values - base) / scale).round_().clamp_(0, top)
        centred = codes - codes.mean(1, keepdim=True)
        slope = (centred * values).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True)
        levels = values.mean(1, keepdim=True) + slope * centred
        error = (levels - values).square().sum(1, keepdim=True)
        better = error < least
        best, least = torch.where(better, levels, best), torch.where(better, error, least)
        best_scale = torch.where(better, slope, best_scale)
        best_base = torch.where(better, (levels - slope * codes)[:, :1], best_base)

    for scale in torch.linspace(0.95 if top == 255 else 0.6, 1.02, 40):
        slack = top * (1 - scale).abs() + 1
        for base in torch.linspace(-0.5, 0.5, 40) * slack + top * (1 - scale) / 2:
            step(scale.expand_as(low), base.expand_as(low))
    for _ in range(8):
        step(best_scale, best_base)
    return best / top * (high - low) + low


@dataclasses.dataclass
class Figures:
    """What a rival leaves of a problem.

    error    relative layer error
    weight   |E|^2
    seconds  CPU seconds, the least of the runs
    bits     per weight, as text; empty where they are not counted
    """

    error: float = 0.0
    weight: float = 0.0
    seconds: float = float("inf")
    bits: str = ""


def measure(problem: LayerProblem, options: HQQ, rivals: list[Quantize], repeat: int) -> list[Figures]:
    """Figures of each rival."""
    figures = [Figures() for _ in rivals]
    for _, (rival, result) in itertools.product(range(repeat), zip(rivals, figures, strict=True)):
        start = time.process_time()
        found = rival(problem, options)
        result.seconds = min(result.seconds, time.process_time() - start)
        if isinstance(found, AffineWeight):
            result.bits = f"{pack_smallest(found)[1].bits_per_weight:.3f}"
            found = found.dequantize()
        result.error = problem.error(found)
        result.weight = float((found - problem.weight).double().square().sum())
    return figures


def report(problems: list[tuple[int, int]], options: list[HQQ], rivals: list[Quantize], repeat: int) -> None:
    """Print one line for each (size, seed) and set of options; ratios where `reference` is among the rivals."""
    columns = ["size", "seed", "bits", "axis"]
    for rival in rivals:
        columns += [f"{rival.__name__}: error", "s", "bits per weight"]
    compared = [rival for rival in rivals if rival not in (hessian, reference)] if reference in rivals else []
    for rival in compared:
        columns += [f"{rival.__name__}: error ratio", "weight ratio", "time ratio"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for size, seed in problems:
        problem = layer_problem(size, seed)
        for chosen in options:
            figures = dict(zip(rivals, measure(problem, chosen, rivals, repeat), strict=True))
            cells: list[object] = [size, seed, chosen.bits, chosen.axis]
            for found in figures.values():
                cells += [f"{found.error:.4g}", f"{found.seconds:.3f}", found.bits]
            for rival in compared:
                found, base = figures[rival], figures[reference]
                ratios = found.error / base.error, found.weight / base.weight
                cells += [*(f"{ratio:.3f}" for ratio in ratios), f"{found.seconds / base.seconds:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="HQQ on one layer: error, seconds, size")
    parser.add_argument("--sizes", default="512,1024", help="sizes of the square layer problems")
    parser.add_argument("--seeds", default="0", help="seeds of the problems")
    parser.add_argument("--bits", default="1,2,3,4,8")
    parser.add_argument("--axes", default="1,0")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--reference", action="store_true", help="compare with the installed hqq package")
    parser.add_argument("--exhaustive", action="store_true", help="the least that float levels can leave: some seconds")
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
    rivals: list[Quantize] = [plain, stored, finer, hessian]
    rivals += [reference] * arguments.reference + [exhaustive] * arguments.exhaustive
    report(problems, options, rivals, arguments.repeat)


if __name__ == "__main__":
    main()
