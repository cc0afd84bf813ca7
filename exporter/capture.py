"""torch.export -> a flat, undecomposed fx graph -> Program.

The graph keeps its ATen operators whole (batch norm, linear, attention), takes flat inputs by name and returns a flat
tuple. What inference does not need is dropped: dropout, dtype assertions, casts and slices that change nothing. Layers'
weights become constants (exporter.constant_weights). Parameters are cloned, because the exported program shares them
with the user's model; those mapped from a file are not. A model in another type than float32 becomes one in float32
(exporter.float32).
"""

import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from exporter.constant_weights import make_weights_constant
from exporter.errors import InputError
from exporter.float32 import as_float32, compute_in_float32, other_types
from exporter.functional import inline_regions, make_functional
from passes.base import LayerRule, Program, TargetRules
from passes.calibration import Batch, Calibration
from passes.graph import aten, copy_graph, inputs_of, tidy
from passes.memory import is_mapped

DROPOUTS = {aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default, aten.alpha_dropout.default}
ALIASES = {aten.alias.default, aten.detach.default}

Dynamic = Mapping[str, Mapping[int, str]]
"""{input: {axis: label}}: axes that stay free; axes with one label are equal."""


def export_module(module: nn.Module, inputs: Mapping[str, Tensor], dynamic: Dynamic) -> torch.export.ExportedProgram:
    """Export `module` (eval mode) called with `inputs` by keyword, keeping the `dynamic` axes free.

    Raises InputError when torch.export cannot capture the model, with its reason on one line.
    """
    shapes = {name: dict.fromkeys(dynamic.get(name, {}), torch.export.Dim.DYNAMIC) for name in inputs}
    try:
        with torch.no_grad():
            return torch.export.export(module, (), dict(inputs), dynamic_shapes=shapes or None, strict=False)
    except Exception as error:  # torch.export raises many unrelated kinds; all of them mean "not capturable as asked"
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"torch.export could not capture {type(module).__name__}: {reason}",
            where="MODEL",
            fix="check the input shapes (--input, --dynamic) and that the model runs under torch.export",
        ) from error


def flatten(program: torch.export.ExportedProgram) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """The program as a clean flat graph of its own, and the names of its outputs."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    info = module.graph._codegen.pytree_info  # type: ignore[attr-defined]  # set by torch.export's code generator
    names = output_names(info.out_spec)
    keep = outputs_kept(module)
    module.graph.set_codegen(fx.graph.CodeGen())
    output = module.graph.output_node()
    output.args = (tuple(output.args[0][index] for index in keep),)  # type: ignore[index]  # a flat list of nodes
    inline_regions(module)
    if other_types(program):
        compute_in_float32(module)
    strip(module)
    own_tensors(module)
    graph = copy_graph(module)
    make_weights_constant(graph)
    tidy(graph)
    return graph, distinct([names[index] for index in keep], {str(node.target) for node in inputs_of(graph)})


def outputs_kept(module: fx.GraphModule) -> list[int]:
    """Indices of the outputs that are tensors; numbers (sizes of the inputs, too) and None are dropped."""
    values = module.graph.output_node().args[0]
    assert isinstance(values, Sequence)
    return [
        index
        for index, value in enumerate(values)
        if isinstance(value, fx.Node) and not isinstance(value.meta.get("val"), torch.SymInt | torch.SymFloat)
    ]


def distinct(names: Sequence[str], taken: set[str]) -> tuple[str, ...]:
    """The names, with a number behind those that another value or `taken` has already."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name}_{count}" for count in itertools.count(1))
        found.append(next(new for new in itertools.chain([name], numbered) if new not in taken and new not in found))
    return tuple(found)


def output_names(spec: pytree.TreeSpec) -> list[str]:
    """A readable name for every leaf of the output: its key where it has one, else output, output_1, ..."""
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = pytree.tree_flatten_with_path(leaves)[0]
    names: list[str] = []
    for path, _ in paths:
        parts = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path]
        name = "_".join(part for part in parts if part) or "output"
        name = f"output_{name}" if name.isdigit() else name
        names.append("output" if spec.num_leaves == 1 and name == "output_0" else name)
    return names


