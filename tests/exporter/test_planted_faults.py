"""Faults planted one at a time into a good artifact or pipeline: the report names the layer and the stage of each."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, fx, nn
from torch.nn import functional as F

from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.backends.tensorrt.lower import TensorRTBackend
from exporter.judge import judge_all
from exporter.lowering.lowered import Lowered
from exporter.recipe import Recipe
from exporter.render.markdown import render
from exporter.report import Report
from exporter.samples import Samples, fingerprint, split
from exporter.stages import is_fault, own_stage, source
from passes.act_quant import ActQuant
from passes.base import Program
from passes.graph import find_layers, get_tensor
from passes.rtn import RTN
from runtimes.base import Artifact, Session
from runtimes.ort import OnnxRuntime
from tests.exporter.compiled import program_of, quantized
from tests.passes.nets import seeded

pytestmark = pytest.mark.ort


class Convs(nn.Module):
    """A convolution with batch norm, a depthwise one with a shortcut, a pointwise one, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        nn.init.uniform_(self.norm.weight, 0.5, 2.0)
        nn.init.uniform_(self.norm.running_var, 0.2, 3.0)
        self.depthwise, self.mix = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8 * 36, 6)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 2, 6, 6] -> [N, 6]."""
        y = F.relu(self.norm(self.stem(x)))
        y = y + F.relu(self.depthwise(y))
        return self.fc(F.relu(self.mix(y)).flatten(1))


class Block(nn.Module):
    """Attention behind a layer norm, and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 32] -> [N, T, 32]."""
        h = self.norm(x)
        x = x + self.out(torch.softmax(self.q(h) @ self.k(h).transpose(1, 2), -1) @ self.v(h))
        return x + self.fc2(F.relu(self.fc1(x)))


class Two(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 16] -> [N, 4]."""
        return self.two(F.relu(self.one(x)))


@dataclasses.dataclass(frozen=True)
class Good:
    """A program and its files as they should be; `lowered` is {target: file}."""

    program: Program
    lowered: dict[str, Lowered]


def samples(*shape: int) -> dict[str, Tensor]:
    return {"x": torch.randn(*shape, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def convs(tmp_path_factory: pytest.TempPathFactory) -> Good:
    program = quantized(program_of(seeded(Convs).eval(), samples(16, 2, 6, 6)), ActQuant(), RTN())
    return Good(program, {"onnx": OnnxBackend().lower(program, tmp_path_factory.mktemp("convs"))})


@pytest.fixture(scope="module")
def block(tmp_path_factory: pytest.TempPathFactory) -> Good:
    program = quantized(program_of(seeded(Block), samples(16, 5, 32)), RTN(bits=4, group_size=16))
    return Good(program, {"onnx": OnnxBackend().lower(program, tmp_path_factory.mktemp("block"))})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Good:
    rules = OnnxBackend.rules.strictest(TensorRTBackend.rules)
    program = quantized(program_of(seeded(Two), samples(16, 16), rules=rules), ActQuant(), RTN())
    folders = {name: tmp_path_factory.mktemp(name) for name in ("onnx", "trt")}
    backends = {"onnx": OnnxBackend(), "trt": TensorRTBackend()}
    return Good(program, {name: backend.lower(program, folders[name]) for name, backend in backends.items()})


def judge(good: Good, lowered: dict[str, Lowered] | None = None) -> Report:
    """What validation says of a program and its files."""
    files = lowered or good.lowered
    report = judge_all(good.program, Recipe(threads=1), files, None, files["onnx"].artifact.model.parent)
    return dataclasses.replace(report, model={"name": "net"})


def assert_names(report: Report, layer: str, stage: str) -> None:
    """The report says so in its data, in words, and accuses no layer in front of it."""
    found = source(report.layers)
    assert found is not None
    assert found.stage is not None
    assert (found.name, own_stage(found.stage)) == (layer, stage)
    assert f"{stage} at {layer}, " in render(report)
    if is_fault(found.stage):
        assert found.causes[0].kind == "lowering"
        assert "begins to differ here" in found.causes[0].why


# ---- faults of a file ----------------------------------------------------------------------------------------------


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name)).copy()


def set_constant(model: onnx.ModelProto, name: str, value: np.ndarray) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.array(value, order="C"), name))


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(entry for entry in model.graph.node if entry.name == name)


def maker(model: onnx.ModelProto, value: str) -> onnx.NodeProto:
    return next(entry for entry in model.graph.node if value in entry.output)


