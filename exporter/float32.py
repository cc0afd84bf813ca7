"""Models in float16, bfloat16 or float64 as float32, in which passes and runtimes work.

Where a model has parameters of another type, or values of 16 bits (as under autocast), every floating-point value of
the graph becomes float32, its inputs and outputs included. float64 that a float32 model computes or takes stays.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

HALF = (torch.float16, torch.bfloat16)
OTHERS = (*HALF, torch.float64)


def other_types(program: torch.export.ExportedProgram) -> list[str]:
    """Names of the types for which a model must be converted; empty for one that stays as it is."""
    found = {value.dtype for value in program.parameters() if value.dtype in OTHERS}
    found |= {value.dtype for value in _values(program) if value.dtype in HALF}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found)


def _values(program: torch.export.ExportedProgram) -> Iterator[Tensor]:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
            yield from (value for value in pytree.tree_leaves(node.meta.get("val")) if isinstance(value, Tensor))


def as_float32(value: Any) -> Any:
    """A type or a tensor, in float32 where it was in one of OTHERS; anything else unchanged."""
    if isinstance(value, torch.dtype):
        return torch.float32 if value in OTHERS else value
    return value.to(torch.float32) if isinstance(value, Tensor) and value.dtype in OTHERS else value


def compute_in_float32(module: fx.GraphModule) -> None:
    """Convert the module's tensors, each once, the types that its graph names, and what nodes say of their values."""
    converted: dict[int, Tensor] = {}
    for owner in module.modules():
        for name, value in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            if value.dtype in OTHERS:
                new = converted.setdefault(id(value), as_float32(value.detach()))
                delattr(owner, name)
                owner.register_buffer(name, new)
    for node in module.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(as_float32, (node.args, node.kwargs))
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map(as_float32, node.meta["val"])
