"""Figures of outputs and layers: the bad layer is named, and a fault of the file is told apart from quantization."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from exporter.errors import InputError
from exporter.metrics import EXACT_DB
from exporter.report import LayerDiff
from exporter.validate import compare_layers, compare_outputs, eager_session, evaluate_metrics, predictor
from passes.act_quant import ActQuant
from passes.base import LayerRule, Pass
from passes.rtn import RTN
from runtimes.ort import OnnxRuntime
from tests.exporter.compiled import Compiled, compiled, initializers, program_of, quantized
from tests.passes.nets import seeded

pytestmark = pytest.mark.ort


class Net(nn.Module):
    """A convolution and three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.one, self.two, self.three = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 6, 6] -> [N, 5]."""
        y = F.relu(self.stem(x)).flatten(1)
        return self.three(F.relu(self.two(F.relu(self.one(y)))))


def batch(seed: int) -> dict[str, Tensor]:
    return {"x": torch.randn(20, 1, 6, 6, generator=torch.Generator().manual_seed(seed))}


def build(folder: Path, *passes: Pass, rules: tuple[LayerRule, ...] = ()) -> Compiled:
    """The net, quantized and lowered; 20 samples are more than a batch of the layer comparison."""
    return compiled(quantized(program_of(seeded(Net), batch(0), layer_rules=rules), *passes), folder)


def layers(result: Compiled) -> dict[str, LayerDiff]:
    """Every layer's figures."""
    diffs = compare_layers(result.program, result.lowered, result.kernel_of)
    return {diff.name: diff for diff in diffs}


@pytest.fixture
def result(tmp_path: Path) -> Compiled:
    return build(tmp_path, ActQuant(), RTN(), rules=(LayerRule("two", options={"bits": 2}),))


def test_the_worst_layer_is_the_one_with_fewest_bits(result: Compiled) -> None:
    found = layers(result)
    assert list(found) == ["stem", "one", "two", "three"]
    own = {name: diff.output_sqnr_db.own for name, diff in found.items()}
    weights = {name: diff.weight_sqnr_db for name, diff in found.items()}
    for figures in (own, weights):
        others = [value for name, value in figures.items() if name != "two"]
        # 2 bits against 8: steps 85 times as wide are 38 dB; activations at 8 bits leave half of that at the output.
        assert figures["two"] < min(others) - 15
    assert found["two"].cosine < found["one"].cosine


def test_own_error_is_the_layers_alone_and_accumulated_that_of_all_before(result: Compiled) -> None:
    found = {name: diff.output_sqnr_db for name, diff in layers(result).items()}
    assert found["stem"].own == pytest.approx(found["stem"].accumulated)  # nothing stands in front of it
    assert found["three"].own > found["three"].accumulated + 15  # fed float inputs it is as good as 8 bits are
    # In front of the 2 bits stand two layers of 8 bits, 30 dB better: they add 0.1 % to its noise.
    assert found["two"].accumulated == pytest.approx(found["two"].own, abs=0.1)


def test_the_file_agrees_with_the_lowered_graph(result: Compiled) -> None:
    for name, diff in layers(result).items():
        assert diff.output_sqnr_db.onnxruntime_vs_eager_quantized >= 100, name
        assert diff.output_sqnr_db.onnxruntime == pytest.approx(diff.output_sqnr_db.accumulated, abs=0.1), name


def test_a_fault_of_the_file_shows_in_the_file_only(result: Compiled) -> None:
    before = layers(result)
    model = onnx.load(result.path)
    scale = initializers(model)["one.weight_scale"]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.1), scale.name))
    onnx.save(model, result.path)
    after = layers(result)
    figures = {name: diff.output_sqnr_db.onnxruntime_vs_eager_quantized for name, diff in after.items()}
    assert figures["stem"] >= 100
    # Weights 1.1 times too large: an error of a tenth, 20 dB; a bias of its own takes off some.
    assert 15 < figures["one"] < 25
    assert figures["two"] < 30
    for name, diff in after.items():
        for key in ("own", "accumulated"):
            assert getattr(diff.output_sqnr_db, key) == getattr(before[name].output_sqnr_db, key), name
        assert (diff.cosine, diff.weight_sqnr_db) == (before[name].cosine, before[name].weight_sqnr_db)
    assert after["one"].output_sqnr_db.onnxruntime < 25


