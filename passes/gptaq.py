"""GPTQ with quantized activations: activations first, then the weights on what the quantized network feeds each layer.

    1. act-quant puts fake-quant nodes on the float network, unless the graph has some already;
    2. gptq walks the layers. H = X^T X / n is that of the inputs as they arrive: rounded by the fake-quant node in
       front of the layer, and changed by every weight and activation quantized before it.

So a layer's weights make up for each other on the numbers that the integer kernel will multiply them by.
"""

import dataclasses
from typing import ClassVar, Literal

from passes.act_quant import ActQuant
from passes.base import PassError, PassResult, Program
from passes.gptq import GPTQ
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC


@dataclasses.dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Options of GPTQ, and of the activations.

    act_bits     4 or 8
    activations  static: one range a tensor, from calibration; token: each row's own range at run time
    """

    bits: int = 8
    act_bits: int = 8
    group_size: int = -1
    activations: Literal["static", "token"] = "static"

    name: ClassVar[str] = "gptaq"
    summary: ClassVar[str] = "activations quantized, then gptq on what the quantized network feeds each layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations not in ("static", "token"):
            raise PassError(f"{self.name}: activations={self.activations} is no kind", fix="use static or token")

    def requires(self, program: Program) -> None:
        """What act-quant and gptq require."""
        super().requires(program)
        if not _has_fake_quant(program):
            self._act_quant.requires(program)

    def run(self, program: Program) -> PassResult:
        """Quantize the activations, if nothing has, and then the weights."""
        if _has_fake_quant(program):
            return super().run(program)
        activations = self._act_quant.run(program)
        weights = super().run(program)
        return PassResult(
            changed=activations.changed + weights.changed,
            skipped=tuple(dict.fromkeys(activations.skipped + weights.skipped)),  # both name what the recipe skips
            measured={**activations.measured, **weights.measured},
        )

    @property
    def _act_quant(self) -> ActQuant:
        return ActQuant(bits=self.act_bits, mode=self.activations)


def _has_fake_quant(program: Program) -> bool:
    return any(node.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC) for node in program.graph.graph.nodes)
