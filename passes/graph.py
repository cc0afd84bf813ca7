"""Helpers over torch.fx graphs of ATen operators: find the layers, read and replace their tensors, edit safely.

Tensors are never changed in place: a pass registers a new one under a new name and rewires one use, so tied weights
come apart by themselves and copies of a graph may share storage.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, fx, nn

from passes.memory import release

aten = torch.ops.aten

Kind = Literal["linear", "conv", "conv_transpose", "embedding"]

CONVS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv2d.padding, aten.conv1d.padding}
CONV_TRANSPOSES = {aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A node that multiplies its input by a constant weight.

    Its *matrix* is [out, in]: a linear's weight (transposed for addmm and mm, whose weight is [in, out]), a
    convolution's [out, in / groups * kernel], a transposed convolution's likewise (weight [in, out / groups, *kernel]),
    an embedding's table [rows, dim].
    """

    node: fx.Node
    kind: Kind
    name: str
    input_arg: int
    weight_arg: int
    bias_arg: int | None
    groups: int = 1
    transposed: bool = False

    @property
    def input(self) -> fx.Node:
        """The node whose value the layer multiplies."""
        return _node(self.node.args[self.input_arg])

    @property
    def weight(self) -> fx.Node:
        """The node that yields the weight: a get_attr, or what dequantizes it."""
        return _node(self.node.args[self.weight_arg])

    @property
    def bias(self) -> fx.Node | None:
        """The node that yields the bias [out], if there is one."""
        if self.bias_arg is None or len(self.node.args) <= self.bias_arg:
            return None
        value = self.node.args[self.bias_arg]
        return value if isinstance(value, fx.Node) else None

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The layer's weight as its matrix [out, in]."""
        if self.kind == "linear":
            return weight.t() if self.transposed else weight
        if self.kind == "conv_transpose":
            per_group: Tensor = weight.unflatten(0, (self.groups, -1)).transpose(1, 2)
            return per_group.flatten(0, 1).flatten(1)  # from [groups, out / groups, in / groups, *kernel]
        return weight.flatten(1)

    def from_matrix(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The weight of `shape` whose matrix is `matrix`: the inverse of to_matrix."""
        if self.kind == "linear":
            return matrix.t() if self.transposed else matrix
        if self.kind == "conv_transpose":
            rows = matrix.view(self.groups, shape[1], shape[0] // self.groups, *shape[2:])
            return rows.transpose(1, 2).reshape(shape)
        return matrix.view(shape)


def find_layers(graph: fx.GraphModule) -> list[Layer]:
    """Every layer in the graph's order, each under a name of its own (its module's path where it has one).

    A layer keeps the name it was first found under: it is noted on the node, because passes replace the weights that
    names come from.
    """
    layers: list[Layer] = []
    seen: dict[str, int] = {}
    for node in graph.graph.nodes:
        layer = _layer_at(graph, node)
        if layer is None:
            continue
        count = seen[layer.name] = seen.get(layer.name, 0) + 1
        unique = layer.name if count == 1 else f"{layer.name}@{count}"
        layers.append(dataclasses.replace(layer, name=node.meta.setdefault("layer_name", unique)))
    return layers


def _layer_at(graph: fx.GraphModule, node: fx.Node) -> Layer | None:
    if node.op != "call_function":
        return None
    found: Layer | None = None
    if node.target is aten.linear.default:
        found = Layer(node, "linear", "", 0, 1, 2)
    elif node.target is aten.addmm.default and not node.kwargs:
        found = Layer(node, "linear", "", 1, 2, 0, transposed=True)
    elif node.target in (aten.mm.default, aten.matmul.default):
        found = Layer(node, "linear", "", 0, 1, None, transposed=True)
    elif node.target in CONVS:
        found = Layer(node, "conv", "", 0, 1, 2, groups=_argument(node, 6, 1))
    elif node.target in CONV_TRANSPOSES:
        found = Layer(node, "conv_transpose", "", 0, 1, 2, groups=_argument(node, 6, 1))
    elif node.target is aten.embedding.default:
        found = Layer(node, "embedding", "", 1, 0, None)
    if found is None or not isinstance(found.node.args[found.weight_arg], fx.Node):
        return None
    root = constant_root(found.weight)
    if found.bias is not None and constant_root(found.bias) is None:
        return None
    if root is None or (found.kind == "linear" and weight_rank(found) != 2):
        return None
    return dataclasses.replace(found, name=_layer_name(node, str(root.target)))


def weight_rank(layer: Layer) -> int:
    """Number of dimensions of the layer's weight."""
    value = layer.weight.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else 2


def constant_root(node: fx.Node) -> fx.Node | None:
    """The get_attr node a constant weight is computed from, or None when the value depends on the input."""
    if node.op == "get_attr":
        return node
    roots = [constant_root(value) for value in node.all_input_nodes] if node.op == "call_function" else []
    return None if None in roots else next(iter(roots), None)


def _layer_name(node: fx.Node, target: str) -> str:
    """The module's path when a module owns the weight, else the parameter's own path."""
    owner = target.rpartition(".")[0] if "." in target else target
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return owner
    path, kind = stack[-1]
    path = path.removeprefix("L['self'].")
    leaf = str(kind).rpartition(".")[2]
    return path if path and (path == owner or any(word in leaf for word in ("Linear", "Conv", "Embedding"))) else owner


def _argument(node: fx.Node, index: int, default: int) -> int:
    value = node.args[index] if len(node.args) > index else default
    assert isinstance(value, int)
    return value


