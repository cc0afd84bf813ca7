"""8-bit convolutional networks, weights per tensor: python -m tools.bench.conv_int8 [--nets A,B] [--rows GLOB]

Rows are lists of passes as the command line takes them, columns the reference networks. A cell is the SQNR of the
logits on the 700 test images against the float network, of the quantized graph in eager torch and of its ONNX file in
onnxruntime as shipped, and the change of accuracy of the latter in points; seconds are those of the passes over all
networks. Calibration sees 205 training images: what `qexport MODEL --passes ROW --calib` does with the committed ones.

PEERS are other tools' figures with weights per tensor, measured once on networks of the same make and other weights.
"""

import argparse
import fnmatch
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from exporter.backends import backend_for
from exporter.capture import capture, export_module
from exporter.lowering.lowered import Lowered
from exporter.metrics import sqnr_db
from exporter.samples import gather, split
from exporter.specs import parse_passes
from exporter.validate import eager_session
from passes import PASSES
from passes.base import Pipeline, Program
from runtimes.base import Array, Session
from runtimes.ort import OnnxRuntime
from tools.data import DIGITS_TEST_FILE, digits_calibration
from tools.models import load_reference

NETS = ("mobilenet_relu", "mobilenet_spread", "mobilenet", "mobilenet_high_bias", "residual_cnn")

ROWS = (
    "act-quant,rtn:group_size=0",
    "cle:activations=0,act-quant,rtn:group_size=0,bias-correct",
    "cle,act-quant,rtn:group_size=0,bias-correct:source=analytic",
    "cle,act-quant,rtn:group_size=0,bias-correct",
    "cle,gptaq:group_size=0",
    "centre,cle,gptaq:group_size=0",
    "absorb-bias,cle,gptaq:group_size=0",
    "absorb-bias,centre,cle,gptaq:group_size=0",
    "absorb-bias,centre,cle:activations=0,gptaq:group_size=0",
    "absorb-bias,centre,cle,gptaq:group_size=0:activations=output",
    "absorb-bias,centre,cle:activations=0.65,gptaq:group_size=0:activations=output",
    "absorb-bias,centre,cle,gptaq",
)

PEERS = {
    "onnxruntime static": ("31.5", "chance", "28.7", "chance", ""),
    "AIMET, CLE": ("32.0", "32.3", "32.0", "23.7", ""),
    "Brevitas, CLE, bias correction": ("34.1", "34.5", "31.0", "34.1", ""),
    "NNCF torch": ("27.4", "chance", "27.3", "11.6", ""),
    "ModelOpt": ("31.1", "chance", "29.1", "-0.5", ""),
}


def program_of(net: str) -> Program:
    """The network captured with its calibration data, as the command line does it."""
    samples = digits_calibration()
    calibration, _ = split(gather(samples, None, len(samples["x"]), source="digits"))
    exported = export_module(load_reference(net), {"x": samples["x"][:2]}, {"x": {0: "batch"}})
    return capture(exported, calibration, backend_for("onnx").rules)


def logits(session: Session, images: Array) -> Array:
    """[n, 10] for images [n, 1, 8, 8]."""
    (value,) = session.run({"x": images}).values()
    return value


def accuracy(value: Array, labels: Array) -> float:
    """Right answers in percent."""
    return 100 * float((value.argmax(-1) == labels).mean())


def quantize(net: str, passes: str, folder: Path) -> tuple[Program, Lowered, float]:
    """The program behind the passes, its file, and the seconds the passes took."""
    program = program_of(net)
    start = time.perf_counter()
    Pipeline(parse_passes(passes), PASSES).run(program)
    seconds = time.perf_counter() - start
    return program, backend_for("onnx").lower(program, folder), seconds


def measure(net: str, passes: str) -> tuple[str, float]:
    """A cell of the table, and seconds."""
    test = {name: value.numpy() for name, value in load_file(DIGITS_TEST_FILE).items()}
    with tempfile.TemporaryDirectory() as folder:
        program, lowered, seconds = quantize(net, passes, Path(folder))
        reference = logits(eager_session(program, program.reference), test["x"])
        eager = logits(eager_session(program, lowered.simulated), test["x"])
        shipped = logits(OnnxRuntime(threads=1).load(lowered.artifact), test["x"])
    change = accuracy(shipped, test["labels"]) - accuracy(reference, test["labels"])
    figures = " / ".join(f"{sqnr_db(np.asarray(reference), np.asarray(value)):.1f}" for value in (eager, shipped))
    return f"{figures} ({change:+.2f})", seconds


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description="int8 convolutional networks: SQNR of the logits in dB")
    parser.add_argument("--nets", default=",".join(NETS))
    parser.add_argument("--rows", default="*", help="glob of the pass lists to run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    nets = arguments.nets.split(",")
    print("| passes | " + " | ".join(nets) + " | seconds |")
    print("|---|" + "---|" * (len(nets) + 1))
    for passes in fnmatch.filter(ROWS, arguments.rows):
        cells = [measure(net, passes) for net in nets]
        total = sum(seconds for _, seconds in cells)
        print(f"| `{passes}` | " + " | ".join(cell for cell, _ in cells) + f" | {total:.1f} |", flush=True)
    for peer, figures in PEERS.items():
        known = dict(zip(NETS, figures, strict=True))
        print(f"| {peer} | " + " | ".join(known.get(net, "") for net in nets) + " | |")


if __name__ == "__main__":
    main()
