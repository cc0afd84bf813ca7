"""Every form of the ONNX target: same values in onnxruntime, on its integer kernels, packed and named as promised."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.backends.base import LoweringError
from exporter.backends.onnx_qdq.forms import kernel_block
from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.lowering import to_onnx
from passes.act_quant import ActQuant
from passes.base import LayerRule, Pass
from passes.gptq import GPTQ
from passes.rtn import RTN
from runtimes.ort import OnnxRuntime
from tests.exporter.compiled import (
    INTEGER_KERNELS,
    Compiled,
    compiled,
    first,
    initializers,
    labels,
    program_of,
    quantized,
    sqnr,
    typical_sqnr,
)
from tests.passes.nets import seeded

pytestmark = pytest.mark.ort

SAME = 100.0
"""dB between two float32 evaluations of one network in which no value crosses a rounding boundary: sums of up to 200
products carry a relative error of about 1e-6 (120 dB); 20 dB for cancellation."""

STEP = 45.0
"""dB where values may fall to the other side of a boundary: one step of an 8-bit tensor in a thousand values is
20 log10(127) + 30 - 3 = 69 dB for that tensor; the kernels' int32 biases and block quantizers touch a few in a hundred,
and up to four layers follow."""

Act = Callable[[Tensor], Tensor]


class Mlp(nn.Module):
    """Two linear layers: the first is followed by an activation, the second is the head."""

    def __init__(self, activation: Act = F.gelu, bias: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(128, 96, bias=bias)
        self.second = nn.Linear(96, 10, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., 128] -> [..., 10]."""
        return self.second(self.activation(self.first(x)))


class Maps(nn.Module):
    """Strided, depthwise and grouped convolutions with ReLU and ReLU6, then a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 16, 3, groups=2, bias=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 9, 9] -> [N, 5]."""
        x = F.relu6(self.depthwise(F.relu(self.strided(x))))
        return self.head(F.relu(self.grouped(x)).mean((2, 3)))


class Signal(nn.Module):
    """1-d convolutions, one of them dilated."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv1d(3, 8, 3, padding=2, dilation=2)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 12] -> [N, 5]."""
        return self.head(F.relu(self.depthwise(F.relu(self.wide(x)))).mean(2))


class Up(nn.Module):
    """A grouped transposed convolution between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3)
        self.up = nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 9, 9] -> [N, 4, 15, 15]."""
        return self.last(F.relu(self.up(F.relu(self.down(x)))))


