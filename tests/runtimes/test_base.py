"""What all sessions share: feeds that do not fit are named, faults are one line."""

from collections.abc import Mapping

import numpy as np
import pytest

from runtimes import RUNTIMES
from runtimes.base import Array, Runtime, RuntimeFault, Session


class Echo(Session):
    inputs = ("x", "mask")
    outputs = ("x",)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        self.check(feeds)
        return {"x": feeds["x"]}


ONE = np.ones(1, np.float32)


def test_exact_feeds_pass():
    assert Echo().run({"mask": ONE, "x": ONE})["x"] is ONE


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({"x": ONE}, "inputs do not fit: missing mask; feed x, mask"),
        ({"x": ONE, "mask": ONE, "y": ONE}, "inputs do not fit: unknown y; feed x, mask"),
        ({"X": ONE, "mask": ONE}, "inputs do not fit: missing x; unknown X; feed x, mask"),
    ],
)
def test_feeds_that_do_not_fit_are_named(feeds, message):
    with pytest.raises(RuntimeFault) as caught:
        Echo().run(feeds)
    assert str(caught.value) == message


def test_a_fault_is_one_line_with_its_fix():
    fault = RuntimeFault("engine\n  broke", fix="mend it")
    assert (str(fault), fault.what, fault.fix) == ("engine broke; mend it", "engine broke", "mend it")


def test_every_runtime_is_one():
    assert set(RUNTIMES) == {"onnxruntime", "tensorrt"}
    assert all(issubclass(kind, Runtime) for kind in RUNTIMES.values())
