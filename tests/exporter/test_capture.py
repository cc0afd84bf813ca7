"""torch.export -> flat functional graph: names, what is dropped, in-place operators, tensors of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.capture import capture, export_module
from exporter.errors import InputError
from passes.act_quant import ActQuant
from passes.calibration import Calibration, run_graph
from passes.graph import get_tensor, inputs_of, set_weight, tidy, weight_of
from passes.rtn import RTN
from runtimes.ort import OnnxRuntime
from tests.exporter.compiled import compiled, first, program_of, quantized
from tests.passes.nets import RULES, count, seeded

aten = torch.ops.aten


class Body(nn.Module):
    """A module whose forward is a function of one tensor."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """What the function says."""
        return self.function(x)


class Wrapped(nn.Module):
    """Gives the input of a Sequential a name."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """net(x)."""
        return self.net(x)


def sample() -> Tensor:
    return torch.arange(12.0).view(4, 3) - 5


def same_as_eager(module: nn.Module) -> None:
    """The captured graph is functional and yields what the module yields, on another batch size too."""
    program = program_of(module, {"x": sample()})
    for node in program.graph.graph.nodes:
        assert node.op != "call_function" or not getattr(node.target, "_schema", None) or not node.is_impure(), node
    for x in (sample(), torch.linspace(-2, 2, 15).view(5, 3)):
        with torch.no_grad():
            expected = module(x.clone())
        batch = {"x": x.clone()}
        assert first(program.graph, batch).equal(expected)
        assert batch["x"].equal(x)  # the caller's data is never written to


# ---- inputs and outputs --------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    """A model's output by name."""

    scores: Tensor
    hidden: Tensor


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], tuple[str, ...]]] = {
    "tensor": (lambda x: x + 1, ("output",)),
    "tuple": (lambda x: (x + 1, x * 2), ("output_0", "output_1")),
    "tuple of one": (lambda x: (x + 1,), ("output",)),
    "dict": (lambda x: {"logits": x + 1, "hidden": x * 2}, ("logits", "hidden")),
    "nested": (lambda x: {"a": (x + 1, x * 2), "b": [x * 3]}, ("a_0", "a_1", "b_0")),
    "named tuple": (lambda x: Pair(x + 1, x * 2), ("scores", "hidden")),
    "with None": (lambda x: {"loss": None, "logits": x + 1}, ("logits",)),
    "with a number": (lambda x: (x + 1, 3), ("output_0",)),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs_are_flat_and_named(kind: str) -> None:
    function, names = OUTPUTS[kind]
    program = program_of(Body(function), {"x": sample()})
    assert program.output_names == names
    outputs = run_graph(program.graph, [{"x": sample()}])[0]
    assert len(outputs) == len(names)
    assert outputs[0].equal(sample() + 1)


def test_model_output_classes_give_their_field_names() -> None:
    output = pytest.importorskip("transformers.modeling_outputs").SequenceClassifierOutput
    program = program_of(Body(lambda x: output(logits=x + 1, hidden_states=(x * 2, x * 3))), {"x": sample()})
    assert program.output_names == ("logits", "hidden_states_0", "hidden_states_1")


def test_inputs_keep_their_names_and_order() -> None:
    class Two(nn.Module):
        def forward(self, input: Tensor, mask: Tensor) -> Tensor:
            return torch.where(mask > 0, input, 0.0)

    batch = {"input": sample(), "mask": torch.ones(4, 3, dtype=torch.int64)}
    program = program_of(Two(), batch)
    assert [str(node.target) for node in inputs_of(program.graph)] == ["input", "mask"]
    assert first(program.graph, batch).equal(sample())


# ---- what is dropped -----------------------------------------------------------------------------------------------


class Idle(nn.Module):
    """Operators that do nothing at inference around one that does something."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.drop_in_place = nn.Dropout(0.5, inplace=True)
        self.drop_maps = nn.Dropout2d(0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x + 1."""
        x = self.drop_in_place(self.drop(x))[:, :, None, None]
        x = self.drop_maps(x).squeeze(-1).squeeze(-1)
        return x.to(torch.float32)[:].detach() + 1


def test_what_does_nothing_is_dropped() -> None:
    program = program_of(Idle(), {"x": sample()})
    left = {node.target for node in program.graph.graph.nodes if node.op == "call_function"}
    assert left == {aten.unsqueeze.default, aten.squeeze.dim, aten.add.Tensor}
    same_as_eager(Idle().eval())


def test_casts_and_slices_that_do_something_stay() -> None:
    def body(x: Tensor) -> Tensor:
        return x.to(torch.float64)[:, 1:].to(torch.float32)[:, ::2]

    program = program_of(Body(body), {"x": sample()})
    assert count(program.graph, aten.to.dtype) == 2
    assert count(program.graph, aten.slice.Tensor) == 2
    same_as_eager(Body(body))


def test_a_copy_that_makes_memory_contiguous_stays() -> None:
    same_as_eager(Body(lambda x: x.t().contiguous().view(-1).view(x.shape[1], -1).t().clone().reshape(-1)))


def test_dropout_that_is_active_stays() -> None:
    program = program_of(Body(lambda x: F.dropout(x, 0.5, training=True)), {"x": sample()})
    assert count(program.graph, aten.dropout.default) == 1


class Guarded(nn.Module):
    """The same layer under no_grad, enable_grad and a disabled autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3] -> [N, 3]."""
        with torch.no_grad():
            x = F.relu_(self.inner(x))
            with torch.enable_grad():
                x = self.inner(x)
        with torch.autocast("cpu", enabled=False):
            return self.inner(x) * 2


def test_regions_are_inlined_so_that_their_layers_are_found() -> None:
    module = seeded(Guarded)
    exported = torch.export.export(module, (), {"x": sample()}, strict=False)  # with gradients on: regions are kept
    assert any("wrap_with" in str(node.target) for node in exported.graph.nodes)
    batch = {"x": sample()}
    program = capture(exported, Calibration((batch,), (batch,), "x"), RULES)
    assert [layer.name for layer in program.layers()] == ["inner", "inner@2", "inner@3"]
    with torch.no_grad():
        assert first(program.graph, batch).equal(module(sample()))
    quantized(program, ActQuant(), RTN())
    assert count(program.graph, torch.ops.qexport.dequantize.default) == 3


# ---- in-place operators --------------------------------------------------------------------------------------------


def then_read(x: Tensor) -> Tensor:
    y = x + 1
    y.relu_()
    return y * 2


def old_value_read_before(x: Tensor) -> Tensor:
    y = x + 1
    before = y * 3
    y.mul_(2)
    return before + y


def base_written_view_read(x: Tensor) -> Tensor:
    y = x + 1
    view, part = y.view(-1), y[1:]
    y.add_(1)
    return view * 2 + part.sum()


def view_of_view_read(x: Tensor) -> Tensor:
    y = x + 1
    view = y.t()
    rows = view[1:]
    y.sub_(0.5)
    return rows * view[:1]


def column_written_base_read(x: Tensor) -> Tensor:
    y = x + 1
    y[:, 0] = 0
    y[:, 1:].mul_(3)
    return y * 2


def column_written_other_view_read(x: Tensor) -> Tensor:
    y = x + 1
    view = y.view(-1)
    y[:, 2].add_(10)
    return view * 2


def chunks_of_written(x: Tensor) -> Tensor:
    y = x + 1
    left, right = y.chunk(2, 1)
    y.div_(2)
    return left.sum() - right


def view_written_base_dead(x: Tensor) -> Tensor:
    return F.relu((x + 1).view(-1), inplace=True) * 2


def through_dropout(x: Tensor) -> Tensor:
    y = x + 1
    same = F.dropout(y, 0.5, training=False)
    y.add_(1)
    return same * 2


def masked_and_copied(x: Tensor) -> Tensor:
    y = x + 1
    y[y > 2] = 0
    y.masked_fill_(y < -2, -7)
    z = torch.zeros_like(y)
    z.copy_(y)
    return z.clamp_(-5, 1)


def caller_written(x: Tensor) -> Tensor:
    x.mul_(2)
    x[:, 0] = 1
    return x + 1


def constant_written(x: Tensor) -> Tensor:
    values = torch.tensor([1.0, 2.0, 3.0])
    values.add_(1)
    values[0] = 5
    return x * values


def several_in_a_row(x: Tensor) -> Tensor:
    y = x + 1
    view = y.view(-1)
    part = view[1:]
    y[:, 1] = 0
    y[:, :2].mul_(2)
    y.relu_()
    return view.sum() + part * 2 + y.mean()


IN_PLACE = [
    then_read,
    old_value_read_before,
    base_written_view_read,
    view_of_view_read,
    column_written_base_read,
    column_written_other_view_read,
    chunks_of_written,
    view_written_base_dead,
    through_dropout,
    masked_and_copied,
    caller_written,
    constant_written,
    several_in_a_row,
]


@pytest.mark.parametrize("body", IN_PLACE, ids=lambda body: body.__name__)
def test_in_place_operators_become_values(body: Callable[[Tensor], Tensor]) -> None:
    same_as_eager(Body(body))


@pytest.mark.ort
def test_what_in_place_operators_became_can_be_lowered(tmp_path: Path) -> None:
    module = Body(lambda x: tuple(body(x.clone()) for body in IN_PLACE))
    result = compiled(program_of(module, {"x": sample()}), tmp_path)
    x = torch.linspace(-2, 2, 15).view(5, 3)
    found = result.session(OnnxRuntime(threads=1)).run({"x": x.numpy()})
    for body, value in zip(IN_PLACE, found.values(), strict=True):
        # Sums of 15 float32 values in another order.
        torch.testing.assert_close(torch.from_numpy(value), body(x.clone()), rtol=1e-5, atol=1e-5)


def test_a_write_through_a_view_that_is_read_elsewhere_is_refused() -> None:
    def body(x: Tensor) -> Tensor:
        y = x + 1
        y.view(-1).mul_(3)
        return y * 2

    with pytest.raises(InputError, match=r"writes through a view \(aten.view.default\)") as caught:
        program_of(Body(body), {"x": sample()})
    assert caught.value.fix == "write that line of the model without changing a tensor in place"


def test_an_in_place_operator_without_functional_form_is_refused() -> None:
    def body(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        torch.add(x, 1, out=y)
        return y

    with pytest.raises(InputError, match=r"changes tensors in place with aten\.add\.out") as caught:
        program_of(Body(body), {"x": sample()})
    assert caught.value.where == "add"


# ---- tensors -------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is the head's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        """[N] -> [N, 7]."""
        return self.head(self.embed(ids))


def test_parameters_are_clones() -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    program = program_of(Wrapped(module), {"x": sample()})
    pointers = {value.data_ptr() for value in module.state_dict().values()}
    for graph in (program.graph, program.reference):
        assert all(value.data_ptr() not in pointers for value in graph.state_dict().values())
    quantized(program, ActQuant(), RTN(bits=2))
    assert all(value.equal(before[name]) for name, value in module.state_dict().items())


def test_changing_the_model_later_does_not_change_the_program() -> None:
    module = seeded(lambda: Wrapped(nn.Linear(3, 2)))
    program = program_of(module, {"x": sample()})
    expected = first(program.graph, {"x": sample()})
    module.net.weight.data.zero_()
    assert first(program.graph, {"x": sample()}).equal(expected)


def test_the_reference_does_not_follow_the_graph() -> None:
    program = program_of(seeded(lambda: Wrapped(nn.Linear(3, 2))), {"x": sample()})
    expected = first(program.reference, {"x": sample()})
    layer = program.layers()[0]
    set_weight(program.graph, layer, torch.zeros_like(weight_of(program.graph, layer)))
    tidy(program.graph)
    assert not first(program.graph, {"x": sample()}).equal(expected)
    assert first(program.reference, {"x": sample()}).equal(expected)


def test_tied_weights_come_apart_at_the_use_that_changes() -> None:
    module = seeded(Tied)
    program = program_of(module, {"ids": torch.arange(5)})
    embed, head = program.layers()
    assert (embed.name, head.name) == ("embed", "head")
    assert weight_of(program.graph, embed).data_ptr() == weight_of(program.graph, head).data_ptr()
    table = weight_of(program.graph, embed).clone()
    set_weight(program.graph, head, torch.ones(7, 4))
    tidy(program.graph)
    embed, head = program.layers()
    assert weight_of(program.graph, embed).equal(table)
    assert weight_of(program.graph, head).equal(torch.ones(7, 4))


def test_integer_constants_keep_their_type_beside_half_precision() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3, dtype=torch.float16))
            self.register_buffer("shift", torch.arange(3))
            self.register_buffer("state", torch.ones(3), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale + self.shift + self.state + torch.tensor([1.0, 2.0, 3.0])

    program = program_of(Half(), {"x": sample()})
    constants = [get_tensor(program.graph, n) for n in program.graph.graph.nodes if n.op == "get_attr"]
    kinds = sorted(str(value.dtype) for value in constants)
    assert kinds == ["torch.float32", "torch.float32", "torch.float32", "torch.int64"]
    same_as_eager(Half())


# ---- names of layers -----------------------------------------------------------------------------------------------


class Nested(nn.Module):
    """Layers at different depths, one used twice, one functional, one bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.ReLU()) for _ in range(2))
        self.shared = nn.Linear(3, 3)
        self.projection = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3] -> [N, 3]."""
        for block in self.blocks:
            x = block(x)
        x = self.shared(self.shared(x))
        return F.linear(x, self.projection) @ self.projection


def test_layers_are_named_by_their_modules() -> None:
    program = program_of(seeded(Nested), {"x": sample()})
    names = [layer.name for layer in program.layers()]
    assert names == ["blocks.0.0", "blocks.1.0", "shared", "shared@2", "projection", "projection@2"]


# ---- free axes -----------------------------------------------------------------------------------------------------


class Attend(nn.Module):
    """A text and a mask of the same batch and length, and one image of a fixed size."""

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Tensor:
        """[N, T], [N, T], [1, 3] -> [N, T, 3]."""
        return (ids + mask)[..., None] * image


TEXT = {"ids": torch.ones(2, 5), "mask": torch.ones(2, 5), "image": torch.ones(1, 3)}
FREE = {name: {0: "batch", 1: "seq"} for name in ("ids", "mask")}


def test_free_axes_carry_the_labels_given_and_static_ones_stay() -> None:
    program = program_of(Attend(), TEXT, dynamic=FREE)
    assert program.dynamic == FREE
    bigger = {"ids": torch.ones(3, 4), "mask": torch.ones(3, 4), "image": torch.ones(1, 3)}
    assert first(program.graph, bigger).shape == (3, 4, 3)


def test_free_axes_of_an_export_are_found() -> None:
    exported = export_module(Attend(), TEXT, FREE)
    program = capture(exported, Calibration((TEXT,), (TEXT,), "x"), RULES)
    assert set(program.dynamic) == {"ids", "mask"}
    assert program.dynamic["ids"] == program.dynamic["mask"]
    assert program.dynamic["ids"][0] == "batch"
    assert program.dynamic["ids"][1] not in ("", "batch")


def test_free_axes_whose_length_is_computed_can_be_lowered(tmp_path: Path) -> None:
    net, half = nn.Conv2d(3, 4, 2, stride=2), torch.export.Dim("half", min=2, max=8)
    shapes = {"input": {0: torch.export.Dim("n"), 2: 2 * half, 3: 2 * half}}
    exported = torch.export.export(net, (torch.ones(2, 3, 8, 8),), dynamic_shapes=shapes)
    images = {"input": torch.ones(2, 3, 8, 8)}
    program = capture(exported, Calibration((images,), (images,), "x"), RULES)
    assert program.dynamic == {"input": {0: "batch", 2: "input_2", 3: "input_2"}}
    bigger = {"input": torch.ones(3, 3, 6, 6)}
    assert compiled(program, tmp_path).run(bigger, OnnxRuntime()).shape == (3, 4, 3, 3)


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    program = program_of(Body(lambda x: torch.linalg.eigvalsh(x[:, None] * x[:, :, None])), {"x": sample()})
    with pytest.raises(InputError, match=r"the model uses aten\._linalg_eigh, for which ONNX has no operator"):
        compiled(program, tmp_path)


def test_without_free_axes_everything_is_static() -> None:
    exported = export_module(Attend(), TEXT, {})
    assert dict(capture(exported, Calibration((TEXT,), (TEXT,), "x"), RULES).dynamic) == {}


def test_what_torch_export_cannot_capture_is_bad_input() -> None:
    with pytest.raises(InputError, match="could not capture Body"):
        export_module(Body(lambda x: x if x.sum() > 0 else -x), {"x": sample()}, {})
    with pytest.raises(InputError, match="could not capture Body"):
        export_module(Body(lambda x: x @ x), {"x": sample()}, {})
