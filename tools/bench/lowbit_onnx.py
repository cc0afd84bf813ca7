"""Low-bit linear layers in onnxruntime: file size, loading, memory and latency of each form beside a float MatMul.

    python -m tools.bench.lowbit_onnx

One layer a file, out = in = 4096 and 2048. Codes are random: nothing measured here depends on their values. Latency:
medians of runs in turns with the float file, in one process, one thread. Loading: a process of its own; memory is what
the peak and the resident set of that process grew by while the session was made (VmHWM, VmRSS; ru_maxrss would begin
at the peak of the process that started it). Notes on stderr: a compact file whose constants onnxruntime is told not to
fold, so that it stays packed in memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.bench import bench
from exporter.capture import capture, export_module
from exporter.lowering.lowered import WeightsAs
from passes.base import Program
from passes.calibration import Calibration
from passes.graph import tidy
from passes.weight_nodes import write_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight

LOAD = """
import json, sys, time
from pathlib import Path
from runtimes.base import Artifact
from runtimes.ort import OnnxRuntime, _import
_import()
def memory(kind):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return 1024 * int(line.split()[1])
before, started = memory("VmRSS"), time.perf_counter()
session = OnnxRuntime(threads=1).load(Artifact("onnxruntime", Path(sys.argv[1]), ("x",), ("output",)))
print(json.dumps([time.perf_counter() - started, memory("VmHWM") - before, memory("VmRSS") - before]))
"""


def codebooks(size: int, count: int) -> CodebookWeight:
    """Codebooks of 256 entries of 8 inputs, one scale an output."""
    codes = torch.randint(0, 256, (size, size // 8, count), dtype=torch.uint8)
    return CodebookWeight(codes, torch.randn(count, 256, 1, 8) / 64, torch.rand(size, 1) + 0.5)


def grid(size: int, bits: int, group_size: int = 64) -> AffineWeight:
    """Zero points between codes; both they and the scales of 8 bits in groups of 128, as hqq leaves them."""
    shape = (size, size // group_size)
    values = []
    for high in (0.01, 2.0**bits - 1):
        count = shape[0] * shape[1]
        codes = torch.randint(0, 256, (1, count), dtype=torch.uint8)
        step = torch.full((1, -(-count // 128)), high / 255)
        values.append(AffineWeight(codes, step, torch.zeros_like(step), 8, 128))
    scale, zero = values
    codes = torch.randint(0, 2**bits, (size, size), dtype=torch.uint8)
    scales, zeros = (value.dequantize().view(shape) for value in values)
    return AffineWeight(codes, scales + 0, zeros, bits, group_size, scale_codes=scale, zero_codes=zero)


def symmetric(size: int, bits: int, group_size: int) -> AffineWeight:
    """No zero points, float scales."""
    low = 2 ** (bits - 1)
    codes = torch.randint(-low, low, (size, size)).to(torch.int8)
    return AffineWeight(codes, torch.rand(size, size // group_size) / 100, None, bits, group_size)


HEADINGS = (
    "weights",
    "as",
    "bits",
    "load s",
    "peak MB",
    "after MB",
    "batch 1 ms",
    "times",
    "batch 32 ms",
    "times",
    "format",
)

KEPT_ROUNDS = 7

FORMS: dict[str, Callable[[int], QuantWeight]] = {
    "codebooks 2x8 g8": lambda size: codebooks(size, 2),
    "codebook 1x8 g8": lambda size: codebooks(size, 1),
    "3 bits g64 meta 8": lambda size: grid(size, 3),
    "2 bits g64 meta 8": lambda size: grid(size, 2),
    "4 bits g128": lambda size: symmetric(size, 4, 128),
}


def program_of(size: int, weight: QuantWeight | None) -> Program:
    """One linear layer, float or quantized."""
    batch = {"x": torch.randn(2, size)}
    free = {"x": {0: "batch"}}

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(size, size, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.layer(x)
            return y

    exported = export_module(Layer().eval(), batch, free)
    program = capture(exported, Calibration((batch,), (batch,), "random"), OnnxBackend.rules, dynamic=free)
    if weight is not None:
        (layer,) = program.layers()
        write_weight(program.graph, layer, weight)
        tidy(program.graph)
    return program


def loading(model: Path) -> tuple[float, float, float]:
    """Seconds, and MB at the peak and after, of a session on the model."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(model)], capture_output=True, text=True, check=True)
    seconds, peak, after = json.loads(done.stdout)
    return seconds, peak / 1e6, after / 1e6


def kept(model: Path, size: int, batch: int) -> float:
    """Milliseconds of a run when onnxruntime is told to fold no constants: the weight is decoded anew at every run."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(model), options, disabled_optimizers=["ConstantFolding"])
    feeds = {"x": np.zeros((batch, size), np.float32)}
    times = []
    for _ in range(KEPT_ROUNDS):
        started = time.perf_counter()
        session.run(None, feeds)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def figures(load: tuple[float, float, float]) -> tuple[str, str, str]:
    """The same as text."""
    seconds, peak, after = load
    return f"{seconds:.2f}", f"{peak:.0f}", f"{after:.0f}"


def main() -> None:
    """Print a table a size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 2048])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--weights-as", nargs="+", default=["auto", "fast", "compact"])
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    torch.manual_seed(0)
    choices: list[WeightsAs] = options.weights_as
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "float").mkdir()
            twin = OnnxBackend().lower(program_of(size, None), folder / "float").artifact.model
            seconds, peak, after = figures(loading(twin))
            print(f"\n{size} x {size}; float loads in {seconds} s, {peak} MB at the peak, {after} MB after")
            print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
            for form in options.forms:
                for choice in choices:
                    out = folder / f"{form}-{choice}"
                    out.mkdir()
                    lowered = OnnxBackend(choice).lower(program_of(size, FORMS[form](size)), out)
                    model = lowered.artifact.model
                    cells = [form, choice, f"{8 * model.stat().st_size / size**2:.2f}", *figures(loading(model))]
                    measured = bench(out, batches=[1, 32], length=1, threads=1, rounds=options.rounds, float_model=twin)
                    for timing in measured.timings:
                        cells += [f"{1000 * timing.quantized_s:.2f}", f"{timing.ratio:.1f}"]
                    print(f"| {' | '.join([*cells, lowered.layers[0].format])} |", flush=True)
                    if "function" in lowered.layers[0].format:
                        once, many = (kept(model, size, batch) for batch in (1, 32))
                        print(f"{form}, compact, kept packed: {once:.1f} ms, batch 32 {many:.1f} ms", file=sys.stderr)


if __name__ == "__main__":
    main()
