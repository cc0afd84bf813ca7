"""Layers that read one value (q, k and v; gate and up), so that their weights can be quantized at the same time."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from passes.graph import Layer


def siblings_of(layers: Iterable[Layer]) -> Iterator[list[Layer]]:
    """The layers in their order, in runs of linear ones with one input; any other layer is alone."""
    alone = itertools.count()
    for _, run in itertools.groupby(layers, lambda layer: layer.input if layer.kind == "linear" else next(alone)):
        yield list(run)


def shared_out(costs: Sequence[int], world: int) -> list[int]:
    """Which of `world` ranks does each piece of work: the largest first, to whoever has the least to do."""
    load = [0] * world
    ranks = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        ranks[index] = load.index(min(load))
        load[ranks[index]] += costs[index]
    return ranks
