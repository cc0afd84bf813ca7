"""What a backend is, and what it says when it cannot lower a program."""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import fx

from passes.base import Program, TargetRules
from runtimes.base import Artifact


@dataclasses.dataclass(frozen=True)
class LoweredLayer:
    """How a quantized layer is stored and executed: for the report, and to check the result against."""

    name: str
    format: str
    bits_per_weight: float
    codes: str
    """Name of the initializer that holds the packed codes."""


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


class LoweringError(Exception):
    """Everything in a program that a target cannot run, each with its reason."""

    def __init__(self, target: str, reasons: Mapping[str, str]) -> None:
        self.target, self.reasons = target, dict(reasons)
        listed = "; ".join(f"{node}: {why}" for node, why in list(reasons.items())[:4])
        more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        super().__init__(f"target {target} cannot run {listed}{more}")


class Backend(abc.ABC):
    """Lowers a program to one kind of artifact."""

    name: ClassVar[str]
    rules: ClassVar[TargetRules]

    @abc.abstractmethod
    def lower(self, program: Program, folder: Path) -> Lowered:
        """Write the artifact's files under `folder`. Raises LoweringError naming every node that cannot be lowered."""
