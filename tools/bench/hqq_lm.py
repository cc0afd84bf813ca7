"""HQQ on the committed language model, beside the hqq package: python -m tools.bench.hqq_lm [--reference]

All linear layers but the head are quantized, in groups of 64, by passes.hqq for each norm of --norms and, with
--reference, by the installed hqq package, and beside it by passes.hqq in groups of 32 with scales and zero points in 7
bits, which together take no more than its 16; the rest stays float. Figures are over the held-out tokens: the mean
Kullback-Leibler divergence of the next token's distribution from the float model's, and the perplexity.
"""

import argparse
import copy
import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from passes.hqq import HQQ, quantize_weight
from tools.bench.hqq_layer import half_groups, package_weight
from tools.models import FACTORIES

MODELS = Path(__file__).resolve().parents[2] / "tests" / "models"
AT_ONCE = 16


def log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    """Of every next token, [sequences, length, vocabulary]."""
    with torch.no_grad():
        return torch.cat([model(part).log_softmax(-1) for part in tokens.split(AT_ONCE)])


def quantized(model: nn.Module, quantize: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the model whose linear layers, but the last, have gone through `quantize`."""
    changed = copy.deepcopy(model)
    layers = [layer for layer in changed.modules() if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        layer.weight.data = quantize(layer.weight.data.clone())
    return changed


def our_weight(weight: Tensor, options: HQQ) -> Tensor:
    """The weight as passes.hqq quantizes it, dequantized."""
    return quantize_weight(weight, options).dequantize()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="HQQ on the committed language model")
    parser.add_argument("--bits", default="4,3,2")
    parser.add_argument("--axes", default="1,0")
    parser.add_argument("--norms", default="2,3")
    parser.add_argument("--reference", action="store_true", help="compare with the installed hqq package")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = FACTORIES["opt_lm"]()
    model.load_state_dict(load_file(MODELS / "opt_lm.safetensors"))
    model.eval()
    sequences = load_file(MODELS / "tokens_test.safetensors")["tokens"].long()
    tokens, following = sequences[:, :-1], sequences[:, 1:, None]
    expected = log_probabilities(model, tokens)

    def perplexity(found: Tensor) -> float:
        return float(found.gather(2, following).mean().neg().exp())

    print(f"float: perplexity {perplexity(expected):.4f}\n")
    print("| bits | axis | by | divergence | perplexity |")
    print("|---|---|---|---|---|")
    grid = itertools.product(map(int, arguments.bits.split(",")), map(int, arguments.axes.split(",")))
    for bits, axis in grid:
        rivals: dict[str, Callable[[Tensor], Tensor]] = {}
        if arguments.reference:
            given = HQQ(bits=bits, axis=axis)
            rivals["hqq package"] = functools.partial(package_weight, options=given)
            rivals["at its bits"] = functools.partial(our_weight, options=half_groups(given))
        for norm in map(float, arguments.norms.split(",")):
            options = HQQ(bits=bits, axis=axis, lp_norm=norm)
            rivals[f"lp_norm={norm:g}"] = functools.partial(our_weight, options=options)
        for name, quantize in rivals.items():
            found = log_probabilities(quantized(model, quantize), tokens)
            divergence = float((expected.exp() * (expected - found)).sum(-1).mean())
            print(f"| {bits} | {axis} | {name} | {divergence:.5f} | {perplexity(found):.4f} |", flush=True)


if __name__ == "__main__":
    main()