class Words(nn.Module):
    """An embedding of an odd width, a linear layer and a head, which may share the embedding's table."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 33)
        self.inner = nn.Linear(33, 33)
        self.head = nn.Linear(33, 50, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """[N, T] -> [N, T, 50]."""
        return self.head(F.gelu(self.inner(self.embed(ids))))


class Conv1D(nn.Module):
    """GPT-2's layers: addmm with a weight stored [in, out]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(128, 96) * 0.1)
        self.bias = nn.Parameter(torch.randn(96))
        self.last = nn.Parameter(torch.randn(96, 10) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 128] -> [N, T, 10]."""
        y = torch.addmm(self.bias, x.view(-1, 128), self.weight)
        return (F.gelu(y) @ self.last).view(x.shape[0], -1, 10)


ROWS, TOKENS, IMAGES, SIGNALS = (9, 128), (7, 3, 128), (6, 3, 9, 9), (6, 3, 12)


def draw(shape: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """A batch {x: shape}, or {ids: [n, t]} for a shape of two small numbers."""
    generator = torch.Generator().manual_seed(seed)
    if shape == (4, 9):
        return {"ids": torch.randint(0, 50, shape, generator=generator)}
    return {"x": torch.randn(shape, generator=generator)}


def build(folder: Path, net: Callable[[], nn.Module], shape: tuple[int, ...], *passes: Pass) -> Compiled:
    """The net quantized by the passes and lowered."""
    return compiled(quantized(program_of(seeded(net), draw(shape, 0), draw(shape, 1)), *passes), folder)


def check(result: Compiled, shape: tuple[int, ...], *, optimized: float = STEP) -> None:
    """Every output as promised, on new data; and nothing about the weights is computed at every run."""
    for name, outputs in result.all_outputs(draw(shape, 2)).items():
        assert sqnr(outputs.reference, outputs.plain) < 70, name  # it is quantized
        assert typical_sqnr(outputs.plain, outputs.unoptimized) >= SAME, name
        assert sqnr(outputs.simulated, outputs.optimized) >= optimized, name
    assert result.repeated == ()


# ---- linear layers -------------------------------------------------------------------------------------------------


class Branches(nn.Module):
    """Several nets with one input and an output each."""

    def __init__(self, nets: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleDict(nets)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """{net: its output}."""
        return {name: net(x) for name, net in self.nets.items()}


@pytest.mark.parametrize("shape", [ROWS, TOKENS], ids=["rank2", "rank3"])
@pytest.mark.parametrize(
    ("passes", "kernel"),
    [
        ((ActQuant(), RTN()), "MatMulIntegerToFloat"),
        ((ActQuant(mode="token"), RTN()), "MatMulInteger"),
        ((RTN(bits=4, group_size=32),), "MatMulNBits"),
    ],
    ids=["static", "token", "weight-only"],
)
def test_linear_layers_run_on_integers_whatever_surrounds_them(
    passes: tuple[Pass, ...], kernel: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    def nets() -> nn.Module:
        return Branches(
            {
                f"{activation.__name__}_{bias}": Mlp(activation, bias)
                for activation in (F.relu, F.relu6, F.gelu, F.silu)
                for bias in (True, False)
            }
        )

    result = build(tmp_path, nets, shape, *passes)
    assert len(result.kernel_of) == 16
    assert set(result.kernel_of.values()) == {kernel}
    check(result, shape)


BLOCKS = "MatMulNBits"
NIBBLES = "int4 cast at load to int8"
FLOAT = "MatMul"
INTEGER = "MatMulIntegerToFloat"
TOKEN = "MatMulInteger"

Options = dict[str, object]
FORMS: dict[str, tuple[tuple[Pass, ...], dict[str, tuple[Options, str, str]]]] = {
    # {case: passes in front of RTN, {form: options of the first layer, its format, its kernel}}; the head keeps 8 bits
    "weights": (
        (),
        {
            "w4_g64": ({"bits": 4, "group_size": 64}, "int4", BLOCKS),
            "w4_g128": ({"bits": 4, "group_size": 128}, "int4", BLOCKS),
            "w4_g48_in_blocks_of_16": ({"bits": 4, "group_size": 48}, "int4", BLOCKS),
            "w4_g24_no_block": ({"bits": 4, "group_size": 24}, "int4 decoded at load to int8 blocks of 128", BLOCKS),
            "w4_g33_ragged": ({"bits": 4, "group_size": 33}, "int4 decoded at load to int8 blocks of 128", BLOCKS),
            "w4_channel": ({"bits": 4}, "int4", BLOCKS),
            "w4_tensor": ({"bits": 4, "group_size": 0}, "int4", BLOCKS),
            "w3_g32": ({"bits": 3, "group_size": 32}, "int3 decoded at load to uint4", BLOCKS),
            "w2_g32": ({"bits": 2, "group_size": 32}, "int2 decoded at load to uint4", BLOCKS),
            "w8_channel": ({}, "int8", BLOCKS),
            "w8_g32": ({"group_size": 32}, "int8", BLOCKS),
            "w8_tensor": ({"group_size": 0}, "int8", BLOCKS),
            "w8_g24_no_block": ({"group_size": 24}, "int8 folded at load", FLOAT),
            "w8_g33_ragged": ({"group_size": 33}, "int8 folded at load", FLOAT),
            "u4_g32": ({"bits": 4, "group_size": 32, "symmetric": False}, "uint4", BLOCKS),
            "u4_g48": ({"bits": 4, "group_size": 48, "symmetric": False}, "uint4", BLOCKS),
            "u4_channel": ({"bits": 4, "symmetric": False}, "uint4", BLOCKS),
            "u4_tensor": ({"bits": 4, "group_size": 0, "symmetric": False}, "uint4", BLOCKS),
            "u4_g16": ({"bits": 4, "group_size": 16, "symmetric": False}, "uint4", BLOCKS),
            "u4_g20_ragged": (
                {"bits": 4, "group_size": 20, "symmetric": False},
                "uint4 decoded at load to int8 blocks of 128",
                BLOCKS,
            ),
            "u8_channel": ({"symmetric": False}, "uint8", BLOCKS),
            "u8_tensor": ({"group_size": 0, "symmetric": False}, "uint8", BLOCKS),
        },
    ),
    "static": (
        (ActQuant(),),
        {
            "w8_channel": ({}, "int8", INTEGER),
            "w8_tensor": ({"group_size": 0}, "int8", INTEGER),
            "w4_channel": ({"bits": 4}, NIBBLES, INTEGER),
            "w4_tensor": ({"bits": 4, "group_size": 0}, NIBBLES, INTEGER),
            "w4_g32": ({"bits": 4, "group_size": 32}, "int4", BLOCKS),
            "u8_channel": ({"symmetric": False}, "int8", INTEGER),
            "u8_tensor": ({"group_size": 0, "symmetric": False}, "int8", INTEGER),
            "u4_channel": ({"bits": 4, "symmetric": False}, "uint4 cast at load to int8", INTEGER),
        },
    ),
    "static symmetric": ((ActQuant(symmetric=True),), {"w8": ({}, "int8", INTEGER)}),
    "static 4 bits": ((ActQuant(bits=4),), {"w8": ({}, "int8", INTEGER), "w4": ({"bits": 4}, NIBBLES, INTEGER)}),
    "token": (
        (ActQuant(mode="token"),),
        {
            "w8_channel": ({}, "int8", TOKEN),
            "w8_tensor": ({"group_size": 0}, "int8", TOKEN),
            "w4_channel": ({"bits": 4}, NIBBLES, TOKEN),
            "w4_g32": ({"bits": 4, "group_size": 32}, "int4", BLOCKS),
            "u8_channel": ({"symmetric": False}, "int8", TOKEN),
        },
    ),
    "token 4 bits": ((ActQuant(mode="token", bits=4),), {"w8": ({}, "int8", TOKEN)}),
}
CONTAINERS = {
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
}


@pytest.mark.parametrize("case", FORMS)
def test_linear_formats(case: str, tmp_path: Path) -> None:
    passes, forms = FORMS[case]
    rules = [LayerRule(f"nets.{name}.first", options=options) for name, (options, _, _) in forms.items()]
    module = seeded(lambda: Branches({name: Mlp() for name in forms}))
    program = program_of(module, draw(TOKENS, 0), draw(TOKENS, 1), layer_rules=rules)
    result = compiled(quantized(program, *passes, RTN()), tmp_path)
    layers, kernels = {layer.name: layer for layer in result.lowered.layers}, result.kernel_of
    tensors = initializers(result.model)
    for name, (_, stored, kernel) in forms.items():
        layer = layers[f"nets.{name}.first"]
        assert (layer.format, kernels[layer.name]) == (stored, kernel), name
        if stored.split()[0] in CONTAINERS:
            assert tensors[layer.codes].data_type == CONTAINERS[stored.split()[0]], name
        codes = [t for name, t in tensors.items() if name == layer.codes or name.startswith(f"{layer.codes}_plane")]
        width = int(stored.split()[0].removeprefix("u").removeprefix("int"))
        assert sum(len(tensor.raw_data) for tensor in codes) == 128 * 96 * width // 8, name
    check(result, TOKENS)


@pytest.mark.parametrize(
    ("passes", "kernel"),
    [
        ((GPTQ(bits=4, group_size=32),), BLOCKS),
        ((ActQuant(), GPTQ(bits=4, group_size=-1, symmetric=False)), INTEGER),
    ],
    ids=["w4 g32", "u4a8"],
)
def test_gptq_lowers_like_rtn(passes: tuple[Pass, ...], kernel: str, tmp_path: Path) -> None:
    result = build(tmp_path, Mlp, TOKENS, *passes)
    assert result.kernel_of["first"] == kernel
    check(result, TOKENS)


def test_4_bit_activations_on_blocks_are_refused() -> None:
    program = quantized(program_of(seeded(Mlp), draw(TOKENS, 0)), ActQuant(bits=4), RTN(bits=4, group_size=32))
    with pytest.raises(
        LoweringError, match="first: 4-bit activations do not run on a block-wise weight here"
    ) as caught:
        OnnxBackend().lower(program, Path("unused"))
    assert set(caught.value.reasons) == {"first"}


def test_block_of_the_kernel() -> None:
    found = {group: kernel_block(512, group) for group in (16, 32, 64, 128, 256, 48, 96, 384, 24, 8, -1, 0, 512, 600)}
    assert found == {
        **{16: 16, 32: 32, 64: 64, 128: 128, 256: 256, 48: 16, 96: 32, 384: 128, 24: None, 8: None},
        **dict.fromkeys((-1, 0, 512, 600), 32),
    }


def test_what_the_block_kernel_adds_is_simulated(tmp_path: Path) -> None:
    result = build(tmp_path, Mlp, TOKENS, RTN(bits=4, group_size=32))
    outputs = result.outputs(draw(TOKENS, 2))
    exact = result.run(draw(TOKENS, 2), OnnxRuntime(threads=1, accuracy_level=1))
    assert sqnr(outputs.plain, exact) >= SAME
    assert sqnr(outputs.plain, outputs.optimized) < 60  # its own 8-bit rounding of the input
    assert sqnr(outputs.simulated, outputs.optimized) >= SAME


def test_gpt2_layers(tmp_path: Path) -> None:
    for name, passes in {
        "a8": (ActQuant(), RTN()),
        "token": (ActQuant(mode="token"), RTN()),
        "w4": (RTN(bits=4),),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        result = build(folder, Conv1D, TOKENS, *passes)
        assert set(result.kernel_of) == {"weight", "last"}
        assert set(result.kernel_of.values()) <= INTEGER_KERNELS
        check(result, TOKENS)


# ---- convolutions --------------------------------------------------------------------------------------------------


def variants(
    folder: Path, net: Callable[[], nn.Module], options: Mapping[str, Options], *passes: Pass
) -> dict[str, dict[str, tuple[str, str | None]]]:
    """One net under several options of RTN at once: {variant: {layer: (format, kernel)}}, values checked."""
    shape = SIGNALS if net is Signal else IMAGES
    rules = [LayerRule(f"nets.{name}.*", options=named) for name, named in options.items()]
    module = seeded(lambda: Branches({name: net() for name in options}))
    program = program_of(module, draw(shape, 0), draw(shape, 1), layer_rules=rules)
    result = compiled(quantized(program, *passes, RTN()), folder)
    check(result, shape, optimized=STEP if passes else SAME)
    kernels = result.kernel_of
    found: dict[str, dict[str, tuple[str, str | None]]] = {name: {} for name in options}
    for layer in result.lowered.layers:
        _, name, path = layer.name.split(".")
        found[name][path] = (layer.format, kernels[layer.name])
    return found


@pytest.mark.parametrize("net", [Maps, Signal], ids=["2d", "1d"])
def test_convolutions_run_on_integers(net: Callable[[], nn.Module], tmp_path: Path) -> None:
    options: dict[str, Options] = {
        "w8": {},
        "u8": {"symmetric": False},
        "tensor": {"group_size": 0},
        "w4": {"bits": 4},
        "u4": {"bits": 4, "symmetric": False},
    }
    for name, layers in variants(tmp_path, net, options, ActQuant()).items():
        stored = {"w4": NIBBLES, "u4": "uint4 cast at load to int8"}.get(name, "int8")
        assert layers.pop("head") == (stored, INTEGER), name
        assert len(layers) >= 2
        assert set(layers.values()) == {(stored, "QLinearConv")}, name


@pytest.mark.parametrize("net", [Maps, Signal, Up], ids=["2d", "1d", "transposed"])
def test_weight_only_convolutions_are_decoded_at_load(net: Callable[[], nn.Module], tmp_path: Path) -> None:
    options: dict[str, Options] = {
        "int4": {"bits": 4},
        "uint4": {"bits": 4, "group_size": 8, "symmetric": False},
        "int8": {},
    }
    for name, layers in variants(tmp_path, net, options).items():
        layers.pop("head", None)
        assert {stored for stored, _ in layers.values()} == {f"{name} folded at load"}


def test_a_transposed_convolution_between_integers_stays_float(tmp_path: Path) -> None:
    result = build(tmp_path, Up, IMAGES, ActQuant(), RTN())
    assert result.kernel_of == {"down": "QLinearConv", "up": "ConvTranspose", "last": "QLinearConv"}
    check(result, IMAGES)


def test_a_layer_left_in_float_is_not_quantized_by_onnxruntime(tmp_path: Path) -> None:
    rules = (LayerRule("depthwise", skip=True),)
    program = program_of(seeded(Maps), draw(IMAGES, 0), layer_rules=rules)
    result = compiled(quantized(program, ActQuant(), RTN()), tmp_path)
    assert "depthwise" not in result.kernel_of
    (weight,) = [tensor for name, tensor in initializers(result.model).items() if name == "depthwise.weight"]
    assert weight.data_type == TensorProto.FLOAT
    check(result, IMAGES)
    assert not [kernel for kernel in result.kernels if any("weight_q" in name for name in kernel.inputs)]


# ---- embeddings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "symmetric", "tied"),
    [(4, True, True), (4, False, False), (8, True, False), (8, False, True)],
    ids=["int4-tied", "uint4", "int8", "uint8-tied"],
)
def test_embeddings_stay_packed(bits: int, symmetric: bool, tied: bool, tmp_path: Path) -> None:
    result = build(tmp_path, lambda: Words(tied), (4, 9), RTN(embeddings=bits, symmetric=symmetric))
    layers = {layer.name: layer for layer in result.lowered.layers}
    assert layers["embed"].format == f"int{bits} rows"
    table = initializers(result.model)["embed.weight_codes"]
    assert len(table.raw_data) == 50 * (33 if bits == 8 else 17)
    assert result.kernel_of == {"embed": "Gather", "inner": BLOCKS, "head": BLOCKS}
    floats = [t for t in initializers(result.model).values() if t.data_type == TensorProto.FLOAT]
    assert max(np.prod(t.dims, dtype=int) for t in floats) <= 50  # no float table or weight is left
    check(result, (4, 9), optimized=40)  # rows of few codes sit on the ties of the block quantizer behind them


# ---- the file ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """W4 blocks with a table and integer layers in one file."""
    rules = (LayerRule("inner", options={"bits": 4, "group_size": 16}),)
    free = {"ids": {0: "batch", 1: "seq"}}
    program = program_of(seeded(lambda: Words(True)), draw((4, 9), 0), layer_rules=rules, dynamic=free)
    return compiled(quantized(program, ActQuant(), RTN()), tmp_path_factory.mktemp("mixed"))


def test_initializers_are_named_by_their_layers(mixed: Compiled) -> None:
    names = set(initializers(mixed.model))
    for layer in ("embed", "inner", "head"):
        assert {f"{layer}.weight_codes", f"{layer}.weight_scale"} <= names
    assert "inner.bias" in names
    assert {layer.codes for layer in mixed.lowered.layers} == {f"{n}.weight_codes" for n in ("embed", "inner", "head")}
    assert not [name for name in names if "qexport" in name]


def test_bits_per_weight_count_what_was_written(mixed: Compiled) -> None:
    stored = {layer.name: layer for layer in mixed.lowered.layers}
    tensors = initializers(mixed.model)
    for name, shape in (("embed", (50, 33)), ("inner", (33, 33)), ("head", (50, 33))):
        parts = [f"{name}.weight_{part}" for part in ("codes", "scale", "zero_point")]
        written = sum(len(tensors[part].raw_data) for part in parts if part in tensors)
        assert stored[name].bits_per_weight == pytest.approx(8 * written / (shape[0] * shape[1]))


def test_the_file_tells_nothing_of_the_machine(mixed: Compiled) -> None:
    content = mixed.path.read_bytes()
    here = Path(__file__).resolve()
    for secret in (str(here.parent), here.name, ".py", "File ", "site-packages", "stack_trace", str(Path.home())):
        assert secret.encode() not in content, secret
    kept = {entry.key for node in mixed.model.graph.node for entry in node.metadata_props}
    assert kept == {"pkg.torch.onnx.name_scopes"}
    assert not mixed.model.metadata_props


def test_nodes_keep_their_module_paths(mixed: Compiled) -> None:
    scopes = [entry.value for node in mixed.model.graph.node for entry in node.metadata_props]
    for layer in ("embed", "inner", "head"):
        assert any(f"'{layer}'" in scope for scope in scopes), layer


def test_the_format_is_one_that_onnxruntime_loads(mixed: Compiled) -> None:
    assert mixed.model.ir_version == 10
    assert {entry.domain: entry.version for entry in mixed.model.opset_import} == {"": 21}
    assert {node.domain for node in mixed.model.graph.node} == {""}


def test_one_sample_stays_one_where_the_number_is_fixed(tmp_path: Path) -> None:
    network = seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 10)))
    batch = {"input": torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))}
    fixed = compiled(quantized(program_of(network, batch, dynamic={}), RTN(bits=8)), tmp_path)
    assert labels(fixed.model) == {"input": (1, 3, 6, 6), "output": (1, 10)}
    values = fixed.outputs(batch)
    assert sqnr(values.plain, values.unoptimized) >= SAME


def test_free_axes_stay_free(mixed: Compiled) -> None:
    assert labels(mixed.model) == {"ids": ("batch", "seq"), "output": ("batch", "seq", 50)}
    for size in ((1, 1), (2, 30)):
        batch = {"ids": torch.arange(size[0] * size[1]).view(size) % 50}
        assert sqnr(first(mixed.lowered.graph, batch), mixed.run(batch, OnnxRuntime(optimize=False))) >= SAME


def test_taps_name_the_layers_outputs(mixed: Compiled) -> None:
    values = {name for node in mixed.model.graph.node for name in node.output}
    assert set(mixed.lowered.taps) == {"embed", "inner", "head"}
    assert set(mixed.lowered.taps.values()) <= values
    assert mixed.lowered.taps["head"] == "output"


def test_same_bytes_twice(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        build(tmp_path / name, Maps, IMAGES, ActQuant(), GPTQ(bits=4))
    assert (tmp_path / "one/model.onnx").read_bytes() == (tmp_path / "two/model.onnx").read_bytes()


def test_big_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = build(tmp_path, Mlp, TOKENS, RTN(bits=4, group_size=32))
    expected = inside.outputs(draw(TOKENS, 2)).optimized
    monkeypatch.setattr(to_onnx, "EXTERNAL_DATA_ABOVE", 1000)
    folder = tmp_path / "apart"
    folder.mkdir()
    apart = build(folder, Mlp, TOKENS, RTN(bits=4, group_size=32))
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert apart.path.stat().st_size < inside.path.stat().st_size / 2
    assert apart.outputs(draw(TOKENS, 2)).optimized.equal(expected)
    assert apart.kernel_of == inside.kernel_of


def test_several_outputs_and_an_input_that_is_returned(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.net(x)
            return {"logits": y, "again": y, "scaled": y * 2}

    program = quantized(program_of(seeded(Both), draw(TOKENS, 0)), ActQuant(), RTN())
    result = compiled(program, tmp_path)
    assert result.lowered.artifact.outputs == ("logits", "again", "scaled")
    found = OnnxRuntime().load(result.lowered.artifact).run({"x": draw(TOKENS, 1)["x"].numpy()})
    assert np.array_equal(found["logits"], found["again"])
    assert np.array_equal(found["logits"] * 2, found["scaled"])
