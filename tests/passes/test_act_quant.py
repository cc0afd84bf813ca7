"""act-quant: where quantizers stand under each kind of rules, with which ranges, and what is left alone."""

import dataclasses

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from passes.act_quant import ActQuant
from passes.base import LayerRule, PassError, Program, TargetRules
from passes.calibration import watch_values
from passes.graph import get_tensor, tidy
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC, fake_quantize
from tests.passes.nets import RULES, count, outputs, program_of, reasons, seeded

ONNX = dataclasses.replace(RULES, name="onnx", quantized_skip=False, integer_kinds=frozenset({"linear", "conv"}))
TENSORRT = TargetRules(
    name="trt",
    symmetric_activations=True,
    conv_outputs=False,
    integer_elementwise=False,
    quantized_skip=True,
    dynamic_activations=False,
    weight_zero_point=False,
    integer_kinds=frozenset({"linear", "conv"}),
)


class Net(nn.Module):
    """conv, relu, max pool, residual add, average pool, linear: one of everything that placement knows."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, 8, 8] -> [N, 5]."""
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.right(F.relu(self.left(x))) + x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


IMAGE = {"x": torch.zeros(4, 3, 8, 8)}


def program(module: nn.Module, rules: TargetRules, inputs: dict[str, Tensor] = IMAGE, **options: object) -> Program:
    return dataclasses.replace(program_of(seeded(lambda: module), inputs, **options), rules=rules)


def placed(graph: fx.GraphModule) -> list[tuple[str, tuple[str, ...]]]:
    """(what is quantized, who reads the quantized value), in order."""
    return [
        (node.args[0].name, tuple(user.name for user in node.users))
        for node in graph.graph.nodes
        if node.target is FAKE_QUANTIZE
    ]


def range_of(graph: fx.GraphModule, value: str) -> tuple[float, int, int, int]:
    """Scale, zero point, lowest and highest code of the quantizer behind `value`."""
    (node,) = [n for n in graph.graph.nodes if n.target is FAKE_QUANTIZE and n.args[0].name == value]
    scale, zero_point = (get_tensor(graph, constant).item() for constant in node.args[1:3])
    return (scale, zero_point, *node.args[3:])


def extremes(subject: Program, value: str) -> tuple[float, float]:
    """Smallest and largest value a node of the capture takes on the calibration data."""
    seen: list[Tensor] = []
    batches = subject.calibration.batches
    watch_values(subject.reference, batches, lambda node, found: seen.append(found) if node.name == value else None)
    return min(found.min().item() for found in seen), max(found.max().item() for found in seen)


# ---- placement -----------------------------------------------------------------------------------------------------


def test_placement_where_everything_between_integers_is_quantized() -> None:
    subject = program(Net(), ONNX)
    result = ActQuant().run(subject)
    assert placed(subject.graph) == [
        ("x", ("conv2d",)),
        ("relu", ("max_pool2d",)),
        ("max_pool2d", ("conv2d_1", "add")),
        ("relu_1", ("conv2d_2",)),
        ("conv2d_2", ("add",)),
        ("relu_2", ("adaptive_avg_pool2d",)),
        ("adaptive_avg_pool2d", ("flatten",)),
        ("flatten", ("linear",)),
    ]
    assert result.changed == tuple(value for value, _ in placed(subject.graph))
    assert result.skipped == ()


def test_placement_where_a_residual_rides_in_a_convolution() -> None:
    subject = program(Net(), TENSORRT)
    ActQuant().run(subject)
    assert placed(subject.graph) == [
        ("x", ("conv2d",)),
        ("max_pool2d", ("conv2d_1", "add")),
        ("relu_1", ("conv2d_2",)),
        ("flatten", ("linear",)),
    ]


def test_other_readers_of_an_input_stay_in_float() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(x)
            return self.inner(y) * y

    subject = program(Gated(), ONNX, {"x": torch.zeros(4, 8)})
    ActQuant().run(subject)
    assert placed(subject.graph) == [("tanh", ("linear",))]
    tidy(subject.graph)
    (product,) = [node for node in subject.graph.graph.nodes if node.name == "mul"]
    assert [value.name for value in product.args] == ["linear", "tanh"]


def test_layers_that_share_an_input_share_its_quantizer() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.query(x) * self.key(x)

    for mode, target in (("static", FAKE_QUANTIZE), ("token", FAKE_QUANTIZE_DYNAMIC)):
        subject = program(Heads(), ONNX, {"x": torch.zeros(4, 8)})
        ActQuant(mode=mode).run(subject)
        (node,) = [node for node in subject.graph.graph.nodes if node.target is target]
        assert [user.name for user in node.users] == ["linear", "linear_1"]


