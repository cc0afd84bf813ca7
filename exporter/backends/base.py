"""What a backend is, and what it says when it cannot lower a program."""

import abc
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from exporter.lowering.lowered import Lowered
from passes.base import Program, TargetRules


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
