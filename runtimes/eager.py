"""Eager torch: runs an fx graph behind the same interface as an artifact."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, fx

from runtimes.base import Array, RuntimeFault, Session


class EagerSession(Session):
    """A graph that takes `inputs` in order and returns a flat tuple, fed and read by name as numpy arrays.

    Outputs in bfloat16, which numpy lacks, come back as float32.
    """

    def __init__(
        self, graph: fx.GraphModule, inputs: Sequence[str], outputs: Sequence[str], *, device: str = "cpu"
    ) -> None:
        self._graph, self._device = graph, device
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        self.check(feeds)
        tensors = [_to_tensor(feeds[name]).to(self._device) for name in self.inputs]
        try:
            with torch.no_grad():
                values = self._graph(*tensors)
        except (
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ) as error:  # what torch raises for values that do not fit
            raise RuntimeFault(f"eager torch failed: {error}") from error
        return {name: _to_array(value) for name, value in zip(self.outputs, values, strict=True)}


def _to_tensor(array: Array) -> Tensor:
    # torch warns about memory that it may not write to, such as a mapped file's.
    return torch.from_numpy(array if array.flags.writeable else np.array(array))


def _to_array(value: Tensor) -> Array:
    value = value.detach().cpu()
    array: Array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array
