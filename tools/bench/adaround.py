"""AdaRound (Nagel et al., arXiv 2004.10568) beside gptq on the reference conv nets: python -m tools.bench.adaround

Weights only, 4 bits, one scale a channel; a cell is the SQNR of the logits in dB on the 700 test images, then seconds
of the passes. Layer by layer, AdaRound decides for each weight between the level below and above by gradient descent on

    tr((W - Q) H (W - Q)^T) + lambda sum(1 - |2 h - 1|^beta), Q = s clip(floor(W / s) + h), h = clip(1.2 sigma(V) - 0.1)

with Adam, beta annealed from 20 to 2 after a fifth of the iterations, on the scales gptq would start from: the paper's
objective on the same second moments H that gptq gets, not on batches.
"""

import argparse
import dataclasses
import time
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from exporter.specs import parse_passes
from passes import PASSES
from passes.affine_grid import fit_grid
from passes.base import Pass, Pipeline
from passes.gptq import GPTQ
from passes.graph import Layer
from passes.walk import Walk
from passes.weights import AffineWeight
from tools.bench.accuracy_table import CONV_NETS, sqnr_on_test
from tools.bench.conv_int8 import program_of

LEARNING_RATE = 1e-2
REGULARIZER = 0.01
"""lambda, as a part of the layer's error when rounded to nearest, a weight."""


@dataclasses.dataclass(frozen=True)
class AdaRound(GPTQ):
    """Options of GPTQ, of which bits, group_size and scale_search count, and how many steps of Adam a layer gets."""

    group_size: int = -1
    iterations: int = 1000

    name: ClassVar[str] = "adaround"

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> AffineWeight:
        """The layer's matrix [out, in], every weight rounded down or up."""
        hessian = walk.hessian(layer)  # [groups, in, in]
        importance = hessian.diagonal(dim1=-2, dim2=-1).repeat_interleave(len(matrix) // len(hessian), dim=0)
        grid = fit_grid(matrix, self.bits, -1, True, self.scale_search, importance)
        low, high = grid.centred_range()
        levels = matrix / grid.scale
        floor = levels.floor()
        share = (levels - floor).clamp(0.01, 0.99)
        logit = -torch.log(1.2 / (share + 0.1) - 1)  # h starts where the weight is

        def error_of(codes: Tensor) -> Tensor:
            error = (matrix - codes.clamp(low, high) * grid.scale).unflatten(0, (len(hessian), -1))
            total: Tensor = ((error @ hessian) * error).sum()
            return total

        weight = REGULARIZER * error_of(levels.round()).detach() / matrix.shape[1]
        value = logit.clone().requires_grad_()
        optimizer = torch.optim.Adam([value], LEARNING_RATE)
        for step in range(self.iterations):
            rounding = (1.2 * value.sigmoid() - 0.1).clamp(0, 1)
            loss = error_of(floor + rounding)
            progress = (step / self.iterations - 0.2) / 0.8
            if progress > 0:
                loss = loss + weight * (1 - (2 * rounding - 1).abs().pow(20 - 18 * progress)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        codes = floor + (value.detach() > 0)
        return grid.with_centred_codes(codes.clamp(low, high))


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description="AdaRound beside gptq: SQNR of the logits in dB, weights of 4 bits")
    parser.add_argument("--iterations", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    gptq, plain = "gptq:bits=4:group_size=-1", "rtn:bits=4:scale_search=mse"
    rivals: Mapping[str, tuple[Pass, ...]] = {
        plain: parse_passes(plain),
        gptq: parse_passes(gptq),
        f"AdaRound, {arguments.iterations} iterations": (AdaRound(iterations=arguments.iterations),),
    }
    print(f"| | {' | '.join(CONV_NETS)} |\n|---|{'---|' * len(CONV_NETS)}")
    for name, passes in rivals.items():
        cells = []
        for net in CONV_NETS:
            program = program_of(net)
            start = time.perf_counter()
            Pipeline(passes, PASSES).run(program)
            seconds = time.perf_counter() - start
            cells.append(f"{sqnr_on_test(program):.1f} dB, {seconds:.1f} s")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
