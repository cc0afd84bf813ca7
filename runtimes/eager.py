"""Eager torch: runs an fx graph behind the same interface as an artifact."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from runtimes.base import Array, RuntimeFault, Session


class EagerSession(Session):
    """A graph that takes `inputs` in order and returns a flat tuple, fed and read by name as numpy arrays.

    Outputs in bfloat16, which numpy lacks, come back as float32. `release` is told the graph's tensors after each use.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        device: str = "cpu",
        release: Callable[[Iterable[Tensor]], None] = lambda tensors: None,
    ) -> None:
        self._graph, self._device, self._release = graph, device, release
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        self.check(feeds)
        tensors = [_to_tensor(feeds[name]).to(self._device) for name in self.inputs]
        try:
            with torch.no_grad():
                values = _Interpreter(self._graph, self._release).run(*tensors)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ) as error:  # what torch raises for values that do not fit
            raise RuntimeFault(f"eager torch failed: {error}") from error
        return {name: _to_array(value) for name, value in zip(self.outputs, values, strict=True)}


class _Interpreter(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, release: Callable[[Iterable[Tensor]], None]) -> None:
        super().__init__(graph)
        self._release = release

    def run_node(self, n: fx.Node) -> Any:
        inputs = [self.env[node] for node in n.all_input_nodes]  # views of the graph's tensors among them
        value = super().run_node(n)
        self._release(entry for entry in inputs if isinstance(entry, Tensor))
        return value


def _to_tensor(array: Array) -> Tensor:
    # torch warns about memory that it may not write to, such as a mapped file's.
    return torch.from_numpy(array if array.flags.writeable else np.array(array))


def _to_array(value: Tensor) -> Array:
    value = value.detach().cpu()
    array: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array
