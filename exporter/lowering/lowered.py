"""A lowered program: its file, and the graphs in eager torch that the file is held to."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import fx

from runtimes.base import Artifact

WeightsAs = Literal["auto", "fast", "compact"]
"""What a file's weights are stored for: the fastest kernel and a small file, the kernel alone, any runtime."""

Dtype = Literal["float32", "float16", "bfloat16"]
"""Type in which an artifact holds values between its layers."""


@dataclasses.dataclass(frozen=True)
class LoweredLayer:
    """How a quantized layer is stored and executed: for the report, and to check the result against.

    codes   name of the initializer that holds the packed codes, or the first part of them
    why     the reason for this form, where there was a choice
    """

    name: str
    format: str
    bits_per_weight: float
    codes: str
    why: str = ""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A lowered program on disk.

    graph     the graph that was written, in eager torch: the artifact's arithmetic without the runtime's own additions
    simulated graph plus what the runtime's kernels do to values on their own; `eager_quantized` in the report
    taps      {layer: name of the value in the file that holds its output}
    """

    artifact: Artifact
    graph: fx.GraphModule
    simulated: fx.GraphModule
    layers: tuple[LoweredLayer, ...]
    taps: Mapping[str, str]
