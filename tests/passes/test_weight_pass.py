"""The walk: which layers, with which options, on which inputs; and what is put on the graph in their place."""

import dataclasses
import itertools
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import passes.walk
from exporter.capture import capture, export_module
from passes import gptq, rtn
from passes.base import LayerRule, PassError, Program, TargetRules
from passes.calibration import Calibration, run_graph
from passes.gptq import GPTQ
from passes.graph import aten, copy_graph, find_layers, get_tensor, set_weight, tidy, weight_of
from passes.layer_inputs import hessian_of
from passes.ops import DEQUANTIZE
from passes.rtn import RTN
from tests.passes.nets import (
    RULES,
    Decoder,
    FeedForward,
    Flattening,
    InvertedResidual,
    Residual,
    count,
    outputs,
    program_of,
    reasons,
    seeded,
)


class Attention(nn.Module):
    """Tokens to logits: an embedding table that is also the head, q, k and v of one input, GPT-2's addmm, mm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.weight = nn.Parameter(torch.randn(16, 24))
        self.bias = nn.Parameter(torch.randn(24))
        self.down = nn.Parameter(torch.randn(24, 16))

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T] -> [N, T - 1, 20]."""
        x = self.table(tokens)
        x = x + torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        hidden = F.relu(torch.addmm(self.bias, x.view(-1, 16), self.weight))
        x = x + torch.mm(hidden, self.down).view(x.shape)
        return F.linear(x, self.table.weight)[:, 1:]


def attention_program(layer_rules: tuple[LayerRule, ...] = (), rules: TargetRules = RULES) -> Program:
    """Attention captured with batches of random tokens."""
    generator = torch.Generator().manual_seed(0)
    data = tuple({"tokens": torch.randint(0, 20, (4, 6), generator=generator)} for _ in range(3))
    exported = export_module(seeded(Attention), data[0], {"tokens": {0: "batch"}})
    return capture(exported, Calibration(data, data[:1], "random"), rules, layer_rules=layer_rules)


NETS: Mapping[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "depthwise": (InvertedResidual, (4, 3, 8, 8)),
    "residual": (Residual, (4, 3, 8, 8)),
    "linear": (FeedForward, (4, 5, 12)),
    "flatten": (Flattening, (4, 1, 10, 10)),
    "grouped and transposed": (Decoder, (4, 4, 8, 8)),
}


def _program(net: str) -> Program:
    if net == "attention":
        return attention_program()
    build, shape = NETS[net]
    return program_of(seeded(build), {"x": torch.zeros(shape)})


@pytest.mark.parametrize("net", [*NETS, "attention"])
def test_graph_computes_with_the_dequantized_matrices(net: str) -> None:
    captured = _program(net)
    for group_size, symmetric in itertools.product((-1, 0, 8), (True, False)):
        program = dataclasses.replace(captured, graph=copy_graph(captured.graph))
        options = RTN(bits=8, group_size=group_size, symmetric=symmetric)
        by_hand = copy_graph(captured.graph)
        for layer in find_layers(by_hand):
            weight = weight_of(by_hand, layer)
            chosen = dataclasses.replace(options, group_size=-1) if layer.kind == "embedding" else options
            matrix = rtn.quantize_weight(layer.to_matrix(weight), chosen).dequantize()
            set_weight(by_hand, layer, layer.from_matrix(matrix, weight.shape))
        tidy(by_hand)
        result = options.run(program)
        tidy(program.graph)
        assert len(result.changed) == len(captured.layers()) == count(program.graph, DEQUANTIZE)
        expected = torch.cat([out[0] for out in run_graph(by_hand, program.calibration.batches)])
        assert torch.equal(outputs(program.graph, program), expected)


@pytest.mark.parametrize("net", [*NETS, "attention"])
def test_float_weights_are_gone_and_layers_keep_their_names(net: str) -> None:
    program = _program(net)
    before = {layer.name: layer.weight.meta["val"].shape for layer in program.layers()}
    reference = {name: tensor.clone() for name, tensor in program.reference.named_buffers()}
    GPTQ(bits=8, group_size=-1).run(program)
    tidy(program.graph)
    assert {layer.name: layer.weight.meta["val"].shape for layer in program.layers()} == before
    kept = [tensor for tensor in program.graph.buffers() if tensor.is_floating_point() and tensor.dim() > 1]
    assert len(kept) == len(before)  # the scales
    assert all(tensor.shape[1] == 1 for tensor in kept)
    after = dict(program.reference.named_buffers())
    assert all(torch.equal(tensor, after[name]) for name, tensor in reference.items())


class Chain(nn.Module):
    """Three linear layers with ReLU in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 8] -> [N, 4]."""
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def _chain(layer_rules: tuple[LayerRule, ...] = (), rules: TargetRules = RULES) -> Program:
    program = program_of(seeded(Chain), {"x": torch.zeros(40, 8)}, layer_rules=layer_rules)
    program.rules = rules
    return program


