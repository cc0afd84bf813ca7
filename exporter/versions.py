"""Versions of this package and of what it stands on, without importing any of it."""

import importlib.metadata
import platform

VERSION = "0.1.0"

STANDS_ON: dict[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}
"""What decides a result, by the distributions that carry it."""


def installed(*distributions: str) -> str | None:
    """The version of the first of these distributions that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def versions() -> dict[str, str | None]:
    """{name: version} of Python, qexport and what decides a result; None where it is not installed."""
    found = {name: installed(*distributions) for name, distributions in STANDS_ON.items()}
    return {"python": platform.python_version(), "qexport": VERSION, **found}