def _node(value: object) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def get_tensor(graph: fx.GraphModule, node: fx.Node) -> Tensor:
    """The constant a get_attr node reads."""
    owner: object = graph
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    assert isinstance(owner, Tensor)
    return owner.detach()


def value_of(graph: fx.GraphModule, node: fx.Node, given: Mapping[fx.Node, Tensor] | None = None) -> Tensor:
    """The value of a node that depends on constants, and on nodes whose values are given, alone."""
    if given is not None and node in given:
        return given[node]
    if node.op == "get_attr":
        return get_tensor(graph, node)
    args = [value_of(graph, arg, given) if isinstance(arg, fx.Node) else arg for arg in node.args]
    assert callable(node.target)
    value: Tensor = node.target(*args, **node.kwargs)
    release(arg for arg in args if isinstance(arg, Tensor))
    return value


def add_tensor(graph: fx.GraphModule, name: str, value: Tensor, before: fx.Node) -> fx.Node:
    """Register `value` as a buffer near `name` (made unique) and return a new get_attr node in front of `before`."""
    path, _, leaf = name.rpartition(".")
    owner: nn.Module = graph
    parts: list[str] = []
    for part in path.split(".") if path else []:
        while not isinstance(getattr(owner, part, nn.Module()), nn.Module):
            part += "_"  # taken by a parameter that gave its layer this name
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
        parts.append(part)
    unique, count = leaf, 1
    while hasattr(owner, unique):
        count += 1
        unique = f"{leaf}_{count}"
    owner.register_buffer(unique, value.detach().contiguous())
    with graph.graph.inserting_before(before):
        node = graph.graph.get_attr(".".join([*parts, unique]))
    node.meta["val"] = value
    return node


def weight_of(graph: fx.GraphModule, layer: Layer) -> Tensor:
    """The layer's float weight as stored; the layer must not be quantized yet."""
    return get_tensor(graph, layer.weight)


def bias_of(graph: fx.GraphModule, layer: Layer) -> Tensor | None:
    """The layer's bias [out], if it has one."""
    return None if layer.bias is None else get_tensor(graph, layer.bias)


def set_weight(graph: fx.GraphModule, layer: Layer, value: Tensor) -> None:
    """Give the layer a new float weight of its own."""
    node = add_tensor(graph, f"{slot(layer)}.weight", value, layer.node)
    set_argument(layer.node, layer.weight_arg, node)


def set_bias(graph: fx.GraphModule, layer: Layer, value: Tensor) -> None:
    """Give the layer a new bias [out] of its own, whether or not it had one; mm and matmul cannot take one."""
    if layer.bias_arg is None:
        raise ValueError(f"{layer.name} ({layer.node.target}) has no bias argument")
    node = add_tensor(graph, f"{slot(layer)}.bias", value, layer.node)
    set_argument(layer.node, layer.bias_arg, node)


def give_bias(graph: fx.GraphModule, layer: Layer, value: Tensor) -> Layer:
    """set_bias for any layer: an mm or a matmul of rank 2 becomes an addmm. Returns the layer as it is now.

    Raises ValueError for a matmul of higher rank, which has no form with a bias.
    """
    if layer.bias_arg is None and can_take_bias(layer):
        node = layer.node
        node.target, node.args = aten.addmm.default, (None, *node.args)
        layer = dataclasses.replace(layer, input_arg=1, weight_arg=2, bias_arg=0)
    set_bias(graph, layer, value)
    return layer


def can_take_bias(layer: Layer) -> bool:
    """True when give_bias works on the layer."""
    if layer.bias_arg is not None or layer.kind != "linear":
        return layer.bias_arg is not None
    value = layer.node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 2


def slot(layer: Layer) -> str:
    """The path under which the layer's new tensors are registered."""
    return layer.name.replace("@", "_")


def set_argument(node: fx.Node, index: int, value: fx.Node) -> None:
    """Replace positional argument `index`, extending the arguments when it was left out."""
    args = list(node.args) + [None] * (index + 1 - len(node.args))
    args[index] = value
    node.args = tuple(args)


def single_user(node: fx.Node) -> fx.Node | None:
    """The only node that uses this one's value, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def call_before(graph: fx.GraphModule, before: fx.Node, target: object, args: tuple[object, ...]) -> fx.Node:
    """Insert a call_function node in front of `before`; it inherits the module path of `before`."""
    with graph.graph.inserting_before(before):
        node = graph.graph.call_function(target, args)  # type: ignore[arg-type]  # fx types targets as plain callables
    if "nn_module_stack" in before.meta:
        node.meta["nn_module_stack"] = before.meta["nn_module_stack"]
    return node


def inputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    """The placeholders in order."""
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def outputs_of(graph: fx.GraphModule) -> list[fx.Node]:
    """The nodes the graph returns, in order."""
    output = next(node for node in reversed(graph.graph.nodes) if node.op == "output")
    return [_node(value) for value in output.args[0]]


def tidy(graph: fx.GraphModule) -> None:
    """Erase nodes nobody uses, drop tensors no node reads, check the graph and compile it."""
    graph.graph.eliminate_dead_code()
    used = {str(node.target) for node in graph.graph.nodes if node.op in ("get_attr", "call_module")}
    for path, module in list(graph.named_modules()):
        for name, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = f"{path}.{name}" if path else name
            if full not in used and not any(full.startswith(f"{target}.") for target in used):
                delattr(module, name)
    graph.graph.lint()
    graph.recompile()


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A graph of its own with the same node names that shares every tensor with `graph`."""
    nodes = fx.Graph()
    nodes.output(nodes.graph_copy(graph.graph, {}))
    return fx.GraphModule(graph, nodes)
