"""Programs in float16 and bfloat16: which values are cast, what the file holds, what does not fit, engines."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from exporter.backends.base import LoweringError
from exporter.backends.tensorrt.bundle import finish
from exporter.backends.tensorrt.cast import TYPES, cast, overflows, typed
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.backends.tensorrt.widen import in_float32
from exporter.compile import compile_model
from exporter.lowering.lowered import Dtype, Lowered
from exporter.recipe import Recipe
from exporter.report import Report
from exporter.stages import is_fault
from passes.base import Program
from passes.calibration import run_graph
from passes.ops import fake_quantize
from passes.rtn import RTN
from runtimes.ort import OnnxRuntime
from tests.exporter.backends.test_onnx_lowbit import Make, affine, codebooks, with_weights
from tests.exporter.backends.test_tensorrt_packed import SAME, Pair, numbers, pair
from tests.exporter.compiled import program_of, quantized, sqnr
from tests.passes.nets import seeded
from tools.models import OptLM

HALVES = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}

# Values are rounded to 2^-12 and 2^-9 of their size (uniform error: 2^-b / sqrt(3)): 77 and 59 dB once. One
# block of a network rounds some ten times on the way, errors adding up, and layer normalization takes a mean off.
ROUNDED_DB = {"float16": 77 - 20, "bfloat16": 59 - 20}


class Norms(nn.Module):
    """RMS normalization of values whose squares float16 cannot hold, positions as angles, a mask."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.register_buffer("frequencies", torch.logspace(0, -4, 32))

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 64] -> [N, T, 64]."""
        x = self.first(x) * 300
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        places = torch.arange(x.shape[1], dtype=torch.float32) + 3000
        angles = places[:, None] * self.frequencies
        x = x * torch.cat([angles.cos(), angles.sin()], -1)
        scores = x @ x.transpose(1, 2)
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, torch.finfo(torch.float32).min)
        y: Tensor = self.second(torch.softmax(scores, -1) @ x)
        return y


def language_model() -> Program:
    tokens = {"tokens": torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(1))}
    model = seeded(lambda: OptLM(dim=128, ffn=256, heads=2, layers=1))
    program = program_of(model, tokens, rules=TensorRTBackend.rules)
    return quantized(program, RTN(bits=4, group_size=64))


def norms() -> Program:
    return quantized(program_of(seeded(Norms), numbers(4, 8, 64), rules=TensorRTBackend.rules), RTN())


def output(lowered: Lowered, program: Program) -> Tensor:
    batch = {name: value.numpy() for name, value in program.calibration.batches[0].items()}
    (value,) = OnnxRuntime(optimize=False).load(lowered.artifact).run(batch).values()
    return torch.from_numpy(value)


def run(graph: torch.fx.GraphModule, program: Program) -> Tensor:
    return run_graph(graph, program.calibration.batches)[0][0]


@pytest.mark.ort
@pytest.mark.tensorrt
@pytest.mark.parametrize("dtype", HALVES)
def test_the_file_is_the_graph_in_16_bits_and_builds(dtype: Dtype, tmp_path: Path) -> None:
    program = language_model()
    lowered = TensorRTBackend(dtype=dtype).lower(program, tmp_path)
    rounded, simulated, before = (run(graph, program) for graph in (lowered.graph, lowered.simulated, program.graph))
    assert simulated.dtype == rounded.dtype == torch.float32
    assert ROUNDED_DB[dtype] <= sqnr(before, simulated) < 77  # rounded, and no more than that
    with in_float32(lowered) as wide:
        assert sqnr(rounded, output(wide, program)) >= SAME
    if dtype == "float16":  # the file as it is: two networks that each round to 16 bits
        assert sqnr(simulated, output(lowered, program)) >= ROUNDED_DB[dtype]
    model = onnx.load(lowered.artifact.model)
    assert {value.type.tensor_type.elem_type for value in model.graph.output} == {TensorProto.FLOAT}
    scales = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".weight_scale")]
    assert {tensor.data_type for tensor in scales} == {HALVES[dtype]}
    pytest.importorskip("tensorrt_rtx")
    result = finish(tmp_path, tmp_path / "model.engine", "rtx")
    assert result.folded == ()
    kind = {"float16": "Half", "bfloat16": "BFloat16"}[dtype]
    kernels = {name: kernel for name, kernel in result.kernels.items() if "fc" in name or "proj" in name}
    assert kernels
    assert all(f"({kind})" in kernel for kernel in kernels.values())


@pytest.mark.ort
@pytest.mark.parametrize("dtype", HALVES)
def test_sums_positions_and_softmax_stay_in_float32(dtype: Dtype, tmp_path: Path) -> None:
    program = norms()
    lowered = TensorRTBackend(dtype=dtype).lower(program, tmp_path)
    simulated = run(lowered.simulated, program)
    assert bool(simulated.isfinite().all())
    # An angle of 3000 in 8 bits would be off by 8 and its cosine anything; squares of 300 are 9e4.
    assert sqnr(run(program.graph, program), simulated) >= ROUNDED_DB[dtype] - 6
    with in_float32(lowered) as wide:
        assert sqnr(run(lowered.graph, program), output(wide, program)) >= SAME
    model = onnx.shape_inference.infer_shapes(onnx.load(lowered.artifact.model))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    inputs = {node.op_type: types.get(node.input[0]) for node in model.graph.node}
    assert inputs["Softmax"] == inputs["ReduceMean"] == TensorProto.FLOAT


@pytest.mark.ort
def test_attention_has_its_softmax_in_float32(tmp_path: Path) -> None:
    lowered = TensorRTBackend(dtype="float16").lower(language_model(), tmp_path)
    nodes = onnx.load(lowered.artifact.model).graph.node
    (softmax,) = [node for node in nodes if node.op_type == "Softmax"]
    (before,) = [node for node in nodes if softmax.input[0] in node.output]
    (behind,) = [node for node in nodes if softmax.output[0] in node.input]
    casts = [(node.op_type, node.attribute[0].i) for node in (before, behind)]
    assert casts == [("Cast", TensorProto.FLOAT), ("Cast", TensorProto.FLOAT16)]


@pytest.mark.ort
def test_block_sums_may_pass_the_range_of_float16(tmp_path: Path) -> None:
    """512 inputs of 400 add up to 2e5, the products with a row's weights do not."""
    net = program_of(seeded(lambda: Pair(512, 512)), numbers(4, 3, 512), rules=TensorRTBackend.rules)
    program = quantized(net, RTN(bits=4, group_size=512, symmetric=False))
    large = {"x": torch.full((4, 3, 512), 400.0)}
    lowered = TensorRTBackend(dtype="float16").lower(program, tmp_path)
    expected = run_graph(lowered.graph, [large])[0][0]
    session = OnnxRuntime(optimize=False).load(lowered.artifact)
    (value,) = session.run({"x": large["x"].numpy()}).values()
    assert np.isfinite(value).all()
    assert sqnr(expected, torch.from_numpy(value)) >= ROUNDED_DB["float16"]


