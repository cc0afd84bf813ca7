"""The layer problem: a weight matrix and the second moments of its inputs, with the outliers of real networks.

W [size, size]: Student-t(4) entries, times a lognormal(0, 0.3) for each row, 1 % of the columns times 4, scaled to a
standard deviation of 0.02. X [4096, size]: a mixture of shared normal factors plus a private part, times a
lognormal(0, 0.5) for each channel, 1 % of the channels times 10. H = X^T X / 4096.

FEW is a mixture of size / 8 factors with a private part of a quarter of its amplitude. MANY has size / 2 and a tenth:
what a channel leaves can be made up for only while enough others are to come, so that the order counts twice as much.
"""

import dataclasses

import torch
from torch import Tensor

SAMPLES = 4096


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What inputs share.

    factors   how many, as a fraction of the channels
    private   amplitude of what they do not share
    """

    factors: float
    private: float


FEW, MANY = Mixture(1 / 8, 0.25), Mixture(1 / 2, 0.1)


@dataclasses.dataclass(frozen=True)
class LayerProblem:
    """weight [out, in], inputs [n, in] and hessian [in, in] = X^T X / n, all float32."""

    weight: Tensor
    inputs: Tensor
    hessian: Tensor

    def to(self, device: str) -> "LayerProblem":
        """The problem on a device."""
        return LayerProblem(self.weight.to(device), self.inputs.to(device), self.hessian.to(device))

    def error(self, quantized: Tensor) -> float:
        """Relative layer error tr(E H E^T) / tr(W H W^T), E = W - quantized."""
        difference, hessian = (self.weight - quantized).double(), self.hessian.double()
        weight = self.weight.double()
        return float(((difference @ hessian) * difference).sum() / ((weight @ hessian) * weight).sum())


def finished(result: Tensor) -> Tensor:
    """The result, when the device is done with it."""
    if result.is_cuda:
        torch.cuda.synchronize(result.device)
    return result


def layer_problem(size: int, seed: int = 0, mixture: Mixture = FEW) -> LayerProblem:
    """The problem of this size and seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def few() -> Tensor:
        return torch.randperm(size, generator=generator)[: max(1, size // 100)]

    # Student-t(4) is a normal over the root mean square of four others.
    weight = normal(size, size) / normal(4, size, size).square().mean(0).sqrt()
    weight *= torch.exp(0.3 * normal(size, 1))
    weight[:, few()] *= 4
    weight *= 0.02 / weight.std()

    factors = int(size * mixture.factors)
    inputs = normal(SAMPLES, factors) @ normal(factors, size) / factors**0.5
    inputs += mixture.private * normal(SAMPLES, size)
    inputs *= torch.exp(0.5 * normal(size))
    inputs[:, few()] *= 10
    hessian = inputs.T @ inputs / SAMPLES
    return LayerProblem(weight.float(), inputs.float(), hessian.float())
