"""Programs in TensorRT's dialect: the same numbers in onnxruntime, and engines that keep every weight compressed."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from exporter.backends.base import LoweringError
from exporter.backends.tensorrt import bundle
from exporter.backends.tensorrt.build import EngineBuild
from exporter.backends.tensorrt.bundle import BundleError, finish, read_bundle
from exporter.backends.tensorrt.dialect import fit_blocks, repeat_channel_scale
from exporter.backends.tensorrt.layer_table import EngineLayer, EngineTensor
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.backends.tensorrt.profiles import choose_profiles
from exporter.capture import capture, export_module
from exporter.lowering.lowered import Lowered
from passes.act_quant import ActQuant
from passes.base import Program, TargetRules
from passes.calibration import Calibration, run_graph
from passes.fold_bn import FoldBatchNorm
from passes.graph import tidy
from passes.rtn import RTN
from tools.models import OptLM

Batch = Mapping[str, Tensor]
Dynamic = Mapping[str, Mapping[int, str]]

# What lets any program through, to see what the backend itself refuses.
PERMISSIVE = TargetRules(
    name="any",
    symmetric_activations=False,
    conv_outputs=False,
    integer_elementwise=False,
    quantized_skip=False,
    dynamic_activations=True,
    weight_zero_point=True,
    integer_kinds=frozenset({"linear", "conv"}),
)


class ConvNet(nn.Module):
    """3 channels (padded to 4 by TensorRT), depthwise, residual add, max and average pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 16, 1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 8, 8] -> [N, 10]."""
        x = torch.relu(self.norm(self.stem(x)))
        x = nn.functional.max_pool2d(x + self.point(nn.functional.relu6(self.depthwise(x))), 2)
        logits: Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Upsampler(nn.Module):
    """Transposed convolutions, plain and grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.grouped = nn.ConvTranspose2d(12, 6, 3, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8, 4, 4] -> [N, 6, 10, 10]."""
        y: Tensor = self.grouped(torch.relu(self.up(x)))
        return y


class FusedAttention(nn.Module):
    """Causal attention whose queries, keys and values come from one layer and are cut out of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 64] -> [N, T, 64]."""
        q, k, v = (part.unflatten(2, (2, 32)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y: Tensor = self.out(
            nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        )
        return y


@dataclass(frozen=True)
class Case:
    """A network, how it is quantized, and parts of the names of the kernels its layers must run on (empty: any)."""

    net: str
    bits: int
    group_size: int = -1
    act_bits: int = 0
    embeddings: int = 8
    kernels: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.net}-w{self.bits}a{self.act_bits or 'float'}g{self.group_size}e{self.embeddings}"


NETS: dict[str, tuple[Callable[[], nn.Module], Dynamic]] = {
    "conv": (ConvNet, {"x": {0: "batch"}}),
    "up": (Upsampler, {"x": {0: "batch"}}),
    "attention": (FusedAttention, {"x": {0: "batch", 1: "length"}}),
    "lm": (lambda: OptLM(dim=128, ffn=256, heads=2, layers=1), {"tokens": {0: "batch", 1: "length"}}),
}

# A convolution that also adds the skipped value reads Int8+Float.
CORRELATION, GEMM, EMBEDDING = "correlation (Int8", "gemm (Int8)", "Gath"
INT8_FUSED, INT4_FUSED = "runtime_fusion CastMulCastFc (Float)", "runtime_fusion ReplCastMulCastFc (Float)"

CONV_W8A8 = Case("conv", 8, act_bits=8, kernels=(CORRELATION, GEMM))
UP_W4 = Case("up", 4)
LM_W8A8 = Case("lm", 8, act_bits=8, kernels=(GEMM, EMBEDDING))
LM_W4A8 = Case("lm", 4, act_bits=8, kernels=(GEMM, EMBEDDING))
LM_W2 = Case("lm", 2, group_size=0, kernels=(INT4_FUSED, INT8_FUSED, EMBEDDING))

CASES = [
    CONV_W8A8,
    Case("conv", 8, group_size=0, act_bits=8, kernels=(CORRELATION, GEMM)),
    Case("conv", 4, act_bits=8, kernels=(CORRELATION, GEMM)),
    Case("conv", 4, act_bits=4, kernels=(CORRELATION, GEMM)),
    Case("conv", 4, group_size=12),  # 144 and 27 columns: groups of 12, and rows padded to 36
    UP_W4,
    Case("attention", 8, act_bits=8, kernels=(GEMM,)),
    Case("attention", 8, kernels=(INT8_FUSED,)),
    LM_W8A8,
    LM_W4A8,
    Case("lm", 4, group_size=64, kernels=(INT4_FUSED, INT8_FUSED, EMBEDDING)),  # the head keeps 8 bits
    Case("lm", 4, group_size=128, embeddings=4, kernels=(INT4_FUSED, INT8_FUSED, EMBEDDING)),
    Case("lm", 3, group_size=48, kernels=(INT4_FUSED, INT8_FUSED, EMBEDDING)),  # 48 does not divide 128: blocks of 16
    LM_W2,
]


def network(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETS[name][0]().eval()


def batch_of(name: str, size: int = 4, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    if name == "lm":
        return {"tokens": torch.randint(0, 256, (size, 12), generator=generator)}
    shape = {"conv": (3, 8, 8), "up": (8, 4, 4), "attention": (9, 64)}[name]
    return {"x": torch.randn(size, *shape, generator=generator)}


def program_of(
    module: nn.Module, batch: Batch, dynamic: Dynamic, rules: TargetRules = TensorRTBackend.rules
) -> Program:
    program = capture(export_module(module, batch, dynamic), Calibration((batch,), (batch,), "random"), rules)
    FoldBatchNorm().run(program)
    tidy(program.graph)
    return program


def quantized(case: Case) -> Program:
    program = program_of(network(case.net), batch_of(case.net), NETS[case.net][1])
    if case.act_bits:
        ActQuant(bits=case.act_bits).run(program)
        tidy(program.graph)
    RTN(bits=case.bits, group_size=case.group_size, embeddings=case.embeddings).run(program)
    tidy(program.graph)
    return program


def sqnr(reference: Tensor, actual: Tensor) -> float:
    reference, actual = reference.double(), actual.double()
    return float(10 * torch.log10(reference.square().sum() / (reference - actual).square().sum()))


def in_onnxruntime(model: Path, batch: Batch) -> Tensor:
    """The first output, every node computed as it is written."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {name: value.numpy() for name, value in batch.items()})[0])


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Lowered]:
    """Lowers a case once for all tests."""

    @functools.cache
    def lower(case: Case) -> Lowered:
        return TensorRTBackend().lower(quantized(case), tmp_path_factory.mktemp(case.label))

    return lower


