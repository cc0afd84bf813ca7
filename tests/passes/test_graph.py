"""Finding layers, their matrices, and editing a graph without touching what it shares."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.graph import (
    add_tensor,
    aten,
    bias_of,
    call_before,
    can_take_bias,
    copy_graph,
    find_layers,
    get_tensor,
    give_bias,
    inputs_of,
    outputs_of,
    set_bias,
    set_weight,
    single_user,
    tidy,
    weight_of,
)
from tests.passes.nets import Decoder, FeedForward, InvertedResidual, Residual, outputs, program_of, seeded


class Everything(nn.Module):
    """Each kind of layer, and products that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)
        self.conv1 = nn.Conv1d(5, 4, 3, padding="same", bias=False)
        self.up1 = nn.ConvTranspose1d(4, 6, 2)
        self.linear = nn.Linear(7, 6)
        self.gpt = nn.Parameter(torch.randn(6, 3))
        self.gpt_bias = nn.Parameter(torch.randn(3))
        self.mm = nn.Parameter(torch.randn(3, 3))
        self.batched = nn.Parameter(torch.randn(1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 5] -> [N * 6, 3]."""
        embedded = self.table(x.abs().clamp(0, 6).to(torch.int64))
        y = self.linear(self.up1(self.conv1(embedded)))
        y = torch.addmm(self.gpt_bias, y.flatten(0, 1), self.gpt)
        y = torch.mm(y, self.mm) @ self.mm
        gram = y.t() @ y  # two values that depend on the input: no layer
        return (y @ gram + torch.matmul(y, self.batched)[0]) * torch.ones(3)


def test_layers_of_every_kind_are_found_in_order() -> None:
    program = program_of(seeded(Everything), {"x": torch.zeros(4, 5)})
    found = [
        (layer.name, layer.kind, tuple(layer.to_matrix(weight_of(program.graph, layer)).shape))
        for layer in program.layers()
    ]
    assert found == [
        ("table", "embedding", (7, 6)),
        ("conv1", "conv", (4, 15)),
        ("up1", "conv_transpose", (6, 8)),
        ("linear", "linear", (6, 7)),
        ("gpt", "linear", (3, 6)),
        ("mm", "linear", (3, 3)),
        ("mm@2", "linear", (3, 3)),
    ]
    has_bias = {layer.name: layer.bias is not None for layer in program.layers()}
    assert has_bias == {
        **dict.fromkeys(("up1", "linear", "gpt"), True),
        **dict.fromkeys(("table", "conv1", "mm", "mm@2"), False),
    }


@pytest.mark.parametrize("net", [Everything, Decoder, InvertedResidual, FeedForward, Residual])
def test_matrix_and_weight_are_inverse(net: Callable[[], nn.Module]) -> None:
    shapes = {Everything: (4, 5), Decoder: (2, 4, 8, 8), FeedForward: (2, 3, 12)}
    program = program_of(seeded(net), {"x": torch.zeros(shapes.get(net, (2, 3, 8, 8)))})
    for layer in program.layers():
        weight = weight_of(program.graph, layer)
        assert layer.from_matrix(layer.to_matrix(weight), weight.shape).equal(weight), layer.name


def test_a_row_of_the_matrix_makes_one_output_channel() -> None:
    """Scaling row i scales channel i of the output, for every kind, groups and transposition included."""
    cases = [
        (nn.Linear(6, 4, bias=False), (2, 6), 1),
        (nn.Conv2d(4, 8, 3, groups=2, bias=False), (2, 4, 5, 5), 1),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 5, 5), 1),
        (nn.ConvTranspose1d(4, 6, 2, bias=False), (2, 4, 5), 1),
    ]
    for module, shape, axis in cases:
        program = program_of(_named(module), {"x": torch.zeros(shape)})
        before = outputs(program.graph, program)
        (layer,) = program.layers()
        weight = weight_of(program.graph, layer)
        matrix = layer.to_matrix(weight).clone()
        matrix[3] *= 2
        set_weight(program.graph, layer, layer.from_matrix(matrix, weight.shape))
        after = outputs(program.graph, program)
        factor = torch.ones(before.shape[axis])
        factor[3] = 2
        torch.testing.assert_close(after, before * factor.view(-1, *[1] * (before.dim() - 2)), rtol=1e-5, atol=1e-6)


def _named(module: nn.Module) -> nn.Module:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = module

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    return Named()


def test_names_survive_what_passes_do_to_weights() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 3, 12)})
    names = [layer.name for layer in program.layers()]
    for layer in program.layers():
        set_weight(program.graph, layer, weight_of(program.graph, layer) * 2)
    tidy(program.graph)
    assert [layer.name for layer in program.layers()] == names == ["fc1", "fc2"]
    assert [layer.name for layer in find_layers(copy_graph(program.graph))] == names


def test_a_bias_can_be_given_to_products_without_one() -> None:
    class Product(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(3))
            self.rank = rank

        def forward(self, x: Tensor) -> Tensor:
            return torch.matmul(x, self.weight)

    program = program_of(Product(2), {"x": torch.zeros(2, 3)})
    (layer,) = program.layers()
    assert can_take_bias(layer)
    layer = give_bias(program.graph, layer, torch.tensor([1.0, 2.0, 3.0]))
    x = torch.cat([batch["x"] for batch in program.calibration.batches])
    assert outputs(program.graph, program).equal(x + torch.tensor([1.0, 2.0, 3.0]))
    assert bias_of(program.graph, program.layers()[0]).tolist() == [1, 2, 3]

    program = program_of(Product(3), {"x": torch.zeros(2, 4, 3)})
    (layer,) = program.layers()
    assert not can_take_bias(layer)
    with pytest.raises(ValueError, match=r"weight \(aten.matmul.default\) has no bias argument"):
        give_bias(program.graph, layer, torch.zeros(3))


def test_a_left_out_bias_argument_is_filled_in() -> None:
    program = program_of(_named(nn.Linear(3, 2, bias=False)), {"x": torch.zeros(2, 3)})
    before = outputs(program.graph, program)
    set_bias(program.graph, program.layers()[0], torch.tensor([10.0, 20.0]))
    # One more rounding of a float32 sum near 20.
    torch.testing.assert_close(
        outputs(program.graph, program), before + torch.tensor([10.0, 20.0]), rtol=0, atol=20 * 2.0**-23
    )


def test_new_tensors_get_names_of_their_own() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 3, 12)})
    graph, last = program.graph, program.layers()[-1].node
    first = add_tensor(graph, "fc1.weight", torch.zeros(1), last)
    second = add_tensor(graph, "fc1.weight", torch.ones(1), last)
    assert [str(node.target) for node in (first, second)] == ["fc1.weight_2", "fc1.weight_3"]
    below = add_tensor(graph, "fc1.weight.scale", torch.ones(2), last)  # a parameter is in the way
    assert get_tensor(graph, below).tolist() == [1, 1]
    assert get_tensor(graph, first).tolist() == [0]
    assert (
        get_tensor(program.reference, next(n for n in program.reference.graph.nodes if n.op == "get_attr")).numel() > 1
    )


def test_inserted_nodes_belong_to_the_module_they_stand_in() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 3, 12)})
    layer = program.layers()[0]
    node = call_before(program.graph, layer.node, aten.relu.default, (layer.input,))
    assert node.meta["nn_module_stack"] == layer.node.meta["nn_module_stack"]
    assert node.next is layer.node


def test_tidy_drops_what_nobody_reads() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 3, 12)})
    layer = program.layers()[0]
    call_before(program.graph, layer.node, aten.relu.default, (layer.input,))
    set_weight(program.graph, layer, weight_of(program.graph, layer))
    before = len(list(program.graph.graph.nodes))
    tidy(program.graph)
    assert len(list(program.graph.graph.nodes)) == before - 2  # the relu and the old weight's get_attr
    names = set(program.graph.state_dict())
    assert "fc1.weight_2" in names
    assert "fc1.weight" not in names
    assert "fc1.weight" in set(program.reference.state_dict())


def test_copies_share_tensors_and_nothing_else() -> None:
    program = program_of(seeded(FeedForward), {"x": torch.zeros(2, 3, 12)})
    copied = copy_graph(program.graph)
    assert [node.name for node in copied.graph.nodes] == [node.name for node in program.graph.graph.nodes]
    one, two = weight_of(copied, find_layers(copied)[0]), weight_of(program.graph, program.layers()[0])
    assert one.data_ptr() == two.data_ptr()
    set_weight(copied, find_layers(copied)[0], torch.zeros_like(one))
    tidy(copied)
    assert weight_of(program.graph, program.layers()[0]).equal(two)


def test_ends_of_a_graph() -> None:
    class Both(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return F.relu(a) + b, b * 2

    program = program_of(Both(), {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)})
    assert [str(node.target) for node in inputs_of(program.graph)] == ["a", "b"]
    assert [node.target for node in outputs_of(program.graph)] == [aten.add.Tensor, aten.mul.Tensor]
    relu = next(node for node in program.graph.graph.nodes if node.target is aten.relu.default)
    assert single_user(relu) is outputs_of(program.graph)[0]
    assert single_user(inputs_of(program.graph)[1]) is None
