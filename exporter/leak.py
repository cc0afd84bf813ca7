"""Held-out samples that the passes saw after all: what is measured on them flatters.

Samples are compared by the hash of their names and bytes.
"""

import hashlib
from collections.abc import Iterator, Sequence

import torch

from passes.calibration import Batch, Calibration


def leak_warning(calibration: Calibration) -> str | None:
    """One line when samples of validation are among those of calibration, else None."""
    seen: dict[bytes, int] = {}
    for index, digest in enumerate(_hashes(calibration.batches)):
        seen.setdefault(digest, index)
    held_out = list(_hashes(calibration.holdout))
    leaked = [(index, seen[digest]) for index, digest in enumerate(held_out) if digest in seen]
    if not leaked:
        return None
    first, origin = leaked[0]
    is_also = "is also" if len(leaked) == 1 else "are also"
    return (
        f"{len(leaked)} of {len(held_out)} held-out samples {is_also} among those that the passes saw "
        f"(the first: held-out sample {first} is calibration sample {origin}), so the figures flatter: "
        f"remove repeated samples from {calibration.source}"
    )


def _hashes(batches: Sequence[Batch]) -> Iterator[bytes]:
    for batch in batches:
        names = sorted(batch)
        rows = {
            name: batch[name].contiguous().flatten(1) if batch[name].ndim > 1 else batch[name][:, None]
            for name in names
        }
        for index in range(len(rows[names[0]])):
            digest = hashlib.sha256()
            for name in names:
                digest.update(
                    name.encode() + b"\0" + rows[name][index].contiguous().view(torch.uint8).numpy().tobytes()
                )
            yield digest.digest()
