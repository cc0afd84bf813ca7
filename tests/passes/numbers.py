"""Random weights and second moments."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(size: int, rank: int, seed: int, rest: float = 0.01) -> Tensor:
    """Second moments [size, size] of `rank` directions, and a little, `rest`, of all."""
    mixing = normal(rank, size, seed=seed)
    return mixing.T @ mixing / rank + rest * torch.eye(size)
