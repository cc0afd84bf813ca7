"""A file run in blocks: the values of the whole file, a block's weights at a time."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporter.blocks import UNOPTIMIZED, NodeByNode, cut, extract, reads, stored_bytes
from runtimes.base import Array, Artifact

pytestmark = pytest.mark.ort

WIDTH, DEPTH = 32, 6
WEIGHT_BYTES = 4 * WIDTH * WIDTH


def _model() -> onnx.ModelProto:
    """x -> DEPTH layers, the first layer's value added at the end through both branches of an If; and a dead node."""
    random = np.random.default_rng(0)
    nodes, constants, value = [], [], "x"
    for index in range(DEPTH):
        constants.append(numpy_helper.from_array(random.normal(size=(WIDTH, WIDTH)).astype(np.float32), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [f"y{index}"]))
        nodes.append(helper.make_node("Tanh", [f"y{index}"], [f"z{index}"]))
        value = f"z{index}"
    constants.append(numpy_helper.from_array(np.array(True), "yes"))
    kind = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Add", [value, "z0"], ["inner"])], "branch", [], [kind])
    nodes.append(helper.make_node("If", ["yes"], ["out"], then_branch=branch, else_branch=branch))
    constants.append(numpy_helper.from_array(np.zeros((WIDTH, WIDTH), np.float32), "unused"))
    nodes.append(helper.make_node("MatMul", ["x", "unused"], ["dead"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", WIDTH])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _saved(folder: Path, *, beside: bool) -> Artifact:
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(_model(), path, save_as_external_data=beside, location="model.onnx.data", size_threshold=1024)
    return Artifact("onnxruntime", path, ("x",), ("out",))


def _feeds() -> dict[str, Array]:
    return {"x": np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32)}


@pytest.mark.parametrize("block_bytes", [1, WEIGHT_BYTES, 2 * WEIGHT_BYTES, 1 << 30])
def test_blocks_give_the_bits_of_the_whole_file(tmp_path: Path, block_bytes: int) -> None:
    taps = [f"y{index}" for index in range(DEPTH)]
    whole = NodeByNode(_saved(tmp_path / "whole", beside=False), taps)
    artifact = _saved(tmp_path / "blocks", beside=True)
    blocks = NodeByNode(artifact, taps, block_bytes=block_bytes)
    expected, found = dict(whole.values(_feeds())), dict(blocks.values(_feeds()))
    assert found.keys() == expected.keys() == {*taps, "out"}
    for name, value in expected.items():
        assert np.array_equal(value, found[name]), name
    assert np.array_equal(whole.run(_feeds())["out"], blocks.run(_feeds())["out"])
    assert np.array_equal(UNOPTIMIZED.load(artifact).run(_feeds())["out"], expected["out"])
    assert {path.name for path in artifact.model.parent.iterdir()} == {"model.onnx", "model.onnx.data"}


def test_a_block_reads_no_more_weights_than_it_may(tmp_path: Path) -> None:
    path = _saved(tmp_path / "blocks", beside=True).model
    model = onnx.load(path, load_external_data=False)
    assert sum(stored_bytes(tensor) for tensor in model.graph.initializer) > (DEPTH + 1) * WEIGHT_BYTES
    blocks = cut(model.graph, 2 * WEIGHT_BYTES)
    assert [node for nodes in blocks for node in nodes] == list(model.graph.node)
    assert len(blocks) == 4
    for nodes in blocks:
        block = extract(model, nodes, {}, [])
        assert sum(stored_bytes(tensor) for tensor in block.graph.initializer) <= 2 * WEIGHT_BYTES


def test_values_come_as_their_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    load = type(UNOPTIMIZED).load

    def counted(self: object, artifact: Artifact) -> object:
        loaded.append(artifact.model.name)
        return load(UNOPTIMIZED, artifact)

    monkeypatch.setattr(type(UNOPTIMIZED), "load", counted)
    values = NodeByNode(_saved(tmp_path / "blocks", beside=True), ["y0"], block_bytes=1).values(_feeds())
    assert next(values)[0] == "y0"
    assert len(loaded) == 1
    assert [name for name, _ in values] == ["out"]
    assert len(loaded) == DEPTH + 1  # the last with the If; the block of the dead node is left out


def test_a_node_reads_what_its_inner_graphs_take_from_outside() -> None:
    branching = next(node for node in _model().graph.node if node.op_type == "If")
    assert reads(branching) == {"yes", "z0", f"z{DEPTH - 1}"}
