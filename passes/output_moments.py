"""What an error at a layer's output costs in the end: second moments of a gradient there, the outer factor of K-FAC.

To second order an error D of a layer's weight costs tr(G D H D^T) at the network's outputs, H = X^T X / n the moments
of the layer's inputs, if inputs and gradients are taken to be independent (Martens & Grosse, arXiv 1503.05671).
G = E[g g^T], [out, out], where g is the gradient at the layer's output of

    mse   the product of the outputs with standard normal numbers: E over them of J^T z z^T J is J^T J
    kl    -log p(c), with c drawn from the softmax p of the outputs: its covariance is the Fisher information

one draw for each position of the outputs, on the float network. An error of a value itself costs g^2 each, summed.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from passes.calibration import Batch
from passes.graph import Layer, find_layers, inputs_of, weight_rank

Loss = Literal["mse", "kl"]
See = Callable[[Tensor, Tensor], None]
"""Is given a value and the gradient there."""


def output_moments(
    graph: fx.GraphModule,
    names: Iterable[str],
    batches: Sequence[Batch],
    loss: Loss,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """{layer: G}, [out, out] float32, of layers by name; a convolution's outputs are its channels, at every position.

    A layer that no floating-point output depends on, or of which none is computed by operators that have gradients, is
    missing. Outputs of whole numbers do not count.
    """
    wanted, totals, counts = set(names), dict[str, Tensor](), dict[str, int]()

    def see_layer(layer: Layer) -> See:
        name, outputs_axis = layer.name, -1 if layer.kind == "linear" else 1 - weight_rank(layer)

        def see(_: Tensor, gradient: Tensor) -> None:
            rows = gradient.float().movedim(outputs_axis, -1)
            rows = rows.reshape(-1, rows.shape[-1])
            product = rows.mT @ rows
            totals[name] = totals[name] + product if name in totals else product
            counts[name] = counts.get(name, 0) + len(rows)

        return see

    watched = {layer.node: see_layer(layer) for layer in find_layers(graph) if layer.name in wanted}
    watch_gradients(graph, watched, batches, loss, generator)
    return {name: total / counts[name] for name, total in totals.items()}


def watch_gradients(
    graph: fx.GraphModule,
    watched: Mapping[fx.Node, See],
    batches: Sequence[Batch],
    loss: Loss,
    generator: torch.Generator,
) -> None:
    """Hand each watched node's values and a draw of g there to its function, batch by batch.

    Functions of nodes that no floating-point output depends on, or behind which operators have no gradient, see none.
    """
    watch = _Backward(graph, watched)
    inputs = [str(node.target) for node in inputs_of(graph)]
    for batch in batches:
        with torch.enable_grad():
            outputs = watch.run(*(batch[name] for name in inputs))
            probes = [_probe(value.float(), loss, generator) for value in outputs if value.requires_grad]
            if probes:
                torch.stack(probes).sum().backward()


def _probe(value: Tensor, loss: Loss, generator: torch.Generator) -> Tensor:
    """A number whose gradient at the outputs [..., n] has the loss' curvature as its covariance."""
    if loss == "mse":
        return (value * torch.randn(value.shape, generator=generator)).sum()
    rows = value.flatten(0, -2) if value.dim() > 1 else value[None]
    drawn = torch.multinomial(rows.detach().softmax(-1), 1, generator=generator)[:, 0]
    return F.cross_entropy(rows, drawn, reduction="sum")


class _Backward(fx.Interpreter):
    """Runs a graph so that gradients reach the watched values, and hands them on."""

    def __init__(self, graph: fx.GraphModule, watched: Mapping[fx.Node, See]) -> None:
        super().__init__(graph)
        self._watched = watched

    def run_node(self, n: fx.Node) -> Any:
        """As ever, but that a watched value asks for its gradient."""
        value = super().run_node(n)
        see = self._watched.get(n)
        if see is None or not value.is_floating_point():
            return value
        if not value.requires_grad:
            # not a leaf: an operator behind may work in place
            value = value.detach().requires_grad_().clone()
        kept = value.detach()
        value.register_hook(lambda gradient: see(kept, gradient.detach()))
        return value