def test_concat_of_quantized_values_is_quantized_and_of_others_is_not() -> None:
    class Concat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.last = nn.Conv2d(11, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat([self.one(x), self.two(x)], 1)
            return self.last(torch.cat([both, torch.sigmoid(x)], 1))

    subject = program(Concat(), ONNX)
    ActQuant().run(subject)
    values = [value for value, _ in placed(subject.graph)]
    assert values == ["x", "conv2d", "conv2d_1", "cat", "cat_1", "conv2d_2"]
    (last,) = [readers for value, readers in placed(subject.graph) if value == "cat_1"]
    assert last == ("conv2d_2",)  # as a layer's input, not as an integer concat


# ---- ranges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse", "output"])
def test_behind_a_relu_codes_begin_at_zero(method: str) -> None:
    subject = program(Net(), ONNX)
    ActQuant(method=method).run(subject)
    for value in ("relu", "relu_1", "relu_2"):
        assert range_of(subject.graph, value)[1:] == (0, 0, 255)
    assert 0 < range_of(subject.graph, "x")[1] < 255


def test_operators_that_move_values_keep_the_range_they_got() -> None:
    subject = program(Net(), ONNX)
    ActQuant().run(subject)
    assert range_of(subject.graph, "max_pool2d") == range_of(subject.graph, "relu")
    assert range_of(subject.graph, "flatten") == range_of(subject.graph, "adaptive_avg_pool2d")
    assert range_of(subject.graph, "adaptive_avg_pool2d") != range_of(subject.graph, "relu_2")


class Deaf(nn.Module):
    """A layer with large inputs that it does not hear; its answer is a number, or a choice, which has no gradient."""

    def __init__(self, chooses: bool) -> None:
        super().__init__()
        self.inner, self.chooses = nn.Linear(8, 4), chooses
        self.inner.weight.data[:, 4:] = 0
        self.register_buffer("loudness", torch.tensor([1.0] * 4 + [100.0] * 4))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 4] or [N]."""
        y = self.inner(x * self.loudness)
        return y.argmax(-1) if self.chooses else y


@pytest.mark.parametrize("chooses", [False, True])
def test_output_counts_errors_by_what_they_do_to_the_outputs(chooses: bool) -> None:
    scales = {}
    for method in ("mse", "output"):
        subject = program(Deaf(chooses), ONNX, {"x": torch.zeros(64, 8)})
        ActQuant(method=method).run(subject)
        scales[method] = range_of(subject.graph, "mul")[0]
    if chooses:
        assert scales["output"] == scales["mse"]
    else:
        # Heard values end far below the least share of the range that is tried, 0.3; mse keeps most of the range.
        assert scales["output"] < 0.5 * scales["mse"]


def test_output_is_refused_behind_quantizers() -> None:
    subject = program(Net(), ONNX)
    ActQuant().run(subject)
    with pytest.raises(PassError, match="method=output needs gradients") as refused:
        ActQuant(method="output").requires(subject)
    assert "method=mse" in refused.value.fix


def test_a_cap_per_channel_and_the_relu_in_front_of_it_round_once() -> None:
    class Capped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
            self.register_buffer("cap", torch.linspace(0.1, 0.6, 6).view(1, 6, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.minimum(torch.relu(self.conv(x)), self.cap))

    subject = program(Capped(), ONNX)
    ActQuant(method="minmax").run(subject)
    assert range_of(subject.graph, "relu") == range_of(subject.graph, "minimum")
    low, high = extremes(subject, "minimum")
    assert range_of(subject.graph, "minimum")[0] == pytest.approx((high - low) / 255, rel=1e-6)
    assert extremes(subject, "relu")[1] > high


def test_minmax_ranges_are_those_of_the_calibration_data() -> None:
    subject = program(Net(), ONNX)
    ActQuant(method="minmax").run(subject)
    for value, _ in placed(subject.graph):
        if value not in ("max_pool2d", "flatten"):  # these hand on another's
            low, high = extremes(subject, value)
            scale, zero_point, _, _ = range_of(subject.graph, value)
            assert scale == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-6)
            assert zero_point == round(-min(low, 0) / scale)


def test_rules_and_option_ask_for_symmetric_ranges() -> None:
    for rules, symmetric in ((TENSORRT, False), (ONNX, True)):
        subject = program(Net(), rules)
        ActQuant(method="minmax", symmetric=symmetric).run(subject)
        for value, _ in placed(subject.graph):
            assert range_of(subject.graph, value)[1:] == (0, -128, 127)
        low, high = extremes(subject, "x")
        assert range_of(subject.graph, "x")[0] == pytest.approx(max(-low, high) / 127, rel=1e-6)


def test_four_bits() -> None:
    subject = program(Net(), ONNX)
    ActQuant(bits=4).run(subject)
    assert {range_of(subject.graph, value)[2:] for value, _ in placed(subject.graph)} == {(0, 15)}
    symmetric = program(Net(), TENSORRT)
    ActQuant(bits=4).run(symmetric)
    assert {range_of(symmetric.graph, value)[2:] for value, _ in placed(symmetric.graph)} == {(-8, 7)}


def test_the_graph_computes_what_its_quantizers_say() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(x)))

    module = seeded(Two)
    subject = dataclasses.replace(program_of(module, {"x": torch.zeros(4, 8)}), rules=ONNX)
    ActQuant(bits=4).run(subject)

    def rounded(value: Tensor, name: str) -> Tensor:
        scale, zero_point, low, high = range_of(subject.graph, name)
        return fake_quantize(value, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), low, high)

    x = torch.cat([batch["x"] for batch in subject.calibration.batches])
    with torch.no_grad():
        hidden = F.relu(module.first(rounded(x, "x")))
        expected = module.second(rounded(hidden, "relu"))
    # Batches of 4 against one of 12: float32 sums of 8 products.
    torch.testing.assert_close(outputs(subject.graph, subject), expected, rtol=1e-5, atol=1e-5)


def test_eight_bits_cost_less_than_four() -> None:
    errors = []
    for bits in (8, 4):
        subject = program(Net(), ONNX)
        ActQuant(bits=bits).run(subject)
        expected = outputs(subject.reference, subject)
        errors.append(float((outputs(subject.graph, subject) - expected).norm() / expected.norm()))
    assert 0 < errors[0] < errors[1] / 4  # steps are 17 times as wide


# ---- token ---------------------------------------------------------------------------------------------------------


def test_token_quantizes_the_inputs_of_linear_layers_only() -> None:
    subject = program(Net(), ONNX)
    result = ActQuant(mode="token").run(subject)
    assert result.changed == ("head",)
    assert set(reasons(result)) == {"stem", "left", "right"}
    assert set(reasons(result).values()) == {"a convolution has no per-token ranges: it needs mode=static"}
    assert count(subject.graph, FAKE_QUANTIZE) == 0
    (node,) = [node for node in subject.graph.graph.nodes if node.target is FAKE_QUANTIZE_DYNAMIC]
    assert (node.args[0].name, node.args[1:]) == ("flatten", (8, -1))


def test_token_yields_numbers_for_rows_of_zeros() -> None:
    subject = program(Net(), ONNX)
    ActQuant(mode="token").run(subject)
    subject.graph.recompile()
    with torch.no_grad():
        (found,) = subject.graph(torch.zeros(2, 3, 8, 8))
    assert torch.isfinite(found).all()


# ---- what is left alone --------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """An embedding, a transposed convolution and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.up = nn.ConvTranspose1d(6, 6, 2)
        self.keep, self.drop = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 5] -> [N, 6, 6]."""
        embedded = self.embed(x.abs().clamp(0, 8).to(torch.int64))
        return self.drop(self.keep(self.up(embedded.transpose(1, 2)).transpose(1, 2)))


def test_reasons_for_skipping() -> None:
    rules = (LayerRule("drop", skip=True),)
    subject = program(Mixed(), ONNX, {"x": torch.zeros(4, 5)}, layer_rules=rules)
    result = ActQuant().run(subject)
    assert reasons(result) == {
        "up": "onnx has no integer kernel for conv_transpose",
        "drop": "left in float by the recipe",
    }
    assert result.changed == ("transpose_1",)
    again = ActQuant().run(subject)
    assert again.changed == ()
    assert reasons(again)["keep"] == "its input is quantized already"


def test_widths_it_does_not_have_are_refused() -> None:
    with pytest.raises(PassError, match="act-quant has no 6-bit activations") as caught:
        ActQuant(bits=6).requires(program(Net(), ONNX))
    assert caught.value.fix == "use bits=8 or bits=4"


def test_token_is_refused_where_the_target_has_none() -> None:
    with pytest.raises(PassError, match="target trt has no per-token activations") as caught:
        ActQuant(mode="token").requires(program(Net(), TENSORRT))
    assert caught.value.fix == "use act-quant:mode=static"


def test_values_that_are_not_finite_are_refused_by_name() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.log(torch.relu(x)))  # log 0

    with pytest.raises(PassError, match="log: its values on the calibration data are not finite"):
        ActQuant().run(program(Log(), ONNX, {"x": torch.zeros(4, 8)}))


def test_nan_is_refused() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.sqrt(x))

    with pytest.raises(PassError, match="sqrt: its values on the calibration data are not finite"):
        ActQuant().run(program(Root(), ONNX, {"x": torch.zeros(4, 8)}))


def test_static_ranges_need_data() -> None:
    subject = program(Net(), ONNX)
    subject.calibration = dataclasses.replace(subject.calibration, batches=())
    with pytest.raises(PassError, match="act-quant needs calibration data"):
        ActQuant().requires(subject)
    ActQuant(mode="token").requires(subject)
