"""The pass: what it wins back, what it leaves alone, that it repeats itself, and its refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from passes import PASSES
from passes.act_quant import ActQuant
from passes.base import LayerRule, Pass, PassError, PassRecord, Pipeline, Program
from passes.calibration import run_graph
from passes.graph import find_layers
from passes.hqq import HQQ
from passes.qdora import QDoRA
from passes.ranks import Ranks
from passes.rtn import RTN
from passes.weight_nodes import read_weight
from tests.passes.nets import outputs, program_of, reasons
from tests.passes.pretend_device import DEVICE, Pretend, There

DIM = 32


class Blocks(nn.Module):
    """Three layers, the first and last called by their place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(DIM, 48), nn.ReLU(), nn.Linear(48, DIM), nn.ReLU(), nn.Linear(DIM, 10))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


def run(*passes: Pass, rules: tuple[LayerRule, ...] = (), seed: int = 0) -> tuple[Program, list[PassRecord]]:
    found = program_of(Blocks(), {"x": torch.randn(64, DIM)}, layer_rules=rules)
    found.seed = seed
    return found, Pipeline(passes, PASSES).run(found)


class Decides(Blocks):
    """Gives the largest output's place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).argmax(-1)


class Products(nn.Module):
    """addmm, whose bias an adapter that the base's scales cannot take in moves behind itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bias, self.first = nn.Parameter(torch.randn(48)), nn.Parameter(torch.randn(DIM, 48))
        self.second = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(torch.addmm(self.bias, x, self.first)))
        return y


def distance(program: Program) -> float:
    """Relative squared error of the outputs over the calibration data."""
    wanted = outputs(program.reference, program)
    return float((outputs(program.graph, program) - wanted).square().sum() / wanted.square().sum())


LOW = RTN(bits=2, group_size=16)


def test_the_closed_form_and_then_training_win_back_accuracy() -> None:
    before = distance(run(LOW)[0])
    program, records = run(LOW, QDoRA(rank=4, steps=0))
    fitted = distance(program)
    program, records = run(LOW, QDoRA(rank=4, steps=60, lr=3e-3))
    trained = distance(program)
    assert fitted < 0.7 * before
    assert trained < 0.8 * fitted
    measured = records[-1].result.measured
    assert measured["loss_before"] == pytest.approx(before, rel=0.05)  # means of batches against one ratio
    assert measured["loss_fitted"] == pytest.approx(fitted, rel=0.05)
    assert measured["loss_after"] == pytest.approx(trained, rel=0.05)
    # 4 x (32 + 48), twice; the head has 8 bits
    assert measured["parameters_added"] == pytest.approx(2 * 4 * (DIM + 48) / (2 * DIM * 48))


def test_codes_stay_and_only_low_bit_layers_are_adapted() -> None:
    plain, _ = run(LOW)
    program, records = run(LOW, QDoRA(rank=4, steps=5), rules=())
    assert records[-1].result.changed == ("net.0", "net.2")
    assert reasons(records[-1].result)["net.4"] == "its weight has 8 bits"
    codes = {layer.name: read_weight(plain.graph, layer) for layer in plain.layers()}
    for layer in program.layers():
        if ".lora_" in layer.name:
            continue
        weight, other = read_weight(program.graph, layer), codes[layer.name]
        assert (weight is None) == (other is None)
        if weight is not None and other is not None:
            assert weight.codes.equal(other.codes)


def test_adapters_take_8_bits_unless_told_otherwise() -> None:
    widths = {}
    for bits in (0, 8):
        program, _ = run(LOW, QDoRA(rank=4, bits=bits))
        weights = [read_weight(program.graph, layer) for layer in program.layers() if ".lora_" in layer.name]
        assert len(weights) == 4
        widths[bits] = {getattr(weight, "bits", None) for weight in weights}
        assert distance(program) < 0.7 * distance(run(LOW)[0])
    assert widths == {0: {None}, 8: {8}}


