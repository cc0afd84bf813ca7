"""What of quantized layers is continuous, and can be tuned by gradients: codebooks, scales, biases and norms.

Each tensor p moves as p + rms(p) t, with the step on t, so that one learning rate serves all. Codes stay, and so do
tensors that tables hold.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from passes.graph import add_tensor, get_tensor
from passes.half import half_codebooks, half_scales
from passes.ops import DEQUANTIZE, DEQUANTIZE_CODEBOOK, FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC, spread_scales

SMALLEST_RMS = 1e-3
"""What a tensor of zeros, such as an unused bias, is moved by."""

STORED: Mapping[int, Callable[[Tensor], Tensor]] = {1: half_codebooks, 2: half_scales}
"""How the arguments of dequantize_codebook are rounded in the end, as a file holds them."""

Values = Mapping[fx.Node, Tensor]


class Tunable:
    """The tensors to tune of some nodes that follow each other in a graph; empty where these decode no codebooks."""

    def __init__(self, graph: fx.GraphModule, nodes: Sequence[fx.Node]) -> None:
        self.graph, self.nodes = graph, nodes
        attributes = {value for node in nodes for value in node.all_input_nodes if value.op == "get_attr"}
        self.constants = {value: get_tensor(graph, value) for value in attributes}
        tuned = _tunable(nodes)
        self.sizes = {
            value: self.constants[value].float().square().mean().sqrt().clamp_min(SMALLEST_RMS) for value in tuned
        }
        self.offsets = {
            value: torch.zeros_like(self.constants[value], dtype=torch.float32, requires_grad=True) for value in tuned
        }

    def moved(self) -> dict[fx.Node, Tensor]:
        """The tensors as they stand, with gradients to the offsets."""
        return {
            value: (self.constants[value].float() + self.sizes[value] * offset).to(self.constants[value].dtype)
            for value, offset in self.offsets.items()
        }

    def stored(self) -> dict[fx.Node, Tensor]:
        """The tensors as they stand, as a file holds them."""
        decoding = [node for node in self.nodes if node.target is DEQUANTIZE_CODEBOOK]
        rounding = {node.args[at]: rounded for node in decoding for at, rounded in STORED.items()}
        return {value: rounding.get(value, Tensor.detach)(tensor.detach()) for value, tensor in self.moved().items()}

    def put(self, values: Values) -> None:
        """Have the nodes read these tensors from now on."""
        inside = set(self.nodes)
        for value, tensor in values.items():
            new = add_tensor(self.graph, str(value.target), tensor, self.nodes[0])
            for user in list(value.users):
                if user in inside:
                    user.replace_input_with(value, new)

    def run(self, ends: Sequence[fx.Node], known: Values) -> list[Tensor]:
        """What the nodes compute for `ends`, differentiably; `known` are inputs, and tensors in place of constants."""
        values: dict[fx.Node, Any] = {**self.constants, **known}
        for node in self.nodes:
            args = fx.node.map_arg(node.args, lambda value: values[value])
            kwargs = fx.node.map_arg(node.kwargs, lambda value: values[value])
            assert callable(node.target)
            if node.target is DEQUANTIZE_CODEBOOK:
                codes, codebooks, scales = (values[value] for value in node.all_input_nodes)
                values[node] = _decode(codes, codebooks, scales)
            elif node.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC):
                with torch.no_grad():
                    rounded = node.target(*args, **kwargs)
                values[node] = args[0] + (rounded - args[0]).detach()  # straight through
            else:
                values[node] = node.target(*args, **kwargs)
        return [values[end] for end in ends]


def _tunable(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """The get_attr nodes to tune, if there are codebooks: tensors that tables hold stay."""
    if not any(node.target is DEQUANTIZE_CODEBOOK for node in nodes):
        return []
    found: dict[fx.Node, None] = {}
    for node in nodes:
        values: Sequence[object] = node.args
        if node.target is DEQUANTIZE_CODEBOOK:
            _, codebooks, scales, scale_bits, value_bits, *_ = node.args
            values = [codebooks] * (not value_bits) + [scales] * (not scale_bits)
        elif node.target in (DEQUANTIZE, FAKE_QUANTIZE):
            continue
        for value in values:
            if not isinstance(value, fx.Node) or value.op != "get_attr":
                continue
            if node.target is DEQUANTIZE_CODEBOOK or _is_trained_vector(value):
                found[value] = None
    return list(found)


def _is_trained_vector(node: fx.Node) -> bool:
    """True for a norm's or bias's numbers, known by their names: a capture keeps no parameters apart."""
    value, leaf = node.meta.get("val"), str(node.target).rpartition(".")[2]
    is_vector = isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point()
    return is_vector and leaf.startswith(("weight", "bias"))


def _decode(codes: Tensor, codebooks: Tensor, scales: Tensor) -> Tensor:
    """passes.ops.dequantize_codebook, which has no gradient."""
    blocks = sum((book[codes[..., m].long()] for m, book in enumerate(codebooks)), torch.zeros(()))
    matrix: Tensor = (blocks * spread_scales(scales, codes.shape)[:, :, None, None]).transpose(1, 2)
    return matrix.flatten(0, 1).flatten(1)
