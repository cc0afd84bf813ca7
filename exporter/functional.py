"""A captured graph as pure data flow: regions inlined, every in-place operator a new value.

Passes put nodes behind a value and expect its readers to read that value, so a graph must not write into memory that
others read. An in-place operator on y becomes y' = op(y), and whoever reads y later reads y'. Where y shares memory
with other values (views), those are brought up to date too:

    v = view(y);  y.op_()            ->  y' = op(y),  v' = view(y')
    v = y[:, i];  v.op_()            ->  v' = op(v),  y' = select_scatter(y, v', 1, i)

A write through any other view that is seen elsewhere is refused.
"""

import operator

import torch
from torch import fx
from torch._ops import OpOverload

from exporter.errors import InputError
from passes.graph import aten

SCATTERS = {aten.select.int: aten.select_scatter.default, aten.slice.Tensor: aten.slice_scatter.default}
"""{view: the operator that writes a new value of the view into its base}; both take the view's own arguments."""

SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
AUTOCAST = torch.ops.higher_order.wrap_with_autocast


def inline_regions(module: fx.GraphModule) -> None:
    """Replace regions under no_grad or autocast by their nodes: the one changes nothing, the other the types alone."""
    for node in list(module.graph.nodes):
        if node.target is SET_GRAD:
            region, arguments = node.args[1], node.args[2:]
        elif node.target is AUTOCAST:
            region, arguments = node.args[4], node.args[5:]
        else:
            continue
        inner = getattr(module, region.target)
        inline_regions(inner)
        inputs = [found for found in inner.graph.nodes if found.op == "placeholder"]
        with module.graph.inserting_before(node):
            results = module.graph.graph_copy(inner.graph, dict(zip(inputs, arguments, strict=True)))
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]  # a tuple, its readers are getitems
            module.graph.erase_node(user)
        module.graph.erase_node(node)


def make_functional(graph: fx.Graph) -> None:
    """Turn every in-place operator into its functional form. Raises InputError for one that has none."""
    for node in list(graph.nodes):
        if isinstance(node.target, OpOverload) and node.target._schema.is_mutable:
            written = node.args[0] if node.args else None
            functional = functional_form(node.target)
            if functional is None or not isinstance(written, fx.Node):
                raise InputError(
                    f"the model changes tensors in place with {node.target}, which has no functional form here",
                    where=node.name,
                    fix="write that line of the model without changing a tensor in place",
                )
            stale = shared_and_read_later(written, node)
            node.target = functional
            bring_up_to_date(graph, written, node, stale)


def functional_form(target: OpOverload) -> OpOverload | None:
    """aten.relu.default for aten.relu_.default: the same arguments, a new value."""
    packet = getattr(aten, target._schema.name.removeprefix("aten::").removesuffix("_"), None)
    found = getattr(packet, target._overloadname, None)
    if found is None or found._schema.is_mutable:
        return None
    same = [argument.name for argument in found._schema.arguments] == [a.name for a in target._schema.arguments]
    return found if same else None


def viewed(node: fx.Node) -> fx.Node | None:
    """The node whose memory this one's value shares, if it is a view."""
    if node.target is operator.getitem:  # one of several views, or of several values that share nothing
        several = node.all_input_nodes[0]
        return several if viewed(several) is not None else None
    if not isinstance(node.target, OpOverload) or not any(value.alias_info for value in node.target._schema.returns):
        return None
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    return None


def views_of(node: fx.Node) -> list[fx.Node]:
    """Everything that shares memory with the node, itself included, bases before their views."""
    root = node
    while (base := viewed(root)) is not None:
        root = base
    found = [root]
    for value in found:
        found += [user for user in value.users if viewed(user) is value]
    return found


def shared_and_read_later(written: fx.Node, node: fx.Node) -> list[fx.Node]:
    """Values other than `written` that change with it when `node` runs and are read after that, or lead to such."""
    shared = [value for value in views_of(written) if value is not written and value < node]
    return shared if any(user > node for value in shared for user in value.users) else []


def bring_up_to_date(graph: fx.Graph, written: fx.Node, node: fx.Node, stale: list[fx.Node]) -> None:
    """Have whoever reads `written`, or a value that shares its memory, after `node` read what it holds then."""
    later = {value: [user for user in value.users if user > node] for value in [written, *stale]}
    fresh, last, value = {written: node}, node, written
    while stale and (base := viewed(value)) is not None:
        scatter = SCATTERS.get(value.target)  # type: ignore[call-overload]  # fx types targets as plain callables
        if scatter is None:
            raise InputError(
                f"the model writes through a view ({value.target}) of a tensor that it reads elsewhere",
                where=node.name,
                fix="write that line of the model without changing a tensor in place",
            )
        with graph.inserting_after(last):
            last = graph.call_function(scatter, (base, fresh[value], *value.args[1:]))
        last.meta = dict(base.meta)
        fresh[base], value = last, base
    for view in stale:
        source = viewed(view)
        if view not in fresh and source is not None:
            with graph.inserting_after(last):
                last = graph.node_copy(view, lambda argument: fresh.get(argument, argument))
            fresh[view] = last
    for value, readers in later.items():
        for reader in readers:
            reader.replace_input_with(value, fresh[value])