def test_outer_moments_win_back_more() -> None:
    plain, found = (distance(run(LOW, QDoRA(rank=2, outer=outer))[0]) for outer in (False, True))
    assert found < 0.95 * plain


def test_the_closed_form_works_on_the_device_and_leaves_its_results_on_the_cpu() -> None:
    def program(ranks: Ranks) -> dict[str, Tensor]:
        torch.manual_seed(0)
        found = program_of(Blocks(), {"x": torch.randn(64, DIM)})
        found.ranks = ranks
        Pipeline((LOW, QDoRA(rank=4)), PASSES).run(found)
        return {name: value for name, value in found.graph.state_dict().items() if "lora" in name}

    expected = program(Ranks())
    with Pretend() as mode:
        found = program(Ranks(device=DEVICE))
        assert mode.ran > 100
    assert found.keys() == expected.keys()
    assert found
    assert all(value.equal(expected[name]) and not isinstance(value, There) for name, value in found.items())


def test_layers_left_in_float_are_skipped() -> None:
    rules = (LayerRule("net.0", skip=True),)
    _, records = run(LOW, QDoRA(rank=4, steps=0), rules=rules)
    assert records[-1].result.changed == ("net.2",)
    assert reasons(records[-1].result)["net.0"] == "left in float by the recipe"


def test_it_repeats_itself_and_seeds_differ() -> None:
    first, second, other = (run(LOW, QDoRA(rank=4, steps=7), seed=seed)[0] for seed in (0, 0, 1))
    one, two, three = (outputs(program.graph, program) for program in (first, second, other))
    assert one.equal(two)
    assert not one.equal(three)
    shifted, _ = run(LOW, QDoRA(rank=4, steps=7, seed=1))
    assert outputs(shifted.graph, shifted).equal(three)


def test_training_that_leads_away_is_not_kept() -> None:
    start = run(LOW, QDoRA(rank=4, steps=0))[0]
    wild, records = run(LOW, QDoRA(rank=4, steps=3, lr=100.0))
    assert records[-1].result.measured["loss_after"] == records[-1].result.measured["loss_fitted"]
    assert outputs(wild.graph, wild).equal(outputs(start.graph, start))


@pytest.mark.parametrize(
    "passes", [(ActQuant(), LOW), (HQQ(bits=3, group_size=16),), (HQQ(bits=2, group_size=8, axis=0),)]
)
@pytest.mark.parametrize("loss", ["mse", "kl"])
def test_behind_other_passes(passes: tuple[Pass, ...], loss: str) -> None:
    before = distance(run(*passes)[0])
    program, records = run(*passes, QDoRA(rank=4, steps=30, lr=1e-3, loss=loss))  # type: ignore[arg-type]  # parametrized
    assert distance(program) < 0.8 * before
    measured = records[-1].result.measured
    assert measured["loss_after"] < measured["loss_fitted"] < measured["loss_before"]  # type: ignore[operator]  # numbers


def test_the_graph_is_what_was_trained() -> None:
    """The loss that training ended with is that of the graph, whose scales took the magnitudes in."""
    program, records = run(LOW, QDoRA(rank=4, steps=20, lr=1e-3, loss="kl"))
    total = 0.0
    for batch in program.calibration.batches:
        value, goal = (run_graph(graph, [batch])[0][0] for graph in (program.graph, program.reference))
        total += float((goal.softmax(-1) * (goal.log_softmax(-1) - value.log_softmax(-1))).sum(-1).mean())
    measured = records[-1].result.measured["loss_after"]
    assert total / len(program.calibration.batches) == pytest.approx(measured, rel=1e-3)