def test_layers_are_fitted_to_what_the_quantized_network_feeds_them() -> None:
    module = seeded(Chain)
    program = _chain()
    options = GPTQ(bits=2, group_size=-1)
    options.run(program)
    batches = [batch["x"] for batch in program.calibration.batches]
    layers = {layer.name: layer for layer in find_layers(program.reference)}

    def codes(name: str, inputs: list[Tensor]) -> Tensor:
        hessian = hessian_of(layers[name], inputs)
        return gptq.quantize_weight(getattr(module, name).weight.detach(), hessian, options).codes

    def stored(name: str) -> Tensor:
        return program.graph.get_buffer(f"{name}.weight_codes")

    assert torch.equal(stored("first"), codes("first", batches))
    with torch.no_grad():
        float_inputs = [F.relu(module.first(x)) for x in batches]
        first = gptq.quantize_weight(module.first.weight, hessian_of(layers["first"], batches), options)
        real_inputs = [F.relu(F.linear(x, first.dequantize(), module.first.bias)) for x in batches]
    assert torch.equal(stored("second"), codes("second", real_inputs))
    assert not torch.equal(stored("second"), codes("second", float_inputs))


def test_layers_that_read_one_value_share_its_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(layer, inputs, part):
        seen.append(layer.name)
        return hessian_of(layer, inputs, part)

    monkeypatch.setattr(passes.walk, "hessian_of", counted)
    program = attention_program()
    result = GPTQ(bits=8, group_size=-1).run(program)
    assert {"q", "k", "v"} < set(result.changed)
    assert [name for name in seen if name in ("q", "k", "v")] == ["q"]
    assert len(seen) == len(result.changed) - 3  # less k, v and the embedding table


def test_convolutions_of_one_value_share_its_moments_only_when_their_kernels_move_alike() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, padding=2, dilation=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    program = program_of(seeded(Branches), {"x": torch.zeros(2, 3, 8, 8)})
    layers = {layer.name: layer for layer in find_layers(program.reference)}
    options = GPTQ(bits=4, group_size=-1)
    options.run(program)
    for name, layer in layers.items():
        hessian = hessian_of(layer, [batch["x"] for batch in program.calibration.batches])
        expected = gptq.quantize_weight(weight_of(program.reference, layer).flatten(1), hessian, options)
        assert torch.equal(program.graph.get_buffer(f"{name}.weight_codes"), expected.codes)


def test_tied_weights_get_codes_of_their_own() -> None:
    program = attention_program()
    GPTQ(bits=4, group_size=-1, embeddings=4).run(program)
    tidy(program.graph)
    table, head = (layer for layer in program.layers() if "table" in layer.name)
    assert (table.kind, head.kind) == ("embedding", "linear")
    roots = [layer.weight.all_input_nodes[0] for layer in (table, head)]
    assert [layer.weight.args[3] for layer in (table, head)] == [4, 8]
    codes = [get_tensor(program.graph, root) for root in roots]
    assert codes[0].data_ptr() != codes[1].data_ptr()


@pytest.mark.parametrize("bits", [8, 4])
def test_embedding_tables_are_rounded_row_by_row(bits: int) -> None:
    program = attention_program()
    table = weight_of(program.graph, program.layers()[0])
    GPTQ(bits=4, group_size=8, embeddings=bits).run(program)
    expected = rtn.quantize_weight(table, RTN(bits=bits, group_size=-1, scale_search="mse"))
    assert torch.equal(program.graph.get_buffer("table.weight_codes"), expected.codes)
    assert torch.equal(program.graph.get_buffer("table.weight_scale"), expected.scale)


def _stored_bits(program: Program) -> dict[str, tuple[int, int]]:
    """{layer: (bits, group size)} of the quantized layers."""
    found = {}
    for layer in program.layers():
        node = layer.weight
        while node.target is not DEQUANTIZE and node.op != "get_attr":
            node = node.all_input_nodes[0]
        if node.target is DEQUANTIZE:
            found[layer.name] = node.args[3:5]
    return found


def test_head_keeps_eight_bits() -> None:
    program = _chain()
    RTN(bits=4, group_size=8).run(program)
    assert _stored_bits(program) == {"first": (4, -1), "second": (4, 8), "last": (8, -1)}


def test_head_is_found_through_reshapes() -> None:
    program = attention_program()
    RTN(bits=4).run(program)
    assert [name for name, (bits, _) in _stored_bits(program).items() if bits == 8] == ["table", "table@2"]


@pytest.mark.parametrize("name", ["last", "l*t"])
def test_head_takes_the_bits_that_the_recipe_gives_it_by_name(name: str) -> None:
    program = _chain((LayerRule(name, options={"bits": 3}),))
    RTN(bits=4).run(program)
    assert _stored_bits(program) == {"first": (4, -1), "second": (4, -1), "last": (3, -1)}


