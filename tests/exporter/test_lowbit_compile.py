"""The trained language model in 3 bits and in codebooks, from the recipe to the report and the float twin."""

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest
from torch import Tensor

import qexport
from exporter.backends.onnx_qdq.decode import ROUNDED_BLOCK
from exporter.float_twin import make_float
from exporter.kernels import optimized_kernels, weight_dequantize_left
from exporter.report import LayerDiff, Report
from runtimes.base import Artifact
from tools.data import lm_calibration
from tools.models import load_reference

pytestmark = pytest.mark.ort

SUMS = "uint3 decoded at load to uint4 blocks and a product of group sums"
ROUNDED = f"aq_codebook decoded at load to int8 blocks of {ROUNDED_BLOCK}"
# Few steps on few samples: what is looked at is the way through, not the quality of the codes.
AQ = "aq:num_codebooks=2:codebook_bits=6:beam_size=1:rounds=1:sample=2048:kmeans_iterations=2"
"""Loses much, fast."""


@dataclasses.dataclass(frozen=True)
class Done:
    """A compilation."""

    out: Path
    report: Report

    @property
    def layers(self) -> dict[str, LayerDiff]:
        """By name."""
        return {layer.name: layer for layer in self.report.layers}

    @property
    def artifact(self) -> Artifact:
        """The file."""
        return Artifact("onnxruntime", self.out / "model.onnx", ("tokens",), ("output",))


def done(out: Path, passes: str, **options: object) -> Done:
    tokens: Tensor = lm_calibration()["tokens"]
    recipe = qexport.Recipe(passes=passes, dynamic={"tokens": {0: "batch"}}, threads=1, **options)  # type: ignore[arg-type]  # as a user gives them
    model = load_reference("opt_lm")
    report = qexport.compile_model(model, {"tokens": tokens[:2]}, recipe, calibration={"tokens": tokens[:10]}, out=out)
    return Done(out, report)


@pytest.fixture(scope="module")
def hqq(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """3 bits; one layer compact, one stored for speed alone."""
    layers = [{"match": "layers.0.fc1", "weights_as": "compact"}, {"match": "layers.0.fc2", "weights_as": "fast"}]
    return done(tmp_path_factory.mktemp("hqq") / "out", "hqq:bits=3", layers=layers)


@pytest.fixture(scope="module")
def aq(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """Codebooks."""
    return done(tmp_path_factory.mktemp("aq") / "out", AQ)


def test_three_bits(hqq: Done) -> None:
    layers = hqq.layers
    assert layers["layers.1.fc1"].format == SUMS
    assert layers["layers.1.fc1"].kernel == "MatMulNBits"
    assert layers["layers.1.fc1"].bits_per_weight < 3.5
    assert layers["layers.0.fc1"].format == "uint3 in a function, folded at load"
    assert layers["layers.0.fc1"].kernel == "MatMul"
    assert "folds it to float" in layers["layers.0.fc1"].why
    assert layers["layers.0.fc2"].format == "uint4 blocks and a product of group sums"
    assert layers["layers.0.fc2"].bits_per_weight > 5
    assert layers["lm_head"].kernel == "MatMulNBits"


def test_codebooks(aq: Done) -> None:
    layers = aq.layers
    inner = [layer for name, layer in layers.items() if name.startswith("layers.") and layer.kind == "linear"]
    assert {(layer.format, layer.kernel) for layer in inner} == {(ROUNDED, "MatMulNBits")}
    assert layers["layers.1.fc1"].bits_per_weight < 2.0  # 12 bits for 8 weights, and 32 kbit of codebooks


@pytest.mark.parametrize("name", ["hqq", "aq"])
def test_the_file_agrees_with_the_quantized_graph(name: str, request: pytest.FixtureRequest) -> None:
    result: Done = request.getfixturevalue(name)
    parity = {run: figures["output"].sqnr_db for run, figures in result.report.parity.items()}
    unoptimized, optimized = parity["onnxruntime_unoptimized"], parity["onnxruntime"]
    # Float sums in another order leave over 100 dB in each of 24 layers; 20 dB for what they add up to.
    assert unoptimized is None or unoptimized >= 80
    # Inputs of the block kernels may fall to the other side of a rounding boundary.
    assert optimized is None or optimized >= 45
    assert weight_dequantize_left(optimized_kernels(result.artifact)) == ()


@pytest.mark.parametrize("name", ["hqq", "aq"])
def test_the_float_twin_has_no_codes(name: str, request: pytest.FixtureRequest) -> None:
    model = ir.load(request.getfixturevalue(name).out / "model.onnx")
    assert make_float(model) > 20
    left = {node.op_type for node in model.graph}
    assert not left & {"DequantizeLinear", "QuantizeLinear", "ReduceSum"}


def test_the_report_says_why(hqq: Done) -> None:
    text = (hqq.out / "report.md").read_text(encoding="utf-8")
    assert f"- {SUMS} (22 layers): packed; becomes what the kernel reads at load" in text
    assert (Report.from_json((hqq.out / "report.json").read_text(encoding="utf-8"))).layers[3].why
