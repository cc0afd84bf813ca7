"""model.safetensors: what a program holds comes back exactly, the bytes are the same every time, damage is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from exporter.capture import capture, export_module
from exporter.checkpoint import (
    KEY,
    Checkpoint,
    DynamicQuantizer,
    StaticQuantizer,
    load_checkpoint,
    save_checkpoint,
)
from exporter.errors import InputError, InternalError
from passes.act_quant import ActQuant
from passes.base import Pass, Pipeline, Program, TargetRules
from passes.calibration import Batch, Calibration, watch_values
from passes.fold_bn import FoldBatchNorm
from passes.gptq import GPTQ
from passes.graph import add_tensor, get_tensor, tidy, weight_of
from passes.hqq import HQQ
from passes.ops import FAKE_QUANTIZE
from passes.rtn import RTN
from passes.weight_nodes import is_quantized, read_weight, source_of, write_weight
from passes.weights import AffineWeight, CodebookWeight, QuantWeight
from tools.models import FACTORIES

RULES = TargetRules(
    name="test",
    symmetric_activations=False,
    conv_outputs=True,
    integer_elementwise=True,
    quantized_skip=False,
    dynamic_activations=True,
    weight_zero_point=True,
    integer_kinds=frozenset({"linear", "conv", "conv_transpose"}),
)


def _images() -> Batch:
    return {"x": torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


def _tokens() -> Batch:
    return {"tokens": torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))}


def _vectors(columns: int) -> Batch:
    return {"x": torch.randn(6, columns, generator=torch.Generator().manual_seed(0))}


def _program(module: nn.Module, batch: Batch, *passes: Pass) -> Program:
    exported = export_module(module.eval(), batch, {name: {0: "batch"} for name in batch})
    program = capture(exported, Calibration((batch,), (batch,), "random"), RULES)
    Pipeline(passes, {"fold-bn": FoldBatchNorm}).run(program)
    return program


def _quantized(program: Program) -> dict[str, QuantWeight]:
    """The quantized weights on the program's graph."""
    found = {layer.name: read_weight(program.graph, layer) for layer in program.layers()}
    return {name: weight for name, weight in found.items() if weight is not None}


def _float_weights(program: Program) -> dict[str, Tensor]:
    """What every quantized layer multiplies by, as the graph computes it."""
    names = {layer.weight: layer.name for layer in program.layers() if is_quantized(layer)}
    values: dict[str, Tensor] = {}

    def see(node: torch.fx.Node, value: Any) -> None:
        if node in names:
            values[names[node]] = value

    watch_values(program.graph, program.calibration.batches, see)
    return values


def _assert_same(actual: Tensor | None, expected: Tensor | None) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None and expected is not None:
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)


def _assert_same_weight(actual: QuantWeight, expected: QuantWeight) -> None:
    assert type(actual) is type(expected)
    for ours, theirs in zip(vars(actual).values(), vars(expected).values(), strict=True):
        if isinstance(theirs, AffineWeight):
            _assert_same_weight(ours, theirs)
        elif isinstance(theirs, Tensor):
            _assert_same(ours, theirs)
        else:
            assert ours == theirs


def _tensors_behind(node: torch.fx.Node) -> set[str]:
    """Names of the tensors that a node is computed from."""
    if node.op == "get_attr":
        return {str(node.target)}
    return {name for source in node.all_input_nodes for name in _tensors_behind(source)}


def _assert_holds(checkpoint: Checkpoint, program: Program) -> None:
    """The checkpoint has everything in the program's graph, bit for bit."""
    expected = _quantized(program)
    assert checkpoint.weights
    assert set(checkpoint.weights) == set(expected) == set(checkpoint.layers)
    for name, weight in expected.items():
        _assert_same_weight(checkpoint.weights[name], weight)
    for name, value in _float_weights(program).items():
        _assert_same(checkpoint.float_weight(name), value)
    sources = [source for layer in program.layers() if (source := source_of(layer)) is not None]
    parts = {name for source in sources for name in _tensors_behind(source)}
    read = {str(node.target): node for node in program.graph.graph.nodes if node.op == "get_attr"}
    assert set(checkpoint.tensors) == set(read) - parts
    for tensor_name, tensor in checkpoint.tensors.items():
        _assert_same(tensor, get_tensor(program.graph, read[tensor_name]))


