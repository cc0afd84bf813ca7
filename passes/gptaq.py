"""GPTQ with quantized activations: activations first, then the weights on what the quantized network feeds each layer.

    1. act-quant puts fake-quant nodes on the float network, unless the graph has some already, or act_bits is 0;
    2. gptq walks the layers. H = X^T X / n is that of the inputs as they arrive: rounded by the fake-quant node in
       front of the layer, and changed by every weight and activation quantized before it. With `asymmetric`, what it
       rounds is not the layer's weight but the one that best yields the float network's output from those inputs;
    3. `activations=reoptimize` re-fits the activation ranges to the weights as they are by then.

So a layer's weights make up for each other, and for what was lost in front of them, on the numbers that the integer
kernel will multiply them by.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

from torch import Tensor

from passes import gptq
from passes.act_quant import ActQuant
from passes.affine_grid import fit_grid
from passes.asymmetric import shifted_weight
from passes.base import PassError, PassResult, Program
from passes.eigen_scale import eigen_adjusted
from passes.gptq import GPTQ
from passes.graph import Layer
from passes.ops import FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC
from passes.ranks import Ranks
from passes.refit_ranges import refit_ranges
from passes.walk import Walk
from passes.weights import AffineWeight

Activations = Literal["static", "rtn", "token", "reoptimize", "output"]


@dataclasses.dataclass(frozen=True)
class GPTAQ(GPTQ):
    """Options of GPTQ, and of the activations.

    act_bits     8 or 4; 0: activations stay float, and the asymmetric term makes up for the weights rounded before
    activations  static: one range a tensor, of the least squared error on calibration data; rtn: one from the smallest
                 value to the largest; reoptimize: static, re-fitted after the weights by the output error of layers,
                 see passes.refit_ranges; token: each row's own range at run time; output: as static, errors counted by
                 what they cost at the network's outputs
    asymmetric   aim at the float network's layer outputs; see passes.asymmetric
    alpha        how far, from 0 (not at all) to 1
    ridge        how firmly that aim is held to the float weight, as a fraction of the Hessian's mean diagonal
    refine       as in gptq; its ten rounds lower layers' errors by 0.3 to 1 % more, and bring networks nothing
    eig          adjust the weights' scales by the Hessian's eigenvalues; see passes.eigen_scale, which says why not to
    """

    bits: int = 8
    act_bits: int = 8
    group_size: int = -1
    refine: int = 2
    activations: Activations = "static"
    asymmetric: bool = True
    alpha: float = 1.0
    ridge: float = 0.3
    eig: bool = False

    name: ClassVar[str] = "gptaq"
    summary: ClassVar[str] = "activations quantized, then gptq on what the quantized network feeds each layer"
    paper: ClassVar[str] = "arXiv 2504.02692"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations not in get_args(Activations):
            raise PassError(
                f"{self.name}: activations={self.activations} is no kind", fix=f"use {', '.join(get_args(Activations))}"
            )
        if self.act_bits == 0 and self.activations != "static":
            raise PassError(
                f"{self.name}: act_bits=0 leaves the activations of activations={self.activations} in float",
                fix="leave one of the two out",
            )
        if not 0 <= self.alpha <= 1:
            raise PassError(f"{self.name}: alpha={self.alpha} is not between 0 and 1", fix="use alpha=1")
        if self.ridge < 0:
            raise PassError(f"{self.name}: ridge={self.ridge} is negative", fix="use ridge=0.3")

    def requires(self, program: Program) -> None:
        """What act-quant and gptq require."""
        super().requires(program)
        if self.act_bits and not _has_fake_quant(program):
            self._act_quant.requires(program)

    def run(self, program: Program) -> PassResult:
        """Quantize the activations, if nothing has, then the weights; re-fit the activations' ranges if asked to."""
        results = []
        if self.act_bits and not _has_fake_quant(program):
            results.append(self._act_quant.run(program))
        results.append(super().run(program))
        measured = {name: value for result in results for name, value in result.measured.items()}
        if self.activations == "reoptimize":
            measured["refitted_ranges"] = float(len(refit_ranges(program)))
        return PassResult(
            changed=tuple(name for result in results for name in result.changed),
            skipped=tuple(dict.fromkeys(skip for result in results for skip in result.skipped)),  # both name some
            measured=measured,
        )

    def quantize_layer(self, matrix: Tensor, layer: Layer, walk: Walk) -> AffineWeight:
        """quantize_weight with these options, on the layer's moments."""
        hessian = walk.hessian(layer)
        cross = walk.cross(layer) if self.asymmetric else None
        return quantize_weight(matrix, hessian, self, cross=cross, ranks=walk.ranks)

    @property
    def _act_quant(self) -> ActQuant:
        match self.activations:
            case "token":
                return ActQuant(bits=self.act_bits, mode="token")
            case "rtn":
                return ActQuant(bits=self.act_bits, method="minmax")
            case "output":
                return ActQuant(bits=self.act_bits, method="output")
            case _:
                return ActQuant(bits=self.act_bits)


def quantize_weight(
    weight: Tensor, hessian: Tensor, options: GPTAQ, cross: Tensor | None = None, ranks: Ranks | None = None
) -> AffineWeight:
    """Quantize `weight` [out, in] to act on inputs Xq as it did on X.

    hessian  Xq^T Xq / n, [in, in] or [groups, in, in]
    cross    X^T Xq / n, shaped as `hessian`; without it, this is gptq.quantize_weight
    ranks    share the outputs, as there

    Raises PassError as gptq.quantize_weight does.
    """
    if cross is not None and options.asymmetric:
        weight = shifted_weight(weight, hessian, cross, ridge=options.ridge, alpha=options.alpha)
    if not options.eig:
        return gptq.quantize_weight(weight, hessian, options, ranks=ranks)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).view(-1, hessian.shape[-1])  # [groups, in]
    importance = diagonal.repeat_interleave(len(weight) // len(diagonal), dim=0)
    grid = fit_grid(weight, options.bits, options.group_size, options.symmetric, options.scale_search, importance)
    return gptq.quantize_weight(weight, hessian, options, eigen_adjusted(grid, hessian))


def _has_fake_quant(program: Program) -> bool:
    return any(node.target in (FAKE_QUANTIZE, FAKE_QUANTIZE_DYNAMIC) for node in program.graph.graph.nodes)
