"""Several processes on one program (torchrun): who takes which part, and sums that do not depend on how many there are.

Calibration batches fall into SHARDS runs, whatever the number of ranks; a rank takes a run of shards. What the shards
add up to is added in one fixed binary tree,

    ((s0 + s1) + (s2 + s3)) + ((s4 + s5) + (s6 + s7)),

of which a rank computes the parts it can, so that one process and several come to the same bits. A shard's
sum is float64; finished ones wait, and are added, as float32: they are large, and made of float32 products. The outputs
of a layer are divided in units that one process, too, works on one at a time.
"""

import dataclasses
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor

SHARDS = 8
CPU = torch.device("cpu")

T = TypeVar("T")
Place = TypeVar("Place")


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process and the others; by default there are no others. `device` is where this one computes."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @property
    def is_first(self) -> bool:
        """True for the rank that reads and writes what all share."""
        return self.rank == 0

    def batches(self, count: int) -> range:
        """Which of `count` batches are this rank's."""
        first, last = (self._shards.start, self._shards.stop)
        mine = [index for index in range(count) if first <= shard_of(index, count) < last]
        return range(mine[0], mine[-1] + 1) if mine else range(0)

    def units(self, count: int) -> range:
        """Which of `count` units of work are this rank's."""
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.world == 1:
            return [value]
        found: list[T] = [value] * self.world
        torch.distributed.all_gather_object(found, value)
        return found

    def together(self, tensors: dict[Place, Tensor]) -> dict[Place, Tensor]:
        """Every rank's tensors under their places, no two of which are the same; all on this one's device."""
        if self.world == 1:
            return tensors
        found = {}
        shapes = {place: (tuple(tensor.shape), tensor.dtype) for place, tensor in tensors.items()}
        for rank, theirs in enumerate(self.gather(shapes)):
            for place, (shape, dtype) in theirs.items():
                mine = rank == self.rank
                found[place] = tensors[place] if mine else torch.empty(shape, dtype=dtype, device=self.device)
                torch.distributed.broadcast(found[place], src=rank)
        return found

    def from_first(self, value: T) -> T:
        """The value of rank 0."""
        if self.world == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    @property
    def _shards(self) -> range:
        return range(self.rank * SHARDS // self.world, (self.rank + 1) * SHARDS // self.world)


def shard_of(index: int, count: int) -> int:
    """The shard of batch `index` of `count`."""
    return index * SHARDS // count


class ShardSum:
    """A sum over batches in the fixed tree; batches are added in their order."""

    def __init__(self, ranks: Ranks, count: int) -> None:
        self._ranks, self._count = ranks, count
        self._mine = ranks._shards
        self._nodes: dict[tuple[int, int], Tensor] = {}  # {(level, index): sum of shards index << level and on}
        self._leaf: Tensor | None = None  # of the shard under way
        self._shard = self._mine.start

    def add(self, index: int, value: Tensor) -> None:
        """Take in what batch `index` adds."""
        self._finish(shard_of(index, self._count))
        self._leaf = value.double() if self._leaf is None else self._leaf.add_(value)

    def total(self) -> Tensor | None:
        """The sum over all ranks; None when nobody had anything to add."""
        self._finish(self._mine.stop)
        self._nodes = self._ranks.together(self._nodes)
        return self._sum(SHARDS.bit_length() - 1, 0)

    def _finish(self, shard: int) -> None:
        """All shards in front of `shard` are complete: join them with their siblings that are."""
        while self._shard < shard:
            level, index = 0, self._shard
            if self._leaf is not None:
                self._nodes[level, index], self._leaf = self._leaf.float(), None
            while index % 2 and (index - 1) << level >= self._mine.start:
                joined = _joined(self._nodes.pop((level, index - 1), None), self._nodes.pop((level, index), None))
                level, index = level + 1, index // 2
                if joined is not None:
                    self._nodes[level, index] = joined
            self._shard += 1

    def _sum(self, level: int, index: int) -> Tensor | None:
        if (level, index) in self._nodes or level == 0:
            return self._nodes.pop((level, index), None)
        return _joined(self._sum(level - 1, 2 * index), self._sum(level - 1, 2 * index + 1))


def _joined(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one.add_(other)
