"""A device that is none: its tensors are the CPU's, but no operator takes them together with tensors of the CPU.

What runs here runs on a GPU as far as devices go. It bears the name of the one device that every torch can guard.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
"""Operators that may read one device and write another."""


class There(Tensor):
    """A tensor of the pretended device; `here` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "There":
        """Metadata like that of `here`, but for the device."""
        made: There = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        made.here = here
        return made

    def __repr__(self) -> str:
        return f"There({self.here!r})"

    def tolist(self) -> Any:
        """As of any tensor: torch gives that of a subclass to no mode."""
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The mode does it."""
        raise AssertionError(f"{func} on the pretended device outside of Pretend()")


class Pretend(TorchDispatchMode):
    """While it is on, DEVICE can be used; `ran` counts the operators that worked on it."""

    def __init__(self) -> None:
        super().__init__()
        self.ran = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator on the CPU, and say where its results are."""
        kwargs = dict(kwargs or {})
        given = [value for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        there = [value for value in given if isinstance(value, There)]
        strangers = [value for value in given if not isinstance(value, There) and value.dim()]
        if there and strangers and func not in MOVES:
            raise AssertionError(f"{func} mixes devices: {[tuple(value.shape) for value in strangers]} is on the CPU")
        asked = kwargs.get("device")
        is_there = bool(there) if asked is None else torch.device(asked) == DEVICE
        if func is torch.ops.aten.copy_.default:
            is_there = isinstance(args[0], There)
        if is_there and asked is not None:
            kwargs["device"] = torch.device("cpu")
        wrappers = {id(value.here): value for value in there}
        found = func(*_map(lambda value: value.here, args, There), **_map(lambda value: value.here, kwargs, There))
        if not is_there:
            # What was made from a tensor of the device shares nothing with it.
            return _map(lambda value: value.clone() if id(value) in wrappers else value, found, Tensor)
        self.ran += 1
        return _map(lambda value: wrappers[id(value)] if id(value) in wrappers else There(value), found, Tensor)


def _map(change: Callable[[Any], Any], values: Any, kind: type) -> Any:
    return pytree.tree_map(lambda value: change(value) if isinstance(value, kind) else value, values)
