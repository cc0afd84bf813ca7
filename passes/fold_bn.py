"""Fold inference batch norms into the layers in front of them.

    y = gamma (W x + b - mean) / sqrt(var + eps) + beta = W' x + b'
    k = gamma / sqrt(var + eps),   W' = k W  (row by row),   b' = k (b - mean) + beta

Computed in float64, so what is left is one rounding of W' and b'. Behind the batch norm a channel has mean beta and
standard deviation |gamma| over the training data (Ioffe and Szegedy, arXiv 1502.03167); both are kept for the passes
that would otherwise have to estimate them.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, fx

from passes.base import ChannelStatistics, Pass, PassResult, Program, Skip
from passes.graph import Layer, aten, bias_of, find_layers, get_tensor, give_bias, set_weight, weight_of


@dataclasses.dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold every batch norm that directly follows a convolution (grouped, transposed) or linear layer; exact."""

    name: ClassVar[str] = "fold-bn"
    summary: ClassVar[str] = "fold batch norms into the layers in front of them"
    paper: ClassVar[str] = "arXiv 1502.03167"
    quantizes: ClassVar[bool] = False

    def run(self, program: Program) -> PassResult:
        """Fold what can be folded; batch norms that stay are listed with the reason."""
        changed, skipped = [], []
        layers = {layer.node: layer for layer in find_layers(program.graph)}
        for node in list(program.graph.graph.nodes):
            if node.target is not aten.batch_norm.default:
                continue
            layer = layers.get(node.args[0])
            reason = _obstacle(node, layer)
            if layer is None or reason:
                skipped.append(Skip(node.name, reason))
                continue
            layers[node.args[0]] = _fold(program, layer, node)
            changed.append(layer.name)
        return PassResult(changed=tuple(changed), skipped=tuple(skipped))


def _obstacle(node: fx.Node, layer: Layer | None) -> str:
    """Why this batch norm cannot be folded into `layer`, the layer in front of it; empty when it can."""
    if layer is None or layer.kind == "embedding":
        return "its input is not a convolution or linear layer"
    if node.args[5] or node.args[3] is None:
        return "it normalizes with the statistics of the batch"
    constants = [value for value in (*node.args[1:5], layer.bias) if value is not None]
    if layer.weight.op != "get_attr" or any(not isinstance(c, fx.Node) or c.op != "get_attr" for c in constants):
        return "a weight or statistic is not a constant"
    if len(layer.node.users) > 1:
        return f"the output of {layer.name} has another reader"
    # Batch norm's channels are axis 1: a linear's only when its output is [N, out]; a convolution's unless unbatched.
    expected = 2 if layer.kind == "linear" else layer.weight.meta["val"].dim()
    if layer.node.meta["val"].dim() != expected:
        return f"the channels of {layer.name} are not on axis 1"
    return ""


def _fold(program: Program, layer: Layer, node: fx.Node) -> Layer:
    """Give the layer W' and b', and its readers the batch norm's."""
    graph = program.graph
    gamma, beta, mean, var = (None if arg is None else get_tensor(graph, arg).double() for arg in node.args[1:5])  # type: ignore[arg-type]  # _obstacle checked that they are nodes
    assert mean is not None
    assert var is not None
    gamma = torch.ones_like(mean) if gamma is None else gamma
    beta = torch.zeros_like(mean) if beta is None else beta
    eps = node.args[7]
    assert isinstance(eps, float)
    factor = gamma / torch.sqrt(var + eps)  # [out]

    weight = weight_of(graph, layer)
    matrix = layer.to_matrix(weight).double() * factor[:, None]
    bias = bias_of(graph, layer)
    shifted: Tensor = -mean if bias is None else bias.double() - mean
    set_weight(graph, layer, layer.from_matrix(matrix.to(weight.dtype), weight.shape))
    layer = give_bias(graph, layer, (factor * shifted + beta).to(weight.dtype))

    node.replace_all_uses_with(layer.node)
    graph.graph.erase_node(node)
    program.channel_stats[layer.name] = ChannelStatistics(beta.float(), gamma.abs().float())
    return layer
