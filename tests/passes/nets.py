"""Small networks with the shapes of real ones, and `program_of`, which captures a module with random data.

Every network is built from a torch seed, so `build(seed)` is the same at every call.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from exporter.capture import capture, export_module
from passes.base import LayerRule, PassResult, Program, TargetRules
from passes.calibration import Calibration, run_graph

RULES = TargetRules(
    name="test",
    symmetric_activations=False,
    conv_outputs=True,
    integer_elementwise=True,
    quantized_skip=True,
    dynamic_activations=True,
    weight_zero_point=True,
    integer_kinds=frozenset({"linear", "conv", "conv_transpose"}),
)

FLOAT32_EPS = 2.0**-23


def program_of(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    batches: int = 3,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
    layer_rules: tuple[LayerRule, ...] = (),
    seed: int = 0,
) -> Program:
    """`module` captured with `batches` random batches shaped like `inputs`; axis 0 stays free unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    data = tuple(
        {name: torch.randn(value.shape, generator=generator) for name, value in inputs.items()} for _ in range(batches)
    )
    free = {name: {0: "batch"} for name in inputs} if dynamic is None else dynamic
    exported = export_module(module.eval(), inputs, free)
    return capture(exported, Calibration(data, data[:1], "random"), RULES, layer_rules=layer_rules)


def outputs(graph: fx.GraphModule, program: Program) -> Tensor:
    """The first output over the calibration data, batches joined."""
    graph.recompile()
    return torch.cat([batch[0] for batch in run_graph(graph, program.calibration.batches)])


def float_tolerance(reference: Tensor, depth: int) -> float:
    """How far two float32 evaluations of one function may lie apart after `depth` layers.

    Rescaling or folding re-rounds every weight and partial sum: a relative error of a few eps a layer in the norm, so
    at most about 8 eps sqrt(depth) of the largest output on these nets; 4 times that for cancellation.
    """
    return 32 * FLOAT32_EPS * depth**0.5 * max(1.0, float(reference.abs().max()))


def assert_same_function(program: Program, *, depth: int = 8) -> None:
    """The program's graph computes what the capture computed, to float tolerance."""
    expected = outputs(program.reference, program)
    actual = outputs(program.graph, program)
    assert torch.isfinite(actual).all()
    assert float((actual - expected).abs().max()) <= float_tolerance(expected, depth)


def reasons(result: PassResult) -> dict[str, str]:
    """{node: why} of what a pass left alone."""
    return {skip.node: skip.why for skip in result.skipped}


def count(graph: fx.GraphModule, target: object) -> int:
    """How many nodes call `target`."""
    return sum(node.target is target for node in graph.graph.nodes)


def randomize_statistics(module: nn.Module, seed: int, bias: float = 0.5) -> nn.Module:
    """Give every batch norm statistics and affine values that look trained: no zeros, no ones, some negative gammas."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            size = child.num_features
            child.running_mean = torch.randn(size, generator=generator) * 0.5
            child.running_var = torch.rand(size, generator=generator) * 2 + 0.1
            if child.affine:
                sign = torch.where(torch.rand(size, generator=generator) < 0.2, -1.0, 1.0)
                child.weight.data = sign * (torch.rand(size, generator=generator) + 0.5)
                child.bias.data = torch.randn(size, generator=generator) * bias
    return module.eval()


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """`build()` under a torch seed, batch norms randomized, without touching the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return randomize_statistics(build(), seed)


def spread_channels(module: nn.Module, seed: int, octaves: float = 3.0) -> nn.Module:
    """Multiply each output channel of every conv and linear by 2^N(0, octaves): ranges far apart, as cle likes them."""
    generator = torch.Generator().manual_seed(seed)
    for child in module.modules():
        if isinstance(child, nn.Conv2d | nn.Linear) and child.weight.shape[0] > 4:
            factor = torch.exp2(torch.randn(child.weight.shape[0], generator=generator) * octaves)
            child.weight.data *= factor.view(-1, *[1] * (child.weight.dim() - 1)) / factor.mean()
            if child.bias is not None:
                child.bias.data *= factor / factor.mean()
    return module


class InvertedResidual(nn.Module):
    """MobileNetV2's block between a stem and a classifier: expand, depthwise, project, add."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_bn = nn.BatchNorm2d(8)
        self.expand = nn.Conv2d(8, 24, 1, bias=False)
        self.expand_bn = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.depthwise_bn = nn.BatchNorm2d(24)
        self.project = nn.Conv2d(24, 8, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, 5)
        self.activation = activation()

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 5]."""
        x = self.activation(self.stem_bn(self.stem(x)))
        y = self.activation(self.expand_bn(self.expand(x)))
        y = self.activation(self.depthwise_bn(self.depthwise(y)))
        x = x + self.project_bn(self.project(y))
        return self.classifier(self.pool(x).flatten(1))


class Residual(nn.Module):
    """A ResNet block: conv, relu, conv, add; in-place operators."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, 5]."""
        x = F.relu(self.stem(x), inplace=True)
        y = self.second(F.relu(self.first(x), inplace=True))
        y += x
        return self.head(F.relu(y).mean((2, 3)))


class FeedForward(nn.Module):
    """OPT's feed-forward block over tokens: layer norm, fc1, relu, fc2, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.fc1 = nn.Linear(12, 40)
        self.fc2 = nn.Linear(40, 12)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, 12] -> [N, T, 12]."""
        shape = x.shape
        tokens = self.norm(x).reshape(-1, shape[-1])
        return x + self.fc2(F.relu(self.fc1(tokens))).view(shape)


class Flattening(nn.Module):
    """LeNet-like: convolutions, pooling, then a flatten to a linear layer whose columns repeat each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3)
        self.fc1 = nn.Linear(8 * 9, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, 10, 10] -> [N, 4]."""
        x = F.max_pool2d(F.leaky_relu(self.conv1(x), 0.1), 2, ceil_mode=True)
        x = F.relu(self.conv2(x))
        x = F.relu(self.fc1(x.view(x.size(0), -1)))
        return self.fc2(x)


class Decoder(nn.Module):
    """Grouped and transposed convolutions with PReLU, zero padding and average pooling in between."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 16, 3, groups=4)
        self.slope = nn.PReLU(16)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, groups=4)
        self.pad = nn.ZeroPad2d(1)
        self.mix = nn.Conv2d(8, 12, 3)
        self.pool = nn.AvgPool2d(2)
        self.up_again = nn.ConvTranspose2d(12, 4, 2, stride=2)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 4, 8, 8] -> [N, 2, H, W]."""
        x = self.up(self.slope(self.grouped(x)))
        x = self.mix(self.pad(F.relu(x)))
        x = self.up_again(self.pool(F.relu(x)))
        return self.last(F.relu(x))