def strip(module: fx.GraphModule) -> None:
    """Drop what does nothing at inference, and leave no in-place operator."""
    drop(module.graph, shares_memory)  # first, so that in-place operators see which values are one
    make_functional(module.graph)
    drop(module.graph, copies_only)


def drop(graph: fx.Graph, does_nothing: Callable[[fx.Node], bool]) -> None:
    """Erase nodes whose first argument may stand for them, and dtype assertions."""
    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.op == "call_function" and does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def shares_memory(node: fx.Node) -> bool:
    """True for what returns its argument itself: inactive dropout, bookkeeping, a slice of everything."""
    if node.target in DROPOUTS:
        return node.args[2] is False
    if node.target is aten.slice.Tensor:
        start, end = (node.args[2] if len(node.args) > 2 else 0), (node.args[3] if len(node.args) > 3 else sys.maxsize)
        return start in (0, None) and end in (sys.maxsize, None) and len(node.args) < 5
    return node.target in ALIASES


def copies_only(node: fx.Node) -> bool:
    """True for what returns its argument's values: copies, and casts to the same type."""
    if node.target in (aten.to.dtype, aten._to_copy.default):
        source = node.args[0]
        before = source.meta.get("val") if isinstance(source, fx.Node) else None
        after = node.meta.get("val")
        return isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype
    return node.target is aten.lift_fresh_copy.default or shares_memory(node)


def own_tensors(module: nn.Module) -> None:
    """Give the graph tensors of its own, as buffers: detached, contiguous, one for each tensor that was shared."""
    owned: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if id(tensor) not in owned:
                owned[id(tensor)] = (tensor if is_mapped(tensor) else tensor.clone()).detach().contiguous()
            delattr(owner, name)
            owner.register_buffer(name, owned[id(tensor)])


def dynamic_axes(program: torch.export.ExportedProgram, graph: fx.GraphModule) -> dict[str, dict[int, str]]:
    """The free axes of the graph's inputs; an axis 0 that all share is called batch, other axes by their symbol.

    A length that is computed from a symbol (2*s39 of an even axis) is called after the first axis that has it: x_2.
    """
    symbols: dict[str, dict[int, str]] = {}
    for node in inputs_of(graph):
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            free = {axis: str(size) for axis, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
            if free:
                symbols[str(node.target)] = free  # the node of an input called "input" has another name
    first = {axes[0] for axes in symbols.values() if 0 in axes}
    rename = {first.pop(): "batch"} if len(first) == 1 else {}
    for name, axes in symbols.items():
        for axis, label in axes.items():
            if not label.isidentifier():
                rename.setdefault(label, f"{name}_{axis}")
    return {name: {axis: rename.get(label, label) for axis, label in axes.items()} for name, axes in symbols.items()}


def capture(
    exported: torch.export.ExportedProgram,
    calibration: Calibration,
    rules: TargetRules,
    *,
    dynamic: Dynamic | None = None,
    layer_rules: Sequence[LayerRule] = (),
    seed: int = 0,
) -> Program:
    """The Program of an exported model. `dynamic` gives labels for free axes; None takes them from the export."""
    graph, names = flatten(exported)
    if other_types(exported):
        calibration = dataclasses.replace(
            calibration, batches=_in_float32(calibration.batches), holdout=_in_float32(calibration.holdout)
        )
    return Program(
        graph=graph,
        reference=copy_graph(graph),
        calibration=calibration,
        rules=rules,
        output_names=names,
        dynamic=copy.deepcopy(dict(dynamic)) if dynamic is not None else dynamic_axes(exported, graph),
        layer_rules=tuple(layer_rules),
        seed=seed,
    )


def _in_float32(batches: Sequence[Batch]) -> tuple[Batch, ...]:
    return tuple({name: as_float32(value) for name, value in batch.items()} for batch in batches)
