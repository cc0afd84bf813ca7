"""Asymmetric calibration: a layer's weights are aimed at what the float network computes, from quantized inputs.

Li et al., arXiv 2504.02692 (GPTAQ). Rows of X [n, in] are a layer's inputs in the float network, rows of Xq its inputs
as the quantized network delivers them. With H = Xq^T Xq / n, C = X^T Xq / n, and a ridge d that holds Wq to W,

    ||X W^T - Xq Wq^T||^2 / n + d ||W - Wq||^2  =  tr((W* - Wq) (H + d I) (W* - Wq)^T) + const,
    W* = W + W (C - H) (H + d I)^-1.

So the problem is GPTQ's, with W* in the place of W: whatever rounds a weight under a Hessian may round W* instead.
`alpha` goes part of the way, W + alpha (W* - W): 0 is GPTQ, 1 the least error on the calibration data.

The paper goes column by column and lets the error of input i be made up for by the columns behind i only (the strictly
upper part of (C - H) U^T, H^-1 = U^T U). Solving first lets every column make up for every input, its own included,
and fits the grids to the weights that are rounded in the end. It fits the calibration data better, and so needs
holding: the noise of rounded activations shrinks W* as it does any regression.
"""

import torch
from torch import Tensor

from passes.base import PassError
from passes.threads import single_thread

MAX_RIDGE = 10.0
"""A ridge, as a fraction of the mean diagonal, past which nothing is left to solve."""


def shifted_weight(weight: Tensor, hessian: Tensor, cross: Tensor, *, ridge: float, alpha: float = 1.0) -> Tensor:
    """W + alpha (W* - W), [out, in], in the weight's dtype.

    hessian  Xq^T Xq / n, [in, in], or [groups, in, in] for a grouped convolution, whose rows fall into equal runs
    cross    X^T Xq / n, shaped as `hessian`
    ridge    d, as a fraction of the Hessian's mean diagonal; raised tenfold until the Hessian factorizes

    Raises PassError when a moment is not finite, or the Hessian not positive definite even when damped.
    """
    with single_thread():
        hessians = hessian.float().view(-1, *hessian.shape[-2:])  # [groups, in, in]
        change = cross.float().view_as(hessians) - hessians  # [groups, in, in]
        if not torch.isfinite(change).all():
            raise PassError("its inputs are not finite on the calibration data", fix="check the calibration data")
        grouped = weight.float().unflatten(0, (len(hessians), -1))  # [groups, out / groups, in]
        shift = torch.cholesky_solve((grouped @ change).mT, _damped_factor(hessians, ridge)).mT
        shifted: Tensor = grouped.add(shift, alpha=alpha).flatten(0, 1).to(weight.dtype)
        return shifted


def _damped_factor(hessians: Tensor, ridge: float) -> Tensor:
    """Lower Cholesky factors of the Hessians [groups, in, in], damped; dead inputs get the mean diagonal."""
    diagonal = hessians.diagonal(dim1=-2, dim2=-1)
    alive = (diagonal > 0).sum(-1).clamp_min(1)
    mean = diagonal.sum(-1) / alive
    mean = torch.where(mean > 0, mean, 1.0)[:, None]  # [groups, 1]
    factor: Tensor
    while True:
        damped = hessians.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(torch.where(diagonal > 0, ridge * mean, mean))
        factor, info = torch.linalg.cholesky_ex(damped)
        # A pivot at the level of rounding noise divides what follows by noise.
        pivots = factor.diagonal(dim1=-2, dim2=-1).square()
        if not info.any() and (pivots > torch.finfo(torch.float32).eps * mean).all():
            return factor
        ridge = max(10 * ridge, 1e-4)
        if ridge > MAX_RIDGE:
            raise PassError(
                "its Hessian is not positive definite, even strongly damped",
                fix="use more calibration samples, or gptaq:asymmetric=false",
            )
