"""What an error at a layer's output costs in the end: second moments of a gradient there, the outer factor of K-FAC.

To second order an error D of a layer's weight costs tr(G D H D^T) at the network's outputs, H = X^T X / n the moments
of the layer's inputs, if inputs and gradients are taken to be independent (Martens & Grosse, arXiv 1503.05671).
G = E[g g^T], [out, out], where g is the gradient at the layer's output of

    mse   the product of the outputs with standard normal numbers: E over them of J^T z z^T J is J^T J
    kl    -log p(c), with c drawn from the softmax p of the outputs: its covariance is the Fisher information

one draw for each position of the outputs, on the float network.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from passes.calibration import Batch, cut
from passes.graph import Layer, find_layers, inputs_of

Loss = Literal["mse", "kl"]


def output_moments(
    graph: fx.GraphModule,
    names: Iterable[str],
    batches: Sequence[Batch],
    loss: Loss,
    generator: torch.Generator,
    size: int,
) -> dict[str, Tensor]:
    """{layer: G}, [out, out] float32, of linear layers by name, `size` samples at a time.

    A layer that no floating-point output depends on, or of which none is computed by operators that have gradients, is
    missing. Outputs of whole numbers do not count.
    """
    wanted = set(names)
    layers = {layer.node: layer for layer in find_layers(graph) if layer.name in wanted}
    watch = _Backward(graph, layers)
    inputs = [str(node.target) for node in inputs_of(graph)]
    for batch in (part for whole in batches for part in cut(whole, size)):
        with torch.enable_grad():
            outputs = watch.run(*(batch[name] for name in inputs))
            probes = [_probe(value.float(), loss, generator) for value in outputs if value.requires_grad]
            if probes:
                torch.stack(probes).sum().backward()
    return {name: total / watch.counts[name] for name, total in watch.totals.items()}


def _probe(value: Tensor, loss: Loss, generator: torch.Generator) -> Tensor:
    """A number whose gradient at the outputs [..., n] has the loss' curvature as its covariance."""
    if loss == "mse":
        return (value * torch.randn(value.shape, generator=generator)).sum()
    rows = value.flatten(0, -2) if value.dim() > 1 else value[None]
    drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(rows, drawn, reduction="sum")


class _Backward(fx.Interpreter):
    """Runs a graph so that gradients reach the layers' outputs, and sums up their moments."""

    def __init__(self, graph: fx.GraphModule, layers: Mapping[fx.Node, Layer]) -> None:
        super().__init__(graph)
        self._layers = layers
        self.totals: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        """As ever, but that a layer's output asks for its gradient."""
        value = super().run_node(n)
        layer = self._layers.get(n)
        if layer is None:
            return value
        if not value.requires_grad:
            # not a leaf: an operator behind may work in place
            value = value.detach().requires_grad_().clone()
        value.register_hook(lambda gradient: self._add(layer.name, gradient))
        return value

    def _add(self, name: str, gradient: Tensor) -> None:
        rows = gradient.detach().float().flatten(0, -2) if gradient.dim() > 1 else gradient.detach().float()[None]
        product = rows.mT @ rows
        self.totals[name] = self.totals[name] + product if name in self.totals else product
        self.counts[name] = self.counts.get(name, 0) + len(rows)