def test_notebook_starts_where_the_layer_is() -> None:
    plain, _ = run(LOW)
    same, records = run(LOW, QDoRA(rank=4, steps=0, notebook=True))
    assert torch.allclose(outputs(same.graph, same), outputs(plain.graph, plain), rtol=1e-4, atol=1e-5)
    measured = records[-1].result.measured
    assert measured["loss_fitted"] == pytest.approx(measured["loss_before"], rel=1e-3)
    _, records = run(LOW, QDoRA(rank=4, steps=60, lr=3e-3, notebook=True))
    measured = records[-1].result.measured
    assert measured["loss_after"] < 0.9 * measured["loss_fitted"]  # type: ignore[operator]  # numbers


def test_adapters_from_a_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "base_model.model.net.0.lora_A.weight": torch.randn(3, DIM, generator=generator),
        "base_model.model.net.0.lora_B.weight": torch.randn(48, 3, generator=generator),
        "base_model.model.net.0.lora_magnitude_vector": torch.rand(48, generator=generator) + 1,
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    program, records = run(LOW, QDoRA(adapters=str(tmp_path / "adapter.safetensors")))
    assert records[-1].result.changed == ("net.0",)
    plain, _ = run(LOW)
    a, b, m = tensors.values()
    twin = {layer.name: layer for layer in plain.layers()}
    weights = {name: read_weight(plain.graph, layer) for name, layer in twin.items()}
    base = weights["net.0"]
    assert base is not None
    direction = base.dequantize() + b @ a
    model = Blocks()
    with torch.no_grad():
        model.net[0].weight.copy_(m[:, None] * direction / direction.norm(dim=1, keepdim=True))
        for index in (2, 4):
            weight = weights[f"net.{index}"]
            assert weight is not None
            model.net[index].weight.copy_(weight.dequantize())
        x = torch.cat([batch["x"] for batch in program.calibration.batches])
        expected = model(x)
    assert torch.allclose(outputs(program.graph, program), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"rank": 0}, "rank=0 is less than 1"),
        ({"bits": 4}, "bits=4 is neither 8 nor 0"),
        ({"steps": -1}, "steps and damp are at least 0"),
        ({"lr": 0.0}, "lr is positive"),
        ({"loss": "l1"}, "loss=l1 is none"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], what: str) -> None:
    with pytest.raises(PassError, match=what):
        QDoRA(**options)  # type: ignore[arg-type]  # on purpose


def test_a_bias_that_an_adapter_takes_off_its_layer() -> None:
    program = program_of(Products(), {"x": torch.randn(32, DIM)})
    records = Pipeline((HQQ(bits=2, group_size=16), QDoRA(rank=4, steps=0)), PASSES).run(program)
    parameters = 4 * (DIM + 48)
    assert records[-1].result.measured["parameters_added"] == parameters / (DIM * 48)


def test_refusals() -> None:
    with pytest.raises(PassError, match="the model has none"):
        Pipeline((LOW, QDoRA()), PASSES).run(program_of(Decides(), {"x": torch.randn(8, DIM)}))
    with pytest.raises(PassError, match="no linear layer below 8 bits"):
        run(QDoRA())
    with pytest.raises(PassError, match="no linear layer below 8 bits"):
        run(RTN(bits=8), QDoRA())
    program = program_of(Blocks(), {"x": torch.randn(4, DIM)}, batches=1)
    Pipeline((LOW,), PASSES).run(program)
    program.calibration = type(program.calibration)((), (), "none")
    with pytest.raises(PassError, match="needs calibration data"):
        QDoRA().requires(program)


def test_one_sample_and_inputs_that_are_always_zero() -> None:
    program = program_of(Blocks(), {"x": torch.randn(2, DIM)}, batches=1)
    for batch in program.calibration.batches:
        batch["x"][:, 3] = 0
        batch["x"][1] = batch["x"][0]
    Pipeline((LOW, QDoRA(rank=4, steps=2)), PASSES).run(program)
    assert outputs(program.graph, program).isfinite().all()
    weights = [read_weight(program.graph, layer) for layer in find_layers(program.graph) if "lora" in layer.name]
    assert len(weights) == 4
    assert all(weight is not None and weight.dequantize().isfinite().all() for weight in weights)