def test_layers_say_how_they_are_stored_and_run(result: Compiled) -> None:
    found = layers(result)
    assert {name: (diff.kind, diff.format, diff.kernel, diff.params) for name, diff in found.items()} == {
        "stem": ("conv", "int8", "QLinearConv", 36),
        "one": ("linear", "int8", "MatMulIntegerToFloat", 4096),
        "two": ("linear", "int4 cast at load to int8", "MatMulIntegerToFloat", 4096),
        "three": ("linear", "int8", "MatMulIntegerToFloat", 320),
    }
    assert 8 < found["one"].bits_per_weight < 9
    assert 4 < found["two"].bits_per_weight < 5


def test_a_layer_left_in_float_has_no_weight_error(tmp_path: Path) -> None:
    found = layers(build(tmp_path, RTN(bits=4), rules=(LayerRule("one", skip=True),)))
    assert (found["one"].format, found["one"].bits_per_weight, found["one"].weight_sqnr_db) == ("float32", 32.0, None)
    assert found["one"].output_sqnr_db.own == EXACT_DB
    assert found["one"].output_sqnr_db.accumulated < 40  # the stem in front of it has 4 bits


def test_what_block_kernels_add_counts_as_quantization(tmp_path: Path) -> None:
    """accumulated is of the simulated network; the file, unoptimized, is compared with what it says."""
    found = {name: diff.output_sqnr_db for name, diff in layers(build(tmp_path, RTN(group_size=32))).items()}
    assert found["one"].onnxruntime_vs_eager_quantized >= 100
    assert found["one"].accumulated < found["one"].onnxruntime - 0.5


def test_progress_counts_layers_in_small_batches(result: Compiled) -> None:
    seen: dict[str, list[int]] = {}
    result.program.on_step = lambda text, done, total: seen.setdefault(f"{text} of {total}", []).append(done)
    compare_layers(result.program, result.lowered, {})
    assert seen == {
        "layers of 12": [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 11, 12],  # 20 samples are 3 batches, 4 layers each
        "weights of 4": [0, 1, 2, 3, 4],
    }


def test_outputs_are_compared_over_all_batches(result: Compiled) -> None:
    program, reference = result.program, eager_session(result.program, result.program.reference)
    same = compare_outputs(reference, reference, [batch(1), batch(2)])["output"]
    assert (same.sqnr_db, same.max_abs, same.top1_agreement) == (EXACT_DB, 0.0, 1.0)
    batches = [batch(1), batch(2)]
    simulated = eager_session(program, result.lowered.simulated)
    found = compare_outputs(reference, simulated, batches)["output"]
    values = [
        torch.cat([torch.from_numpy(s.run({"x": b["x"].numpy()})["output"]) for b in batches])
        for s in (reference, simulated)
    ]
    noise = (values[0] - values[1]).double().square().sum()
    assert found.sqnr_db == pytest.approx(float(10 * torch.log10(values[0].double().square().sum() / noise)))
    assert found.max_abs == pytest.approx(float((values[0] - values[1]).abs().max()))
    artifact = compare_outputs(simulated, OnnxRuntime(threads=1).load(result.lowered.artifact), batches)["output"]
    assert artifact.sqnr_db > found.sqnr_db + 10  # the runtime's own arithmetic is small beside 2 bits


def test_inputs_go_by_name_whatever_the_order_of_the_samples(tmp_path: Path) -> None:
    class Difference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, input: Tensor, other: Tensor) -> Tensor:
            return self.layer(input - 3 * other)

    def samples(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"other": torch.randn(6, 8, generator=generator), "input": torch.randn(6, 8, generator=generator)}

    result = compiled(quantized(program_of(seeded(Difference), samples(0)), ActQuant(), RTN()), tmp_path)
    sessions = [eager_session(result.program, result.program.reference), OnnxRuntime().load(result.lowered.artifact)]
    assert compare_outputs(*sessions, [samples(1)])["output"].sqnr_db > 30
    assert layers(result)["layer"].output_sqnr_db.onnxruntime_vs_eager_quantized >= 100


def test_a_predictor_takes_tensors_and_arrays(result: Compiled) -> None:
    predict = predictor(OnnxRuntime(threads=1).load(result.lowered.artifact))
    x = batch(3)["x"]
    assert np.array_equal(predict({"x": x})["output"], predict({"x": x.numpy()})["output"])


def misshapen(predict: Callable[[dict[str, Tensor]], object]) -> dict[str, float]:
    """For --eval: feeds what no network here takes."""
    predict({"x": torch.ones(1, 2)})
    return {}


def test_an_evaluation_that_feeds_what_does_not_fit_is_the_users_affair(result: Compiled) -> None:
    session = eager_session(result.program, result.program.graph)
    with pytest.raises(InputError, match=r"misshapen failed on eager: RuntimeFault: eager torch failed"):
        evaluate_metrics(f"{__name__}:misshapen", {"eager": session})
