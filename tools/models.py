"""The reference networks, as plain factories: `--factory tools.models:mobilenet` with a checkpoint of `tests/models`.

| factory        | network                                                                  | input                |
|----------------|--------------------------------------------------------------------------|----------------------|
| mobilenet      | inverted residuals, batch norm, ReLU6 (Sandler et al., arXiv 1801.04381) | x [N, 1, 8, 8]       |
| mobilenet_relu | the same with ReLU; also the architecture of the two variants below      | x [N, 1, 8, 8]       |
| residual_cnn   | basic blocks, max pooling (He et al., arXiv 1512.03385)                  | x [N, 1, 8, 8]       |
| opt_lm         | decoder-only, pre-LayerNorm, ReLU FFN (Zhang et al., arXiv 2205.01068)   | tokens [N, T] int64  |

Two variants of a ReLU mobilenet are hard to quantize on purpose (Nagel et al., arXiv 1906.04721).
Inside a block, y = D relu(B relu(A x + a) + b) with A, B the expansion and depthwise layers, batch norm included:

- `spread`: relu(s z) = s relu(z) for s > 0, so A, a -> S A, S a and B -> B S^-1 keep the function, and spread the
  channel ranges;
- `raise_biases`: where a channel stays positive relu is the identity, so a -> a + c there and b -> b - B c keep it, but
  for the border of a zero-padded convolution (which sees 0, not c) and for channels that used to be cut at zero.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

CHECKPOINT_DIR = Path(__file__).resolve().parents[1] / "tests" / "models"

VOCAB_SIZE = 256
CONTEXT = 128
NUM_CLASSES = 10
_DROPOUT = 0.1

Factory = Callable[[], nn.Module]


def _seeded(factory: Factory) -> Factory:
    """Make a factory's initial weights the same at every call, without touching the caller's random state."""

    @functools.wraps(factory)
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return factory()

    return build


# ---- convolutional networks -----------------------------------------------------------------------------------------


class ConvNormAct(nn.Module):
    """Convolution without bias, batch norm, and an activation; zero padding keeps the size at stride 1."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, activation: nn.Module, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class InvertedResidual(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1 (linear); the input is added where the shapes agree."""

    def __init__(
        self, in_channels: int, out_channels: int, expansion: int, stride: int, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        inner = in_channels * expansion
        self.expand = ConvNormAct(in_channels, inner, 1, activation())
        self.depthwise = ConvNormAct(inner, inner, 3, activation(), stride=stride, groups=inner)
        self.project = ConvNormAct(inner, out_channels, 1, nn.Identity())
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNet(nn.Module):
    """MobileNetV2 for 8x8 images: stem, six inverted residual blocks, 1x1 head, average pool, classifier."""

    # (expansion, output channels, stride); blocks 2, 4 and 6 add their input
    BLOCKS = ((4, 24, 1), (6, 24, 1), (6, 32, 2), (6, 32, 1), (6, 48, 2), (6, 48, 1))

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        channels = 16
        self.stem = ConvNormAct(1, channels, 3, activation())
        blocks = []
        for expansion, out_channels, stride in self.BLOCKS:
            blocks.append(InvertedResidual(channels, out_channels, expansion, stride, activation))
            channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = ConvNormAct(channels, 128, 1, activation())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(_DROPOUT)
        self.classifier = nn.Linear(128, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] in [-1, 1] -> logits [N, 10]."""
        features = self.pool(self.head(self.blocks(self.stem(x))))
        logits: Tensor = self.classifier(self.dropout(features.flatten(1)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, added and rectified in place as torchvision's ResNet does."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.first = ConvNormAct(in_channels, out_channels, 3, nn.ReLU(inplace=True), stride=stride)
        self.second = ConvNormAct(out_channels, out_channels, 3, nn.Identity())
        same = stride == 1 and in_channels == out_channels
        self.shortcut = nn.Identity() if same else ConvNormAct(in_channels, out_channels, 1, nn.Identity(), stride)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H / stride, W / stride]."""
        y = self.second(self.first(x))
        y += self.shortcut(x)
        out: Tensor = self.relu(y)
        return out


class ResidualCNN(nn.Module):
    """A small ResNet for 8x8 images: stem, 3x3 max pooling to 4x4, three basic blocks, average pool, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNormAct(1, 32, 3, nn.ReLU(inplace=True))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.blocks = nn.Sequential(BasicBlock(32, 32, 1), BasicBlock(32, 64, 2), BasicBlock(64, 64, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(_DROPOUT)
        self.classifier = nn.Linear(64, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 1, 8, 8] in [-1, 1] -> logits [N, 10]."""
        features = self.pool(self.blocks(self.maxpool(self.stem(x))))
        logits: Tensor = self.classifier(self.dropout(features.flatten(1)))
        return logits


# ---- language model -------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal multi-head self-attention with separate biased projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def _split(self, x: Tensor) -> Tensor:
        """[N, T, dim] -> [N, heads, T, dim / heads]."""
        batch, length, _ = x.shape
        return x.view(batch, length, self.heads, -1).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, dim] -> [N, T, dim]; position t sees positions up to t."""
        q, k, v = self._split(self.q_proj(x)), self._split(self.k_proj(x)), self._split(self.v_proj(x))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out


class DecoderLayer(nn.Module):
    """Pre-LayerNorm attention and ReLU feed-forward, each added to its input."""

    def __init__(self, dim: int, ffn: int, heads: int) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        self.self_attn = Attention(dim, heads)
        self.final_layer_norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(ffn, dim)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, dim] -> [N, T, dim]."""
        x = x + self.dropout(self.self_attn(self.self_attn_layer_norm(x)))
        y: Tensor = self.dropout(self.fc2(self.relu(self.fc1(self.final_layer_norm(x)))))
        return x + y