@pytest.mark.ort
@pytest.mark.parametrize("make", [affine(3, 64), affine(3, 64, meta=128), codebooks(2, 8, 8)])
@pytest.mark.parametrize(("dtype", "plugins"), [("float16", True), ("bfloat16", False)])
def test_packed_weights_and_plugins_take_the_type(make: Make, plugins: bool, dtype: Dtype, tmp_path: Path) -> None:
    program = pair(make, 128, 128)
    lowered = TensorRTBackend(dtype=dtype, plugins=plugins).lower(program, tmp_path)
    with in_float32(lowered) as wide:
        assert sqnr(run(lowered.graph, program), output(wide, program)) >= SAME
    model = onnx.load(lowered.artifact.model)
    calls = [node for node in model.graph.node if node.domain == "qexport"]
    assert len(calls) == 2 * plugins
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    for call in calls:  # its activations are of the type already, its numbers are stored in it
        assert HALVES[dtype] in {types[name] for name in call.input if name in types}
    if plugins:
        assert len(casts) == 2  # at the network's input and output


@pytest.mark.ort
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_scales_made_of_bytes_and_numbers_are_rounded_as_the_file_has_them(dtype: Dtype, tmp_path: Path) -> None:
    class Scaled(Pair):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x * 0.35355339) - 0.1
            return self.second(torch.addcmul(y, torch.remainder(y, 1.3), y, value=0.3))

    program = program_of(seeded(lambda: Scaled(64, 64)), numbers(4, 3, 64), rules=TensorRTBackend.rules)
    with_weights(program, {name: affine(4, 64, meta=128) for name in ("first", "second")})
    lowered = TensorRTBackend(dtype=dtype).lower(program, tmp_path)
    with in_float32(lowered) as wide:
        assert sqnr(run(lowered.graph, program), output(wide, program)) >= SAME


