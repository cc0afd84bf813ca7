"""Reports that the tests of renderings share."""

import dataclasses

from exporter.metrics import Figures
from exporter.report import (
    Cause,
    Evidence,
    GateResult,
    Histogram,
    LayerDiff,
    LayerSqnr,
    PassRecordView,
    Report,
    Sizes,
    SkipView,
    Stage,
)

FIGURES = Figures(34.26, 0.99981, 0.0639, 0.0154, 0.995, 0.000161)
HOSTILE = "</script><img src=x onerror=alert(1)>&\"'<!--"
BINS = 48

LATENCY = {
    "runtime": "onnxruntime",
    "threads": 1,
    "rounds": 30,
    "timings": [
        {"batch": 1, "float_s": 0.003, "quantized_s": 0.0012},
        {"batch": 32, "float_s": 0.008, "quantized_s": 0.004},
    ],
}


def layer(name: str, total: float, **fields: object) -> LayerDiff:
    """A quantized layer with everything known of it."""
    usual = LayerDiff(
        name,
        "conv",
        "int8",
        8.5,
        1000,
        41.25,
        LayerSqnr(total + 5, total, total, 140.0),
        0.9999,
        0.02,
        "QLinearConv",
        Evidence(8.0, 8, 45.0, 50.0, 2.0, 1, "input", 3.0, 2, 0.0, 0.0, 0.001, 0.01),
        (
            Cause("inherited", "68 % of its noise comes from layers before it"),
            Cause("rounding", "8 bits of the weight leave 45.0 dB at its own output"),
        ),
    )
    return dataclasses.replace(usual, **fields)


def histograms(*names: str) -> dict[str, dict[str, Histogram]]:
    """Some of every kind."""
    bins = Histogram(-1.5, 2.5, tuple(range(BINS)), (0, 1000, *[0] * (BINS - 2)))
    return {name: {"weight": bins, "input": bins, "output": bins} for name in names}


def report(*layers: LayerDiff) -> Report:
    """With gates of every verdict, two outputs, a metric, passes and warnings."""
    return Report(
        model={"name": "mobilenet.pt2"},
        recipe={"passes": "cle,gptq:bits=4", "target": ["onnx"], "seed": 0, "gate": ["sqnr_db>=40"]},
        environment={"torch": "2.13.0", "python": "3.11"},
        calibration={"source": "digits.npz", "samples": 128},
        warnings=("calibration data is synthetic",),
        passes=(
            PassRecordView("fold-bn", {}, inserted=True, changed=("a", "b")),
            PassRecordView("cle", {"act_order": True}, False, (), (SkipView("conv3", "it branches"),), {"sweeps": 4.0}),
        ),
        layers=layers,
        outputs={"eager_quantized": {"logits": FIGURES}, "onnxruntime": {"logits": FIGURES}},
        parity={"onnxruntime_unoptimized": {"logits": dataclasses.replace(FIGURES, sqnr_db=300.0)}},
        metrics={"accuracy": {"reference": 0.987, "onnxruntime": 0.985}},
        sizes=Sizes(4_000_000, {"model.onnx": 1_040_000, "model.safetensors": 900_000}),
        gates=(
            GateResult("sqnr_db>=40", 34.26, False, where="onnxruntime logits"),
            GateResult("layer.output_sqnr_db>=20", 18.0, False, where="b"),
            GateResult("max_abs<=0.1", 0.0639, True, where="onnxruntime logits"),
            GateResult("tensorrt.kl<=1", None, False, measured=False, where="tensorrt"),
        ),
        histograms=histograms(*(entry.name for entry in layers[:12])),
    )


FAULT = Stage(
    "lowering",
    after=("a",),
    own={"quantization": 35.0, "lowering": 18.0},
    total={"quantization": 30.0, "lowering": 18.0},
    typical={"lowering": 19.0},
)

SMALL = report(
    layer("a", 30.0),
    layer("b", 18.0, causes=(Cause("clipping", "2 % of the input's values lie outside its range"),), stage=FAULT),
    layer("c.linear", 25.0, kind="linear", kernel="MatMulNBits"),
    layer("float", 27.0, format="float32", bits_per_weight=32.0, weight_sqnr_db=None, kernel=None, evidence=None),
)

BIG = report(
    *(
        layer(f"model.decoder.layers.{index:03}.self_attention.{'block.' * 9}projection", 20 + index % 17)
        for index in range(500)
    )
)
"""500 layers with names of 100 characters."""
