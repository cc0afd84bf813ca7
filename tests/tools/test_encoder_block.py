"""The encoder block's bench on a small block: what it claims about the file holds, whatever the machine's speed."""

import pytest

from passes.act_quant import ActQuant
from passes.rtn import RTN
from passes.smooth import Smooth
from tests.exporter.compiled import INTEGER_KERNELS
from tools.bench import encoder_block

pytestmark = pytest.mark.ort

LINEARS = {"query", "key", "value", "out", "up", "down"}


@pytest.mark.parametrize("pre_norm", [False, True])
def test_every_linear_is_an_integer_kernel_and_no_float_weight_is_left(
    pre_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HIDDEN": 64, "HEADS": 4, "FFN": 128, "WORDS": 200}.items():
        monkeypatch.setattr(encoder_block, name, value)
    result = encoder_block.measure(pre_norm, (Smooth(), ActQuant(), RTN()), threads=1, rounds=1)
    kernels = dict(result.kernels)
    assert kernels.pop("words") == "Gather"
    assert set(kernels) == LINEARS
    assert set(kernels.values()) <= INTEGER_KERNELS
    assert result.largest_float == 200  # one scale for each word; the smallest weight has 64 * 64
    # A step of 1 / 255 of the range alone is a noise of about -50 dB; layers add up, outliers cost range.
    assert result.sqnr_db > 25
