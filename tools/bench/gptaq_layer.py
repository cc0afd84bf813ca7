"""Asymmetric calibration on one layer, beside the authors' code: python -m tools.bench.gptaq_layer [--reference PATH]

PATH is the folder `fake_quant` of a checkout of https://github.com/Intelligent-Computing-Lab-Panda/GPTAQ. A layer in
front is rounded to 4 bits (groups of 128), which changes what the measured layer sees:

    X = relu(Z V^T),   Xq = relu(Z V4^T),   error = ||X W^T - Xq Wq^T||^2 / ||X W^T||^2

with W and (V, Z) of tools.bench.problem, seeds 0 and 1. `linear` leaves the ReLU out: then Xq determines X, and a
real-valued weight could make up for everything. Both sides get X, Xq and W in one process on one thread; seconds are
the processor's, of moments and quantization, the best of --repeat runs, in turn. Both round with act_order, static
groups, and zero points; `plain` leaves out what else gptaq does by default, the scale search and the refinement.
"""

import argparse
import contextlib
import dataclasses
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from passes import rtn
from passes.gptaq import GPTAQ, quantize_weight
from passes.rtn import RTN
from tools.bench.problem import layer_problem

NEEDLESS = ("transformers", "utils", "model_utils", "hadamard_utils", "fast_hadamard_transform")
"""What the authors' files import by bare name and the layer solver does not use."""


@dataclasses.dataclass(frozen=True)
class AsymmetricProblem:
    """weight [out, in], floats X and inputs Xq [n, in], all float32."""

    weight: Tensor
    floats: Tensor
    inputs: Tensor

    def error(self, quantized: Tensor) -> float:
        """||X W^T - Xq Wq^T||^2 / ||X W^T||^2."""
        wanted = self.floats @ self.weight.T
        return float((wanted - self.inputs @ quantized.T).square().sum() / wanted.square().sum())


Quantize = Callable[[AsymmetricProblem, GPTAQ], Tensor]


def asymmetric_problem(size: int, linear: bool) -> AsymmetricProblem:
    """A layer behind one that was rounded to 4 bits."""
    front = layer_problem(size, seed=1)
    rounded = rtn.quantize_weight(front.weight, RTN(bits=4, group_size=128, symmetric=False)).dequantize()
    floats, inputs = front.inputs @ front.weight.T, front.inputs @ rounded.T
    if not linear:
        floats, inputs = floats.relu(), inputs.relu()
    return AsymmetricProblem(layer_problem(size).weight, floats, inputs)


def ours(problem: AsymmetricProblem, options: GPTAQ) -> Tensor:
    """The dequantized weight by passes.gptaq, moments included."""
    count = len(problem.inputs)
    hessian, cross = problem.inputs.T @ problem.inputs / count, problem.floats.T @ problem.inputs / count
    return quantize_weight(problem.weight, hessian, options, cross=cross).dequantize()


@contextlib.contextmanager
def reference(folder: Path) -> Iterator[Quantize]:
    """The authors' code as a function; what it imports by bare name is visible inside the block only."""
    before = {name: sys.modules.get(name) for name in (*NEEDLESS, "gptaq_utils", "quant_utils")}
    sys.modules.update({name: mock.MagicMock() for name in NEEDLESS})
    sys.path.insert(0, str(folder))
    synchronize = torch.cuda.synchronize
    torch.cuda.synchronize = lambda device=None: None  # it waits for a GPU whether or not there is one
    try:
        solver, quant = importlib.import_module("gptaq_utils"), importlib.import_module("quant_utils")
        yield lambda problem, options: _by_reference(solver, quant, problem, options)
    finally:
        torch.cuda.synchronize = synchronize
        sys.path.remove(str(folder))
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def _by_reference(solver: Any, quant: Any, problem: AsymmetricProblem, options: GPTAQ) -> Tensor:
    outputs, inputs = problem.weight.shape
    layer = nn.Linear(inputs, outputs, bias=False)
    layer.weight.data = problem.weight.clone()
    work = solver.GPTAQ(layer)
    work.quantizer = quant.WeightQuantizer()
    work.quantizer.configure(options.bits, perchannel=True, sym=options.symmetric, mse=False)
    work.fp_inp.append(problem.floats.T)  # [in, n], as its hook leaves them
    work.add_batch(problem.inputs[None], None)
    work.fasterquant(
        blocksize=options.block_size,
        percdamp=options.damp,
        groupsize=options.group_size,
        actorder=options.act_order,
        static_groups=options.act_order,
        alpha=options.alpha,
    )
    return layer.weight.data


def measure(
    problem: AsymmetricProblem, options: GPTAQ, rivals: list[Quantize], repeat: int
) -> list[tuple[float, float]]:
    """(error, seconds) of each rival."""
    errors, seconds = [0.0] * len(rivals), [float("inf")] * len(rivals)
    for _, (index, rival) in itertools.product(range(repeat), enumerate(rivals)):
        start = time.process_time()
        quantized = rival(problem, options)
        seconds[index] = min(seconds[index], time.process_time() - start)
        errors[index] = problem.error(quantized)
    return list(zip(errors, seconds, strict=True))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="asymmetric calibration on one layer: error and seconds")
    parser.add_argument("--sizes", default="512,1024", help="sizes of the square layer problems")
    parser.add_argument("--alphas", default="0,0.25,1")
    parser.add_argument("--ridge", type=float, default=GPTAQ.ridge, help="ours alone has it")
    parser.add_argument("--plain", action="store_true", help="min-max scales, no refinement: the reference's own terms")
    parser.add_argument("--linear", action="store_true", help="no ReLU between the two layers")
    parser.add_argument("--reference", type=Path, help="fake_quant of the authors' checkout, to compare with")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    columns = ["size", "bits", "alpha", "error", "seconds"]
    if arguments.reference is not None:
        columns += ["ref. error", "ref. seconds", "error ratio", "time ratio"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    with reference(arguments.reference) if arguments.reference else contextlib.nullcontext() as theirs:
        for size in map(int, arguments.sizes.split(",")):
            problem = asymmetric_problem(size, arguments.linear)
            for bits, alpha in itertools.product((4, 3), map(float, arguments.alphas.split(","))):
                options = GPTAQ(bits=bits, group_size=128, symmetric=False, alpha=alpha, ridge=arguments.ridge)
                if arguments.plain:
                    options = dataclasses.replace(options, scale_search="minmax", refine=0)
                (error, seconds), *others = measure(
                    problem, options, [ours, theirs] if theirs else [ours], arguments.repeat
                )
                cells: list[object] = [size, bits, alpha, f"{error:.5f}", f"{seconds:.3f}"]
                for other_error, other_seconds in others:
                    cells += [f"{other_error:.5f}", f"{other_seconds:.3f}"]
                    cells += [f"{error / other_error:.3f}", f"{seconds / other_seconds:.2f}"]
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
