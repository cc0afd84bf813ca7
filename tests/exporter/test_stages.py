"""Which stage is named on which figures, and that one run tells a layer's own noise from what it inherits."""

import pytest

from exporter.metrics import EXACT_DB
from exporter.report import LayerDiff, Stage
from exporter.stages import Noises, describe, is_fault, own_stage, short, source, stage_of, with_stages


def noises(own: dict[str, float], total: dict[str, float] | None = None, **typical: float) -> Noises:
    return Noises(("before",), own, own if total is None else total, typical)


@pytest.mark.parametrize(
    ("given", "name", "inherited"),
    [
        (noises({"quantization": 40.0, "lowering": EXACT_DB}), "quantization", False),
        (noises({"quantization": 40.0}, {"quantization": 38.0}), "quantization", False),  # 37 % came with the input
        (noises({"quantization": 40.0}, {"quantization": 36.0}), "quantization", True),  # 60 % did
        (noises({"quantization": 40.0, "lowering": 39.0}), "lowering", False),
        # Values on the other side of a rounding boundary: few, and less than what quantization costs.
        (noises({"quantization": 40.0, "lowering": 60.0}, lowering=140.0), "quantization", False),
        # A scale in half precision: little noise, but in every row.
        (noises({"quantization": 40.0, "lowering": 71.0}, lowering=70.0), "lowering", False),
        (
            noises({"quantization": 40.0, "lowering": EXACT_DB}, {"quantization": 38.0, "lowering": 9.0}),
            "lowering",
            True,
        ),
        (noises({"quantization": 40.0, "runtime": 20.0}), "runtime", False),
        # Two roundings of one network, both 33 dB from float, are 30 dB apart.
        (
            noises({"quantization": 43.0, "runtime": 62.0}, {"quantization": 33.0, "runtime": 30.0}),
            "quantization",
            True,
        ),
        (noises({"quantization": 40.0, "tensorrt dialect": 12.0}), "tensorrt dialect", False),
    ],
)
def test_rules(given: Noises, name: str, inherited: bool) -> None:
    found = stage_of(given)
    assert (found.name, found.inherited) == (name, inherited)
    assert (found.after, found.own, found.total, found.typical) == (
        given.after,
        given.own,
        given.total,
        given.typical,
    )


def layer(name: str, stage: Stage | None) -> LayerDiff:
    return LayerDiff(name, "linear", "int8", 8.0, 64, stage=stage)


def test_the_first_fault_comes_before_the_loudest_layer() -> None:
    loud = layer("loud", stage_of(noises({"quantization": 3.0, "lowering": EXACT_DB})))
    quiet = layer("quiet", stage_of(noises({"quantization": 40.0, "lowering": EXACT_DB})))
    one, two = (
        layer(name, stage_of(noises({"quantization": 40.0, "lowering": 70.0}, lowering=70.0)))
        for name in ("one", "two")
    )
    assert source([quiet, loud, one, two]) is one
    assert source([quiet, loud]) is loud
    assert source([layer("bare", None)]) is None
    assert source([]) is None


def test_a_stage_in_words() -> None:
    fault = stage_of(noises({"quantization": 40.0, "lowering": 12.0}, lowering=11.0))
    assert is_fault(fault)
    assert own_stage(fault) == "lowering"
    assert describe(fault) == (
        "the file begins to differ here (behind before) from the graph it was written from: "
        "12.0 dB, a typical row 11.0 dB, quantization 40.0 dB"
    )
    exact = stage_of(noises({"quantization": EXACT_DB, "tensorrt dialect": 142.0}))
    assert (exact.name, is_fault(exact)) == ("tensorrt dialect", False)  # sums in another order, and no other noise
    assert describe(exact).startswith("tensorrt dialect, mostly of its own")
    carried = stage_of(noises({"quantization": 40.0, "lowering": EXACT_DB}, {"quantization": 38.0, "lowering": 9.0}))
    assert not is_fault(carried)
    assert own_stage(carried) == "quantization"
    assert short(carried) == "lowering, inherited"
    assert (
        describe(carried)
        == "lowering, mostly from layers before it (behind before): exact alone, 9.0 dB in the network"
    )
    assert short(None) == ""


def test_layers_without_noises_have_no_stage() -> None:
    found = with_stages([layer("a", None), layer("b", None)], {"b": noises({"quantization": 40.0})})
    assert [entry.stage is None for entry in found] == [True, False]
