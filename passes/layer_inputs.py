"""What a layer multiplies its weight matrix by: its input as rows [groups, n, in], and their second moments X^T X / n.

A linear layer's rows are its input vectors. A convolution's are the patches under its kernel, one for each output
position and group. A transposed convolution of stride s is a convolution of stride 1 with the flipped kernel over its
input with s - 1 zeros between neighbours, so its rows are patches of that.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from passes.base import PassError
from passes.graph import Layer
from passes.ranks import Ranks, ShardSum
from passes.threads import single_thread


@dataclasses.dataclass(frozen=True)
class Part:
    """The batches a rank holds: `batches` of `total`."""

    ranks: Ranks
    batches: range
    total: int


ROWS_AT_ONCE = 1 << 24
"""How many numbers of the rows are held at once, at least one sample's."""


def hessian_of(layer: Layer, inputs: Sequence[Tensor], part: Part | None = None) -> Tensor:
    """X^T X / n, [groups, in, in] float32, of the layer's rows X over its input in every batch; see moments_of."""
    return moments_of(layer, inputs, inputs, part)


def moments_of(layer: Layer, lefts: Sequence[Tensor], rights: Sequence[Tensor], part: Part | None = None) -> Tensor:
    """X^T Y / n, [groups, in, in] float32: X the layer's rows over `lefts`, Y those over `rights`, batch by batch.

    `part` says which of all batches these are, where other ranks have others. Products are float32, and summed as
    passes.ranks says. Raises PassError when an input is not finite.
    """
    part = part or Part(Ranks(), range(len(rights)), len(rights))
    total, count = ShardSum(part.ranks, part.total), 0
    with single_thread():
        for index, left, right in zip(part.batches, lefts, rights, strict=True):
            same = left is right
            right = right.to(part.ranks.device)
            left = right if same else left.to(part.ranks.device)
            for rows in _pairs(layer, left, right):
                total.add(index, rows[0].mT @ rows[1])
                count += rows[1].shape[1]
        moments = total.total()
    count = sum(part.ranks.gather(count))
    if moments is None:
        raise PassError("it saw no calibration data", node=layer.name, fix="give calibration samples")
    if not torch.isfinite(moments).all():
        raise PassError(
            "its inputs are not finite on the calibration data",
            node=layer.name,
            fix="check the calibration data and the layers in front",
        )
    return moments.div_(count).float()


def _pairs(layer: Layer, left: Tensor, right: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    if left is right:
        yield from ((rows, rows) for rows in layer_rows(layer, right))
    else:
        yield from zip(layer_rows(layer, left), layer_rows(layer, right), strict=True)


def layer_rows(layer: Layer, value: Tensor) -> Iterator[Tensor]:
    """The rows [groups, n, in] of one batch of the layer's input, a few samples at a time."""
    value = value.float()
    if layer.kind == "linear":
        yield value.flatten(0, -2)[None] if value.dim() > 1 else value[None, None]
        return
    geometry = Geometry(layer)
    samples = value if value.dim() == len(geometry.kernel) + 2 else value[None]
    size = geometry.row_numbers(samples)
    for chunk in samples.split(max(1, ROWS_AT_ONCE // max(size, 1))):
        yield geometry.patches(chunk)


class Geometry:
    """How a convolution's kernel moves over its input."""

    def __init__(self, layer: Layer) -> None:
        weight = layer.weight.meta["val"]
        self.groups = layer.groups
        self.kernel: tuple[int, ...] = tuple(weight.shape[2:])
        self.transposed = layer.kind == "conv_transpose"
        self.stride = self._sizes(layer.node, 3, 1)
        self.dilation = self._sizes(layer.node, 7 if self.transposed else 5, 1)
        reach = [(size - 1) * step for size, step in zip(self.kernel, self.dilation, strict=True)]
        padding = layer.node.args[4] if len(layer.node.args) > 4 else 0
        self.padding: list[tuple[int, int]]
        if padding == "same":
            self.padding = [(span // 2, span - span // 2) for span in reach]
        elif padding == "valid":
            self.padding = [(0, 0) for _ in reach]
        else:
            self.padding = [(size, size) for size in self._sizes(layer.node, 4, 0)]
        if self.transposed:
            extra = self._sizes(layer.node, 5, 0)
            sides = zip(reach, self.padding, extra, strict=True)
            self.padding = [(span - size, span - size + more) for span, (size, _), more in sides]

    def _sizes(self, node: fx.Node, index: int, default: int) -> tuple[int, ...]:
        value = node.args[index] if len(node.args) > index else default
        values = [value] if isinstance(value, int) else list(value)  # type: ignore[arg-type]  # a list of ints
        return tuple(values * len(self.kernel) if len(values) == 1 else values)

    def patches(self, value: Tensor) -> Tensor:
        """Rows [groups, n * positions, in / groups * kernel] of a batch [n, in, *space]."""
        stride = self.stride
        if self.transposed:
            value, stride = spread(value, stride), (1,) * len(stride)
        value = F.pad(value, [size for sides in reversed(self.padding) for size in sides])
        for axis, (size, step, dilation) in enumerate(zip(self.kernel, stride, self.dilation, strict=True), start=2):
            value = value.unfold(axis, (size - 1) * dilation + 1, step)[..., ::dilation]
        kernel_axes = list(range(value.dim() - len(self.kernel), value.dim()))
        if self.transposed:
            value = value.flip(kernel_axes)
        # [n, in, *positions, *kernel] -> [groups, n, *positions, in / groups, *kernel]
        value = value.unflatten(1, (self.groups, -1))
        value = value.movedim(2, -1 - len(self.kernel)).movedim(1, 0)
        return value.flatten(-1 - len(self.kernel)).flatten(1, -2)

    def row_numbers(self, samples: Tensor) -> int:
        """About how many numbers the rows of one sample hold."""
        numbers = samples[0].numel()
        for size, step in zip(self.kernel, self.stride, strict=True):
            numbers = numbers * size * step if self.transposed else numbers * size // step
        return numbers


def spread(value: Tensor, stride: Sequence[int]) -> Tensor:
    """Put stride - 1 zeros between neighbours along each spatial axis of [n, channels, *space]."""
    space = [(size - 1) * step + 1 for size, step in zip(value.shape[2:], stride, strict=True)]
    result = value.new_zeros((*value.shape[:2], *space))
    every = tuple(slice(None, None, step) for step in stride)
    result[(slice(None), slice(None), *every)] = value
    return result
