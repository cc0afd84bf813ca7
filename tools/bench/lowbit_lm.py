"""Low-bit weight formats side by side on the language model: python -m tools.bench.lowbit_lm [--rows GLOB]

--passes gives rows of their own instead; --more measures on 192 other held-out windows, of the installed Python's text.

Every row is a compilation by qexport.compile_model for onnxruntime, with the committed calibration text; embeddings and
head stay in float, so that rows differ by the 24 linear layers alone.

perplexity   per byte over the held-out windows, of the file in onnxruntime as shipped
increase %   of it over float, and its standard error over the windows; with --beside ROW also over that row's, so that
             what windows have in common does not count
KL           mean divergence of the file's next-byte distribution from the float network's, over the same windows
bits         a weight of those layers takes, codebooks, scales and adapters included: 8 (size of the file - size of the
             float file + 4 bytes a weight) / weights
ratio        times as fast as the float file, in turns, one sequence, one thread: of 1 byte and of 128
load, run    MB by which loading the file, and then one run of 128 bytes, raise the peak of a process of their own
seconds      of the passes
"""

import argparse
import fnmatch
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import qexport
from exporter.bench import bench
from tools.data import LM_TEST_FILE, documentation_bytes, lm_calibration
from tools.models import CONTEXT, load_reference

FLOAT = "none"

ROWS = {
    "float": FLOAT,
    "rtn 3b g64": "rtn:bits=3:group_size=64",
    "hqq 3b g64": "hqq:bits=3:group_size=64",
    "hqq 3b g64, qdora": "hqq:bits=3:group_size=64,qdora",
    "gptq 3b g64": "gptq:bits=3:group_size=64",
    "aq 2x8 g8": "aq",
    "aq 2x8 g8, kl": "aq:loss=kl",
    "aq 2x8 g8, qdora": "aq,qdora",
    "hqq 3b g64, hessian": "hqq:bits=3:group_size=64:hessian=true",
    "gptq 2b g64": "gptq:bits=2:group_size=64",
    "gptq 2b g64, qdora": "gptq:bits=2:group_size=64,qdora",
    "aq 1x8 g8": "aq:num_codebooks=1",
    "hqq 3b g64, axis 0": "hqq:bits=3:group_size=64:axis=0",
}
"""Name: passes."""

PLACES = 64
KEPT_FLOAT = ("embed_*", "lm_head")

HEADINGS = (
    "weights",
    "perplexity",
    "increase %",
    "KL",
    "bits, checkpoint",
    "bits, ONNX",
    "ratio, 1",
    "ratio, 128",
    "load, run MB",
    "seconds",
)

PROCESS = """
import json, sys
from pathlib import Path
import numpy as np
from runtimes.base import Artifact
from runtimes.ort import OnnxRuntime, _import
_import()
def memory(kind):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])
before = memory("VmRSS")
session = OnnxRuntime(threads=1).load(Artifact("onnxruntime", Path(sys.argv[1]), ("tokens",), ("output",)))
loaded = memory("VmHWM")
session.run({"tokens": np.ones((1, int(sys.argv[2])), np.int64)})
print(json.dumps([loaded - before, memory("VmHWM") - before]))
"""