def test_recipe_overrides_options_by_layer() -> None:
    rules = (
        LayerRule("second", options={"bits": 2, "group_size": 4, "of_another_pass": 1}),
        LayerRule("first", skip=True),
    )
    program = _chain(rules)
    result = RTN(bits=4).run(program)
    assert _stored_bits(program) == {"second": (2, 4), "last": (8, -1)}
    assert reasons(result) == {"first": "left in float by the recipe"}


def test_recipe_overrides_the_bits_of_a_table() -> None:
    program = attention_program((LayerRule("table", options={"bits": 4}),))
    RTN(bits=8).run(program)
    assert _stored_bits(program)["table"] == (4, -1)


def test_bad_override_names_the_layer() -> None:
    with pytest.raises(PassError, match=r"^second: rtn: bits=7 is no width"):
        RTN().run(_chain((LayerRule("second", options={"bits": 7}),)))


def test_tables_stay_float_when_asked() -> None:
    program = attention_program()
    result = RTN(embeddings=0).run(program)
    assert reasons(result) == {"table": "embeddings=0 leaves tables in float"}
    assert count(program.graph, DEQUANTIZE) == len(result.changed)


def test_what_is_quantized_already_is_left() -> None:
    program = _program("grouped and transposed")
    RTN().run(program)
    result = GPTQ().run(program)
    assert result.changed == ()
    assert set(reasons(result).values()) == {"its weight is quantized already"}


def test_kinds_of_layers_that_the_target_cannot_store_are_left() -> None:
    program = program_of(seeded(Flattening), {"x": torch.zeros(2, 1, 10, 10)})
    program.rules = dataclasses.replace(RULES, conv_bits=frozenset({8}))
    options = RTN(bits=4)
    options.requires(program)
    result = options.run(program)
    assert reasons(result) == dict.fromkeys(("conv1", "conv2"), "test has no 4-bit weights for conv")
    assert result.changed == ("fc1", "fc2")


def test_named_layers_must_be_given_what_the_target_can_store() -> None:
    rules = dataclasses.replace(RULES, linear_bits=frozenset({4, 8}))
    with pytest.raises(PassError, match=r"^second: target test cannot run rtn with bits=2") as caught:
        RTN().run(_chain((LayerRule("second", options={"bits": 2}),), rules))
    assert caught.value.fix == "the nearest it can is rtn:bits=4"


def test_convolutions_fall_back_to_one_group_where_the_target_has_no_groups_for_them() -> None:
    program = program_of(seeded(Flattening), {"x": torch.zeros(2, 1, 10, 10)})
    program.rules = dataclasses.replace(RULES, conv_groups=False)
    RTN(bits=4, group_size=8).run(program)
    assert _stored_bits(program) == {"conv1": (4, -1), "conv2": (4, -1), "fc1": (4, 8), "fc2": (8, -1)}


def test_options_that_no_layer_can_take_are_refused_with_the_nearest() -> None:
    no_zero_point = dataclasses.replace(RULES, weight_zero_point=False)
    with pytest.raises(PassError, match="target test has no weights with zero points") as caught:
        GPTQ(symmetric=False).requires(_chain(rules=no_zero_point))
    assert caught.value.fix == "gptq:symmetric=true"
    eight = dataclasses.replace(RULES, linear_bits=frozenset({4, 8}), embedding_bits=frozenset({8}))
    with pytest.raises(PassError, match="target test cannot run gptq with bits=3") as caught:
        GPTQ(bits=3).requires(_chain(rules=eight))
    assert caught.value.fix == "the nearest it can is gptq:bits=4"
    with pytest.raises(PassError, match="target test cannot run gptq with embeddings=4") as caught:
        GPTQ(embeddings=4).requires(attention_program(rules=eight))
    assert caught.value.fix == "the nearest it can is gptq:embeddings=8"


def test_data_that_is_missing_or_broken() -> None:
    program = _chain()
    program.calibration = Calibration((), (), "none")
    with pytest.raises(PassError, match="gptq needs calibration data"):
        GPTQ().requires(program)
    program.calibration = Calibration(({"x": torch.full((2, 8), torch.nan)},), (), "broken")
    with pytest.raises(PassError, match=r"^first: its inputs are not finite"):
        GPTQ().run(program)


def test_new_weight_keeps_the_form_its_operator_wants() -> None:
    program = _program("grouped and transposed")
    RTN(bits=4).run(program)
    targets = {layer.name: layer.weight.target for layer in program.layers()}
    assert targets["grouped"] is aten.view.default
    assert targets["up"] is aten.reshape.default
    attention = attention_program()
    RTN(bits=4).run(attention)
    assert {layer.weight.target for layer in attention.layers() if layer.transposed} == {aten.t.default}
