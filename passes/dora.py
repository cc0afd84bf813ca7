"""A quantized linear layer with a weight-decomposed low-rank adapter (DoRA, Liu et al., arXiv 2402.09353).

    V = Wq + s B A,   s = alpha / rank             y = (m / |V|) (x Wq^T + s (x A^T) B^T) + b       (eq. 5)

|V| is the norm [out] of each output's row, m a learned magnitude. For gradients |V| is a constant (section 4.3): that
saves the memory of a second full matrix, and it is why A and B see only the direction.

`notebook` is the QDoRA that this follows, whose code differs from the paper in four places, each corrected above:

    alpha       multiplies the whole output, so that any but 1 changes the base layer; here it scales the adapter
    |V|         leaves alpha out, as B A has none there; here it is the norm of what the layer multiplies by
    the bias    is not known; with a bias inside the brackets, m would scale it; here it is added last
    division    and product change the output in place, one after the other; here they are one factor for each output

so there y = (x Wq^T + (x A^T) B^T) / |Wq + B A| * (m alpha). Both take |V| as a constant, and both start with B = 0 and
m = |Wq|, which leaves the quantized layer as it is.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passes.weights import QuantWeight


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What is learned for a layer [out, in].

    lora_a     A, [rank, in]
    lora_b     B, [out, rank]
    magnitude  m, [out]
    alpha      the adapter is scaled by alpha / rank, or, with `notebook`, the whole output by alpha
    """

    lora_a: Tensor
    lora_b: Tensor
    magnitude: Tensor
    alpha: float
    notebook: bool = False

    @property
    def rank(self) -> int:
        """Rows of A."""
        return len(self.lora_a)

    @property
    def scaling(self) -> float:
        """s."""
        return 1.0 if self.notebook else self.alpha / self.rank

    def cpu(self) -> "Adapter":
        """The same on the CPU, where a program keeps it."""
        return dataclasses.replace(
            self, lora_a=self.lora_a.cpu(), lora_b=self.lora_b.cpu(), magnitude=self.magnitude.cpu()
        )

    def norms(self, base: Tensor) -> Tensor:
        """|V|, [out], of the base matrix [out, in]; a row of zeros has the norm 1, as any will do."""
        norms = torch.addmm(base, self.lora_b, self.lora_a, alpha=self.scaling).norm(dim=1)
        return torch.where(norms > 0, norms, 1.0)

    def row_factor(self, base: Tensor) -> Tensor:
        """What the output's columns [out] are multiplied by."""
        return self.magnitude / self.norms(base).detach() * (self.alpha if self.notebook else 1.0)

    def weight(self, base: Tensor) -> Tensor:
        """The matrix [out, in] of the layer with its adapter."""
        direction = torch.addmm(base, self.lora_b, self.lora_a, alpha=self.scaling)
        return self.row_factor(base)[:, None] * direction


class DoRALinear(nn.Module):
    """A linear layer on a quantized base; lora_a, lora_b and magnitude are its parameters."""

    def __init__(self, base: QuantWeight, adapter: Adapter, bias: Tensor | None = None) -> None:
        super().__init__()
        self.base = base
        self.alpha, self.notebook = adapter.alpha, adapter.notebook
        self.lora_a = nn.Parameter(adapter.lora_a.clone())  # [rank, in]
        self.lora_b = nn.Parameter(adapter.lora_b.clone())  # [out, rank]
        self.magnitude = nn.Parameter(adapter.magnitude.clone())  # [out]
        self.register_buffer("weight", base.dequantize(), persistent=False)  # [out, in]
        self.bias: Tensor | None
        self.register_buffer("bias", bias)

    def adapter(self) -> Adapter:
        """The parameters as they are now."""
        return Adapter(self.lora_a, self.lora_b, self.magnitude, self.alpha, self.notebook)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        adapter = self.adapter()
        base = self.get_buffer("weight")
        y = F.linear(x, base) + adapter.scaling * F.linear(F.linear(x, self.lora_a), self.lora_b)
        y = y * adapter.row_factor(base)
        return y if self.bias is None else y + self.bias


def untrained(base: Tensor, rank: int, alpha: float, generator: torch.Generator, *, notebook: bool = False) -> Adapter:
    """The notebook's start on a base matrix [out, in]: A normal with variance 1 / rank, B zero, m = |Wq|."""
    outputs, inputs = base.shape
    lora_a = torch.randn(rank, inputs, generator=generator) / rank**0.5
    return Adapter(lora_a, torch.zeros(outputs, rank), base.norm(dim=1), alpha, notebook)


def fitted(
    base: Tensor,
    target: Tensor,
    hessian: Tensor,
    rank: int,
    alpha: float,
    damp: float,
    outer: Tensor | None = None,
    outer_damp: float = 0.1,
) -> Adapter:
    """An adapter of small error tr(G D H D^T), D = target - M V, M a factor for each row, in closed form.

    With G = R R^T and H = L L^T (damped), B A is the best approximation of rank `rank` to E = target - base in the norm
    |R^T E L|: R^T E L = U S Z^T, B = R^-T U_r S_r^1/2, A = S_r^1/2 Z_r^T L^-1. Without `outer` G is the identity, which
    is QERA (Zhang et al., arXiv 2410.06040). Then M is the gain of each row that has the least error in H alone.

    base, target [out, in]; hessian [in, in] = X^T X / n; outer [out, out], see passes.output_moments. damp and
    outer_damp are added to their diagonals, as fractions of the means. Ranks past that of E hold zeros.
    """
    damped = _damped(hessian.double(), damp)
    lower = torch.linalg.cholesky(damped)
    scaled = (target - base).double() @ lower
    root = None if outer is None else torch.linalg.cholesky(_damped(outer.double(), outer_damp))
    if root is not None:
        scaled = root.mT @ scaled
    left, values, right = torch.linalg.svd(scaled, full_matrices=False)
    kept = min(rank, len(values))
    left = left[:, :kept]
    if root is not None:
        left = torch.linalg.solve_triangular(root.mT, left, upper=True)
    size = values[:kept].sqrt()
    lora_b = base.new_zeros(len(base), rank)
    lora_a = base.new_zeros(rank, base.shape[1])
    lora_b[:, :kept] = (left * size) * (rank / alpha)
    lora_a[:kept] = torch.linalg.solve_triangular(lower, size[:, None] * right[:kept], upper=False, left=False)
    adapter = Adapter(lora_a, lora_b, base.new_ones(len(base)), alpha)
    direction = torch.addmm(base, lora_b, lora_a, alpha=adapter.scaling).double()
    seen = direction @ damped
    energy = (seen * direction).sum(1)
    gain = torch.where(energy > 0, (seen * target.double()).sum(1) / energy, 1.0)
    return dataclasses.replace(adapter, magnitude=gain.to(base.dtype) * adapter.norms(base))


def _damped(moments: Tensor, damp: float) -> Tensor:
    """Moments [n, n] with their mean diagonal, times `damp`, added; what is never seen counts as much as the mean."""
    diagonal = moments.diagonal()
    mean = diagonal.mean() if bool(diagonal.any()) else diagonal.new_ones(())
    return moments + torch.diag(torch.where(diagonal > 0, damp * mean, mean))
