"""Sums that do not depend on how many ranks add them, and work that is shared out whole."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from passes.ranks import SHARDS, Ranks, ShardSum, shard_of

COUNTS = [1, 2, 5, 8, 13, 64]
WORLDS = [1, 2, 3, 4, 5, 8, 11]


class _Together(Ranks):
    """Ranks of one process: what is brought together was put there by all."""

    def together(self, tensors: object) -> dict:  # type: ignore[type-arg]  # of whatever the caller has
        return BOARD


BOARD: dict[object, Tensor] = {}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("count", COUNTS)
def test_batches_and_units_are_shared_out_whole(count: int, world: int) -> None:
    ranks = [Ranks(rank, world) for rank in range(world)]
    assert list(itertools.chain.from_iterable(rank.batches(count) for rank in ranks)) == list(range(count))
    assert list(itertools.chain.from_iterable(rank.units(count) for rank in ranks)) == list(range(count))


def _tree(values: Sequence[Tensor | None]) -> Tensor | None:
    """The sum as the module's text has it, by hand."""
    if len(values) == 1:
        return values[0]
    left, right = _tree(values[: len(values) // 2]), _tree(values[len(values) // 2 :])
    return left if right is None else right if left is None else left + right


@pytest.mark.parametrize("count", COUNTS)
def test_the_sum_is_that_of_the_tree_to_the_bit(count: int) -> None:
    torch.manual_seed(count)
    values = [torch.randn(3, 3) * 10.0 ** torch.randint(-6, 6, ()) for _ in range(count)]
    sums64: list[Tensor | None] = [None] * SHARDS
    for index, value in enumerate(values):
        before = sums64[shard_of(index, count)]
        sums64[shard_of(index, count)] = value.double() if before is None else before + value
    expected = _tree([None if value is None else value.float() for value in sums64])
    for world in WORLDS:
        global BOARD
        sums = []
        for rank in range(world):
            ranks = _Together(rank, world)
            total = ShardSum(ranks, count)
            for index in ranks.batches(count):
                total.add(index, values[index].clone())
            total._finish(total._mine.stop)
            sums.append(total)
        nodes = [dict(total._nodes) for total in sums]
        assert expected is not None
        for total in sums:
            # Sums are made in place, so that every rank of a real run has nodes of its own.
            BOARD = {place: value.clone() for own in nodes for place, value in own.items()}
            found = total.total()
            assert found is not None
            assert torch.equal(found, expected)


def test_nothing_adds_up_to_none() -> None:
    assert ShardSum(Ranks(), 0).total() is None


def test_one_rank_needs_no_others() -> None:
    assert Ranks().gather(3) == [3]
    assert Ranks().from_first("x") == "x"
