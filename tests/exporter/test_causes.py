"""Each rule fires on its figures and not beside them, the likeliest cause comes first."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporter.causes import explain, likely_causes, worth_a_look
from exporter.compile import compile_model
from exporter.metrics import EXACT_DB
from exporter.recipe import Recipe
from exporter.report import Evidence, LayerDiff, LayerSqnr, Stage
from tests.passes.nets import seeded

GOOD = Evidence(
    weight_bits=8,
    input_bits=8,
    weight_only_db=45.0,
    input_only_db=52.0,
    weight_outlier_ratio=2.0,
    weight_outlier_channel=1,
    weight_outlier_axis="input",
    input_outlier_ratio=2.0,
    input_outlier_channel=3,
    weight_clipped=0.0,
    weight_clip_noise=0.0,
    input_clipped=0.0,
    input_clip_noise=0.0,
)


FAULT = Stage("lowering", after=("stem",), own={"quantization": 44.0, "lowering": 20.0}, total={"lowering": 20.0})


def layer(
    *, own: float = 44.0, total: float = 43.0, kernel: str = "QGemm", stage: Stage | None = None, **evidence: object
):
    return LayerDiff(
        "fc",
        "linear",
        "int8",
        8.0,
        64,
        45.0,
        LayerSqnr(own, total, total, 140.0),
        kernel=kernel,
        stage=stage,
        evidence=dataclasses.replace(GOOD, **evidence),
    )


@pytest.mark.parametrize(
    ("entry", "causes"),
    [
        (layer(), [("rounding", "8 bits of the weight leave 45.0 dB at its own output")]),
        (layer(input_only_db=50.0), [("rounding", "8 bits of the weight"), ("rounding", "8 bits of the input")]),
        (layer(weight_only_db=49.0, input_only_db=40.0), [("rounding", "8 bits of the input leave 40.0 dB")]),
        (layer(weight_bits=4), [("coarse bits", "4 bits of the weight leave 45.0 dB")]),
        (layer(weight_bits=2.5), [("coarse bits", "2.5 bits of the weight")]),
        (
            layer(weight_bits=3, weight_clipped=0.0125, weight_clip_noise=0.25),
            [("clipping", "1.2 % of the weight's values lie outside its range and make 25 % of its error")],
        ),
        (
            layer(weight_outlier_ratio=8.0),
            [("outlier channels", "input channel 1 of the weight is 8.0 times as wide as the median one")],
        ),
        (
            layer(weight_only_db=None, input_only_db=30.0, input_outlier_ratio=60.4),
            [("outlier channels", "channel 3 of the input is 60 times as wide")],
        ),
        (layer(weight_clip_noise=0.2, weight_clipped=0.5, weight_outlier_ratio=7.9), [("rounding", "8 bits")]),
        # The input stands out, but makes a fifth of the weight's noise: it is not why.
        (layer(input_outlier_ratio=60.0), [("rounding", "8 bits of the weight")]),
        (
            layer(own=46.0, total=43.0),
            [("rounding", "8 bits of the weight")],
        ),
        (
            layer(own=53.0, total=43.0),
            [("inherited", "90 % of its noise comes from layers before it (alone it is 53.0 dB"), ("rounding", "")],
        ),
        (layer(stage=FAULT), [("lowering", "the file begins to differ here (behind stem)"), ("rounding", "")]),
        (layer(stage=dataclasses.replace(FAULT, inherited=True)), [("rounding", "")]),
        (layer(kernel="FusedConv"), [("rounding", ""), ("folding", "FusedConv computes in float")]),
        (
            layer(kernel="QGemm, DequantizeLinear+Gemm"),
            [("rounding", ""), ("folding", "DequantizeLinear+Gemm: the weight is decoded to float at every run")],
        ),
    ],
)
def test_rules(entry, causes):
    found = likely_causes(entry)
    assert [cause.kind for cause in found] == [kind for kind, _ in causes]
    for cause, (_, why) in zip(found, causes, strict=True):
        assert why in cause.why


def test_a_float_layer_only_inherits():
    float_layer = LayerDiff("head", "linear", "float32", 32.0, 64, None, LayerSqnr(EXACT_DB, 30.0, 30.0, 150.0))
    assert [(cause.kind, cause.why) for cause in likely_causes(float_layer)] == [
        ("inherited", "100 % of its noise comes from layers before it (alone it is exact)")
    ]
    assert likely_causes(dataclasses.replace(float_layer, output_sqnr_db=LayerSqnr())) == ()


def test_an_exact_network_has_no_causes():
    same = layer(own=EXACT_DB, total=EXACT_DB, weight_only_db=EXACT_DB, input_only_db=EXACT_DB)
    assert likely_causes(same) == ()


def test_explain_gives_each_layer_its_own_evidence():
    bare = [dataclasses.replace(layer(), name=name, evidence=None) for name in "ab"]
    one, other = explain(bare, {"b": GOOD})
    assert (one.evidence, one.causes) == (None, ())
    assert other.evidence == GOOD
    assert [cause.kind for cause in other.causes] == ["rounding"]


def test_folded_layers_are_named():
    found = explain([layer(kernel=None), dataclasses.replace(layer(), name="b")], {"fc": GOOD, "b": GOOD}, ["fc"])
    assert [[cause.kind for cause in entry.causes] for entry in found] == [["rounding", "folding"], ["rounding"]]
    (_, why) = found[0].causes
    assert why.why == "the runtime keeps none of its codes: it turned them to float while loading"


def test_a_float_layer_is_not_folded():
    weightless = dataclasses.replace(GOOD, weight_bits=None, weight_only_db=None)
    (found,) = explain([layer(kernel="Gemm")], {"fc": weightless}, ["fc"])
    assert "folding" not in [cause.kind for cause in found.causes]


def test_the_worst_in_the_network_and_the_worst_alone_are_looked_at():
    figures = {"a": (50.0, 30.0), "b": (10.0, 35.0), "c": (50.0, 31.0), "d": (50.0, 32.0), "float": (EXACT_DB, 33.0)}
    layers = [dataclasses.replace(layer(own=own, total=total), name=name) for name, (own, total) in figures.items()]
    assert worth_a_look(layers, limit=3) == ("a", "b", "c")
    assert set(worth_a_look(layers)) == set(figures)


def test_a_fault_of_the_file_is_worth_a_look():
    broken = dataclasses.replace(layer(), name="broken", output_sqnr_db=LayerSqnr(44.0, 43.0, 5.0, 5.0))
    assert worth_a_look([layer(own=40.0, total=40.0), broken], limit=1) == ("broken",)


class Net(nn.Module):
    """A convolution with an activation, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 8, 3), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 6, 6] -> [N, 4]."""
        return self.fc(torch.relu(self.conv(x)).flatten(1))


@pytest.mark.ort
def test_a_compilation_names_causes(tmp_path: Path) -> None:
    """onnxruntime has no convolution that takes integer weights and float values: it folds them."""
    x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    kinds = {}
    for passes in ("rtn:bits=4", "act-quant,rtn:bits=4"):
        recipe = Recipe(passes=passes, layers=[{"match": "fc", "bits": 8}], force=True)
        report = compile_model(seeded(Net), {"x": x}, recipe, out=tmp_path / "out")
        kinds[passes] = {entry.name: {cause.kind for cause in entry.causes} for entry in report.layers}
        assert set(report.histograms) == {"conv", "fc"}
    assert {"coarse bits", "folding"} <= kinds["rtn:bits=4"]["conv"]
    assert "coarse bits" in kinds["act-quant,rtn:bits=4"]["conv"]
    assert "inherited" in kinds["act-quant,rtn:bits=4"]["fc"]
    assert "folding" not in set().union(*kinds["act-quant,rtn:bits=4"].values())
