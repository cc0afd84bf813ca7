"""Eager torch behind the runtime interface."""

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from runtimes.base import RuntimeFault
from runtimes.eager import EagerSession


class Net(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x @ y, (x - 1).to(torch.bfloat16)


@pytest.fixture
def session() -> EagerSession:
    return EagerSession(fx.symbolic_trace(Net()), ("a", "b"), ("product", "less"))


A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.ones((3, 2), np.float32)


def test_inputs_go_by_position_and_outputs_come_by_name(session):
    outputs = session.run({"b": B, "a": A})
    assert list(outputs) == ["product", "less"]
    np.testing.assert_array_equal(outputs["product"], A @ B)


def test_bfloat16_comes_back_as_float32(session):
    less = session.run({"a": A, "b": B})["less"]
    assert less.dtype == np.float32
    np.testing.assert_array_equal(less, A - 1)  # small whole numbers are exact in bfloat16


def test_read_only_feeds_are_taken_without_a_warning(session):
    frozen = A.copy()
    frozen.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        session.run({"a": frozen, "b": B})


def test_results_carry_no_gradient():
    net = nn.Linear(3, 2)
    graph = fx.symbolic_trace(nn.Sequential(net))
    output = EagerSession(tuple_of(graph), ("x",), ("y",)).run({"x": A})["y"]
    assert output.shape == (2, 2)


def tuple_of(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with its one output in a tuple, as captured graphs have it."""
    output = graph.graph.output_node()
    output.args = ((output.args[0],),)
    graph.recompile()
    return graph


def test_shapes_that_do_not_fit_are_a_fault_on_one_line(session):
    with pytest.raises(RuntimeFault, match="eager torch failed") as caught:
        session.run({"a": A, "b": B.T})
    assert "\n" not in str(caught.value)


def test_a_missing_feed(session):
    with pytest.raises(RuntimeFault, match="missing b"):
        session.run({"a": A})