class OptLM(nn.Module):
    """OPT-style decoder on bytes, learned positions, head not tied to the embedding."""

    def __init__(self, dim: int = 256, ffn: int = 1024, heads: int = 4, layers: int = 4) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB_SIZE, dim)
        self.embed_positions = nn.Embedding(CONTEXT, dim)
        self.layers = nn.Sequential(*(DecoderLayer(dim, ffn, heads) for _ in range(layers)))
        self.final_layer_norm = nn.LayerNorm(dim)
        self.lm_head = nn.Linear(dim, VOCAB_SIZE, bias=False)
        for table in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Bytes [N, T] int64, T <= 128 -> logits of the next byte [N, T, 256]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed_tokens(tokens) + self.embed_positions(positions)
        logits: Tensor = self.lm_head(self.final_layer_norm(self.layers(x)))
        return logits


# ---- factories ------------------------------------------------------------------------------------------------------


@_seeded
def mobilenet() -> nn.Module:
    """MobileNetV2-style network with ReLU6."""
    return MobileNet(nn.ReLU6)


@_seeded
def mobilenet_relu() -> nn.Module:
    """MobileNetV2-style network with ReLU."""
    return MobileNet(nn.ReLU)


# the variants differ from it in their weights only
mobilenet_spread = mobilenet_relu
mobilenet_high_bias = mobilenet_relu


@_seeded
def residual_cnn() -> nn.Module:
    """Small residual network with ReLU and max pooling."""
    return ResidualCNN()


@_seeded
def opt_lm() -> nn.Module:
    """OPT-style byte language model: 4 layers, width 256, FFN 1024, 4 heads, context 128."""
    return OptLM()


FACTORIES: dict[str, Factory] = {
    "mobilenet": mobilenet,
    "mobilenet_relu": mobilenet_relu,
    "mobilenet_spread": mobilenet_spread,
    "mobilenet_high_bias": mobilenet_high_bias,
    "residual_cnn": residual_cnn,
    "opt_lm": opt_lm,
}


def load_reference(name: str) -> nn.Module:
    """Reference network `name` (a key of `FACTORIES`) with its committed weights, float32, in eval mode."""
    model = FACTORIES[name]()
    # the language model is stored in float16; copying into the float32 parameters is exact
    model.load_state_dict(load_file(CHECKPOINT_DIR / f"{name}.safetensors"), strict=True)
    return model.eval()


# ---- variants that are hard to quantize -----------------------------------------------------------------------------


def _inverted_residuals(model: nn.Module) -> list[InvertedResidual]:
    return [module for module in model.modules() if isinstance(module, InvertedResidual)]


@torch.no_grad()
def spread(model: nn.Module, seed: int = 0, log2_std: float = 2.0) -> nn.Module:
    """Copy of a ReLU mobilenet whose inner channels are rescaled by 2^N(0, log2_std^2); the function stays the same."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for block in _inverted_residuals(model):
        for producer, consumer in ((block.expand, block.depthwise), (block.depthwise, block.project)):
            scale = torch.exp2(log2_std * torch.randn(producer.conv.out_channels, generator=generator))  # [inner]
            producer.bn.weight.mul_(scale)
            producer.bn.bias.mul_(scale)
            depthwise = consumer.conv.groups > 1
            consumer.conv.weight.div_(scale.view(-1, 1, 1, 1) if depthwise else scale.view(1, -1, 1, 1))
    return model


@torch.no_grad()
def raise_biases(model: nn.Module, seed: int = 0, fraction: float = 0.25) -> nn.Module:
    """Copy of a ReLU mobilenet with high biases in `fraction` of the inner channels: beta = k |gamma|, k in [4, 10].

    Such channels practically never reach zero. The shift is taken out of the next layer's batch norm, which leaves the
    error at padded borders and in channels that used to be rectified: fine-tuning is left to the caller.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for block in _inverted_residuals(model):
        for producer, consumer in ((block.expand, block.depthwise), (block.depthwise, block.project)):
            gamma, beta = producer.bn.weight, producer.bn.bias
            channels = gamma.numel()
            chosen = torch.randperm(channels, generator=generator)[: round(fraction * channels)]
            sigmas = 4 + 6 * torch.rand(len(chosen), generator=generator)
            shift = torch.zeros(channels)  # [inner], change of beta
            shift[chosen] = sigmas * gamma[chosen].abs() - beta[chosen]
            beta.add_(shift)
            weight = consumer.conv.weight  # [inner, 1, 3, 3] depthwise or [out, inner, 1, 1]
            seen = shift * weight.sum((1, 2, 3)) if consumer.conv.groups > 1 else weight[:, :, 0, 0] @ shift
            running_mean = consumer.bn.running_mean
            assert running_mean is not None
            running_mean.add_(seen)
    return model
