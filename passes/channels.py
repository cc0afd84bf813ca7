"""The channels of a layer: which kernel sees which, and a layer with its channels rescaled.

A layer's *kernels* are its matrix as [out, in / groups, taps]: the weights with which an output channel sees an input
channel of its group.
"""

from torch import Tensor, fx

from passes.base import ChannelStatistics, Program
from passes.graph import Layer, bias_of, set_bias, set_weight, weight_of


def inputs_per_group(graph: fx.GraphModule, layer: Layer) -> int:
    """How many input channels an output channel of the layer sees."""
    weight = weight_of(graph, layer)
    if layer.kind == "conv_transpose":
        return weight.shape[0] // layer.groups
    return layer.to_matrix(weight).shape[1] if layer.kind == "linear" else weight.shape[1]


def kernels_of(graph: fx.GraphModule, layer: Layer) -> Tensor:
    """The layer's float weight as [out, in / groups, taps] float64."""
    matrix = layer.to_matrix(weight_of(graph, layer)).double()
    kernels: Tensor = matrix.unflatten(1, (inputs_per_group(graph, layer), -1))
    return kernels


def per_kernel(inputs: Tensor, groups: int, outputs: int) -> Tensor:
    """What each kernel [out, in / groups] of a grouped layer sees of a value per input channel [in]."""
    return inputs.view(groups, -1).repeat_interleave(outputs // groups, 0)


def rescale(program: Program, layer: Layer, outputs: Tensor | None, inputs: Tensor | None) -> None:
    """W[o, i] *= inputs[i] / outputs[o], b[o] /= outputs[o], all [channels]; the layer's statistics follow."""
    graph = program.graph
    weight, bias = weight_of(graph, layer), bias_of(graph, layer)
    kernels = kernels_of(graph, layer)
    if inputs is not None:
        kernels = kernels * per_kernel(inputs, layer.groups, len(kernels))[:, :, None]
    if outputs is not None:
        kernels = kernels / outputs[:, None, None]
        if bias is not None:
            set_bias(graph, layer, (bias.double() / outputs).to(bias.dtype))
        statistics = program.channel_stats.get(layer.name)
        if statistics is not None:
            mean, std = statistics.mean / outputs, statistics.std / outputs
            program.channel_stats[layer.name] = ChannelStatistics(mean.float(), std.float())
    set_weight(graph, layer, layer.from_matrix(kernels.flatten(1).to(weight.dtype), weight.shape))
