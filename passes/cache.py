"""Finished layers on disk, so that a run that was stopped goes on where it stood.

A layer's quantized weight depends on the graph and the calibration data when its pass began, on the pass's options for
every layer so far, and on nothing else. Its key is therefore a chain:

    key_0 = H(graph, tensors, calibration, seed, versions, pass)
    key_n = H(key_{n-1}, layer, its options)

A file is the hash of what follows and the weight; it is written under another name and renamed, so that it is whole or
not there. One that does not match its hash is reported and made again.

Beside the layers lies, for each rank, the newest snapshot of the walk over the calibration data (passes.snapshot),
under the key of the layer that was finished last when it was taken: with all layers up to that one from here, the walk
need not begin at the network's input.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from passes import snapshot
from passes.memory import release
from passes.ranks import Ranks
from passes.snapshot import StreamState
from passes.weights import AffineWeight, CodebookWeight, QuantWeight

KINDS: dict[str, type[AffineWeight] | type[CodebookWeight]] = {
    kind.__name__: kind for kind in (AffineWeight, CodebookWeight)
}
DIGEST_BYTES = hashlib.sha256().digest_size

SNAPSHOT_EVERY_S = 30.0
"""How long the walk goes on between two snapshots, at least: what a stopped run may have to walk again."""

SNAPSHOT_SHARE = 10
"""Between two snapshots goes at least so many times the time that the last one took to write."""


class Cache:
    """A folder of finished layers, made when the first one is.

    versions        what results depend on besides a program: of this package and of torch
    warn            is told of damaged entries, and of snapshots there is no room for
    snapshot_every  seconds; 0: a snapshot after every layer
    """

    def __init__(
        self,
        folder: Path,
        versions: str,
        warn: Callable[[str], None],
        ranks: Ranks | None = None,
        snapshot_every: float = SNAPSHOT_EVERY_S,
    ) -> None:
        self.folder, self.versions, self._warn, self._ranks = folder, versions, warn, ranks or Ranks()
        self._every, self._next_snapshot = snapshot_every, time.monotonic() + snapshot_every

    def get(self, key: str, layer: str) -> QuantWeight | None:
        """The weight kept under `key`; None when there is none that is whole."""
        path = self.folder / key
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        digest, payload = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            self._warn(f"{path}: the kept result of layer {layer} is damaged; the layer is quantized again")
            return None
        return _revived(torch.load(io.BytesIO(payload), weights_only=True))

    def put(self, key: str, weight: QuantWeight) -> None:
        """Keep a weight under `key`. Raises OSError when the disk is full or the folder cannot be written."""
        buffer = io.BytesIO()
        torch.save(_plain(weight), buffer)
        payload = buffer.getvalue()
        self.folder.mkdir(exist_ok=True)
        temporary = self.folder / f".{key}.{secrets.token_hex(4)}"
        try:
            temporary.write_bytes(hashlib.sha256(payload).digest() + payload)
            os.replace(temporary, self.folder / key)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()
            with contextlib.suppress(OSError):  # other layers are in it: they stay
                self.folder.rmdir()
            raise

    def has_walk(self, key: str) -> bool:
        """True when there is a snapshot of this rank's walk, taken when the layer of `key` was finished."""
        return self._walk_file(key).exists()

    def get_walk(self, key: str) -> list[StreamState] | None:
        """The snapshot under `key`; None, with a warning, when it is damaged."""
        states = snapshot.read(self._walk_file(key))
        if states is None:
            what = "the kept activations are damaged; the network is run again over the calibration data"
            self._warn(f"{self._walk_file(key)}: {what}")
        return states

    def put_walk(self, key: str, states: Sequence[StreamState]) -> None:
        """Keep a snapshot in the place of the one before, if it is time for one. A full disk is a warning only."""
        started = time.monotonic()
        if started < self._next_snapshot:
            return
        path = self._walk_file(key)
        try:
            self.folder.mkdir(exist_ok=True)
            snapshot.write(path, states)
        except OSError as error:
            self._warn(f"{self.folder}: activations are not kept: {error.strerror}; a run that goes on computes them")
            self._next_snapshot = math.inf
            return
        self._drop_walks(but=path)
        now = time.monotonic()
        self._next_snapshot = now + max(self._every, SNAPSHOT_SHARE * (now - started) if self._every else 0.0)

    def drop_walks(self) -> None:
        """Forget this rank's snapshots, and the folder if nothing else is in it."""
        self._drop_walks()
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _walk_file(self, key: str) -> Path:
        return self.folder / f".walk-{self._ranks.rank}-of-{self._ranks.world}-{key}"

    def _drop_walks(self, but: Path | None = None) -> None:
        for path in self.folder.glob(f".walk-{self._ranks.rank}-*"):
            if path != but:
                path.unlink(missing_ok=True)

    def count(self) -> int:
        """How many layers are kept."""
        return count(self.folder)


def count(folder: Path) -> int:
    """How many layers are kept in a cache's folder."""
    return sum(1 for path in folder.glob("[!.]*")) if folder.is_dir() else 0


def first_key(what: object, graphs: Sequence[fx.GraphModule], batches: Sequence[Mapping[str, Tensor]]) -> str:
    """What every result of a pass depends on: `what` (by its repr), graphs with their tensors, and the data."""
    digest = hashlib.sha256(repr(what).encode())
    named: list[tuple[str, Tensor]] = []
    for graph in graphs:
        digest.update(str(graph.graph).encode())
        named += graph.state_dict().items()
    named += [item for batch in batches for item in batch.items()]
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in named:
        same = first.setdefault((tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype), name)
        digest.update(repr((name, same, tensor.dtype, tuple(tensor.shape))).encode())
        if same == name or not tensor.numel():
            values = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(values.numpy().data)
            release([tensor])
    return digest.hexdigest()


def next_key(key: str, layer: str, work: object) -> str:
    """The key of a layer's result, from that of the layer before and the pass with its options for this one."""
    return hashlib.sha256(repr((key, layer, work)).encode()).hexdigest()


def _plain(weight: QuantWeight) -> dict[str, Any]:
    """The fields of a weight, nested weights likewise: what torch.load reads without running code."""
    fields = {field.name: getattr(weight, field.name) for field in dataclasses.fields(weight)}
    return {"kind": type(weight).__name__} | {
        name: _plain(value) if isinstance(value, AffineWeight) else value for name, value in fields.items()
    }


def _revived(plain: dict[str, Any]) -> QuantWeight:
    fields: dict[str, Any] = {
        name: _revived(value) if isinstance(value, dict) else value for name, value in plain.items() if name != "kind"
    }
    return KINDS[plain["kind"]](**fields)
