"""Under torchrun: which process this is, and an end for all when one of them ends.

    torchrun --nproc-per-node 2 -m exporter.cli MODEL ...

torchrun sets RANK, WORLD_SIZE and the address where the processes meet. A process that fails leaves its reason there,
so that the others, whose next exchange breaks off, can say why.
"""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from exporter.errors import InputError, QExportError
from passes.ranks import Ranks

REASON = "reason"
PATIENCE = datetime.timedelta(hours=12)
"""How long a rank waits for another that is alive: a layer of a large model takes its time."""


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The ranks of this run, of which this one computes on `device`; alone when torchrun did not start it.

    What lies on GPUs goes between them by nccl, all else by gloo. Raises InputError when another rank failed.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(device=device)
        return
    dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl", timeout=PATIENCE)
    ranks = Ranks(dist.get_rank(), world, device)
    store = PrefixStore("qexport", _get_default_store())
    try:
        yield ranks
    except Exception as error:
        if not _is_broken_exchange(error):
            line = " ".join(str(error).split())
            store.set(REASON, f"rank {ranks.rank}: {line}")
            raise
        raise InputError(f"another rank stopped: {_reason(store)}", where=f"rank {ranks.rank}") from error
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _is_broken_exchange(error: BaseException | None) -> bool:
    """True when the fault is that of a connection to another rank, not of this one."""
    while error is not None:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error):
            return not isinstance(error, QExportError)
        error = error.__cause__
    return False


def _reason(store: Store) -> str:
    try:
        return str(store.get(REASON).decode()) if store.check([REASON]) else "it was lost without a word"
    except RuntimeError:  # the store went with the rank that held it
        return "the first one, which held all together, was lost"
