"""Weights of operators that are no layers to passes: the report names them, and nothing else."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from exporter.leftovers import left_in_float
from passes.rtn import RTN
from tests.passes.nets import program_of, seeded


class Experts(nn.Module):
    """A stack of matrices, a table that is added, and a linear layer: 128, 12 and 20 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.place = nn.Parameter(torch.randn(8, 4, 4)), nn.Parameter(torch.randn(1, 3, 4))
        self.head = nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        """[N, 3, 4] -> [N, 8, 3, 4]."""
        return self.head((input + self.place)[:, None] @ self.experts)


@pytest.mark.parametrize(
    ("build", "what"),
    [
        (lambda: nn.GRU(4, 8, batch_first=True), "86% of the model's parameters stay in float: .* of gru$"),
        (lambda: nn.LSTM(4, 8, batch_first=True), "of lstm$"),
        (Experts, "80% of the model's parameters stay in float: .* of matmul$"),
    ],
)
def test_weights_outside_of_layers_are_named(build: Callable[[], nn.Module], what: str) -> None:
    program = program_of(seeded(build), {"input": torch.zeros(2, 3, 4)})
    RTN().run(program)
    (line,) = left_in_float(program)
    assert re.search(what, line), line


def test_layers_norms_and_tables_that_are_added_are_none() -> None:
    network = seeded(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    program = program_of(network, {"src": torch.zeros(2, 3, 8)})
    assert left_in_float(program) == ()
    RTN().run(program)
    assert left_in_float(program) == ()