@pytest.mark.tensorrt
def test_what_the_parser_does_not_read_in_bfloat16_is_computed_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    net = nn.Sequential(nn.Linear(64, 64), nn.Hardswish(), nn.Linear(64, 64), nn.Mish(), nn.Linear(64, 64))
    program = quantized(program_of(net, {"input": torch.ones(4, 64)}, rules=TensorRTBackend.rules), RTN())
    lowered = TensorRTBackend(dtype="bfloat16").lower(program, tmp_path)
    finish(tmp_path, tmp_path / "model.engine", "rtx")
    with in_float32(lowered) as wide:
        assert sqnr(run(lowered.graph, program), output(wide, program)) >= SAME


class Loud(nn.Module):
    """A product past float16's largest number."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.loud, self.quiet = nn.Linear(8, 8), nn.Linear(8, 8)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 8]."""
        y: Tensor = self.quiet(torch.tanh(self.loud(x * self.gain)))
        return y


def test_what_float16_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    program = quantized(program_of(seeded(lambda: Loud(3e5)), numbers(4, 8), rules=TensorRTBackend.rules), RTN())
    with pytest.raises(LoweringError, match=r"loud: .*past float16's 65504; give --dtype bfloat16"):
        TensorRTBackend(dtype="float16").lower(program, tmp_path)
    assert bool(run(TensorRTBackend(dtype="bfloat16").lower(program, tmp_path).simulated, program).isfinite().all())


def test_weights_that_float16_cannot_hold_are_refused_by_name() -> None:
    net = seeded(lambda: Loud(1.0))
    assert isinstance(net, Loud)
    with torch.no_grad():
        net.quiet.weight.fill_(1e5)
        net.loud.bias.fill_(1e-9)
    program = program_of(net, numbers(4, 8), rules=TensorRTBackend.rules)
    found = overflows(typed(program.graph, program.calibration.batches), torch.float16)
    assert "its values reach 1e+05, past float16's 65504" in found["quiet.weight"]
    assert "would be 0 in float16" in found["loud.bias"]
    assert overflows(typed(program.graph, program.calibration.batches), torch.bfloat16) == {}


@pytest.mark.parametrize("dtype", HALVES)
def test_the_float_model_alone_is_cast_by_the_same_rules(dtype: Dtype) -> None:
    program = norms()
    assert program.float_twin is not None
    halved = cast(typed(program.float_twin, program.calibration.batches), TYPES[dtype])
    noise = sqnr(run(program.reference, program), run(halved, program))
    assert ROUNDED_DB[dtype] - 6 <= noise < 77


def test_activations_of_16_bits_are_quantized_in_float32() -> None:
    """A quotient in float16 would round 63.46875 / 1 and its like across the half."""
    scale, zero = torch.tensor(0.0123, dtype=torch.float16), torch.tensor(0, dtype=torch.int32)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(0)).half()
    codes = torch.round(x.double() / scale.double()).clamp(-128, 127)
    expected = (codes * scale.double()).half()
    assert torch.equal(fake_quantize(x, scale, zero, -128, 127), expected)


@pytest.mark.ort
@pytest.mark.parametrize("dtype", HALVES)
def test_the_report_shows_what_the_cast_alone_costs(dtype: Dtype, tmp_path: Path) -> None:
    # No engine: full TensorRT has none to build with here, or takes a GPU.
    recipe = Recipe(target=("trt",), trt_flavor="tensorrt", dtype=dtype, passes="rtn")
    report = compile_model(seeded(Norms), numbers(4, 8, 64), recipe, out=tmp_path / "out")
    ((output, figures),) = report.cast[dtype].items()
    assert ROUNDED_DB[dtype] - 6 <= figures.sqnr_db < 77
    assert report.outputs["eager_quantized"][output].sqnr_db < figures.sqnr_db  # which has the cast in it
    assert report.parity["tensorrt_dialect"][output].sqnr_db >= SAME
    assert ("tensorrt_16_bit" in report.parity) == (dtype == "float16")
    assert not any(is_fault(layer.stage) for layer in report.layers)
    assert Report.from_json(report.to_json()).cast[dtype][output].sqnr_db == pytest.approx(figures.sqnr_db, rel=1e-6)
    for text in ((tmp_path / "out" / name).read_text(encoding="utf-8") for name in ("report.md", "report.html")):
        assert f"float model in {dtype}" in text