@pytest.mark.ort
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_file_computes_what_the_lowered_graph_does(case: Case, lowered: Callable[[Case], Lowered]) -> None:
    result = lowered(case)
    onnx.checker.check_model(str(result.artifact.model), full_check=True)
    for size in (4, 3):  # the batch is free
        batch = batch_of(case.net, size, seed=size)
        expected = run_graph(result.graph, [batch])[0][0]
        # Asked of a lowering where no rounding boundary is crossed, as here: float32 sums in another order leave more
        # than 100 dB. (An activation that another order puts on the other side of a boundary costs more: one step.)
        assert sqnr(expected, in_onnxruntime(result.artifact.model, batch)) >= 60


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_only_signed_codes_and_zero_points_of_zero(case: Case, lowered: Callable[[Case], Lowered]) -> None:
    graph = onnx.load(str(lowered(case).artifact.model)).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    assert not {TensorProto.UINT8, TensorProto.UINT4} & {tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) == 3:
            assert not numpy_helper.to_array(constants[node.input[2]]).any()
        if node.op_type == "QuantizeLinear":
            assert constants[node.input[2]].data_type == TensorProto.INT8  # else ONNX takes it for uint8


@pytest.mark.tensorrt
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_engine_keeps_every_weight_compressed_and_uses_its_kernels(
    case: Case, lowered: Callable[[Case], Lowered], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    result = lowered(case)
    engine = finish(result.artifact.model.parent, tmp_path / "model.engine", "rtx")
    assert engine.folded == ()
    assert set(engine.kernels) == {layer.name for layer in result.layers}
    for name, kernel in engine.kernels.items():
        assert not case.kernels or any(wanted in kernel for wanted in case.kernels), (name, kernel)
    assert engine.build.engine.stat().st_size == engine.build.engine_bytes


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        TensorRTBackend(arch=("sm80",)).lower(quantized(CONV_W8A8), folder)
        files.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert files[0] == files[1]
    assert set(files[0]) == {"model.onnx", "build.json"}


@pytest.mark.tensorrt
def test_architectures_and_shapes_can_be_replaced(lowered: Callable[[Case], Lowered], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    folder = lowered(CONV_W8A8).artifact.model.parent
    shapes = {"x": ((2, 3, 8, 8), (2, 3, 8, 8), (2, 3, 8, 8))}
    build = functools.partial(finish, folder, flavor="rtx")
    everywhere = build(engine=tmp_path / "all.engine")
    again = build(engine=tmp_path / "again.engine")
    ampere = build(engine=tmp_path / "sm80.engine", arch=["sm80"], profiles=shapes)
    assert everywhere.build.sha256 == again.build.sha256
    assert ampere.build.sha256 != everywhere.build.sha256
    assert ampere.folded == ()


# ---- how weights are stored ----------------------------------------------------------------------------------------


def stored(result: Lowered) -> dict[str, tuple[str, TensorProto]]:
    """{layer: its format and the initializer of its codes}."""
    constants = {tensor.name: tensor for tensor in onnx.load(str(result.artifact.model)).graph.initializer}
    return {layer.name: (layer.format, constants[layer.codes]) for layer in result.layers}


def test_int4_weights_of_one_scale_a_channel_become_blocks(lowered: Callable[[Case], Lowered]) -> None:
    formats = stored(lowered(LM_W2))
    kind, codes = formats["layers.0.fc1"]
    assert (kind, codes.data_type, list(codes.dims)) == ("int4 blocks of 64", TensorProto.INT4, [128, 256])
    assert formats["layers.0.fc2"][0] == "int4 blocks of 128"


def test_narrow_codes_of_integer_layers_ride_in_int8(lowered: Callable[[Case], Lowered]) -> None:
    result = lowered(LM_W4A8)
    kind, codes = stored(result)["layers.0.fc1"]
    assert (kind, codes.data_type) == ("int8", TensorProto.INT8)
    values = numpy_helper.to_array(codes)
    assert values.min() >= -8
    assert values.max() <= 7
    by_name = {layer.name: layer for layer in result.layers}
    assert by_name["layers.0.fc1"].bits_per_weight == 8 + 32 / 128  # one float32 scale for 128 weights


def test_int4_needs_an_even_number_of_elements(tmp_path: Path) -> None:
    module, batch = nn.Sequential(nn.Linear(9, 7)).eval(), {"input": torch.randn(4, 9)}
    program = program_of(module, batch, {"input": {0: "batch"}})
    RTN(bits=8).run(program)
    for node in program.graph.graph.nodes:  # as if a pass had made a 4-bit head
        if "dequantize" in str(node.target):
            node.update_arg(3, 4)
    result = TensorRTBackend().lower(program, tmp_path)
    assert result.artifact.inputs == ("input",)  # fx calls this node input_1
    kind, codes = stored(result)["0"]
    assert (kind, codes.data_type) == ("int8", TensorProto.INT8)


@pytest.mark.parametrize(
    ("columns", "group_size", "block"), [(128, 32, 32), (128, 48, 16), (27, 12, 12), (96, 64, 32), (40, 64, -1)]
)
def test_blocks_divide_rows_and_mean_the_same(columns: int, group_size: int, block: int) -> None:
    random = np.random.default_rng(0)
    groups = -(-columns // group_size) if group_size < columns else 1
    codes = random.integers(-8, 8, (6, columns)).astype(np.int8)
    scale = random.random((6, groups), np.float32)
    new_codes, new_scale, new_block = fit_blocks(codes, scale, group_size if groups > 1 else -1)
    assert new_block == max(block, 0)
    if new_block:
        assert new_codes.shape[1] == new_block * new_scale.shape[1]
        repeated = np.repeat(new_scale, new_block, axis=1)
        expected = codes * scale[:, np.arange(columns) // group_size]
        np.testing.assert_array_equal((new_codes * repeated)[:, :columns], expected)


@pytest.mark.parametrize(("columns", "block"), [(256, 128), (128, 64), (48, 16), (16, -1), (100, -1)])
def test_a_repeated_scale_has_two_blocks_or_none(columns: int, block: int) -> None:
    scale, chosen = repeat_channel_scale(np.ones((3, 1), np.float32), columns)
    assert chosen == block
    assert scale.shape == (3, columns // block if block > 0 else 1)


# ---- refusals ------------------------------------------------------------------------------------------------------


def refused(program: Program, folder: Path) -> dict[str, str]:
    tidy(program.graph)
    with pytest.raises(LoweringError) as caught:
        TensorRTBackend().lower(program, folder)
    assert list(folder.iterdir()) == []
    return caught.value.reasons


def test_activations_that_tensorrt_does_not_know_are_refused(tmp_path: Path) -> None:
    program = program_of(network("lm"), batch_of("lm"), NETS["lm"][1], PERMISSIVE)
    ActQuant(mode="token").run(program)
    RTN(embeddings=0).run(program)
    assert all("per-token" in reason for reason in refused(program, tmp_path).values())
    program = program_of(network("conv"), batch_of("conv"), NETS["conv"][1], PERMISSIVE)
    ActQuant().run(program)
    reasons = refused(program, tmp_path)
    assert len(reasons) == 4  # the input of each layer
    assert all("codes 0 to 255" in reason for reason in reasons.values())


def test_block_wise_weights_on_quantized_activations_are_refused(tmp_path: Path) -> None:
    program = program_of(network("lm"), batch_of("lm"), NETS["lm"][1])
    ActQuant().run(program)
    RTN(bits=4, group_size=32).run(program)
    reasons = refused(program, tmp_path)
    assert "layers.0.fc1" in reasons
    assert "group_size=-1" in reasons["layers.0.fc1"]


# ---- the bundle ----------------------------------------------------------------------------------------------------


def test_the_bundle_says_how_to_build_it(lowered: Callable[[Case], Lowered]) -> None:
    result = lowered(LM_W8A8)
    described = read_bundle(result.artifact.model.parent)
    assert (described.inputs, described.outputs) == (("tokens",), result.artifact.outputs)
    assert described.profiles == {"tokens": ((1, 1), (8, 12), (32, 12))}
    assert described.arch == ()
    assert described.layers == result.layers


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("{}", "damaged"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1, "inputs": [], "outputs": [], "profiles": {"x": 3}}', "damaged"),
        ('{"schema_version": 1, "inputs": [], "outputs": [], "profiles": {"x": [[1]]}}', "damaged"),
    ],
)
def test_a_damaged_bundle_is_one_line(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "build.json").write_text(content)
    with pytest.raises(BundleError, match=reason) as caught:
        finish(tmp_path, tmp_path / "e", "rtx")
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_bundle_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has to hold build\.json and model\.onnx"):
        read_bundle(tmp_path)


def test_a_folded_weight_is_reported_with_its_layer(
    lowered: Callable[[Case], Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = lowered(CONV_W8A8).artifact.model.parent

    def folding_builder(model: Path, engine: Path, *_: object, **__: object) -> EngineBuild:
        """An engine whose classifier is a float matmul, and whose other layers are as they should be."""
        engine.write_bytes(b"")
        layers = []
        for layer in read_bundle(folder).layers:
            dims = tuple(stored(lowered(CONV_W8A8))[layer.name][1].dims)
            kind = "Float" if layer.name == "head" else "Int8"
            nodes = (f"{layer.name}/DequantizeLinear",)
            layers.append(EngineLayer(layer.name, "gemm", "", nodes, (), (EngineTensor("w", kind, dims),)))
        return EngineBuild(engine, "rtx", "1", 0, "", tuple(layers), 0, 0, (), 0.0)

    monkeypatch.setattr(bundle, "build_engine", folding_builder)
    assert finish(folder, tmp_path / "e", "rtx").folded == ("head",)


def test_architectures_of_a_bundle_are_for_rtx_only(
    lowered: Callable[[Case], Lowered], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TensorRTBackend(arch=("sm89",)).lower(quantized(UP_W4), tmp_path)
    asked: list[object] = []

    def recording_builder(model: Path, engine: Path, flavor: str, **options: object) -> EngineBuild:
        asked.append(options["arch"])
        raise bundle.BundleError("enough")

    monkeypatch.setattr(bundle, "build_engine", recording_builder)
    for flavor in ("rtx", "tensorrt"):
        with pytest.raises(BundleError, match="enough"):
            finish(tmp_path, tmp_path / "e", flavor)  # type: ignore[arg-type]  # a plain string here
    assert asked == [("sm89",), ()]
    assert json.loads((tmp_path / "build.json").read_text(encoding="utf-8"))["arch"] == ["sm89"]


# ---- shapes --------------------------------------------------------------------------------------------------------


class TwoTexts(nn.Module):
    """Two inputs whose lengths are one."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """[N, T, 4] and [N, T] -> [N, T, 4]."""
        return a * b[..., None]


class Pairs(nn.Module):
    """A network that needs at least two columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, T] -> [N, 1, T - 1]."""
        y: Tensor = self.conv(x)
        return y


def test_free_axes_of_one_label_get_one_range() -> None:
    batch = {"a": torch.randn(40, 6, 4), "b": torch.randn(40, 6)}
    axes = {0: "batch", 1: "length"}
    profiles = choose_profiles(program_of(TwoTexts(), batch, {"a": axes, "b": axes}))
    # A calibration batch larger than the usual maximum must fit.
    assert profiles == {"a": ((1, 1, 4), (8, 6, 4), (40, 6, 4)), "b": ((1, 1), (8, 6), (40, 6))}


def test_an_axis_begins_at_a_length_the_model_can_run() -> None:
    program = program_of(Pairs(), {"x": torch.randn(2, 1, 6)}, {"x": {0: "batch", 2: "length"}})
    assert choose_profiles(program) == {"x": ((1, 1, 6), (8, 1, 6), (32, 1, 6))}  # not from 1


def test_fixed_inputs_have_no_profile() -> None:
    assert choose_profiles(program_of(TwoTexts(), {"a": torch.randn(2, 3, 4), "b": torch.randn(2, 3)}, {})) == {}
