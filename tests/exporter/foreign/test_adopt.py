"""Foreign codes in the captured program: the same function as dequantizing and running, and what passes do to them."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from exporter.backends.onnx_qdq.lower import OnnxBackend
from exporter.capture import capture
from exporter.checkpoint import load_checkpoint
from exporter.compile import compile_path
from exporter.foreign.adopt import adopt
from exporter.load import Loaded, load_model
from exporter.prepare import prepare
from exporter.progress import Silent
from exporter.recipe import Recipe
from passes import PASSES
from passes.base import Pipeline, Program
from passes.calibration import run_graph
from passes.graph import aten
from passes.weight_nodes import read_weight
from tests.exporter.foreign.checkpoints import (
    Folder,
    Pack,
    aqlm,
    aqlm_settings,
    batch,
    folder,
    gpt2,
    gptq,
    gptq_settings,
    hqq,
    hqq_settings,
    llama,
    opt,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.hf


def program_of(path: Path) -> tuple[Loaded, Program]:
    loaded = load_model(path)
    prepared = prepare(loaded, Recipe(), batch(8))
    program = capture(
        prepared.program, prepared.calibration, OnnxBackend.rules, dynamic=prepared.dynamic, layer_rules=()
    )
    adopt(program, loaded.weights, path)
    return loaded, program


def logits(program: Program) -> Tensor:
    return run_graph(program.graph, [batch()])[0][0]


CASES: dict[str, tuple[object, dict[str, object], Pack]] = {
    "gptq": (opt, gptq_settings(3), gptq(3)),
    "gptq, act order": (llama, gptq_settings(4), gptq(4, order="act")),
    "gptq, gpt2": (gpt2, gptq_settings(4), gptq(4, order="act")),
    "aqlm": (opt, aqlm_settings(2, 8), aqlm(2, 8)),
    "hqq, axis 1": (llama, hqq_settings(3), hqq(3)),
    "hqq, axis 0": (opt, hqq_settings(4), hqq(4, 16, 0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_program_is_what_dequantizing_and_running_gives(case: str, tmp_path: Path) -> None:
    model, settings, pack = CASES[case]
    written: Folder = folder(tmp_path, model(), settings, pack)  # type: ignore[operator]  # a table of functions
    loaded, program = program_of(tmp_path)
    expected = written.logits(batch())
    # Columns in another order are summed in another order: a few float32 steps in each of at most eight layers.
    assert float((logits(program) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    quantized = {layer.name: read_weight(program.graph, layer) for layer in program.layers()}
    for name, foreign in loaded.weights.items():
        weight = quantized[name]
        assert weight is not None
        assert weight.codes.equal(foreign.weight.codes)
        assert weight.dequantize().equal(foreign.weight.dequantize())
    float_layers = {name for name, weight in quantized.items() if weight is None}
    assert not float_layers & loaded.weights.keys()
    assert "lm_head" in float_layers


def test_layers_in_one_order_share_the_input_in_it(tmp_path: Path) -> None:
    """q, k and v see the same input, so act_order gives them the same order."""
    pack = gptq(4, order="act")
    one = pack((32, 32), np.random.default_rng(0))
    folder(
        tmp_path,
        llama(),
        gptq_settings(4),
        lambda shape, generator: one if shape == (32, 32) else pack(shape, generator),
    )
    _, program = program_of(tmp_path)
    targets = [node.target for node in program.graph.graph.nodes]
    # q, k, v together; o; gate; up; down: each of the latter with an order of its own
    assert targets.count(aten.index_select.default) == 5


@pytest.mark.parametrize("passes", ["cle,gptaq", "smooth,gptq:bits=4", "act-quant,rtn", "absorb-bias,rtn,bias-correct"])
def test_passes_leave_them_alone_and_say_so(passes: str, tmp_path: Path) -> None:
    folder(tmp_path, opt(), gptq_settings(4), gptq(4))
    loaded, program = program_of(tmp_path)
    records = Pipeline(Recipe(passes=passes).parsed_passes, PASSES).run(program)
    quantizer = next(record for record in records if record.name in ("gptaq", "gptq", "rtn"))
    reasons = {skip.node: skip.why for skip in quantizer.result.skipped}
    assert {reasons[name] for name in loaded.weights} == {"its weight is quantized already"}
    assert "model.decoder.embed_tokens" in quantizer.result.changed
    weights = {layer.name: read_weight(program.graph, layer) for layer in program.layers()}
    for name, foreign in loaded.weights.items():
        weight = weights[name]
        assert weight is not None
        assert weight.codes.equal(foreign.weight.codes)


@pytest.mark.ort
@pytest.mark.parametrize("case", [name for name in CASES if name != "gptq"])
def test_a_folder_compiles_without_passes(case: str, tmp_path: Path) -> None:
    model, settings, pack = CASES[case]
    written: Folder = folder(tmp_path / "model", model(), settings, pack)  # type: ignore[operator]  # a table of functions
    save_file(batch(10), tmp_path / "calib.safetensors")
    recipe = Recipe(calib=str(tmp_path / "calib.safetensors"), out=tmp_path / "out")
    result = compile_path(tmp_path / "model", recipe, progress=Silent())
    report = result.report
    assert report.passes == ()
    assert report.recipe["passes"] == "none"
    layers = {layer.name: layer for layer in report.layers}
    assert layers.keys() >= written.layers.keys()
    for name in written.layers:
        assert layers[name].kernel == "MatMulNBits"
        assert layers[name].weight_sqnr_db == 300  # the codes stand for the reference's weights exactly
    stored = load_checkpoint(tmp_path / "out" / "model.safetensors")
    for name, foreign in load_model(tmp_path / "model").weights.items():
        assert stored.weights[name].codes.equal(foreign.weight.codes)
    parity = report.parity["onnxruntime_unoptimized"]["logits"]
    assert parity.sqnr_db is not None
    assert parity.sqnr_db >= 40  # the block kernel rounds its input to 8 bits: about 45 dB here


def test_a_weight_that_is_read_elsewhere_is_refused(tmp_path: Path) -> None:
    folder(tmp_path, llama(), gptq_settings(4), gptq(4))
    loaded, program = program_of(tmp_path)
    name = "model.layers.0.mlp.up_proj"
    untouched = dataclasses.replace(program, graph=program.reference)
    weight = next(node for node in untouched.graph.graph.nodes if node.target == f"{name}.weight")
    with untouched.graph.graph.inserting_after(weight):
        extra = untouched.graph.graph.call_function(aten.sum.default, (weight,))
    output = untouched.graph.graph.output_node()
    output.args = ((*output.args[0], extra),)  # type: ignore[misc]  # a flat tuple of nodes
    with pytest.raises(Exception, match=f"layer {name}: the model reads its weight elsewhere"):
        adopt(untouched, loaded.weights, tmp_path)
    assert torch.is_tensor(logits(program))


def test_adapters_beside_foreign_codes(tmp_path: Path) -> None:
    """qdora aims at the float network: here that is what the codes mean, so there is nothing to win back."""
    folder(tmp_path, llama(), gptq_settings(4), gptq(4, order="act"))
    loaded, program = program_of(tmp_path)
    before = logits(program)
    records = Pipeline(Recipe(passes="qdora:rank=2").parsed_passes, PASSES).run(program)
    assert set(records[-1].result.changed) == loaded.weights.keys()
    # The closed form of no error: float32 rounding of the target, through seven layers.
    assert float((logits(program) - before).abs().max()) <= 1e-4 * float(before.abs().max())
