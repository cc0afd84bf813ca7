"""GPTQ with quantized activations: activations first, then the weights on what the quantized network feeds each layer.

    1. act-quant puts fake-quant nodes on the float network, unless the graph has some already;
    2. gptq walks the layers. H = X^T X / n is that of the inputs as they arrive: rounded by the fake-quant node in
       front of the layer, and changed by every weight and activation quantized before it. With `asymmetric`, what it
       rounds is not the layer's weight but the one that best yields the float network's output from those inputs.

So a layer's weights make up for each other, and for what was lost in front of them, on the numbers that the integer
kernel will multiply them by.
"""

import dataclasses
from typing import ClassVar, Literal

from torch import Tensor

from passes import gptq
from passes.act_quant import ActQuant
from passes.asymmetric import shifted_weight
from passes.base import PassError, PassResult, Program
from passes.gptq import GPTQ
from passes.graph import Layer
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.weight_pass import Walk
from passes.weights import AffineWeight


@dataclasses.dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Options of GPTQ, and of the activations.

    act_bits     4 or 8
    activations  static: one range a tensor, from calibration; token: each row's own range at run time
    asymmetric   aim at the float network's layer outputs; see passes.asymmetric
    alpha        how far, from 0 (not at all) to 1
    ridge        how firmly that aim is held to the float weight, as a fraction of the Hessian's mean diagonal
    """

    bits: int = 8
    act_bits: int = 8
    group_size: int = -1
    activations: Literal["static", "token"] = "static"
    asymmetric: bool = True
    alpha: float = 1.0
    ridge: float = 0.1

    name: ClassVar[str] = "gptaq"
    summary: ClassVar[str] = "activations quantized, then gptq on what the quantized network feeds each layer"
    paper: ClassVar[str] = "arXiv 2504.02692"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations not in ("static", "token"):
            raise PassError(f"{self.name}: activations={self.activations} is no kind", fix="use static or token")
        if not 0 <= self.alpha <= 1:
            raise PassError(f"{self.name}: alpha={self.alpha} is not between 0 and 1", fix="use alpha=1")
        if self.ridge < 0:
            raise PassError(f"{self.name}: ridge={self.ridge} is negative", fix="use ridge=0.1")

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

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> AffineWeight:
        """quantize_weight with these options, on the layer's moments."""
        hessian = walk.hessian(layer)
        return quantize_weight(matrix, hessian, self, cross=walk.cross(layer) if self.asymmetric else None)

    @property
    def _act_quant(self) -> ActQuant:
        return ActQuant(bits=self.act_bits, mode=self.activations)


def quantize_weight(weight: Tensor, hessian: Tensor, options: GPTAQ, cross: Tensor | None = None) -> AffineWeight:
    """Quantize `weight` [out, in] to act on inputs Xq as it did on X.

    hessian  Xq^T Xq / n, [in, in] or [groups, in, in]
    cross    X^T Xq / n, shaped as `hessian`; without it, this is gptq.quantize_weight

    Raises PassError as gptq.quantize_weight does.
    """
    if cross is not None and options.asymmetric:
        weight = shifted_weight(weight, hessian, cross, ridge=options.ridge, alpha=options.alpha)
    return gptq.quantize_weight(weight, hessian, options)


def _has_fake_quant(program: Program) -> bool:
    return any(node.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC) for node in program.graph.graph.nodes)
