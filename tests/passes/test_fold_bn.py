"""fold-bn: the function stays, the statistics are kept, and what cannot be folded says why."""

import pytest
import torch
from torch import Tensor, nn

from passes.fold_bn import FoldBatchNorm
from passes.graph import aten, bias_of, find_layers, get_tensor, tidy
from tests.passes.nets import InvertedResidual, assert_same_function, count, program_of, reasons, seeded


def _fold(module: nn.Module, **inputs: Tensor):
    program = program_of(module, inputs)
    result = FoldBatchNorm().run(program)
    tidy(program.graph)
    return program, result


CASES = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)), (2, 3, 6, 6)),
    "conv without bias": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 3, 6, 6)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 9)),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6)), (2, 2, 4, 4, 4)),
    "padding same": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8)), (2, 3, 6, 6)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(6, 12, 3, groups=6), nn.BatchNorm2d(12)), (2, 6, 6, 6)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(6, 8, 3, groups=2), nn.BatchNorm2d(8)), (2, 6, 6, 6)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)), (2, 4, 5, 5)),
    "transposed grouped": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5)), (4, 7)),
    "no affine": (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, affine=False)), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_function_stays_and_nothing_is_left(case: str, seed: int) -> None:
    build, shape = CASES[case]
    program, result = _fold(seeded(build, seed), input=torch.zeros(shape))
    assert result.changed == ("0",)
    assert result.skipped == ()
    assert count(program.graph, aten.batch_norm.default) == 0
    assert_same_function(program, depth=1)


def test_layers_keep_their_names_and_statistics() -> None:
    module = seeded(InvertedResidual)
    program, result = _fold(module, x=torch.zeros(2, 3, 8, 8))
    names = ("stem", "expand", "depthwise", "project")
    assert result.changed == names
    assert [layer.name for layer in find_layers(program.graph)] == [*names, "classifier"]
    for name in names:
        norm = getattr(module, f"{name}_bn")
        assert torch.equal(program.channel_stats[name].mean, norm.bias)
        assert torch.equal(program.channel_stats[name].std, norm.weight.abs())
    assert_same_function(program)


def test_the_folded_weight_is_the_rounded_exact_one() -> None:
    module = seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    program, _ = _fold(module, input=torch.zeros(2, 3))
    layer = find_layers(program.graph)[0]
    linear, norm = module[0], module[1]
    factor = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = (linear.bias.double() - norm.running_mean.double()) * factor + norm.bias.double()
    assert torch.equal(get_tensor(program.graph, layer.weight), (linear.weight.double() * factor[:, None]).float())
    assert torch.equal(bias_of(program.graph, layer), bias.float())


def test_a_product_without_bias_becomes_one_with() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 4))
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.mm(x, self.weight))

    program, result = _fold(seeded(Product), x=torch.zeros(3, 5))
    assert len(result.changed) == 1
    assert count(program.graph, aten.addmm.default) == 1
    assert count(program.graph, aten.mm.default) == 0
    assert_same_function(program, depth=1)


def test_a_shared_weight_is_folded_for_one_use_only() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.conv(x)))

    program, result = _fold(seeded(Shared), x=torch.zeros(2, 3, 4, 4))
    assert result.changed == ("conv",)
    assert_same_function(program, depth=2)


def test_reasons_for_leaving_one() -> None:
    class Awkward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.first = nn.BatchNorm2d(3)
            self.branched = nn.BatchNorm2d(3)
            self.tokens = nn.Linear(4, 4)
            self.over_tokens = nn.BatchNorm1d(12)
            self.live = nn.BatchNorm1d(12, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.first(x))
            y = y + self.branched(y)
            return self.live(self.over_tokens(self.tokens(y.flatten(1, 2))))

    program, result = _fold(seeded(Awkward), x=torch.zeros(2, 3, 4, 4))
    assert result.changed == ()
    assert list(reasons(result).values()) == [
        "its input is not a convolution or linear layer",
        "the output of conv has another reader",
        "the channels of tokens are not on axis 1",
        "its input is not a convolution or linear layer",
    ]
    assert_same_function(program)


def test_batch_statistics_are_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    program, result = _fold(module, input=torch.zeros(2, 3, 4, 4))
    assert list(reasons(result).values()) == ["it normalizes with the statistics of the batch"]
    assert_same_function(program)
