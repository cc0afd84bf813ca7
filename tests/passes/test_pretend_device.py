"""Weight algorithms take tensors wherever they are: the same numbers, and nothing made on the CPU in between."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes import aq_fit, gptaq, gptq, hqq, rtn
from passes.aq import AQ
from passes.device import to_cpu
from passes.gptaq import GPTAQ
from passes.gptq import GPTQ
from passes.hqq import HQQ
from passes.ranks import Ranks
from passes.rtn import RTN
from passes.weight_pass import WeightPass
from tests.exporter.compiled import program_of, quantized
from tests.passes.nets import InvertedResidual, seeded
from tests.passes.pretend_device import DEVICE, Pretend, There


@pytest.fixture
def device() -> Iterator[Pretend]:
    """The pretended device, on."""
    with Pretend() as mode:
        yield mode


def test_the_device_tells_what_mixes(device: Pretend) -> None:
    there = torch.ones(2, device=DEVICE)
    assert isinstance(there, There)
    assert (there * 2).cpu().equal(torch.full((2,), 2.0))
    with pytest.raises(AssertionError, match="mixes devices"):
        _ = there + torch.ones(2)
    assert device.ran >= 2


CASES: dict[str, Callable[..., Any]] = {
    "rtn": lambda weight, hessian, cross: rtn.quantize_weight(weight, RTN(bits=4, group_size=16, scale_search="mse")),
    "gptq": lambda weight, hessian, cross: gptq.quantize_weight(weight, hessian, GPTQ(group_size=16)),
    "gptq in order": lambda weight, hessian, cross: gptq.quantize_weight(
        weight, hessian, GPTQ(group_size=16, act_order=False, symmetric=False, scale_search="minmax")
    ),
    "gptq of a tensor": lambda weight, hessian, cross: gptq.quantize_weight(weight, hessian, GPTQ(group_size=0)),
    "gptaq": lambda weight, hessian, cross: gptaq.quantize_weight(weight, hessian, GPTAQ(), cross),
    "gptaq eig": lambda weight, hessian, cross: gptaq.quantize_weight(weight, hessian, GPTAQ(eig=True), cross),
    "hqq": lambda weight, hessian, cross: hqq.quantize_weight(weight, HQQ(group_size=16)),
    "hqq hessian": lambda weight, hessian, cross: hqq.quantize_weight(weight, HQQ(group_size=16), hessian),
    "aq": lambda weight, hessian, cross: aq_fit.quantize_weight(
        weight, hessian, AQ(codebook_bits=4, sample=64, rounds=2)
    ),
    "aq by the outputs": lambda weight, hessian, cross: aq_fit.quantize_weight(
        weight, hessian, AQ(codebook_bits=4, sample=64, rounds=2), outer=weight @ hessian @ weight.T
    ),
    "aq with tables": lambda weight, hessian, cross: aq_fit.quantize_weight(
        weight, hessian, AQ(codebook_bits=4, scale_bits=2, codebook_value_bits=3, sample=64, rounds=1, shuffle=True)
    ),
}


def _problem() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, y = torch.randn(256, 64), torch.randn(256, 64) * 0.1
    x[:, 5] = 0  # a dead input takes a path of its own
    y[:, 5] = 0
    return torch.randn(48, 64), x.T @ x / 256, (x + y).T @ x / 256


@pytest.mark.parametrize("name", CASES)
def test_a_weight_on_a_device_gets_the_codes_it_gets_on_the_cpu(name: str) -> None:
    weight, hessian, cross = _problem()
    expected = CASES[name](weight, hessian.clone(), cross.clone())
    with Pretend() as mode:
        found = CASES[name](weight.to(DEVICE), hessian.to(DEVICE), cross.to(DEVICE))
        assert mode.ran > 10
        assert isinstance(found.codes, There)
        back = to_cpu(found)
    assert not isinstance(back.codes, There)
    assert back.codes.equal(expected.codes)
    assert back.dequantize().equal(expected.dequantize())


class Words(nn.Module):
    """A table of words, two layers, and a constant that the graph makes by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.second = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        """[N, T] -> [N, T, 8]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        result: Tensor = self.second(torch.relu(self.first(self.table(tokens))) + places[:, None])
        return result


@pytest.mark.parametrize("net", [Words, InvertedResidual])
@pytest.mark.parametrize(
    "work",
    [
        GPTQ(group_size=16),
        GPTAQ(activations="rtn"),
        HQQ(group_size=16, hessian=True),
        AQ(codebook_bits=3, in_group_size=4, sample=64, rounds=1, kmeans_iterations=2),
        AQ(codebook_bits=3, in_group_size=4, sample=64, rounds=1, kmeans_iterations=2, loss="mse"),
    ],
    ids=["gptq", "gptaq", "hqq", "aq", "aq by the outputs"],
)
def test_a_pass_works_on_the_device_and_leaves_its_results_on_the_cpu(net: type[nn.Module], work: WeightPass) -> None:
    def program() -> dict[str, Tensor]:
        torch.manual_seed(0)
        batches = (
            [{"tokens": torch.randint(0, 20, (4, 6))} for _ in range(3)]
            if net is Words
            else [{"x": torch.randn(4, 3, 8, 8)} for _ in range(3)]
        )
        made = program_of(seeded(net), *batches)
        made.ranks = ranks
        graph = quantized(made, work).graph
        return {name: value for name, value in graph.state_dict().items() if "codes" in name}

    ranks = Ranks()
    expected = program()
    ranks = Ranks(device=DEVICE)
    with Pretend() as mode:
        found = program()
        assert mode.ran > 100
    assert found.keys() == expected.keys()
    assert found
    assert not any(isinstance(value, There) for value in found.values())
    assert all(found[name].equal(expected[name]) for name in expected)
