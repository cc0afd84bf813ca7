"""The lists of passes side by side, on the language model and on two conv nets: python -m tools.bench.accuracy_table

Language model of tools.models (3.3 M parameters): perplexity per byte on held-out text, relative to float; the head and
the embeddings have 8 bits. Conv nets: SQNR of the logits in dB on the 700 test images against float, and the
change of accuracy in points (one image is 0.14). All in eager torch; seconds are those of the passes, on one thread.
"""

import argparse
import fnmatch
import time

import torch
from safetensors.torch import load_file
from torch import Tensor

from exporter.metrics import sqnr_db
from exporter.specs import parse_passes
from passes import PASSES
from passes.base import Pipeline, Program
from passes.calibration import run_graph
from runtimes.base import Array
from tools.bench.conv_int8 import accuracy, program_of
from tools.bench.thesis_table import captured, perplexity
from tools.data import DIGITS_TEST_FILE

LM_ROWS = {
    "W8A8": ("rtn,act-quant", "smooth,rtn,act-quant", "gptaq", "smooth,gptaq"),
    "W4 g128": ("rtn:bits=4:group_size=128", "gptq:refine=0:scale_search=minmax", "gptq"),
    "W4 g64": ("rtn:bits=4:group_size=64", "gptq:group_size=64", "gptaq:bits=4:group_size=64:act_bits=0"),
    "W4A8 g64": ("act-quant,rtn:bits=4:group_size=64", "smooth,gptaq:bits=4:group_size=64"),
    "W3 g64": ("rtn:bits=3:group_size=64", "gptq:bits=3:group_size=64", "gptaq:bits=3:group_size=64:act_bits=0"),
    "W4A4": ("act-quant:bits=4,rtn:bits=4", "smooth,gptaq:bits=4:act_bits=4"),
}
"""Bits: lists of passes, the simplest first."""

CONV_ROWS = {
    "W8A8": ("act-quant,rtn", "cle,gptaq", "absorb-bias,centre,cle,gptaq"),
    "W4A8": ("act-quant,rtn:bits=4", "cle,gptaq:bits=4", "absorb-bias,centre,cle,gptaq:bits=4"),
    "W4": ("rtn:bits=4", "gptq:bits=4:group_size=-1", "gptaq:bits=4:act_bits=0"),
    "W4A4": ("act-quant:bits=4,rtn:bits=4", "cle,gptaq:bits=4:act_bits=4"),
}

CONV_NETS = ("mobilenet", "residual_cnn")


def quantize(program: Program, passes: str) -> float:
    """Run the passes; returns the seconds they took."""
    start = time.perf_counter()
    Pipeline(parse_passes(passes), PASSES).run(program)
    return time.perf_counter() - start


def language_model(pattern: str) -> None:
    """Print the language model's rows."""
    original = perplexity(captured().graph)
    print(
        f"| language model | passes | perplexity | increase % | seconds |\n|---|---|---|---|---|\n"
        f"| float | | {original:.4f} | | |",
        flush=True,
    )
    for bits in fnmatch.filter(LM_ROWS, pattern):
        for passes in LM_ROWS[bits]:
            program = captured()
            seconds = quantize(program, passes)
            value = perplexity(program.graph)
            increase = 100 * (value / original - 1)
            print(f"| {bits} | `{passes}` | {value:.4f} | {increase:+.2f} | {seconds:.1f} |", flush=True)


def conv_nets(pattern: str) -> None:
    """Print the conv nets' rows."""
    test = load_file(DIGITS_TEST_FILE)
    print(
        f"| conv nets | passes | {' | '.join(CONV_NETS)} | seconds |\n|---|---|{'---|' * len(CONV_NETS)}---|",
        flush=True,
    )
    for bits in fnmatch.filter(CONV_ROWS, pattern):
        for passes in CONV_ROWS[bits]:
            cells, seconds = [], 0.0
            for net in CONV_NETS:
                program = program_of(net)
                seconds += quantize(program, passes)
                cells.append(_cell(program, test["x"], test["labels"]))
            print(f"| {bits} | `{passes}` | {' | '.join(cells)} | {seconds:.1f} |", flush=True)


def _cell(program: Program, images: Tensor, labels: Tensor) -> str:
    reference, value = logits(program, images)
    change = accuracy(value, labels.numpy()) - accuracy(reference, labels.numpy())
    return f"{sqnr_db(reference, value):.1f} ({change:+.2f})"


def logits(program: Program, images: Tensor) -> tuple[Array, Array]:
    """Of the float network and of the quantized one, [n, 10] each."""
    program.graph.recompile()
    reference, value = (run_graph(graph, [{"x": images}])[0][0].numpy() for graph in (program.reference, program.graph))
    return reference, value


def sqnr_on_test(program: Program) -> float:
    """SQNR in dB of the logits on the test images."""
    return sqnr_db(*logits(program, load_file(DIGITS_TEST_FILE)["x"]))


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="passes side by side on the reference networks")
    parser.add_argument("--bits", default="*", help="rows to run, a glob: W4*")
    parser.add_argument("--only", choices=("lm", "conv"), help="one of the two tables")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only != "lm":
        conv_nets(arguments.bits)
    if arguments.only != "conv":
        language_model(arguments.bits)


if __name__ == "__main__":
    main()
