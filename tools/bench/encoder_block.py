"""An encoder block of BERT's size at W8A8 in onnxruntime, beside the same block in float.

    python -m tools.bench.encoder_block

Hidden size 768, 12 heads, feed-forward 3072, GELU, embeddings in front; random weights, outliers in eight channels of
the normalizations. Both networks run in one process, in turns; the times are medians, and their ratio is what to quote.
What holds on every machine stands below them: the kernel of every layer, and the largest float constant in the file.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.bench import Timing, bench
from exporter.capture import capture, export_module
from exporter.kernels import kernel_of_layers, optimized_kernels
from passes import PASSES
from passes.act_quant import ActQuant
from passes.base import Pass, Pipeline, Program
from passes.calibration import Calibration, cut
from passes.rtn import RTN
from passes.smooth import Smooth
from runtimes.ort import OnnxRuntime

HIDDEN, HEADS, FFN, WORDS = 768, 12, 3072, 1000
OUTLIERS, OUTLIER = 8, 20.0
SAMPLES, LENGTH = 16, 64


class Block(nn.Module):
    """Embeddings and one transformer layer, normalizations behind the residuals (BERT) or in front (pre_norm)."""

    def __init__(self, pre_norm: bool) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.words = nn.Embedding(WORDS, HIDDEN)
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.attention_norm, self.ffn_norm = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, FFN), nn.Linear(FFN, HIDDEN)
        for norm in (self.attention_norm, self.ffn_norm):
            norm.weight.data[torch.randperm(HIDDEN)[:OUTLIERS]] *= OUTLIER

    def attend(self, x: Tensor) -> Tensor:
        """[N, T, 768] -> [N, T, 768]."""
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T] int64 -> [N, T, 768]."""
        x: Tensor = self.words(tokens)
        if self.pre_norm:
            x = x + self.attend(self.attention_norm(x))
            x = x + self.down(F.gelu(self.up(self.ffn_norm(x))))
            return x
        x = self.attention_norm(x + self.attend(x))
        x = self.ffn_norm(x + self.down(F.gelu(self.up(x))))
        return x


@dataclasses.dataclass(frozen=True)
class Result:
    """One row: times of float and quantized, error of the quantized outputs in dB, and what the file holds."""

    timing: Timing
    sqnr_db: float
    kernels: dict[str, str | None]
    largest_float: int
    size_ratio: float


def measure(pre_norm: bool, passes: tuple[Pass, ...], threads: int, rounds: int) -> Result:
    """Compile the block with the passes and run it beside its float self."""
    torch.manual_seed(0)
    block = Block(pre_norm).eval()
    samples = {"tokens": torch.randint(0, WORDS, (SAMPLES, LENGTH))}
    batches = tuple(cut(samples, 4))
    free = {"tokens": {0: "batch", 1: "length"}}
    exported = export_module(block, batches[0], free)

    def program() -> Program:
        return capture(exported, Calibration(batches, batches, "random"), OnnxBackend.rules, dynamic=free)

    with tempfile.TemporaryDirectory() as name:
        folders = Path(name) / "float", Path(name) / "quantized"
        for folder in folders:
            folder.mkdir()
        quantized = program()
        Pipeline(passes, PASSES).run(quantized)
        before, after = OnnxBackend().lower(program(), folders[0]), OnnxBackend().lower(quantized, folders[1])
        float_model, model = before.artifact.model, after.artifact.model
        (timing,) = bench(
            folders[1], batches=[1], length=LENGTH, threads=threads, rounds=rounds, float_model=float_model
        ).timings
        feeds = {key: value.numpy() for key, value in batches[0].items()}
        expected, found = (
            next(iter(OnnxRuntime(threads=threads).load(lowered.artifact).run(feeds).values()))
            for lowered in (before, after)
        )
        constants = onnx.load(model).graph.initializer
        return Result(
            timing=timing,
            sqnr_db=float(10 * np.log10(np.square(expected).sum() / np.square(expected - found).sum())),
            kernels=kernel_of_layers(model, optimized_kernels(after.artifact)),
            largest_float=max(int(np.prod(c.dims)) for c in constants if c.data_type == TensorProto.FLOAT),
            size_ratio=model.stat().st_size / float_model.stat().st_size,
        )


def main() -> None:
    """Measure with and without smooth and print."""
    parser = argparse.ArgumentParser(description="W8A8 encoder block: latency beside float")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| block | passes | float ms | W8A8 ms | times as fast | SQNR dB | size ratio | largest float constant |")
    print("|---|---|---|---|---|---|---|---|")
    kernels: dict[str, str | None] = {}
    for pre_norm in (False, True):
        for passes in ((ActQuant(), RTN()), (Smooth(), ActQuant(), RTN())):
            result = measure(pre_norm, passes, arguments.threads, arguments.rounds)
            timing, kernels = result.timing, result.kernels
            cells = ["pre-norm" if pre_norm else "post-norm", ",".join(work.name for work in passes)]
            cells += [f"{1000 * timing.float_s:.2f}", f"{1000 * timing.quantized_s:.2f}", f"{timing.ratio:.2f}"]
            cells += [f"{result.sqnr_db:.1f}", f"{result.size_ratio:.3f}", str(result.largest_float)]
            print(f"| {' | '.join(cells)} |", flush=True)
    for layer, kernel in kernels.items():
        print(f"{layer}: {kernel}")


if __name__ == "__main__":
    main()
