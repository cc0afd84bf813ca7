"""The thesis' table on the reference language model: python -m tools.bench.thesis_table [--rows GLOB] [--rounds N]

Its rows under its names: 4-bit weights per output channel on scales of least squared error, the head at 8 bits, plain
GPTQ. Then ours: scale search by the Hessian, refinement, asymmetric calibration. Perplexity is that of the quantized
graph in eager torch on held-out text; latency that of its ONNX artifact in onnxruntime, one window of 128 bytes, one
thread, as a percentage of the float network's artifact (under 100: faster), all rows in turns. onnxruntime has no 4-bit
activations: they ride in 8-bit containers, so A4 is as fast as A8.
"""

import argparse
import dataclasses
import fnmatch
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from exporter.backends import backend_for
from exporter.capture import capture, export_module
from exporter.recipe import Recipe
from passes import PASSES
from passes.base import Pipeline, Program
from passes.calibration import Calibration, cut
from runtimes.base import Session
from runtimes.ort import OnnxRuntime
from tools.data import lm_calibration, lm_perplexity
from tools.models import load_reference

BATCH = 16
WARM_UP = 3
PLAIN = "bits=4:group_size=-1:refine=0:scale_search=mse"
THESIS = f"gptaq:act_bits=4:asymmetric=false:{PLAIN}"
OURS = "gptaq:bits=4:act_bits=4"

ROWS = {
    "Original": "",
    "W4": f"gptq:{PLAIN}",
    "W4_A4_RTN": f"{THESIS}:activations=rtn",
    "W4_A4_TOKEN": f"{THESIS}:activations=token",
    "W4_A4_REOPTIMIZE": f"{THESIS}:activations=reoptimize",
    "W4_A4_CLE": f"cle,{THESIS}",
    "W4_A4_EIG": f"{THESIS}:eig=true",
    "W4_A4_RTN_CLE": f"cle,{THESIS}:activations=rtn",
    "W4_A4_RTN_EIG": f"{THESIS}:activations=rtn:eig=true",
    "W4_A4_TOKEN_CLE": f"cle,{THESIS}:activations=token",
    "W4_A4_REOPTIMIZE_CLE": f"cle,{THESIS}:activations=reoptimize",
    "W4_A4_STATIC": THESIS,
    "ours, W4": "gptq:bits=4:group_size=-1",
    "ours, RTN": f"{OURS}:activations=rtn",
    "ours, TOKEN": f"{OURS}:activations=token",
    "ours, REOPTIMIZE": f"{OURS}:activations=reoptimize",
    "ours, STATIC": OURS,
    "ours, STATIC, not asymmetric": f"{OURS}:asymmetric=false",
    "ours, STATIC, CLE": f"cle,{OURS}",
    "ours, STATIC, smooth": f"smooth,{OURS}",
    "ours, TOKEN, smooth": f"smooth,{OURS}:activations=token",
}
"""Name: passes. STATIC is gptaq's default, one range a tensor, of the least squared error."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A quantized network and what it came to."""

    name: str
    passes: str
    perplexity: float
    seconds: float
    session: Session


def captured() -> Program:
    """The reference language model with its calibration text."""
    samples = lm_calibration()
    batches = tuple(cut(samples, BATCH))
    exported = export_module(load_reference("opt_lm"), dict(batches[0]), {"tokens": {0: "batch"}})
    return capture(exported, Calibration(batches, batches[:1], "training text"), backend_for("onnx").rules)


def row(name: str, passes: str, folder: Path) -> Row:
    """Quantize, evaluate, and write the artifact."""
    program = captured()
    started = time.perf_counter()
    if passes:
        Pipeline(Recipe(passes=passes).parsed_passes, PASSES).run(program)
    seconds = time.perf_counter() - started
    folder.mkdir()
    artifact = backend_for("onnx").lower(program, folder).artifact
    return Row(name, passes, perplexity(program.graph), seconds, OnnxRuntime(threads=1).load(artifact))


def perplexity(graph: fx.GraphModule) -> float:
    """Per byte, on held-out text."""

    def predict(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": graph(*inputs.values())[0]}

    return lm_perplexity(predict)["perplexity"]


def latencies(rows: Sequence[Row], rounds: int) -> list[float]:
    """Median seconds of each row's session on one window, in turns."""
    feeds = {"tokens": lm_calibration()["tokens"][:1].numpy()}
    taken: list[list[float]] = [[] for _ in rows]
    for turn in range(rounds + WARM_UP):
        for each, times in zip(rows, taken, strict=True):
            started = time.perf_counter()
            each.session.run(feeds)
            if turn >= WARM_UP:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="the thesis' table on the reference language model")
    parser.add_argument("--rows", default="*", help="names of the rows to run, a glob; Original always runs")
    parser.add_argument("--rounds", type=int, default=50)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        chosen = [name for name in ROWS if name == "Original" or fnmatch.fnmatchcase(name, arguments.rows)]
        rows = [row(name, ROWS[name], Path(folder) / str(index)) for index, name in enumerate(chosen)]
        times = latencies(rows, arguments.rounds)
    print("| row | perplexity | increase % | latency ms | % of float | seconds to quantize | passes |")
    print("|---|---|---|---|---|---|---|")
    for each, latency in zip(rows, times, strict=True):
        increase, share = 100 * (each.perplexity / rows[0].perplexity - 1), 100 * latency / times[0]
        print(
            f"| {each.name} | {each.perplexity:.4f} | {increase:+.2f} | {1000 * latency:.2f} | {share:.0f} "
            f"| {each.seconds:.1f} | `{each.passes}` |"
        )


if __name__ == "__main__":
    main()
