"""Tensors that lie in files, so that a model may be larger than memory.

A tensor mapped from a file takes memory only for the pages that were touched. `release` gives these back: they are
clean, so nothing is lost, and the next read brings them in again. Whoever is done with a large tensor for a while
releases it. With a limit, results and activations are moved into scratch files and mapped likewise.
"""

import contextlib
import ctypes
import gc
import math
import mmap
import tempfile
import warnings
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ACTIVATIONS_SHARE = 4
"""Activations waiting for their readers may take one in this many parts of the limit; past that they go to disk."""

M_MMAP_THRESHOLD = -3
LARGE_BLOCK = 1 << 20

_MAPPINGS: "weakref.WeakValueDictionary[int, mmap.mmap]" = weakref.WeakValueDictionary()
"""{address: mapping} of every file mapped here: what tells a mapped tensor from any other."""


def map_file(file: BinaryIO, length: int) -> Tensor:
    """The first `length` bytes of an open file as a uint8 tensor [length] that must not be written to."""
    if not length:
        return torch.empty(0, dtype=torch.uint8)
    mapping = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the memory is read-only; no pass changes a tensor in place
        tensor = torch.frombuffer(mapping, dtype=torch.uint8)
    _MAPPINGS[tensor.data_ptr()] = mapping
    return tensor


def own_storage(mapped: Tensor) -> Tensor:
    """The bytes of a mapped tensor as a uint8 tensor whose storage begins where they do."""
    start = mapped.data_ptr()
    for base, mapping in _MAPPINGS.items():
        if base <= start < base + len(mapping):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                return torch.frombuffer(mapping, dtype=torch.uint8, count=mapped.nbytes, offset=start - base)
    raise ValueError("the tensor is not mapped")


def release(tensors: Iterable[Tensor]) -> None:
    """Give back the memory of mapped tensors; others stay as they are."""
    for tensor in tensors:
        if tensor.is_cpu:
            _release(tensor.data_ptr(), tensor.nbytes)


def release_array(array: NDArray[np.generic]) -> None:
    """Likewise for an array that shares a mapped tensor's memory."""
    _release(array.ctypes.data, array.nbytes)


def _release(start: int, length: int) -> None:
    for base, mapping in _MAPPINGS.items():
        if base <= start < base + len(mapping):
            first = (start - base) // mmap.PAGESIZE * mmap.PAGESIZE
            mapping.madvise(mmap.MADV_DONTNEED, first, start - base + length - first)
            break


def free_at_once() -> None:
    """Have the C library give back large blocks when they are freed, for the price of new pages for the next ones.

    glibc keeps freed blocks of up to 32 MB for itself, and a heap of them in between which little else lies.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)


def settle() -> None:
    """Between two stages: give back what only cycles hold, every mapped page, and what the C library keeps."""
    gc.collect()
    for mapping in list(_MAPPINGS.values()):
        mapping.madvise(mmap.MADV_DONTNEED)
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def many_files() -> None:
    """Let this process have as many files open as it may: every mapping holds one, every layer a few mappings."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # another system, or one that refuses
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def is_mapped(tensor: Tensor) -> bool:
    """True when the tensor's values lie in a file mapped here."""
    start = tensor.data_ptr()
    return any(base <= start < base + len(mapping) for base, mapping in _MAPPINGS.items())


class Memory:
    """Where a program keeps what it holds for long: in memory, or, with a limit in bytes, in files under `folder`.

    The files have no name: they vanish with the last tensor mapped from them, whatever ends the process.
    """

    def __init__(self, limit: int = 0, folder: Path | None = None) -> None:
        self.limit, self._folder = limit, folder
        if limit:
            free_at_once()
            many_files()

    @property
    def activations(self) -> float:
        """How many bytes of activations may wait in memory."""
        return self.limit / ACTIVATIONS_SHARE if self.limit else math.inf

    def settle(self) -> None:
        """With a limit: see `settle`."""
        if self.limit:
            settle()

    def keep(self, tensor: Tensor) -> Tensor:
        """A finished result: itself, or with a limit the same values in a file."""
        return self.spill(tensor) if self.limit else tensor

    def spill(self, tensor: Tensor) -> Tensor:
        """The same values in a file."""
        if not tensor.numel() or is_mapped(tensor):
            return tensor
        flat = tensor.detach().contiguous().view(-1)
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.write(flat.view(torch.uint8).numpy().data)
            file.flush()
            return map_file(file, flat.nbytes).view(tensor.dtype).view(tensor.shape)
