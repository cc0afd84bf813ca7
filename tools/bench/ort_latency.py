"""Latency of W8A8 in onnxruntime beside float, in one run: a feed-forward block, and the digits classifier.

    python -m tools.bench.ort_latency

Speed does not depend on the values, so the block has random weights. Medians of alternating runs, one thread.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import qexport
from exporter.bench import bench
from tools.data import digits_calibration
from tools.models import load_reference


def main() -> None:
    """Print one line a network and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    feed_forward = nn.Sequential(nn.Linear(768, 3072), nn.ReLU(), nn.Linear(3072, 768))
    networks = (
        ("FFN 768-3072-768", feed_forward, {"input": torch.randn(256, 768)}, (1, 128)),
        ("mobilenet (a)", load_reference("mobilenet"), digits_calibration(), (1, 32)),
    )
    print(f"{'network':<18} {'batch':>5} {'float ms':>9} {'int8 ms':>9} {'times':>6}")
    for name, model, samples, batches in networks:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            recipe = qexport.Recipe(passes="act-quant,rtn", threads=1)
            example = {key: value[:2] for key, value in samples.items()}
            qexport.compile_model(model, example, recipe, calibration=samples, out=out)
            for timing in bench(out, batches=batches, length=1, threads=1, rounds=rounds).timings:
                milliseconds = f"{1000 * timing.float_s:>9.3f} {1000 * timing.quantized_s:>9.3f}"
                print(f"{name:<18} {timing.batch:>5} {milliseconds} {timing.ratio:>6.2f}")


if __name__ == "__main__":
    main()