def set_attribute(entry: onnx.NodeProto, name: str, value: object) -> None:
    kept = [attribute for attribute in entry.attribute if attribute.name != name]
    del entry.attribute[:]
    entry.attribute.extend([*kept, helper.make_attribute(name, value)])


Plant = Callable[[onnx.ModelProto], None]


def edit(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Change a constant, its type and shape stay."""

    def plant(model: onnx.ModelProto) -> None:
        value = constant(model, name)
        changed = change(value.copy())
        assert changed.shape == value.shape
        assert not np.array_equal(changed, value), "the fault changes nothing"
        set_constant(model, name, changed.astype(value.dtype))

    return plant


def swap(one: str, other: str) -> Plant:
    """Exchange two layers' constants."""

    def plant(model: onnx.ModelProto) -> None:
        for kind in ("weight_codes", "weight_scale", "bias"):
            values = [constant(model, f"{layer}.{kind}") for layer in (one, other)]
            set_constant(model, f"{one}.{kind}", values[1])
            set_constant(model, f"{other}.{kind}", values[0])

    return plant


def attribute(name: str, key: str, value: object) -> Plant:
    return lambda model: set_attribute(node(model, name), key, value)


def replace_by_identity(find: Callable[[onnx.ModelProto], onnx.NodeProto], argument: int = 0) -> Plant:
    """Take an operator out: one of its inputs passes through."""

    def plant(model: onnx.ModelProto) -> None:
        entry = find(model)
        entry.CopyFrom(helper.make_node("Identity", [entry.input[argument]], list(entry.output), name=entry.name))

    return plant


def only(kind: str) -> Callable[[onnx.ModelProto], onnx.NodeProto]:
    """The first operator of a kind."""
    return lambda model: next(entry for entry in model.graph.node if entry.op_type == kind)


def input_quantizer(model: onnx.ModelProto, layer: str) -> onnx.NodeProto:
    """The DequantizeLinear in front of a layer."""
    return maker(model, maker(model, f"{layer}/output").input[0])


def own_zero_point(model: onnx.ModelProto) -> None:
    """The DequantizeLinear in front of mix takes a zero point of one more than the QuantizeLinear."""
    entry = input_quantizer(model, "mix")
    value = constant(model, entry.input[2])
    model.graph.initializer.append(numpy_helper.from_array(value + np.uint8(1), "zero_off_by_one"))
    entry.input[2] = "zero_off_by_one"


def halve_range(model: onnx.ModelProto) -> None:
    name = input_quantizer(model, "mix").input[1]
    set_constant(model, name, constant(model, name) / np.float32(2))


def batch_norm_left_out(model: onnx.ModelProto) -> None:
    norm = seeded(Convs).eval().norm
    fold = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().numpy()
    set_constant(model, "stem.weight_scale", constant(model, "stem.weight_scale") / fold)
    set_constant(model, "stem.bias", np.zeros(8, np.float32))


def other_group_size(model: onnx.ModelProto) -> None:
    """Groups of 32 inputs where there are 16: the first half of the scales serves all."""
    set_attribute(node(model, "fc2/DequantizeLinear"), "block_size", 32)
    set_constant(model, "fc2.weight_scale", constant(model, "fc2.weight_scale")[:2])


def other_nibble_order(model: onnx.ModelProto) -> None:
    tensor = next(entry for entry in model.graph.initializer if entry.name == "v.weight_codes")
    packed = np.frombuffer(tensor.raw_data, np.uint8)
    tensor.raw_data = ((packed >> 4) | (packed << 4)).astype(np.uint8).tobytes()


def permuted(value: np.ndarray) -> np.ndarray:
    return value[[1, 0, *range(2, len(value))]]


def row(index: int, factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(value: np.ndarray) -> np.ndarray:
        value[index] = value[index] * factor
        return value

    return change


def column(index: int, factor: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(value: np.ndarray) -> np.ndarray:
        value[:, index] = value[:, index] * factor
        return value

    return change


IN_CONVS: dict[str, tuple[Plant, str]] = {
    "wrong channel axis": (attribute("mix/DequantizeLinear", "axis", 1), "mix"),
    "zero point of a weight off by one": (edit("depthwise.weight_zero_point", lambda zero: zero + 1), "depthwise"),
    "zero point of an activation off by one": (own_zero_point, "mix"),
    "range of an activation halved": (halve_range, "mix"),
    "bias dropped": (edit("mix.bias", np.zeros_like), "mix"),
    "bias of another channel": (edit("depthwise.bias", permuted), "depthwise"),
    "scale rounded to half precision": (edit("depthwise.weight_scale", lambda scale: np.float16(scale)), "depthwise"),
    "scale of one channel doubled": (edit("stem.weight_scale", row(3, 2.0)), "stem"),
    "weight transposed": (edit("mix.weight_codes", lambda codes: codes.transpose(1, 0, 2, 3)), "mix"),
    "sign of a row flipped": (edit("fc.weight_codes", column(2, -1)), "fc"),
    "codes shifted by one column": (edit("fc.weight_codes", lambda codes: np.roll(codes, 1, axis=0)), "fc"),
    "channels permuted": (edit("depthwise.weight_codes", permuted), "depthwise"),
    "wrong padding": (attribute("node_conv2d", "pads", [2, 2, 0, 0]), "stem"),
    "batch norm not folded": (batch_norm_left_out, "stem"),
    "layer left out": (replace_by_identity(lambda model: maker(model, "depthwise/output")), "depthwise"),
    "shortcut left out": (replace_by_identity(only("Add"), 1), "mix"),
}

IN_BLOCK: dict[str, tuple[Plant, str]] = {
    "q and k swapped": (swap("q", "k"), "q"),
    "k and v swapped": (swap("k", "v"), "k"),
    "nibble order swapped": (other_nibble_order, "v"),
    "another group size": (other_group_size, "fc2"),
    "relu removed": (replace_by_identity(only("Relu")), "fc2"),
    "wrong epsilon of a norm": (lambda model: set_attribute(only("LayerNormalization")(model), "epsilon", 1e-2), "q"),
    "softmax over the wrong axis": (lambda model: set_attribute(only("Softmax")(model), "axis", 1), "out"),
    "weights of an earlier training": (edit("fc1.weight_codes", lambda codes: codes[:, ::-1]), "fc1"),
    "scales of an earlier training": (edit("out.weight_scale", lambda scale: scale * np.float32(1.01)), "out"),
}


def planted(good: Good, plant: Plant, folder: Path, target: str = "onnx") -> dict[str, Lowered]:
    """The files with a fault in one of them."""
    lowered = good.lowered[target]
    model = onnx.load(lowered.artifact.model)
    plant(model)
    onnx.save(model, folder / "faulty.onnx")
    artifact = dataclasses.replace(lowered.artifact, model=folder / "faulty.onnx")
    return {**good.lowered, target: dataclasses.replace(lowered, artifact=artifact)}


@pytest.mark.parametrize("fault", IN_CONVS)
def test_a_fault_in_the_file_of_convolutions(fault: str, convs: Good, tmp_path: Path) -> None:
    plant, layer = IN_CONVS[fault]
    assert_names(judge(convs, planted(convs, plant, tmp_path)), layer, "lowering")


@pytest.mark.parametrize("fault", IN_BLOCK)
def test_a_fault_in_the_file_of_a_transformer_block(fault: str, block: Good, tmp_path: Path) -> None:
    plant, layer = IN_BLOCK[fault]
    assert_names(judge(block, planted(block, plant, tmp_path)), layer, "lowering")


def test_layers_behind_a_fault_inherit_it(convs: Good, tmp_path: Path) -> None:
    report = judge(convs, planted(convs, edit("mix.bias", np.zeros_like), tmp_path))
    stages = {layer.name: layer.stage for layer in report.layers}
    assert [name for name, stage in stages.items() if is_fault(stage)] == ["mix"]
    behind = stages["fc"]
    assert behind is not None
    assert (behind.name, behind.inherited, behind.after) == ("lowering", True, ("mix",))
    assert behind.own["lowering"] > 100
    assert behind.total["lowering"] < 30


def test_a_fault_in_the_file_for_tensorrt(two: Good, tmp_path: Path) -> None:
    report = judge(two, planted(two, edit("two.bias", np.zeros_like), tmp_path, "trt"))
    assert_names(report, "two", "tensorrt dialect")


# ---- faults of the runtime -----------------------------------------------------------------------------------------


def test_a_faulty_kernel(convs: Good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the optimizer made of mix has lost a row of weights; the file is whole."""
    write, load = OnnxRuntime.write_optimized, OnnxRuntime.load

    def write_faulty(runtime: OnnxRuntime, artifact: Artifact, path: Path) -> None:
        write(runtime, artifact, path)
        model = onnx.load(path)
        (kernel,) = [entry for entry in model.graph.node if entry.name.startswith(maker_of_mix)]
        set_constant(model, kernel.input[3], row(2, 0)(constant(model, kernel.input[3])))
        onnx.save(model, path)

    def load_faulty(runtime: OnnxRuntime, artifact: Artifact) -> Session:
        if not runtime.optimize:
            return load(runtime, artifact)
        write_faulty(runtime, artifact, tmp_path / "faulty.onnx")
        return load(OnnxRuntime(optimize=False), dataclasses.replace(artifact, model=tmp_path / "faulty.onnx"))

    maker_of_mix = maker(onnx.load(convs.lowered["onnx"].artifact.model), "mix/output").name
    monkeypatch.setattr(OnnxRuntime, "write_optimized", write_faulty)
    monkeypatch.setattr(OnnxRuntime, "load", load_faulty)
    report = judge(convs)
    assert_names(report, "mix", "runtime")
    assert report.parity["onnxruntime"]["output"].sqnr_db < report.parity["onnxruntime_unoptimized"]["output"].sqnr_db


# ---- faults of passes ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def changed(tensor: Tensor, value: Tensor) -> Iterator[None]:
    """A tensor of the program with another value for a while; the lowered graphs share it."""
    before = tensor.clone()
    tensor.copy_(value)
    try:
        yield
    finally:
        tensor.copy_(before)


def arguments(program: Program, quantizer: fx.Node) -> list[Tensor]:
    """The constants of a node that quantizes or dequantizes."""
    return [
        get_tensor(program.graph, entry)
        for entry in quantizer.args
        if isinstance(entry, fx.Node) and entry.op == "get_attr"
    ]


def weight_of(program: Program, name: str) -> list[Tensor]:
    """Codes and scale of a layer."""
    layer = next(entry for entry in find_layers(program.graph) if entry.name == name)
    entry = layer.weight
    while len(entry.args) < 3 or entry.target is torch.ops.aten.view.default:
        entry = entry.all_input_nodes[0]
    return arguments(program, entry)


def test_a_range_that_clips(convs: Good, tmp_path: Path) -> None:
    layer = next(entry for entry in find_layers(convs.program.graph) if entry.name == "mix")
    scale = arguments(convs.program, layer.input)[0]
    with changed(scale, scale / 8):
        report = judge(convs, planted(convs, eighth_of_range, tmp_path))
    assert_names(report, "mix", "quantization")
    found = next(entry for entry in report.layers if entry.name == "mix")
    assert [cause.kind for cause in found.causes] == ["clipping"]
    assert "of the input's values lie outside its range" in found.causes[0].why


def eighth_of_range(model: onnx.ModelProto) -> None:
    name = input_quantizer(model, "mix").input[1]
    set_constant(model, name, constant(model, name) / np.float32(8))


def test_a_pass_that_doubles_one_scale(convs: Good, tmp_path: Path) -> None:
    scale = weight_of(convs.program, "depthwise")[1]
    doubled = scale.clone()
    doubled[5] *= 2
    with changed(scale, doubled):
        report = judge(convs, planted(convs, edit("depthwise.weight_scale", row(5, 2.0)), tmp_path))
    assert_names(report, "depthwise", "quantization")
    found = next(entry for entry in report.layers if entry.name == "depthwise")
    assert found.evidence is not None
    assert found.evidence.weight_only_db < 20 < found.evidence.input_only_db


def test_a_pass_that_gives_a_layer_other_codes(convs: Good, tmp_path: Path) -> None:
    codes = weight_of(convs.program, "fc")[0]
    fault = edit("fc.weight_codes", lambda stored: np.roll(stored, 1, axis=1))
    with changed(codes, codes.roll(1, 0)):
        report = judge(convs, planted(convs, fault, tmp_path))
    assert_names(report, "fc", "quantization")


# ---- calibration data ----------------------------------------------------------------------------------------------


def test_samples_of_validation_among_those_of_calibration() -> None:
    values = samples(20, 3)
    values["x"][9] = values["x"][2]  # every fifth sample is held out: 4, 9, 14, 19
    _, warnings = split(Samples(values, "data.npz", fingerprint(values)))
    assert warnings == (
        "1 of 4 held-out samples is also among those that the passes saw (the first: held-out sample 1 is "
        "calibration sample 2), so the figures flatter: remove repeated samples from data.npz",
    )


# ---- no fault ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("net", ["convs", "block", "two"])
def test_a_good_artifact_has_no_fault(net: str, request: pytest.FixtureRequest) -> None:
    report = judge(request.getfixturevalue(net))
    assert not any(is_fault(layer.stage) for layer in report.layers)
    assert {layer.stage.name for layer in report.layers if layer.stage} == {"quantization"}
    stages = {"quantization", "lowering", "runtime"} | ({"tensorrt dialect"} if net == "two" else set())
    assert all(layer.stage is not None and layer.stage.own.keys() == stages for layer in report.layers)