def log_probabilities(predict: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    """Of the next byte, [windows, length, 256], for tokens [windows, length]."""
    return torch.cat([predict(part).log_softmax(-1) for part in tokens.split(16)])


def peaks(model: Path) -> tuple[float, float]:
    """MB that loading the file, and loading and running it, take in a process of their own."""
    command = [sys.executable, "-c", PROCESS, str(model), str(CONTEXT)]
    loaded, run = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return loaded / 1e6, run / 1e6


class Table:
    """The rows, measured one after the other beside the float row, which comes first."""

    def __init__(
        self, model: nn.Module, folder: Path, rounds: int, samples: Mapping[str, Tensor], windows: Tensor
    ) -> None:
        """`samples` calibrate; windows [n, length + 1] are what all is measured on. No latency if `rounds` is 0."""
        self.model, self.folder, self.rounds, self.samples = model, folder, rounds, samples
        self.tokens, self.targets = windows[:, :-1].contiguous(), windows[:, 1:, None]
        with torch.no_grad():
            self.expected = log_probabilities(model, self.tokens)
        self.twin = folder / "float"
        self.losses: dict[str, Tensor] = {}
        names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
        self.weights = sum(int(model.get_parameter(f"{name}.weight").numel()) for name in names)

    def compile(self, passes: str, out: Path) -> qexport.Report:
        """Into the folder `out`."""
        recipe = qexport.Recipe(
            passes=passes, skip=KEPT_FLOAT, dynamic={"tokens": {0: "batch", 1: "length"}}, threads=1
        )
        example = {"tokens": self.samples["tokens"][:2]}
        return qexport.compile_model(self.model, example, recipe, calibration=self.samples, out=out)

    def row(self, name: str, passes: str, beside: str) -> tuple[list[str], list[str]]:
        """The cells, and remarks on layers that a pass left alone; `beside` names the row to compare with."""
        out = self.twin if passes == FLOAT else self.folder / name
        report = self.compile(passes, out)
        timings = json.loads((out / "timings.json").read_text())
        found = self.found(out)
        self.losses[name] = -found.gather(-1, self.targets)[..., 0].double().mean(1)  # of each window
        lost = _increase(self.losses[name] + self.expected.gather(-1, self.targets)[..., 0].double().mean(1))
        divergence = float((self.expected.exp() * (self.expected - found)).sum(-1).mean())
        if beside:
            other = self.losses.get(beside)
            lost += f", {_increase(self.losses[name] - other)}" if other is not None and name != beside else ","
        cells = [name, f"{self.losses[name].mean().exp():.4f}", lost, f"{divergence:.5f}"]
        cells += [f"{self.bits(out, file):.2f}" for file in ("model.safetensors", "model.onnx")]
        cells += [f"{ratio:.2f}" for ratio in self.ratios(out)] if self.rounds else ["", ""]
        cells += [", ".join(f"{peak:.0f}" for peak in peaks(out / "model.onnx"))]
        cells += [f"{sum(timings['seconds'].get(record.name, 0.0) for record in report.passes):.1f}"]
        skips = [
            f"{name}: {record.name} left {skip.node} alone: {skip.why}"
            for record in report.passes
            for skip in record.skipped
            if "by the recipe" not in skip.why
        ]
        return cells, skips

    def found(self, out: Path) -> Tensor:
        """The file's log-probabilities."""
        loaded = qexport.load(out)

        def predict(tokens: Tensor) -> Tensor:
            (logits,) = loaded.run({"tokens": tokens}).values()
            return torch.from_numpy(logits)

        return log_probabilities(predict, self.tokens)

    def bits(self, out: Path, file: str) -> float:
        """Bits a weight of the linear layers."""
        rest = (self.twin / file).stat().st_size - 4 * self.weights
        return 8 * ((out / file).stat().st_size - rest) / self.weights

    def ratios(self, out: Path) -> list[float]:
        """Times as fast as the float file, on 1 byte and on a whole window."""
        found: list[float] = []
        for length in (1, CONTEXT):
            measured = bench(
                out,
                batches=[1],
                length=length,
                threads=1,
                rounds=self.rounds,
                float_model=self.twin / "model.onnx",
            )
            found += [timing.ratio for timing in measured.timings]
        return found


def _increase(lost: Tensor) -> str:
    """By how many percent perplexity rises when windows [n] lose so much, and the standard error."""
    return f"{100 * math.expm1(float(lost.mean())):+.2f} +- {100 * float(lost.std()) / len(lost) ** 0.5:.2f}"


def held_out() -> Tensor:
    """Windows [192, 129] of the held-out text: the three that follow each one that is committed.

    They do if the installed Python's documentation is the one that those come from.
    """
    _, text = documentation_bytes()
    places = torch.arange(PLACES) * (len(text) // PLACES)
    starts = (places[:, None] + torch.arange(1, 4) * (CONTEXT + 1)).flatten()
    return text[starts[:, None] + torch.arange(CONTEXT + 1)].contiguous()


def options(description: str, rounds: int) -> argparse.ArgumentParser:
    """What to measure, without saying of which network; `rounds` by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rows", default="*", help="names of the rows to run, a glob; float always runs")
    parser.add_argument("--passes", nargs="+", metavar="PASSES", help="rows of these passes instead")
    parser.add_argument("--beside", default="", metavar="ROW", help="an earlier row to compare perplexities with")
    parser.add_argument("--rounds", type=int, default=rounds, help="of the latencies; 0: none")
    return parser


def measure(
    asked: argparse.Namespace, rows: Mapping[str, str], model: nn.Module, samples: Mapping[str, Tensor], windows: Tensor
) -> None:
    """Print the rows that are asked for as they come, then the remarks; `samples` and `windows` are those of Table."""
    if asked.passes:
        rows = {"float": FLOAT, **{each: each for each in asked.passes}}
    remarks: list[str] = []
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    with tempfile.TemporaryDirectory() as folder:
        table = Table(model, Path(folder), asked.rounds, samples, windows)
        for name, passes in rows.items():
            if passes == FLOAT or name == asked.beside or fnmatch.fnmatchcase(name, asked.rows):
                cells, skips = table.row(name, passes, asked.beside)
                remarks += skips
                print(f"| {' | '.join(cells)} |", flush=True)
    for remark in remarks:
        print(remark)


def main() -> None:
    """Parse, measure, print."""
    parser = options("low-bit weight formats on the language model", rounds=50)
    parser.add_argument("--more", action="store_true", help="measure on 192 other held-out windows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    windows = held_out() if arguments.more else load_file(LM_TEST_FILE)["tokens"]
    measure(arguments, ROWS, load_reference("opt_lm"), lm_calibration(), windows)


if __name__ == "__main__":
    main()