NETS: dict[str, tuple[str, Callable[[], Batch], tuple[Pass, ...]]] = {
    "mobilenet int8": ("mobilenet", _images, (ActQuant(), RTN())),
    "residual_cnn gptq 4 bits": ("residual_cnn", _images, (GPTQ(bits=4, group_size=32, symmetric=False),)),
    "opt_lm gptq 3 bits": ("opt_lm", _tokens, (GPTQ(bits=3, group_size=32, symmetric=False, embeddings=4),)),
    "opt_lm int8 per token": ("opt_lm", _tokens, (ActQuant(mode="token"), RTN(symmetric=False))),
    "mobilenet hqq 3 bits": ("mobilenet", _images, (HQQ(bits=3, group_size=16),)),
    "opt_lm 2 bits per tensor": ("opt_lm", _tokens, (RTN(bits=2, group_size=0, embeddings=0),)),
}


@pytest.mark.parametrize("case", NETS)
def test_reference_networks_come_back(case: str, tmp_path: Path) -> None:
    name, batch, passes = NETS[case]
    program = _program(FACTORIES[name](), batch(), *passes)
    path = save_checkpoint(program, tmp_path)
    assert path == tmp_path / "model.safetensors"
    _assert_holds(load_checkpoint(path), program)


class _Odd(nn.Module):
    """Layers whose matrix is not their weight as it stands, one that runs twice, and an odd number of columns."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.conv = nn.Conv2d(4, 3, 3, groups=1)
        self.twice = nn.Linear(7, 7)
        self.projection = nn.Parameter(torch.randn(7, 5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.up(x)).flatten(2).mean(1)[:, :7]
        return torch.addmm(torch.ones(5), self.twice(torch.relu(self.twice(y))), self.projection)


def _odd_images() -> Batch:
    return {"x": torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 8])
def test_weights_of_every_kind_of_layer(bits: int, symmetric: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = _program(_Odd(), _odd_images(), RTN(bits=bits, symmetric=symmetric, embeddings=0))
    checkpoint = load_checkpoint(save_checkpoint(program, tmp_path))
    _assert_holds(checkpoint, program)
    kinds = sorted(layer.kind for layer in checkpoint.layers.values())
    assert kinds == ["conv", "conv_transpose", "linear", "linear", "linear"]
    assert any(layer.transposed for layer in checkpoint.layers.values())


def _values(count: int, bits: int = 8) -> AffineWeight:
    """Scales or zero points, quantized."""
    codes = torch.randint(1, 2**bits, (1, count), dtype=torch.uint8)
    return AffineWeight(codes, torch.rand(1, 1) + 0.1, torch.rand(1, 1), bits, 0)


def _three_bits(shape: torch.Size, quantized: bool) -> AffineWeight:
    """3-bit codes with float zero points, in groups of outputs where they divide, else of inputs."""
    rows, columns = shape
    axis, scales = (0, (2, columns)) if rows % 2 == 0 else (1, (rows, 1))
    codes = torch.randint(8, shape, dtype=torch.uint8)
    if not quantized:
        return AffineWeight(codes, torch.rand(scales), torch.rand(scales), 3, rows // 2 if axis == 0 else -1, axis)
    scale, zero = _values(scales[0] * scales[1]), _values(scales[0] * scales[1], 5)
    values = (scale.dequantize().view(scales), zero.dequantize().view(scales))
    return AffineWeight(codes, *values, 3, rows // 2 if axis == 0 else -1, axis, scale, zero)


def _two_codebooks(shape: torch.Size, tables: bool) -> CodebookWeight:
    """Blocks of one input channel, as wide as the kernel for a convolution."""
    rows, columns = shape
    codes = torch.randint(16, (rows, columns, 2), dtype=torch.uint8)
    codebooks = torch.randint(8, (2, 16, 1, 1)) / 3
    return CodebookWeight(codes, codebooks, torch.rand(rows, 1), codebook_value_bits=3 if tables else 0)


LOW_BITS: dict[str, Callable[[torch.Size], QuantWeight]] = {
    "3 bits": lambda shape: _three_bits(shape, False),
    "3 bits, quantized scales": lambda shape: _three_bits(shape, True),
    "codebooks": lambda shape: _two_codebooks(shape, False),
    "codebooks of few values": lambda shape: _two_codebooks(shape, True),
}


@pytest.mark.parametrize("case", LOW_BITS)
def test_weights_of_few_bits(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program = _program(_Odd(), _odd_images())
    for layer in program.layers():
        matrix = layer.to_matrix(weight_of(program.graph, layer))
        write_weight(program.graph, layer, LOW_BITS[case](matrix.shape))
    tidy(program.graph)
    path = save_checkpoint(program, tmp_path)
    checkpoint = load_checkpoint(path)
    _assert_holds(checkpoint, program)
    assert path.read_bytes() == save_checkpoint(program, tmp_path).read_bytes()
    formats = {layer.format for layer in checkpoint.layers.values()}
    assert formats <= ({"aq_codebook"} if "codebooks" in case else {"int3_hqq", "int4_group"})


def test_a_name_that_is_taken_is_not_written_over(tmp_path: Path) -> None:
    program = _program(_Linear(16), _vectors(16))
    layer = program.layers()[0]
    end = program.graph.graph.output_node()
    mine = add_tensor(program.graph, "fc.weight_scale_codes", torch.full((3,), 7.0), end)
    end.args = ((*end.args[0], mine),)  # type: ignore[misc]  # the graph returns a tuple
    write_weight(program.graph, layer, _three_bits(torch.Size((8, 16)), True))
    tidy(program.graph)
    checkpoint = load_checkpoint(save_checkpoint(program, tmp_path))
    _assert_same(checkpoint.tensors["fc.weight_scale_codes"], torch.full((3,), 7.0))
    weight = read_weight(program.graph, program.layers()[0])
    assert weight is not None
    _assert_same_weight(checkpoint.weights["fc"], weight)


class _Tied(nn.Module):
    """An embedding whose table is also the output head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 8)
        self.head = nn.Linear(8, 256, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.head(self.embed(tokens))
        return y


def test_tensors_that_share_memory_come_back(tmp_path: Path) -> None:
    program = _program(_Tied(), _tokens())
    node = next(node for node in program.graph.graph.nodes if node.op == "get_attr")
    table, end = get_tensor(program.graph, node), program.graph.graph.output_node()
    whole = add_tensor(program.graph, "whole", table, end)
    part = add_tensor(program.graph, "part", table[:3], end)
    end.args = ((*end.args[0], whole, part),)  # type: ignore[misc]  # the graph returns a tuple
    path = save_checkpoint(program, tmp_path)
    checkpoint = load_checkpoint(path)
    assert sum(tensor.shape == table.shape for tensor in load_file(path).values()) == 1  # stored once
    assert sum(tensor.shape == table.shape for tensor in checkpoint.tensors.values()) == 2
    _assert_same(checkpoint.tensors["whole"], table)
    _assert_same(checkpoint.tensors["part"], table[:3])


def test_activation_quantizers(tmp_path: Path) -> None:
    program = _program(FACTORIES["mobilenet"](), _images(), ActQuant(), RTN())
    found = load_checkpoint(save_checkpoint(program, tmp_path)).activations
    nodes = [node for node in program.graph.graph.nodes if node.target is FAKE_QUANTIZE]
    assert len(found) == len(nodes) > 0
    for quantizer, node in zip(found, nodes, strict=True):
        value, scale, zero_point, quant_min, quant_max = node.args
        assert isinstance(quantizer, StaticQuantizer)
        assert quantizer.value == value.name
        assert quantizer.scale == float(get_tensor(program.graph, scale))
        assert quantizer.zero_point == int(get_tensor(program.graph, zero_point))
        assert (quantizer.quant_min, quantizer.quant_max) == (quant_min, quant_max)
    read_by = {name for quantizer in found for name in quantizer.layers}
    assert read_by == {layer.name for layer in program.layers()}


def test_activation_quantizers_per_token(tmp_path: Path) -> None:
    program = _program(_Linear(16), _vectors(16), ActQuant(mode="token"), RTN())
    found = load_checkpoint(save_checkpoint(program, tmp_path)).activations
    assert found == (DynamicQuantizer("x", ("fc",), 8, -1),)


class _Linear(nn.Module):
    def __init__(self, columns: int, rows: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(columns, rows)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y


def test_names_and_sizes(tmp_path: Path) -> None:
    # symmetric=false: the head of this net, its only layer, keeps 8 bits; 1024 columns with a 32-bit scale and an
    # 8-bit zero point each
    program = _program(_Linear(1024), _vectors(1024), RTN(symmetric=False))
    path = save_checkpoint(program, tmp_path)
    assert set(load_file(path)) == {"fc.weight_codes", "fc.weight_scale", "fc.weight_zero_point", "fc.bias"}
    layer = load_checkpoint(path).layers["fc"]
    assert (layer.format, layer.kind, layer.weight_shape) == ("int8_channel", "linear", (8, 1024))
    assert layer.bits_per_weight == 8 + 40 / 1024


def test_same_program_same_bytes(tmp_path: Path) -> None:
    contents = set()
    for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "c"):
        folder.mkdir()
        torch.manual_seed(0)
        program = _program(_Odd(), _odd_images(), ActQuant(), GPTQ(bits=4, group_size=4))
        before = {name: tensor.clone() for name, tensor in program.graph.named_buffers()}
        contents.add(save_checkpoint(program, folder).read_bytes())
        assert [child.name for child in folder.iterdir()] == ["model.safetensors"]
        for name, tensor in program.graph.named_buffers():
            assert torch.equal(tensor, before[name])
    assert len(contents) == 1


def test_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    path = save_checkpoint(_program(_Linear(16), _vectors(16), RTN()), tmp_path)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_weight_no_format_holds_is_our_fault(tmp_path: Path) -> None:
    program = _program(_Linear(16), _vectors(16), RTN(symmetric=False))
    source = source_of(program.layers()[0])
    assert source is not None
    get_tensor(program.graph, source.all_input_nodes[1]).fill_(float("nan"))
    with pytest.raises(InternalError, match=r"fc: its weight cannot be stored: .*int8_channel: scale is not finite"):
        save_checkpoint(program, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


# ---- damage ---------------------------------------------------------------------------------------------------------


def _refused(path: Path) -> str:
    """The one line that load_checkpoint refuses the file with."""
    with pytest.raises(InputError) as caught:
        load_checkpoint(path)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{path}: ")
    return line.removeprefix(f"{path}: ")


@pytest.fixture(scope="module")
def saved_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    program = _program(_Linear(12), _vectors(12), ActQuant(), RTN(symmetric=False))
    return save_checkpoint(program, tmp_path_factory.mktemp("saved")).read_bytes()


@pytest.fixture
def saved(saved_bytes: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(saved_bytes)
    return path


def _rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """The file with its metadata and tensors changed."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()[KEY])
    change(content, tensors)
    save_file(tensors, path, metadata={KEY: json.dumps(content)})
    return path


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 20, 0.5, 0.99])
def test_truncated(saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    assert "truncated or damaged" in _refused(saved)


def test_garbled(saved: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    saved.write_bytes(bytes(torch.randint(256, (4096,), generator=generator).tolist()))
    assert "truncated or damaged" in _refused(saved)


def test_not_there(tmp_path: Path) -> None:
    assert "no such file" in _refused(tmp_path / "model.safetensors")
    assert "truncated or damaged" in _refused(tmp_path)


def test_somebody_elses_file(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert "no quantized checkpoint of qexport" in _refused(tmp_path / "model.safetensors")


def test_newer_schema(saved: Path) -> None:
    line = _refused(_rewritten(saved, lambda content, _: content.update(schema_version=2)))
    assert line == ("has schema version 2; this qexport reads 1; read it with the version of qexport that wrote it")


def test_metadata_that_is_no_json(saved: Path) -> None:
    for text in ("", "{", "[]", "[" * 100_000):
        save_file(load_file(saved), saved, metadata={KEY: text})
        assert "its metadata cannot be read" in _refused(saved)


ENTRIES = ("format", "kind", "bits", "group_size", "shape", "symmetric", "weight_shape", "groups", "transposed")


@pytest.mark.parametrize("entry", [*ENTRIES, "tensors"])
@pytest.mark.parametrize("value", [None, "x", [1], {"codes": 1}, 1.5, "absent"])
def test_wrong_entry_of_a_layer(saved: Path, entry: str, value: object) -> None:
    if (entry, value) == ("kind", "x") or (entry, value) == ("kind", "absent"):
        value = 3  # any text is a kind

    def change(content: dict[str, Any], _: dict[str, Tensor]) -> None:
        if value == "absent":
            del content["layers"]["fc"][entry]
        else:
            content["layers"]["fc"][entry] = value

    assert "truncated or damaged: layer fc: " in _refused(_rewritten(saved, change))


@pytest.mark.parametrize(
    ("entry", "value", "reason"),
    [
        ("bits", 4, "4 bits are not 5 to 8"),
        ("bits", 5, "are outside of 0 to 31"),
        ("bits", 99, "99 bits are not 5 to 8"),
        ("group_size", 4, "scale has shape [8, 1], not [8 or 1, 3]"),
        ("shape", [12, 8], "codes is torch.int8 [8, 12], not torch.int8 [12, 8]"),
        ("shape", [-8, -12], "no matrix has the shape"),
        ("axis", 0, "8 outputs do not fall into groups of -1"),
        ("axis", 2, "axis 2 is not 0 or 1"),
        ("dtype", "int3", "'int3' is no type of values"),
        ("scale", 3, "3 is no dict"),
        ("scale", {"bits": 8, "group_size": 0, "shape": [1, 8], "symmetric": True}, "stored are"),
        ("symmetric", True, "stored are codes, scale, zero_point, not codes, scale"),
        ("format", "int4_group", "8 bits are not 3 to 4"),
        ("weight_shape", [12, 8], "has no matrix of 8 x 12"),
        ("weight_shape", [], "has no matrix of 8 x 12"),
        ("transposed", True, "has no matrix of 8 x 12"),
        ("groups", 0, "has no matrix of 8 x 12"),
        ("kind", "conv_transpose", "sizes"),
    ],
)
def test_entries_that_do_not_fit_the_tensors(saved: Path, entry: str, value: object, reason: str) -> None:
    line = _refused(_rewritten(saved, lambda content, _: content["layers"]["fc"].update({entry: value})))
    assert "layer fc: " in line
    assert reason in line


@pytest.mark.parametrize("name", ["fc.weight_codes", "fc.weight_scale", "fc.weight_zero_point"])
def test_missing_or_cut_tensor(saved: Path, name: str) -> None:
    content = saved.read_bytes()
    assert f"'{name}' is missing" in _refused(_rewritten(saved, lambda _, tensors: tensors.__delitem__(name)))
    saved.write_bytes(content)
    assert "layer fc: " in _refused(
        _rewritten(saved, lambda _, tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    )


@pytest.mark.parametrize(
    "change",
    [
        {"activations": 3},
        {"activations": [3]},
        {"activations": [{"value": "x", "layers": []}]},
        {"activations": [{"value": "x", "layers": [], "scale": "no", "zero_point": "no"}]},
        {"activations": [{"value": "x", "layers": [], "scale": "fc.bias", "zero_point": "fc.bias"}]},
        {"aliases": {"other": "not there"}},
        {"aliases": []},
        {"layers": []},
        {"layers": {"fc": 1}},
    ],
)
def test_wrong_metadata(saved: Path, change: dict[str, object]) -> None:
    assert "its metadata cannot be read" in _refused(_rewritten(saved, lambda content, _: content.update(change)))


def test_scale_of_an_activation_that_is_no_scale(saved: Path) -> None:
    def change(content: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[content["activations"][0]["scale"]].fill_(float("nan"))

    assert "scale of x is nan" in _refused(_rewritten(saved, change))
