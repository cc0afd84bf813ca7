"""What the inputs of a model take, and whether arrays fit them."""

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from exporter.errors import InputError
from exporter.options import nearest
from passes.graph import aten, get_tensor, inputs_of

FLAG = "--calib"
KEPT_INDICES = frozenset(
    {aten.to.dtype, aten._to_copy.default, aten.view.default, aten.reshape.default, aten.slice.Tensor}
)
"""What may stand between an input and the embedding it indexes."""


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An input of the model: sizes that are None are free, as is the whole shape or type."""

    name: str
    shape: tuple[int | None, ...] | None = None
    dtype: torch.dtype | None = None


def wanted_of(program: torch.export.ExportedProgram) -> tuple[Wanted, ...]:
    """The tensors that an exported program takes, by the names of its flat graph."""
    names = set(program.graph_signature.user_inputs)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    return tuple(
        Wanted(name, tuple(size if isinstance(size, int) else None for size in value.shape), value.dtype)
        for name, value in values.items()
        if name in names and isinstance(value, Tensor)
    )


def example_of(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """The example inputs that an archive carries, by the names of `wanted_of`; empty where it carries none."""
    if program.example_inputs is None:
        return {}
    leaves = torch.utils._pytree.tree_leaves(program.example_inputs)
    return {
        str(name): value.detach()
        for name, value in zip(program.graph_signature.user_inputs, leaves, strict=True)
        if isinstance(value, Tensor)
    }


def index_bounds(graph: fx.GraphModule) -> dict[str, int]:
    """{input: rows of the embedding tables that it indexes}."""
    bounds: dict[str, int] = {}
    inputs = set(inputs_of(graph))
    for node in graph.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, index = node.args[0], node.args[1]
        while index.target in KEPT_INDICES:
            index = index.args[0]
        if index in inputs and table.op == "get_attr":
            name, rows = str(index.target), get_tensor(graph, table).shape[0]
            bounds[name] = min(rows, bounds.get(name, rows))
    return bounds


def fit(values: Mapping[str, Tensor], wanted: Sequence[Wanted] | None, source: str) -> dict[str, Tensor]:
    """The arrays in the order and types of `wanted` (None: as they are), if they fit; axis 0 counts samples.

    A float is converted to another float, an integer to another integer that holds its values.
    Raises InputError for wrong names, no samples, unequal numbers of samples, wrong shapes or types, NaN and infinity.
    """
    where = f"{FLAG} {source}"
    if wanted is None:
        wanted = [Wanted(name) for name in values]
    known = [want.name for want in wanted]
    if unknown := [name for name in values if name not in known]:
        raise InputError(f"the model has no input {unknown[0]!r}", where=where, fix=nearest(unknown[0], known))
    if missing := [name for name in known if name not in values]:
        raise InputError(f"nothing for input {missing[0]!r}", where=where, fix=f"the model takes {', '.join(known)}")
    if not wanted:
        raise InputError("holds no arrays", where=where)
    for name, value in values.items():
        if not value.ndim:
            raise InputError(f"{name} is a single number: axis 0 must count samples", where=where)
        if not value.shape[0]:
            raise InputError(f"{name} has no samples", where=where, fix="give at least one")
    counts = {name: len(value) for name, value in values.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"the inputs have different numbers of samples: {listed}", where=where)
    return {want.name: _fit(values[want.name], want, where) for want in wanted}


def _fit(value: Tensor, want: Wanted, where: str) -> Tensor:
    shape = want.shape
    if shape is not None and (
        value.ndim != len(shape)
        or any(size not in (None, given) for size, given in zip(shape[1:], value.shape[1:], strict=True))
    ):
        takes = ", ".join(["samples", *("any" if size is None else str(size) for size in shape[1:])])
        raise InputError(f"{want.name} has shape {list(value.shape)}, the model takes [{takes}]", where=where)
    if value.numel() == 0:
        raise InputError(f"{want.name} has shape {list(value.shape)}: its samples are empty", where=where)
    _check_finite(value, want.name, where)
    if want.dtype is None or want.dtype == value.dtype:
        return value
    converted = value.to(want.dtype) if _kind(value.dtype) == _kind(want.dtype) else None
    if converted is None:
        given, takes = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, want.dtype))
        raise InputError(f"{want.name} is {given}, the model takes {takes}", where=where, fix="convert it")
    if not value.is_floating_point() and not torch.equal(converted.to(value.dtype), value):
        raise InputError(f"{want.name} holds values beyond {str(want.dtype).removeprefix('torch.')}", where=where)
    _check_finite(converted, f"{want.name} as {str(want.dtype).removeprefix('torch.')}", where)
    return converted


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "integer"


def _check_finite(value: Tensor, name: str, where: str) -> None:
    if not value.is_floating_point():
        return
    flat = value.flatten(1) if value.ndim > 1 else value[:, None]
    faulty = ~torch.isfinite(flat).all(dim=1)
    if bool(faulty.any()):
        kind = "NaN" if bool(torch.isnan(flat).any()) else "infinity"
        first, total = int(faulty.nonzero()[0]), int(faulty.sum())
        what = f"{name} holds {kind} in {total} of {len(flat)} samples, the first is sample {first}"
        raise InputError(what, where=where, fix="leave those samples out")
