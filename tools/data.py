"""Data of the reference networks: scikit-learn's 8x8 digits, and Python's own documentation and library as bytes.

Calibration data come from the training part only. What calibrating and evaluating needs is committed in `tests/models`,
so that the figures do not move with the installed scikit-learn or Python (pydoc_data.topics changes with each release);
`digits` and `documentation_bytes` make it from the sources and are used for training.
"""

from __future__ import annotations

import math
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from tools.models import CHECKPOINT_DIR, CONTEXT

DIGITS_CALIBRATION_FILE = CHECKPOINT_DIR / "digits.safetensors"
DIGITS_TEST_FILE = CHECKPOINT_DIR / "digits_test.safetensors"
LM_CALIBRATION_FILE = CHECKPOINT_DIR / "tokens.safetensors"
LM_TEST_FILE = CHECKPOINT_DIR / "tokens_test.safetensors"

_DIGITS_TEST = 700
_DIGITS_CALIBRATION = 256
_LM_CALIBRATION = 96
_LM_TEST = 64
_HELD_OUT_FRACTION = 0.1
_NOT_PROSE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}

Predict = Callable[[Mapping[str, Tensor]], Mapping[str, Any]]


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] in [-1, 1] and labels [N] int64 of both parts."""

    train_x: Tensor
    train_labels: Tensor
    test_x: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """Scikit-learn's 1797 digits, shuffled with a fixed seed: 1097 to train on, 700 to test on."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = torch.tensor(source.images, dtype=torch.float32).unsqueeze(1) / 8 - 1  # grey levels 0..16
    labels = torch.tensor(source.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    test, train = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    return Digits(images[train], labels[train], images[test], labels[test])


def documentation_bytes() -> tuple[Tensor, Tensor]:
    """The topics of pydoc_data as bytes: (training part [n], held-out last tenth [m]), int64.

    Topics repeat each other's sections. A paragraph is kept once, whatever its indentation, so that the held-out part
    is not a copy of what was trained on.
    """
    from pydoc_data.topics import topics

    paragraphs: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            paragraphs.setdefault(" ".join(paragraph.split()), paragraph)
    text = torch.frombuffer(bytearray("\n\n".join(paragraphs.values()).encode()), dtype=torch.uint8).long()
    cut = len(text) - int(len(text) * _HELD_OUT_FRACTION)
    return text[:cut], text[cut:]


def library_bytes() -> tuple[Tensor, Tensor]:
    """The sources of Python's standard library as bytes: (nine files of ten [n], every tenth file [m]), int64.

    Tests are left out, and modules that are tables.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = [path for path in sorted(library.rglob("*.py")) if not _NOT_PROSE & {*path.relative_to(library).parts}]
    held_out = files[9::10]
    return _bytes_of(path for path in files if path not in held_out), _bytes_of(held_out)


def _bytes_of(paths: Iterable[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(path.read_bytes() for path in paths)), dtype=torch.uint8).long()


def _windows(text: Tensor, count: int, length: int) -> Tensor:
    """`count` windows [count, length], evenly spread over `text` and without overlap."""
    starts = torch.arange(count) * (len(text) // count)
    return text[starts[:, None] + torch.arange(length)].contiguous()


def committed_data() -> dict[str, dict[str, Tensor]]:
    """The contents of the committed data files by file name, made from the sources."""
    parts = digits()
    train, held_out = documentation_bytes()
    return {
        DIGITS_CALIBRATION_FILE.name: {"x": parts.train_x[:_DIGITS_CALIBRATION].contiguous()},
        DIGITS_TEST_FILE.name: {"x": parts.test_x, "labels": parts.test_labels},
        LM_CALIBRATION_FILE.name: {"tokens": _windows(train, _LM_CALIBRATION, CONTEXT)},
        # one byte more than the context: the target of the last position
        LM_TEST_FILE.name: {"tokens": _windows(held_out, _LM_TEST, CONTEXT + 1)},
    }


def digits_calibration() -> dict[str, Tensor]:
    """{"x": [256, 1, 8, 8]}, training images."""
    return load_file(DIGITS_CALIBRATION_FILE)


def lm_calibration() -> dict[str, Tensor]:
    """{"tokens": [96, 128] int64}, training text."""
    return load_file(LM_CALIBRATION_FILE)


def _only_output(outputs: Mapping[str, Any]) -> Tensor:
    (output,) = outputs.values()
    return torch.as_tensor(output)


def digits_accuracy(predict: Predict, batch: int = 100) -> dict[str, float]:
    """Fraction of the 700 test images that `predict` classifies right, as {"accuracy": fraction}.

    `predict` takes {"x": [n, 1, 8, 8]} and returns {any name: logits [n, 10]}, tensor or array; n is at most `batch`.
    """
    test = load_file(DIGITS_TEST_FILE)
    classes = [_only_output(predict({"x": x})).argmax(-1) for x in test["x"].split(batch)]
    return {"accuracy": float((torch.cat(classes) == test["labels"]).double().mean())}


def lm_perplexity(predict: Predict, batch: int = 16) -> dict[str, float]:
    """Perplexity per byte over 64 held-out windows of 128, as {"perplexity": value}.

    `predict` takes {"tokens": [n, 128] int64} and returns {any name: logits [n, 128, 256]}, tensor or array.
    """
    total, count = 0.0, 0
    for window in load_file(LM_TEST_FILE)["tokens"].split(batch):
        logits = _only_output(predict({"tokens": window[:, :-1].contiguous()}))
        target = window[:, 1:]
        total += float(F.cross_entropy(logits.double().flatten(0, 1), target.flatten(), reduction="sum"))
        count += target.numel()
    return {"perplexity": math.exp(total / count)}
